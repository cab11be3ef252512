"""API keys: made once, kept as digests, limited, and over when somebody says so."""

from __future__ import annotations

import hashlib
import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from serving.errors import UsageError
from serving.http.answers import Invalid, RateLimited, Unauthenticated
from serving.http.keyring import KeyLimits, Keys, KeysDamaged
from serving.http.keys import Bucket, Caller, Gate, KeysUnreadable, WrongOrigin

LOCAL = {"host": "127.0.0.1:8400"}
HERE = "127.0.0.1"
"""A peer on this machine."""


class Clock:
    """A clock that stands until somebody moves it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def keys(tmp_path: Path, clock: Clock) -> Keys:
    return Keys(tmp_path / "serving" / "keys.json", clock)


def bearer(token: str) -> Headers:
    return Headers({"authorization": f"Bearer {token}", **LOCAL})


# -- the file --


def test_a_token_is_shown_once_and_kept_nowhere(keys: Keys, tmp_path: Path) -> None:
    token, key = keys.add("studio", ["edit"])
    kept = (tmp_path / "serving" / "keys.json").read_text()
    assert token.startswith("afk_")
    assert len(token) == 47
    assert token not in kept
    assert token[4:] not in kept
    assert key.digest == hashlib.sha256(token.encode()).hexdigest()
    assert keys.find(token) == key


def test_the_file_is_for_its_owner_alone(keys: Keys, tmp_path: Path) -> None:
    keys.add("studio", ["edit"])
    file = tmp_path / "serving" / "keys.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert sorted(path.name for path in file.parent.iterdir()) == ["keys.json", "keys.lock"]


@pytest.mark.parametrize(
    "wrong",
    ["", "afk_", "afk_" + "A" * 43, "afk_" + "A" * 42 + "\n", "Bearer", "afk_é" + "A" * 42, "A" * 100_000],
)
def test_what_is_no_key_opens_nothing(keys: Keys, wrong: str) -> None:
    keys.add("studio", ["edit"])
    assert keys.find(wrong) is None


def test_almost_a_token_opens_nothing(keys: Keys) -> None:
    token, _ = keys.add("studio", ["edit"])
    last = "A" if token[-1] != "A" else "E"
    assert keys.find(token[:-1] + last) is None
    assert keys.find(token[:-1]) is None


def test_another_process_sees_a_revocation_at_once(keys: Keys, tmp_path: Path, clock: Clock) -> None:
    token, _ = keys.add("studio", ["edit"])
    running = Keys(tmp_path / "serving" / "keys.json", clock)
    assert running.find(token) is not None
    keys.revoke("studio")
    assert running.find(token) is None


def test_a_key_ends_by_itself(keys: Keys, clock: Clock) -> None:
    token, _ = keys.add("guest", ["read"], days=1)
    clock.now += 86_399
    assert keys.find(token) is not None
    clock.now += 1
    assert keys.find(token) is None
    assert keys.all()[0].facts(clock.now)["state"] == "expired"


def test_a_name_is_never_given_again(keys: Keys) -> None:
    keys.add("studio", ["edit"])
    keys.revoke("studio")
    with pytest.raises(UsageError, match="is or was"):
        keys.add("studio", ["edit"])


@pytest.mark.parametrize("name", ["", "local", "public", "../etc", "a b", "a\n", "é", "x" * 65, "-x"])
def test_names_that_are_none(keys: Keys, name: str) -> None:
    with pytest.raises(UsageError):
        keys.add(name, ["edit"])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version":2,"keys":[]}', '{"version":1,"keys":[{}]}', "[" * 9999]
)
def test_a_damaged_file_lets_nobody_in(keys: Keys, tmp_path: Path, content: str) -> None:
    token, _ = keys.add("studio", ["edit"])
    (tmp_path / "serving" / "keys.json").write_text(content)
    with pytest.raises(KeysDamaged):
        keys.find(token)


def test_two_writers_lose_no_key(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from serving.http.keyring import Keys\n"
        "for n in range(10): Keys(Path(sys.argv[1])).add(f'{sys.argv[2]}{n}', ['edit'])"
    )
    path = tmp_path / "keys.json"
    started = [subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in "ab"]
    assert [one.wait(300) for one in started] == [0, 0]
    assert len(Keys(path).all()) == 20


# -- who is let in --


def test_scopes_and_names_come_from_the_key(keys: Keys) -> None:
    token, _ = keys.add("studio", ["read"])
    caller = Gate(keys).caller(bearer(token), HERE)
    assert (caller.name, caller.may("read"), caller.may("edit"), caller.local) == (
        "studio",
        True,
        False,
        False,
    )
    assert Gate(keys).caller(Headers({"x-api-key": token}), HERE).name == "studio"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer afk_" + "A" * 43},
        {"authorization": "Bearer sk-other"},
        {"authorization": "Basic Zm9v"},
        {"authorization": "Bearer"},
        {"x-api-key": ""},
    ],
)
def test_without_a_valid_key_nobody_is_answered(keys: Keys, headers: dict[str, str]) -> None:
    keys.add("studio", ["edit"])
    with pytest.raises(Unauthenticated):
        Gate(keys).caller(Headers({**LOCAL, **headers}), HERE)


def test_two_keys_at_once_are_none(keys: Keys) -> None:
    token, _ = keys.add("studio", ["edit"])
    with pytest.raises(Unauthenticated, match="more than once"):
        Gate(keys).caller(Headers({"authorization": f"Bearer {token}", "x-api-key": token}), HERE)


def test_this_machine_needs_no_key_while_there_is_none(keys: Keys) -> None:
    gate = Gate(keys)
    assert gate.caller(Headers(LOCAL), HERE).local
    assert gate.caller(Headers({**LOCAL, "authorization": "Bearer sk-anything"}), HERE).local
    keys.add("studio", ["edit"])
    with pytest.raises(Unauthenticated):
        gate.caller(Headers(LOCAL), HERE)


def test_a_file_of_keys_that_vanishes_opens_nothing(keys: Keys, tmp_path: Path) -> None:
    keys.add("studio", ["edit"])
    gate = Gate(keys)
    (tmp_path / "serving" / "keys.json").unlink()
    with pytest.raises(Unauthenticated):
        gate.caller(Headers(LOCAL), HERE)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.4", "example.com"])
def test_an_open_address_without_keys_is_refused_with_the_way_out(keys: Keys, host: str) -> None:
    with pytest.raises(UsageError, match="serving keys add"):
        Gate(keys, host=host)
    assert Gate(keys, host=host, public=True).caller(Headers({}), HERE).anonymous
    keys.add("studio", ["edit"])
    with pytest.raises(Unauthenticated):
        Gate(keys, host=host).caller(Headers({}), HERE)


def test_public_false_always_asks_for_a_key(keys: Keys) -> None:
    with pytest.raises(Unauthenticated):
        Gate(keys, public=False).caller(Headers(LOCAL), HERE)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("peer", [HERE, "203.0.113.7", None])
@pytest.mark.parametrize("name", ["127.0.0.1:8400", "edits.example"])
def test_who_answers_everybody_makes_nobody_an_admin(
    keys: Keys, clock: Clock, guarded: bool, peer: str | None, name: str
) -> None:
    """Behind a proxy on this machine everybody's peer is this machine, and perhaps the Host, too."""
    if guarded:
        keys.add("studio", ["edit"])
    gate = Gate(keys, public=True, clock=clock)
    caller = gate.caller(Headers({"host": name}), peer)
    assert (caller.anonymous, caller.local, caller.scopes) == (True, False, ("edit", "read"))
    limits = KeyLimits()
    with pytest.raises(Invalid):
        caller.spend(limits.pictures + 1)
    for _ in range(limits.requests):
        with gate.turn(caller):
            pass
    with pytest.raises(RateLimited), gate.turn(caller):
        pass


