"""Every error has a status, an explanation, and nothing of this machine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from registry import errors as registry_errors
from serving import errors
from serving.http import answers
from serving.http.answers import Invalid, Unauthenticated, code_of, error_body, error_facts, without_places


def below(kind: type[Exception]) -> Iterator[type[Exception]]:
    for child in kind.__subclasses__():
        yield child
        yield from below(child)


STATUSES = {
    errors.UnknownExpression: 400,
    errors.ImageRefused: 400,
    errors.NotServed: 404,
    errors.WrongBase: 409,
    errors.CandidateRefused: 409,
    errors.Overloaded: 429,
    errors.Draining: 503,
    errors.Cancelled: 499,
    errors.BaseNotFound: 500,
    registry_errors.UsageError: 400,
    registry_errors.NotFound: 404,
    registry_errors.Revoked: 410,
    registry_errors.LicenseRefused: 409,
    registry_errors.BadSignature: 409,
    registry_errors.DigestMismatch: 409,
    registry_errors.NeedsReview: 409,
    registry_errors.NetworkError: 503,
    registry_errors.StaleTrust: 503,
    answers.Unauthenticated: 401,
    answers.Forbidden: 403,
    answers.Invalid: 422,
    ValueError: 500,
}


@pytest.mark.parametrize(("kind", "status"), STATUSES.items())
def test_the_status_of_an_error(kind: type[Exception], status: int) -> None:
    assert answers.status_of(kind("what happened", "what to do")) == status


def test_every_error_of_the_service_is_a_clients_or_a_wait() -> None:
    """What the HTTP layer itself refuses is never told as a fault."""
    for kind in below(answers.HttpError):
        assert 400 <= kind.status < 600, kind  # type: ignore[attr-defined]
        assert kind.status != 500, kind  # type: ignore[attr-defined]


def test_what_is_told() -> None:
    error = errors.UnknownExpression("there is no 'hapy'", "did you mean 'happy'?")
    assert error_facts(error)["error"] == {
        "message": "there is no 'hapy'",
        "mend": "did you mean 'happy'?",
        "type": "invalid_request_error",
        "code": "unknown_expression",
        "param": None,
    }
    assert error_facts(Invalid("n is wrong", "correct n", "n"))["error"]["param"] == "n"


def test_an_error_is_told_without_the_places_of_this_machine() -> None:
    away = registry_errors.NetworkError("file:///srv/objects is away", "look at /srv/objects/log")
    told = error_facts(away)["error"]
    assert (told["message"], told["mend"]) == ("… is away", "look at …")


def test_what_nobody_foresaw_is_not_told() -> None:
    told = error_facts(RuntimeError("the password is 1234"))["error"]
    assert "1234" not in str(told)
    assert (told["type"], told["code"]) == ("server_error", "internal_error")


def test_when_to_come_back() -> None:
    status, headers, _ = error_body(errors.Overloaded("full", "wait", 2.1))
    assert (status, headers["retry-after"]) == (429, "3")
    assert error_body(registry_errors.NetworkError("away", "wait"))[1]["retry-after"]
    assert "retry-after" not in error_body(Invalid("wrong", "mend"))[1]


def test_how_to_say_who_one_is() -> None:
    assert error_body(Unauthenticated("no key", "send one"))[1]["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cannot read /home/me/registry/objects", "cannot read …"),
        ("the store file:///srv/objects does not answer", "the store … does not answer"),
        ("the database sqlite:////tmp/a b.db failed", "the database … b.db failed"),
        ("s3://bucket/prefix is away", "… is away"),
        ("postgresql+psycopg://me:word@host/name is away", "… is away"),
        ("GET /v1/adapters lists them", "GET /v1/adapters lists them"),
        ("see GET /openapi.json", "see GET /openapi.json"),
        ("8 / 3 of them and/or none", "8 / 3 of them and/or none"),
        ("https://minio.corp:9000 failed: it answers 503", "… failed: it answers 503"),
        ("the MLflow index http://me:a,b@10.0.0.5:5000/x failed", "the MLflow index … failed"),
        ("http://127.0.0.1:9000: refused; see (https://[::1]/log).", "…: refused; see (…)."),
        ("HTTPConnectionPool(host='mlflow.corp', port=5000)", "HTTPConnectionPool(host=…, port=5000)"),
        ("Failed to resolve 'mlflow.corp' ([Errno -2])", "Failed to resolve … ([Errno -2])"),
        ("failed to resolve host 'db.corp': [Errno -2]", "failed to resolve host …: [Errno -2]"),
        (
            'connection to server at "db.corp" (10.0.0.5), port 5 failed',
            "connection to server at …, port 5 failed",
        ),
        ("certificate is not valid for 'minio.corp'.", "certificate is not valid for …."),
        ("pixelsmile@sha256:abc", "pixelsmile@sha256:abc"),
    ],
)
def test_paths_of_this_machine_stay_here(text: str, told: str) -> None:
    assert without_places(text) == told


def test_codes_are_names() -> None:
    assert code_of(errors.StrengthOutOfRange("", "")) == "strength_out_of_range"
