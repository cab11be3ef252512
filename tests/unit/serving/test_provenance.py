"""Content credentials: what c2pa's own reader finds in a picture, and certificates that are refused."""

from __future__ import annotations

import io
import json
import stat
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import c2pa
import click
import pytest
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from PIL import Image

from registry.command import run
from registry.digest import digest_bytes
from registry.manifest import BaseModelRef
from serving import certificates
from serving.certificates import Made
from serving.credentials_command import credentials as group
from serving.errors import UsageError
from serving.images import TEXT_KEY, png_bytes
from serving.provenance import ASSERTION, ContentCredentials, check
from serving.schema import EditResult, Used

PARENT = b"\xff\xd8\xff an uploaded picture"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return certificates.make(tmp_path_factory.mktemp("signer") / "new", "Example Team")


@pytest.fixture(scope="module")
def credentials(made: Made) -> ContentCredentials:
    return ContentCredentials.open(made.setting)


@pytest.fixture(scope="module")
def result() -> EditResult:
    return EditResult(
        image=Image.linear_gradient("L").convert("RGB"),
        adapter="pixelsmile:3",
        adapter_digest=digest_bytes(b"manifest"),
        base=BaseModelRef(id="house/base", revision="abc", family="qwen-image-edit", license="Apache-2.0"),
        expressions={"happy": 0.1, "surprised": 1.25},
        strength=0.7,
        seed=(1 << 63) - 1,
        steps=8,
        size=(256, 256),
        stacked=(Used(adapter="fast:1", digest=digest_bytes(b"fast"), strength=1.0),),
    )


@pytest.fixture(scope="module")
def signed(credentials: ContentCredentials, result: EditResult) -> bytes:
    return credentials.sign(png_bytes(result.image, result.facts()), "image/png", result, PARENT)


def report(data: bytes, anchors: Path | None = None, kind: str = "image/png") -> dict[str, Any]:
    """What the library's own reader says, without ours between."""
    settings: dict[str, Any] = {
        "version": 1,
        "verify": {"verify_trust": True, "remote_manifest_fetch": False},
    }
    if anchors is not None:
        settings["trust"] = {"trust_anchors": anchors.read_text()}
    context = c2pa.Context(settings=c2pa.Settings.from_dict(settings))
    with c2pa.Reader(kind, io.BytesIO(data), context=context) as reader:
        return json.loads(reader.json())


def test_a_reader_trusts_it_and_finds_what_made_it(signed: bytes, made: Made, result: EditResult) -> None:
    found = report(signed, made.authority)
    assert found["validation_state"] == "Trusted"
    assert found["validation_results"]["activeManifest"]["failure"] == []
    manifest = found["manifests"][found["active_manifest"]]
    (parent,) = manifest["ingredients"]
    assert parent["relationship"] == "parentOf"
    assert parent["instance_id"] == f"urn:sha256:{sha256(PARENT).hexdigest()}"
    assert parent["format"] == "image/jpeg"
    said = {one["label"]: one["data"] for one in manifest["assertions"]}
    opened, edited = said["c2pa.actions.v2"]["actions"]
    assert (opened["action"], edited["action"]) == ("c2pa.opened", "c2pa.edited")
    assert edited["digitalSourceType"].endswith("/compositeWithTrainedAlgorithmicMedia")
    assert said[ASSERTION] == {
        **result.facts(),
        "size": {"height": 256, "width": 256},
        "parent_sha256": sha256(PARENT).hexdigest(),
    }
    assert said[ASSERTION]["adapter_digest"] == str(result.adapter_digest)


def test_our_check_says_the_same(signed: bytes, made: Made, result: EditResult) -> None:
    found = check(signed, "image/png", made.authority.read_bytes())
    assert (found.state, found.signer, found.problems) == ("trusted", "Example Team", ())
    assert found.parent == sha256(PARENT).hexdigest()
    assert found.facts["seed"] == result.seed
    assert found.facts["expressions"] == dict(result.expressions)
    assert check(signed, "image/png").state == "valid"
    assert check(png_bytes(result.image, {}), "image/png").state == "none"