@pytest.mark.parametrize("peer", ["203.0.113.7", "192.168.0.4", "fe80::1%eth0", "::", "nobody", "", None])
def test_another_machine_that_says_localhost_is_refused(keys: Keys, peer: str | None) -> None:
    """The address of the settings may not be the one listened on, and Host is what a client writes."""
    with pytest.raises(WrongOrigin, match="this machine"):
        Gate(keys).caller(Headers({"host": "localhost"}), peer)
    with pytest.raises(WrongOrigin):
        Gate(keys).caller(Headers({"host": "localhost", "x-forwarded-for": HERE}), peer)


@pytest.mark.parametrize("name", ["X-Forwarded-For", "Forwarded", "X-Real-IP", "Via"])
def test_a_proxy_of_this_machine_is_not_this_machine(keys: Keys, name: str) -> None:
    with pytest.raises(WrongOrigin, match="proxy"):
        Gate(keys).caller(Headers({**LOCAL, name: HERE}), HERE)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "127.0.0.1.evil.example:8400"},
        {"host": ""},
        {**LOCAL, "origin": "https://evil.example"},
        {**LOCAL, "origin": "null"},
        {**LOCAL, "sec-fetch-site": "cross-site"},
    ],
)
def test_pages_from_elsewhere_do_not_use_the_local_service(keys: Keys, headers: dict[str, str]) -> None:
    """DNS rebinding makes another name mean this machine; a form of another page needs no name."""
    with pytest.raises(WrongOrigin):
        Gate(keys).caller(Headers(headers), HERE)


