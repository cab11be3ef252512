"""Attacks by whoever carries a mirror archive: none gets anything into the site, each has its exit code.

Every attack goes through the command line. Afterwards the site holds what it held before, byte for byte.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes.archives import Members, appearance, find, members, packed, repacked, site
from fakes.registries import (
    NAME,
    PASSING,
    adapter_folder,
    copy_registry,
    expire,
    forget_trust,
    key_ring,
    objects,
    resign,
)
from registry.attestation import approval_predicate, statement
from registry.cli import main
from registry.client import Registry
from registry.digest import Digest, digest_bytes
from registry.manifest import WEIGHTS_NAME, AdapterManifest
from registry.signing import envelope
from registry.storage import archive as archives
from registry.storage.local import LocalObjects

APPROVED = {"by": "a person", "reason": "looks right", "at": "2026-01-01T00:00:00Z"}


def cli(home: Path, *arguments: str) -> int:
    """The exit code of a command at a site."""
    patch = pytest.MonkeyPatch()
    patch.setenv("ADAPTER_FOUNDRY_HOME", str(home))
    try:
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
    finally:
        patch.undo()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


class Carrier:
    """A publisher with one approved version, an archive of it, and a site that has pinned its root."""

    def __init__(self, home: Path, tmp_path: Path) -> None:
        self.publisher, self.home, self.folder = copy_registry(home), home, tmp_path
        self.archive = tmp_path / "adapters.tar"
        self.export(self.archive)
        self.site = tmp_path / "site"
        site(self.site, home)

    def export(self, path: Path) -> Path:
        assert cli(self.home, "mirror", "export", str(path)) == 0
        return path

    def publish(self, seed: int, version: int) -> None:
        self.publisher.push(adapter_folder(self.folder / f"a{seed}", seed=seed), NAME, evaluation=PASSING)
        self.publisher.approve(f"{NAME}:{version}", "a person", "looks right")

    def refused(self, code: int) -> None:
        """The site takes nothing of the archive, and everything that it had stays."""
        before = appearance(self.site)
        assert cli(self.site, "mirror", "import", str(self.archive)) == code
        after = appearance(self.site)
        changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
        assert changed <= {"trust/metadata/memory.json"}

    def digest(self) -> Digest:
        return self.publisher.authority.state().aliases()[f"{NAME}@prod"].digest


@pytest.fixture
def carrier(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Carrier:
    return Carrier(home, tmp_path)


def test_the_honest_archive_is_taken(carrier: Carrier) -> None:
    """Or nothing below would mean anything."""
    assert cli(carrier.site, "mirror", "import", str(carrier.archive)) == 0
    assert cli(carrier.site, "pull", f"{NAME}@prod") == 0


# -- bytes --


@pytest.mark.parametrize(
    ("part", "code"),
    [
        ("trust/1.root.json", 13),
        ("trust/timestamp.json", 13),
        (".snapshot.json", 13),
        (".targets.json", 13),
        (".names.json", 13),
        (".versions-", 13),
        ("manifests/", 13),
        ("/training.", 13),
        ("/approval.", 13),
        ("blobs/", 13),
        (WEIGHTS_NAME, 13),
    ],
)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_a_flipped_byte(carrier: Carrier, part: str, code: int, place: str) -> None:
    def flip(content: Members) -> None:
        key = find(content, part)
        data = bytearray(content[key])
        data[{"first": 0, "middle": len(data) // 2, "last": -1}[place]] ^= 1
        content[key] = bytes(data)

    repacked(carrier.archive, flip)
    before = appearance(carrier.site)
    found = cli(carrier.site, "mirror", "import", str(carrier.archive))
    # A changed signature and a changed key are told apart from other changes.
    assert found in ({12, 13} if part.startswith(("trust", ".")) else {code})
    assert {name for name in appearance(carrier.site) if name not in before} == set()


def test_weights_of_another_adapter(carrier: Carrier) -> None:
    carrier.publish(1, 2)
    carrier.archive.unlink()
    carrier.export(carrier.archive)

    def swap(content: Members) -> None:
        one, two = (key for key in content if key.endswith(WEIGHTS_NAME))
        content[one], content[two] = content[two], content[one]

    repacked(carrier.archive, swap)
    carrier.refused(13)


def test_weights_that_change_after_they_were_verified(
    carrier: Carrier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is written to in place, between the check and the use."""
    at = carrier.archive.read_bytes().index(members(carrier.archive)[weights_key(carrier)])
    put = LocalObjects.put

    def late(self: LocalObjects, key: str, *rest: object) -> bool:
        with carrier.archive.open("r+b") as stream:
            stream.seek(at + 100_000)
            stream.write(b"evil")
        return put(self, key, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(LocalObjects, "put", late)
    assert cli(carrier.site, "mirror", "import", str(carrier.archive)) == 13
    names = {*LocalObjects(objects(carrier.site)).keys("")}
    assert not any(name.startswith(("models/", "manifests/", "trust/")) for name in names)


def weights_key(carrier: Carrier) -> str:
    return find(members(carrier.archive), WEIGHTS_NAME)


def test_a_file_is_missing(carrier: Carrier) -> None:
    repacked(carrier.archive, lambda content: content.pop(find(content, WEIGHTS_NAME)))
    carrier.refused(11)


# -- who signed --


def test_another_registry(carrier: Carrier, tmp_path: Path) -> None:
    """Everything is genuine, only of a registry that this site has not pinned."""
    registry = Registry.init(tmp_path / "other")
    registry.push(adapter_folder(tmp_path / "evil"), NAME, evaluation=PASSING)
    registry.approve(f"{NAME}:1", "somebody", "trust me")
    carrier.archive.unlink()
    assert cli(tmp_path / "other", "mirror", "export", str(carrier.archive)) == 0
    before = appearance(carrier.site)
    assert cli(carrier.site, "mirror", "import", str(carrier.archive)) in (12, 13)
    assert appearance(carrier.site) == before


def test_names_signed_by_a_key_that_may_not(carrier: Carrier) -> None:
    resign(carrier.home, {"targets": lambda signed: None}, {"targets": "publisher"})
    repacked(carrier.archive, with_trust_of(carrier))
    carrier.refused(12)


def with_trust_of(carrier: Carrier) -> Callable[[Members], None]:
    """Exchanges the trust metadata of an archive for what the publisher's store holds now."""

    def change(content: Members) -> None:
        for key in [key for key in content if key.startswith("trust/")]:
            del content[key]
        trust = objects(carrier.home) / "trust"
        state = {path.name.partition(".")[2]: path for path in sorted(trust.iterdir(), key=number)}
        for path in state.values():
            content[f"trust/{path.name}"] = path.read_bytes()

    return change


def number(path: Path) -> int:
    text = path.name.partition(".")[0]
    return int(text) if text.isdigit() else 0


def test_a_manifest_that_nobody_signed(carrier: Carrier) -> None:
    def plant(content: Members) -> None:
        manifest = AdapterManifest.parse(content[find(content, "manifests/")])
        other = manifest.model_copy(update={"version": 7})
        content[f"manifests/sha256/{other.digest.hex}"] = other.canonical_bytes()

    repacked(carrier.archive, plant)
    carrier.refused(12)


@pytest.mark.parametrize(("signer", "code"), [("publisher", 12), ("stranger", 12)])
def test_an_approval_by_somebody_else(carrier: Carrier, tmp_path: Path, signer: str, code: int) -> None:
    from securesystemslib.signer import CryptoSigner

    key = key_ring(carrier.home).signer(signer) if signer == "publisher" else CryptoSigner.generate_ed25519()
    payload = statement("approval", f"{NAME}:1", carrier.digest(), approval_predicate(**APPROVED))

    def forge(content: Members) -> None:
        del content[find(content, "/approval.")]
        data = envelope.sign(payload, [key])
        content[f"statements/{carrier.digest().hex}/approval.{digest_bytes(data).hex}.json"] = data

    repacked(carrier.archive, forge)
    carrier.refused(code)


def test_an_approval_of_another_version(carrier: Carrier) -> None:
    payload = statement("approval", f"{NAME}:2", digest_bytes(b"other"), approval_predicate(**APPROVED))

    def forge(content: Members) -> None:
        del content[find(content, "/approval.")]
        data = envelope.sign(payload, [key_ring(carrier.home).signer("approver")])
        content[f"statements/{carrier.digest().hex}/approval.{digest_bytes(data).hex}.json"] = data

    repacked(carrier.archive, forge)
    carrier.refused(12)


def test_an_approval_is_left_out(carrier: Carrier) -> None:
    repacked(carrier.archive, lambda content: content.pop(find(content, "/approval.")))
    carrier.refused(10)


def test_a_revoked_version(carrier: Carrier) -> None:
    """The trust metadata of today with the files of yesterday."""
    carrier.publisher.revoke(f"{NAME}:1", "it leaks")
    repacked(carrier.archive, with_trust_of(carrier))
    carrier.refused(15)


# -- time --


def test_an_older_archive_than_what_was_seen(carrier: Carrier) -> None:
    carrier.publish(1, 2)
    newer = carrier.export(carrier.folder / "newer.tar")
    assert cli(carrier.site, "mirror", "import", str(newer)) == 0
    carrier.refused(16)


def test_an_older_archive_than_the_site_shows(carrier: Carrier) -> None:
    """The machine's memory is gone; what its store holds counts as seen."""
    carrier.publish(1, 2)
    newer = carrier.export(carrier.folder / "newer.tar")
    assert cli(carrier.site, "mirror", "import", str(newer)) == 0
    forget_trust(carrier.site)
    assert cli(carrier.site, "mirror", "import", str(carrier.archive)) == 16
    assert f"{NAME}:2" in [row.reference for row in Registry.open(carrier.site).list()]


@pytest.mark.parametrize("kind", ["timestamp", "snapshot", "targets", "names", "versions"])
def test_expired_metadata(carrier: Carrier, kind: str) -> None:
    resign(carrier.home, {kind: expire})
    repacked(carrier.archive, with_trust_of(carrier))
    carrier.refused(16)


def test_metadata_of_two_moments(carrier: Carrier) -> None:
    old = members(carrier.archive)
    carrier.publish(1, 2)
    carrier.archive.unlink()
    carrier.export(carrier.archive)

    def mix(content: Members) -> None:
        new = find(content, ".versions-")
        content[new] = old[find(old, ".versions-")]

    repacked(carrier.archive, mix)
    carrier.refused(13)


# -- what does not belong --


@pytest.mark.parametrize(
    "key",
    [
        "trust/99.targets.json",
        "trust/0.root.json",
        "trust/draft.root.json",
        "trust/mine.json",
        "blobs/blake3/" + "0" * 64,
        "models/" + "0" * 64 + "/MLmodel",
        "statements/" + "0" * 64 + "/scan." + "0" * 64 + ".json",
        "manifests/sha256/nothing",
    ],
)
def test_something_that_no_signed_name_needs(carrier: Carrier, key: str) -> None:
    repacked(carrier.archive, lambda content: content.update({key: b"planted"}))
    carrier.refused(12 if key.startswith("manifests") else 13)


def foreign(member: tarfile.TarInfo, data: bytes = b"", form: int = tarfile.USTAR_FORMAT) -> bytes:
    """A member as another program writes it."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as stream:
        member.size = len(data)
        stream.addfile(member, io.BytesIO(data))
    return sink.getvalue()[: stream.offset - (-stream.offset % 512)]


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    found = tarfile.TarInfo(name)
    found.type, found.linkname, found.mode = kind, link, 0o444
    return found


NAMES = ["../../outside", "/etc/outside", "trust/../../outside", "trust//1.root.json", "trust/a\nb",
         "trust/.hidden", "trust/ｒoot.json"]  # fmt: skip


@pytest.mark.parametrize(
    ("evil", "said"),
    [
        *((foreign(member(name), b"evil"), "a member is called") for name in NAMES),
        (foreign(member("keys/root.pem"), b"evil"), "does not belong into a mirror archive"),
        (foreign(member("trust/1.root.json", tarfile.SYMTYPE, "/etc/passwd")), "a symbolic link"),
        (foreign(member("trust/1.root.json", tarfile.LNKTYPE, "../../outside")), "a hard link"),
        (foreign(member("trust/1.root.json", tarfile.CHRTYPE)), "a device"),
        (foreign(member("trust/1.root.json", tarfile.BLKTYPE)), "a device"),
        (foreign(member("trust/1.root.json", tarfile.FIFOTYPE)), "a pipe"),
        (foreign(member("trust", tarfile.DIRTYPE)), "a folder"),
        (foreign(member("trust/" + "long" * 40), b"evil", tarfile.GNU_FORMAT), "no tar file"),
        (foreign(member("trust/" + "long" * 40), b"evil", tarfile.PAX_FORMAT), "an extended header"),
        (foreign(member("trust/1.root.json", b"S"), b"evil"), "a sparse file"),
        (foreign(member("trust/1.root.json", b"7"), b"evil"), "no plain file"),
    ],
    ids=lambda value: repr(value[:24].rstrip(b"\0") + value[156:157]) if isinstance(value, bytes) else "",
)
def test_members_that_are_no_plain_objects(
    carrier: Carrier, evil: bytes, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Named for what they are before anything else about them is looked at."""
    carrier.archive.write_bytes(evil + carrier.archive.read_bytes())
    carrier.refused(13)
    assert said in capsys.readouterr().err
    assert not (carrier.site / "outside").exists()
    assert not (carrier.folder / "outside").exists()


def test_a_member_twice(carrier: Carrier) -> None:
    whole = carrier.archive.read_bytes()
    size = -(-len(members(carrier.archive)["trust/1.root.json"]) // 512) * 512 + 512
    carrier.archive.write_bytes(whole[:size] + whole)
    carrier.refused(13)


def test_members_in_another_order(carrier: Carrier) -> None:
    sink = io.BytesIO()
    writer = archives.ArchiveWriter(sink.write)
    for key, data in reversed(members(carrier.archive).items()):
        writer.add(key, data)
    writer.close()
    carrier.archive.write_bytes(sink.getvalue())
    carrier.refused(13)


# -- sizes --


@pytest.mark.parametrize(
    "claimed",
    [
        ("trust/timestamp.json", 9 << 20),
        ("manifests/sha256/ab", 2 << 20),
        (f"models/ab/{WEIGHTS_NAME}", 5 << 30),
    ],
    ids=["trust", "manifest", "weights"],
)
def test_a_size_beyond_its_limit(carrier: Carrier, claimed: tuple[str, int]) -> None:
    """Refused by its header: nothing of it is read, and it need not be there."""
    carrier.archive.write_bytes(archives._header(*claimed) + b"\0" * 4096)
    carrier.refused(14)


def test_more_members_than_a_registry_has(carrier: Carrier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_MEMBERS", 5)
    carrier.refused(14)


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 1000, -1, -512, -1024, -1025])
def test_an_archive_that_is_cut_off(carrier: Carrier, cut: int) -> None:
    carrier.archive.write_bytes(carrier.archive.read_bytes()[:cut])
    carrier.refused(13)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data + b"\0" * 512,
        lambda data: data + data,
        lambda data: gzip.compress(data),
        lambda data: b"PK\x03\x04" + data,
        lambda data: b"\0" * 1024,
        lambda data: data.replace(b"ustar\x0000", b"ustar  \0", 1),
        lambda data: data[:148] + b"0000000\0" + data[156:],
        lambda data: data[:100] + b"0004755\0" + data[108:],
        lambda data: data[:124] + b"\x80" + bytes(10) + b"\x01" + data[136:],
        lambda data: data[:500] + b"hidden bytes" + data[512:],
    ],
    ids=["padding", "twice", "gzip", "zip", "empty", "gnu", "checksum", "setuid", "binary size", "hidden"],
)
def test_another_spelling(carrier: Carrier, change: Callable[[bytes], bytes]) -> None:
    carrier.archive.write_bytes(change(carrier.archive.read_bytes()))
    carrier.refused(13)