def test_pixels_and_label_stay_as_they_were(signed: bytes, result: EditResult) -> None:
    with Image.open(io.BytesIO(signed)) as opened:
        assert opened.tobytes() == result.image.tobytes()
        assert json.loads(opened.info[TEXT_KEY]) == json.loads(json.dumps(result.facts()))


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats_carry_it_too(
    credentials: ContentCredentials, made: Made, result: EditResult, kind: str
) -> None:
    buffer = io.BytesIO()
    result.image.save(buffer, kind)
    data = credentials.sign(buffer.getvalue(), f"image/{kind}", result, PARENT)
    assert report(data, made.authority, f"image/{kind}")["validation_state"] == "Trusted"


def test_several_threads_sign_at_once(
    credentials: ContentCredentials, made: Made, result: EditResult
) -> None:
    data, anchors = png_bytes(result.image, {}), made.authority.read_bytes()

    def one(number: int) -> tuple[str, str | None]:
        parent = str(number).encode()
        found = check(credentials.sign(data, "image/png", result, parent), "image/png", anchors)
        return found.state, found.parent

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(one, range(40)))
    assert found == [("trusted", sha256(str(number).encode()).hexdigest()) for number in range(40)]


# -- certificates and keys --

Write = Callable[[Path], None]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def swap(path: Path) -> None:
    """Put the authority first."""
    leaf, root = path.read_text().split("-----BEGIN", 2)[1:]
    path.write_text(f"-----BEGIN{root}-----BEGIN{leaf}")


