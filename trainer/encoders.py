"""The networks that losses look through: where they lie, what they are, and under which licence.

Two are shipped. Model packs of InsightFace are taken from its own folder and are never downloaded here; they
are for non-commercial research unless a MODEL.LICENSE in the pack, signed by InsightFace for that very model
and not expired, grants more. A licence file that is there but does not hold stops the training: it is not
taken for no file. The adapter's card names what was looked through, with what its licence is.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from registry.digest import Digest, digest_bytes
from registry.errors import shown
from registry.manifest import Ingredient
from trainer.errors import BaseModelError, ModelLicenseError

ARCFACE_SIDE: Final = 112
"""Side in pixels of what every ArcFace encoder looks at."""

NON_COMMERCIAL: Final = "LicenseRef-InsightFace-Non-Commercial"
GRANTED: Final = "LicenseRef-InsightFace-Model-License"

_LICENSE_FILE = "MODEL.LICENSE"
# A manifest may name the licence file; without either there is none.
_SIGNS_OF_A_LICENSE = (_LICENSE_FILE, "manifest.json")
_RECOGNITION: Final[dict[str, str]] = {"antelopev2": "glintr100.onnx", "buffalo_l": "w600k_r50.onnx"}


class TrainerSettings(BaseModel):
    """Settings of the trainer.

    Attributes:
        insightface_root: where InsightFace keeps its packs, each in ``models/<name>``; None is its default.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    insightface_root: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """A network on this machine.

    Attributes:
        file: the ONNX file.
        side: side of its input in pixels.
        ingredient: what the adapter's card says about it.
    """

    file: Path
    side: int
    ingredient: Ingredient


def identity(name: str) -> Encoder:
    """Return an identity encoder.

    Raises:
        BaseModelError: the pack is not on this machine.
        ModelLicenseError: its licence file does not hold.
    """
    if name == "portraits":
        return _shipped("identity", "portraits identity encoder", ARCFACE_SIDE)
    from registry.settings import load

    root = load("trainer", TrainerSettings).insightface_root or Path("~/.insightface")
    return insightface_pack(name, root.expanduser() / "models" / name)


def expression() -> Encoder:
    """Return the labelling judge, as the contrastive loss looks through it."""
    return _shipped("label", "labelling expression judge", 64)


def insightface_pack(name: str, folder: Path, public_keys: Iterable[Any] | None = None) -> Encoder:
    """Return the recognition model of an InsightFace pack, with the licence that holds for it today.

    Args:
        name: name of the pack, for which a MODEL.LICENSE must be signed.
        folder: its folder.
        public_keys: whose signatures are believed; None takes InsightFace's.

    Raises:
        BaseModelError: the pack is not there.
        ModelLicenseError: there is a licence file, but it does not hold.
    """
    file = folder / _RECOGNITION[name]
    if not file.is_file():
        raise BaseModelError(
            f"the identity encoder {name} is not at {file}",
            f"unpack InsightFace's model pack {name} there; it is for non-commercial research",
        )
    license, about = _license_of(name, folder, public_keys)
    ingredient = Ingredient(
        name=f"{name}/{file.name}",
        kind="auxiliary-model",
        license=license,
        source=f"InsightFace model pack {name}; {about}",
        digest=digest_bytes(file.read_bytes()),
    )
    return Encoder(file=file, side=ARCFACE_SIDE, ingredient=ingredient)


def _shipped(kind: Any, name: str, side: int) -> Encoder:
    from trainer.portraits import judges

    file = judges.path(kind)
    ingredient = Ingredient(
        name=name,
        kind="auxiliary-model",
        license="Apache-2.0",
        source=f"trainer/portraits/weights/judges/{file.name}",
        digest=digest_bytes(file.read_bytes()),
    )
    return Encoder(file=file, side=side, ingredient=ingredient)


def _license_of(name: str, folder: Path, public_keys: Iterable[Any] | None) -> tuple[str, str]:
    """Return the licence of a pack, and where it is written."""
    if not any((folder / part).exists() or (folder / part).is_symlink() for part in _SIGNS_OF_A_LICENSE):
        return NON_COMMERCIAL, f"no {_LICENSE_FILE} in it"
    found = _inspect(name, folder, public_keys)
    if found.defaulted:
        return NON_COMMERCIAL, f"no {_LICENSE_FILE} in it"
    if found.license is None or found.license_path is None:
        raise ModelLicenseError(
            f"the licence of the model pack {name} does not hold: {shown(found.message)}",
            f"ask InsightFace for a valid {_LICENSE_FILE}; without any file the pack is for non-commercial "
            "research",
        )
    until = (
        "without end" if found.license.valid_until is None else f"until {found.license.valid_until:%Y-%m-%d}"
    )
    about = (
        f"{_LICENSE_FILE} {_digest(found.license_path)}, id {shown(found.license.license_id, 60)}, {until}"
    )
    return (GRANTED if found.commercial_use_permitted else NON_COMMERCIAL), about


def _digest(file: Path) -> Digest:
    return digest_bytes(file.read_bytes())


def _inspect(name: str, folder: Path, public_keys: Iterable[Any] | None) -> Any:
    try:
        verifier = importlib.import_module("insightface.model_zoo.model_license")
    except ImportError as error:
        raise ModelLicenseError(
            f"the licence of the model pack {name} cannot be verified: {error}",
            "install insightface as requirements-nodeps.txt tells",
        ) from error
    return verifier.inspect_model_package_license(folder, expected_model_id=name, public_keys=public_keys)