@pytest.mark.parametrize("host", ["localhost:8400", "127.0.0.1", "[::1]:8400", "127.9.9.9"])
def test_the_own_page_does(keys: Keys, host: str) -> None:
    headers = {"host": host, "origin": f"http://{host}", "sec-fetch-site": "same-origin"}
    for peer in (HERE, "::1", "127.9.9.9"):
        assert Gate(keys).caller(Headers(headers), peer).local


def test_a_damaged_file_is_no_way_in_over_http(keys: Keys, tmp_path: Path) -> None:
    token, _ = keys.add("studio", ["edit"])
    gate = Gate(keys)
    (tmp_path / "serving" / "keys.json").write_text("{")
    with pytest.raises(KeysUnreadable):
        gate.caller(bearer(token), HERE)


# -- how much --


def limited(keys: Keys, clock: Clock, **limits: int) -> tuple[Gate, Caller]:
    token, _ = keys.add("studio", ["edit"], limits=KeyLimits(**limits))
    gate = Gate(keys, clock=clock)
    return gate, gate.caller(bearer(token), HERE)


def test_requests_a_minute(keys: Keys, clock: Clock) -> None:
    gate, caller = limited(keys, clock, requests=3)
    for _ in range(3):
        with gate.turn(caller):
            pass
    with pytest.raises(RateLimited) as refused, gate.turn(caller):
        pass
    assert refused.value.retry_after == pytest.approx(20.0)
    clock.now += 19.9
    with pytest.raises(RateLimited), gate.turn(caller):
        pass
    clock.now += 0.11
    with gate.turn(caller):
        pass


def test_pictures_a_minute(keys: Keys, clock: Clock) -> None:
    _, caller = limited(keys, clock, pictures=60)
    caller.spend(50)
    with pytest.raises(RateLimited) as refused:
        caller.spend(20)
    assert refused.value.retry_after == pytest.approx(10.0)
    caller.spend(10)
    with pytest.raises(Invalid):
        caller.spend(61)


def test_requests_at_the_same_moment(keys: Keys, clock: Clock) -> None:
    gate, caller = limited(keys, clock, concurrent=2)
    with gate.turn(caller), gate.turn(caller):
        second = gate.turn(caller)
        with pytest.raises(RateLimited, match="at once"):
            second.__enter__()
    with gate.turn(caller):
        pass


def test_one_key_does_not_use_up_anothers(keys: Keys, clock: Clock) -> None:
    gate, caller = limited(keys, clock, requests=1)
    token, _ = keys.add("other", ["edit"], limits=KeyLimits(requests=1))
    with gate.turn(caller):
        pass
    with pytest.raises(RateLimited):
        gate.turn(caller).__enter__()
    other = gate.caller(bearer(token), HERE)
    with gate.turn(other):
        assert dict(other._headers)[b"ratelimit"].startswith(b'"requests";r=0')


def test_the_headers_say_what_is_left(keys: Keys, clock: Clock) -> None:
    gate, caller = limited(keys, clock, requests=4, pictures=60)
    with gate.turn(caller):
        caller.spend(30)
        headers = dict(caller._headers)
    assert headers[b"ratelimit-policy"] == b'"requests";q=4;w=60, "pictures";q=60;w=60'
    assert headers[b"ratelimit"] == b'"requests";r=3;t=15, "pictures";r=30;t=30'


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 10)), max_size=50))
def test_no_minute_gives_more_than_twice_its_limit(asked: list[tuple[float, int]]) -> None:
    """A bucket that was full gives its size at once and its size again while a minute passes."""
    bucket, now, taken = Bucket(10.0, 10.0, 0.0), 0.0, []
    for pause, amount in asked:
        now += pause
        bucket.fill(now)
        if bucket.wait(amount) == 0:
            bucket.left -= amount
            taken.append((now, amount))
    for start, _ in taken:
        assert sum(amount for at, amount in taken if start <= at < start + 60) <= 20.001


# -- the command --


def serving(*arguments: str, home: Path) -> subprocess.CompletedProcess[str]:
    program = "from serving.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True, text=True, env={"PATH": "", "ADAPTER_FOUNDRY_HOME": str(home)},
    )  # fmt: skip


def test_the_command_makes_lists_and_revokes(tmp_path: Path) -> None:
    made = json.loads(serving("keys", "add", "studio", "--scope", "edit", "--json", home=tmp_path).stdout)
    found = Keys.open(tmp_path).find(made["token"])
    assert found is not None
    assert found.scopes == ("edit",)
    assert found.webhook_secret == made["webhook_secret"]
    listed = serving("keys", "list", home=tmp_path).stdout
    assert "studio" in listed
    assert "afk_" not in listed
    assert "whsec_" not in listed
    assert serving("keys", "revoke", "studio", home=tmp_path).returncode == 0
    assert Keys.open(tmp_path).find(made["token"]) is None
    assert serving("keys", "revoke", "nobody", home=tmp_path).returncode == 2
