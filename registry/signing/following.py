"""Roots that were signed after a backup: what was restored is led on to them, if their keys are here.

A reader who has seen a root believes what its keys have signed, and asks the store for that very root.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

from registry.errors import RegistryError
from registry.signing import archived
from registry.signing.authority import Authority
from registry.signing.plan import Plan
from registry.signing.rotation import Rotation
from registry.signing.signers import ROLES, KeyRing, file_of, load

KEPT = "later_roots"
"""Folder beside the pinned root for roots that a restored store cannot show yet."""
_FILE = "file:"


def keep(trust: Path, roots: archived.Followed) -> None:
    """Keep roots on this machine that the store cannot show."""
    for number, root in roots.apart.items():
        (trust / KEPT).mkdir(mode=0o700, parents=True, exist_ok=True)
        (trust / KEPT / f"{number}.root.json").write_bytes(root)


def kept(trust: Path) -> Iterator[dict[int, bytes]]:
    """Roots that this machine has verified once, and those that were kept at a restore."""
    for folder in (trust / "metadata" / "root_history", trust / KEPT):
        paths = folder.glob("*.root.json") if folder.is_dir() else ()
        named = {path.name.partition(".")[0]: path for path in paths}
        yield {int(number): path.read_bytes() for number, path in named.items() if number.isdecimal()}


def follow(authority: Authority, trust: Path) -> tuple[int, ...]:
    """Lead readers on to the roots that were kept: sign by their keys what is restored, and publish them.

    `settle` is to follow.

    Args:
        authority: publishes.
        trust: the folder of what this machine believes.

    Returns:
        Numbers of the roots; none if none was kept.

    Raises:
        BadSignature: a key that has to sign is not on this machine; readers see what they saw before.
        RegistryError: see the error tree.
    """
    if not (trust / KEPT).is_dir():
        return ()
    state = authority.signing_state()
    found = archived.chain(json.dumps(state.document("root")).encode(), [*kept(trust)])
    if found:
        plan = Plan.of(json.loads(found[max(found)])["signed"])
        Rotation(authority, _ring(authority.keys, plan)).follow(plan, found)
    shutil.rmtree(trust / KEPT)
    return tuple(sorted(found))


def settle(authority: Authority) -> tuple[str, ...]:
    """Put keys in their place that the root lists and a restore has put aside; return their roles.

    Versions are let be signed by the publishers of the root, too, if an approver's key is here.

    Raises:
        RegistryError: see the error tree.
    """
    keys = authority.keys
    coming = _ring(keys, Plan.of(authority.signing_state().signed("root")))
    roles = tuple(role for role in ROLES if coming.uri(role) != keys.uri(role))
    if roles:
        Rotation(authority, coming).tidy()
    for role in roles:
        place = keys.file(role)
        if place.exists():
            place.replace(aside(place))
        os.replace(file_of(coming.uri(role)), place)
    return roles


def aside(path: Path) -> Path:
    """A name beside a file that nothing has yet: what an earlier restore put aside may be the only copy."""
    names = (f"{path.name}.before-restore{'' if number == 1 else f'-{number}'}" for number in count(1))
    return next(free for name in names if not os.path.lexists(free := path.with_name(name)))


def _ring(keys: KeyRing, plan: Plan) -> KeyRing:
    """The keys that a root lists, as far as their files are here: in their place, or beside it."""
    files: dict[str, str] = {}
    for path in sorted(keys.folder.iterdir()) if keys.folder.is_dir() else ():
        if path.is_file() and not path.name.startswith("."):
            with suppress(RegistryError):  # another passphrase, or no key at all
                uri = f"{_FILE}{path}"
                files[load(uri, path.name, keys.passphrase).public_key.keyid] = uri
    uris = dict(keys.uris)
    for role in ROLES:
        listed = plan.holders[role].keys
        here = [uri for keyid, uri in files.items() if keyid in listed]
        if here and keys.uri(role).startswith(_FILE) and keys.uri(role) not in here:
            uris[role] = here[0]
    return replace(keys, uris=uris)