def another_key(key: Any) -> Write:
    def write(path: Path) -> None:
        path.write_bytes(key().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    return write


def locked(path: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")))


@pytest.mark.parametrize(
    ("file", "break_it", "said"),
    [
        ("certificates", cut, "not readable PEM"),
        ("certificates", swap, "not that of the first certificate"),
        ("certificates", Path.unlink, "cannot be read"),
        ("key", cut, "not readable PEM"),
        ("key", locked, "not readable PEM"),
        ("key", another_key(lambda: ec.generate_private_key(ec.SECP256R1())), "not that of the first"),
        ("key", another_key(ed25519.Ed25519PrivateKey.generate), "not that of the first"),
        ("key", another_key(x25519.X25519PrivateKey.generate), "not that of the first"),
    ],
)
def test_files_that_do_not_work_are_refused_at_the_start(
    tmp_path: Path, file: str, break_it: Write, said: str
) -> None:
    pair = certificates.make(tmp_path, "Example")
    break_it(getattr(pair, file))
    with pytest.raises(UsageError, match=said):
        ContentCredentials.open(pair.setting)


@pytest.mark.parametrize("setting", ["", "one.pem", "a,b,c"])
def test_a_setting_without_two_files_is_refused(setting: str) -> None:
    with pytest.raises(UsageError, match="no two files"):
        ContentCredentials.open(setting)


def test_a_certificate_that_is_over_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is valid from"):
        ContentCredentials.open(certificates.make(tmp_path, "Example", days=-1).setting)


def openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)


def by_openssl(folder: Path, key: tuple[str, ...], extensions: str) -> str:
    """The commands of the documentation: an authority, a signer's key, and its certificate."""
    (folder / "signer.cnf").write_text(extensions)
    authority = (
        "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -keyout authority.key"
        " -out authority.pem -addext keyUsage=critical,keyCertSign,cRLSign -subj"
    )
    openssl(folder, *authority.split(), "/O=Example/CN=Example authority")
    request = "-nodes -keyout key.pem -out signer.csr -subj"
    openssl(folder, "req", "-new", *key, *request.split(), "/O=Example/CN=Example pictures")
    issue = (
        "x509 -req -in signer.csr -CA authority.pem -CAkey authority.key -days 90 -extfile signer.cnf"
        " -out signer.pem"
    )
    openssl(folder, *issue.split())
    chain = (folder / "signer.pem").read_bytes() + (folder / "authority.pem").read_bytes()
    (folder / "certificates.pem").write_bytes(chain)
    return f"{folder / 'certificates.pem'},{folder / 'key.pem'}"


GOOD = """basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = emailProtection
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""
EC = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384")


@pytest.mark.parametrize("key", [EC, ("-newkey", "ed25519"), ("-newkey", "rsa:2048")])
def test_signers_of_openssl_work(tmp_path: Path, result: EditResult, key: tuple[str, ...]) -> None:
    signer = ContentCredentials.open(by_openssl(tmp_path, key, GOOD))
    data = signer.sign(png_bytes(result.image, {}), "image/png", result, PARENT)
    assert report(data, tmp_path / "authority.pem")["validation_state"] == "Trusted"


@pytest.mark.parametrize(
    "extensions",
    [
        GOOD.replace("emailProtection", "serverAuth"),
        GOOD.replace("emailProtection", "anyExtendedKeyUsage"),
        GOOD.replace("digitalSignature", "keyEncipherment"),
        GOOD.replace("extendedKeyUsage = emailProtection\n", ""),
    ],
)
def test_a_certificate_for_another_purpose_is_refused(tmp_path: Path, extensions: str) -> None:
    with pytest.raises(UsageError, match="C2PA refuses the certificate"):
        ContentCredentials.open(by_openssl(tmp_path, EC, extensions))


def test_a_kind_of_key_that_c2pa_has_no_name_for_is_refused(tmp_path: Path) -> None:
    setting = by_openssl(tmp_path, ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:secp256k1"), GOOD)
    with pytest.raises(UsageError, match="kind of key"):
        ContentCredentials.open(setting)


def test_without_the_extra_the_setting_is_an_error(made: Made) -> None:
    program = f"""
import sys
sys.modules["c2pa"] = None
from serving.errors import UsageError
from serving.provenance import ContentCredentials
try:
    ContentCredentials.open({made.setting!r})
except UsageError as error:
    print(error.mend)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "adapter-foundry[provenance]" in done.stdout


# -- commands --


@click.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def command(words: tuple[str, ...]) -> None:
    run(group, "serving credentials", words)


def call(*words: object) -> Result:
    return CliRunner().invoke(command, [str(word) for word in words])


def test_the_commands_make_a_signer_and_check_a_picture(tmp_path: Path, result: EditResult) -> None:
    folder = tmp_path / "new" / "signer"
    done = call("make", folder, "--name", "Example Team")
    assert done.exit_code == 0, done.output
    assert stat.S_IMODE((folder / "key.pem").stat().st_mode) == 0o600
    signer = ContentCredentials.open(done.stdout.strip())
    picture = tmp_path / "picture.png"
    picture.write_bytes(signer.sign(png_bytes(result.image, {}), "image/png", result, PARENT))
    shown = call("check", picture, "--anchors", folder / "authority.pem")
    assert (shown.exit_code, shown.stdout.splitlines()[0]) == (0, "trusted, signed by Example Team")
    assert "pixelsmile:3" in shown.stdout
    said = json.loads(call("check", picture, "--json").stdout)
    assert (said["state"], said["facts"]["adapter_digest"]) == ("valid", str(result.adapter_digest))
    assert call("make", folder, "--name", "Example").exit_code == 2
    assert call("make", tmp_path / "x", "--name", "").exit_code == 2
    result.image.save(picture)
    assert call("check", picture).exit_code == 10
    other = json.loads(call("make", tmp_path / "other", "--name", "Other", "--json").stdout)
    picture.write_bytes(signer.sign(png_bytes(result.image, {}), "image/png", result, PARENT))
    assert call("check", picture, "--anchors", other["authority"]).exit_code == 12