def test_bytes_hidden_behind_a_member(carrier: Carrier) -> None:
    data = bytearray(carrier.archive.read_bytes())
    end = 512 + len(members(carrier.archive)["trust/1.root.json"])
    assert end % 512, "there is room"
    data[end] = 1
    carrier.archive.write_bytes(data)
    carrier.refused(13)


def test_a_link_instead_of_an_archive(carrier: Carrier) -> None:
    carrier.archive.rename(carrier.folder / "real.tar")
    carrier.archive.symlink_to(carrier.folder / "real.tar")
    carrier.refused(1)


# -- the site --


def test_a_site_that_has_pinned_nothing(carrier: Carrier, tmp_path: Path) -> None:
    assert cli(tmp_path / "new", "mirror", "import", str(carrier.archive)) == 11
    assert not [*(tmp_path / "new").rglob("*.json")]


def test_the_site_s_own_policy_counts(carrier: Carrier) -> None:
    """What the publisher's policy lets pass need not pass here."""
    policy = carrier.site / "registry" / "policy.toml"
    policy.parent.mkdir(parents=True, exist_ok=True)
    policy.write_text("[gates.default]\napprovals = 2\n")
    carrier.refused(12)


def test_terminal_escapes_do_not_reach_the_terminal(
    carrier: Carrier, capsys: pytest.CaptureFixture[str]
) -> None:
    carrier.archive.write_bytes(foreign(member("\x1b[2Jtrust"), b"evil") + carrier.archive.read_bytes())
    carrier.refused(13)
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err


def test_the_answer_names_what_was_left_out(carrier: Carrier, capsys: pytest.CaptureFixture[str]) -> None:
    """One version is refused, the others come: the exit code tells."""
    carrier.publish(1, 2)
    newer = carrier.export(carrier.folder / "newer.tar")
    digest = carrier.publisher.authority.state().versions()[f"{NAME}:2"].digest

    def strip(content: Members) -> None:
        del content[find({key: b"" for key in content if digest.hex in key}, "/approval.")]

    repacked(newer, strip)
    capsys.readouterr()
    assert cli(carrier.site, "mirror", "import", str(newer), "--json") == 10
    told = json.loads(capsys.readouterr().out)
    assert told["references"] == [f"{NAME}:1"]
    assert [left["reference"] for left in told["left_out"]] == [f"{NAME}:2"]
    assert cli(carrier.site, "pull", f"{NAME}@prod") == 0
    assert cli(carrier.site, "pull", f"{NAME}:2") != 0
    assert packed(members(newer)) == newer.read_bytes()
