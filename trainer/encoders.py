"""The networks that losses look through: where they lie, what they are, and under which licence.

Two are shipped. The others are taken from folders of this machine and are never downloaded here. Model packs
of InsightFace are for non-commercial research unless a MODEL.LICENSE in the pack, signed by InsightFace for
that very model and not expired, grants more. A licence file that is there but does not hold stops the
training: it is not taken for no file. The adapter's card names what was looked through, with what its licence
is.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from pydantic import BaseModel, ConfigDict

from registry.digest import Digest
from registry.errors import shown
from registry.manifest import Ingredient
from trainer.errors import BaseModelError, ModelLicenseError

if TYPE_CHECKING:
    from trainer.sections import LossSection

CHOICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "contrastive": ("portraits", "clip-vit-l-14"),
        "identity": ("portraits", "antelopev2", "buffalo_l"),
        "perceptual": ("portraits", "lpips-alex", "lpips-vgg"),
    }
)
"""Which encoders a loss may look through; the other losses look through none."""

ARCFACE_SIDE: Final = 112
"""Side in pixels of what every ArcFace encoder looks at."""

NON_COMMERCIAL: Final = "LicenseRef-InsightFace-Non-Commercial"
GRANTED: Final = "LicenseRef-InsightFace-Model-License"

_LICENSE_FILE = "MODEL.LICENSE"
# A manifest may name the licence file; without either there is none.
_SIGNS_OF_A_LICENSE = (_LICENSE_FILE, "manifest.json")
_BELOW: Final = {"lpips-alex": "torchvision alexnet", "lpips-vgg": "torchvision vgg16"}
_PACKS: Final[dict[str, tuple[str, str]]] = {
    "antelopev2": ("glintr100.onnx", "scrfd_10g_bnkps.onnx"),
    "buffalo_l": ("w600k_r50.onnx", "det_10g.onnx"),
}
"""The recognition model and the face detector of each pack of InsightFace."""


class TrainerSettings(BaseModel):
    """Settings of the trainer.

    Attributes:
        insightface_root: where InsightFace keeps its packs, each in ``models/<name>``; None is its default.
        encoders_root: folder of the other encoders: ``clip-vit-l-14/`` as openai/clip-vit-large-patch14 is
            published, ``lpips-alex.safetensors`` and ``lpips-vgg.safetensors``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    insightface_root: Path | None = None
    encoders_root: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoder:
    """A network on this machine.

    Attributes:
        file: the ONNX or safetensors file.
        side: side of its input in pixels; 0 takes pictures as they are.
        ingredient: what the adapter's card says about it.
        detector: the ONNX file of the detector that finds the faces it looks at; None looks at the whole
            picture.
        helpers: what the card says about the detector, or about other parts of the file.
    """

    file: Path
    side: int
    ingredient: Ingredient
    detector: Path | None = None
    helpers: tuple[Ingredient, ...] = ()

    @property
    def ingredients(self) -> tuple[Ingredient, ...]:
        """Everything that the adapter's card has to name."""
        return (self.ingredient, *self.helpers)


def require(losses: Mapping[Any, LossSection]) -> None:
    """Look for the encoders of all losses that have a weight; nothing is loaded.

    Raises:
        BaseModelError: one is not on this machine.
        ModelLicenseError: one comes with a licence file that does not hold.
    """
    find = {"contrastive": contrastive, "identity": identity, "perceptual": perceptual}
    for name, loss in losses.items():
        if name in find and loss.weight > 0:
            find[name](loss.encoder)


def contrastive(name: str) -> Encoder:
    """Return the encoder of pictures that the contrastive loss asks for; "portraits" is the labelling judge.

    Raises:
        BaseModelError: it is not on this machine.
    """
    if name == "portraits":
        return expression()
    mend = "put the files of openai/clip-vit-large-patch14 into that folder"
    _of_root(name, f"{name}/config.json", mend)
    file = _of_root(name, f"{name}/model.safetensors", mend)
    return Encoder(
        file=file,
        side=224,
        ingredient=Ingredient(
            name=name,
            kind="auxiliary-model",
            license="MIT",
            source="openai/clip-vit-large-patch14",
            digest=_digest(file),
        ),
    )


def perceptual(name: str) -> Encoder:
    """Return the stack of features that the perceptual loss compares; "portraits" is the labelling judge.

    Raises:
        BaseModelError: it is not on this machine.
    """
    if name == "portraits":
        return expression()
    file = _of_root(name, f"{name}.safetensors", "make it with the command in docs/licences.md")
    weights, network = (
        Ingredient(name=part, kind="auxiliary-model", license=license, source=source, digest=_digest(file))
        for part, license, source in (
            (name, "BSD-2-Clause", "richzhang/PerceptualSimilarity v0.1, linear weights"),
            (_BELOW[name], "BSD-3-Clause", "pytorch/vision, trained on ImageNet"),
        )
    )
    return Encoder(file=file, side=0, ingredient=weights, helpers=(network,))


def identity(name: str) -> Encoder:
    """Return an identity encoder.

    Raises:
        BaseModelError: the pack is not on this machine.
        ModelLicenseError: its licence file does not hold.
    """
    if name == "portraits":
        return _shipped("identity", "portraits identity encoder", ARCFACE_SIDE)
    root = _settings().insightface_root or Path("~/.insightface")
    return insightface_pack(name, root.expanduser() / "models" / name)


def expression() -> Encoder:
    """Return the labelling judge; the evaluation's is never trained against."""
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
    files = [folder / part for part in _PACKS[name]]
    for file in files:
        if not file.is_file():
            raise BaseModelError(
                f"the identity encoder {name} is not at {file}",
                f"unpack InsightFace's model pack {name} there; it is for non-commercial research",
            )
    license, about = _license_of(name, folder, public_keys)
    seen, found = (
        Ingredient(
            name=f"{name}/{file.name}",
            kind="auxiliary-model",
            license=license,
            source=f"InsightFace model pack {name}; {about}",
            digest=_digest(file),
        )
        for file in files
    )
    return Encoder(file=files[0], side=ARCFACE_SIDE, ingredient=seen, detector=files[1], helpers=(found,))


def _settings() -> TrainerSettings:
    from registry.settings import load

    return load("trainer", TrainerSettings)


def _of_root(name: str, part: str, mend: str) -> Path:
    """Return a file of the folder of encoders."""
    root = _settings().encoders_root
    if root is None:
        raise BaseModelError(
            f"the encoder {name} is wanted, but no folder of encoders is set",
            f"set ADAPTER_FOUNDRY_TRAINER_ENCODERS_ROOT to a folder and put {part} into it",
        )
    file = root.expanduser() / part
    if not file.is_file():
        raise BaseModelError(f"the encoder {name} is not at {file}", f"{mend}; nothing is downloaded here")
    return file


def _shipped(kind: Any, name: str, side: int) -> Encoder:
    from trainer.portraits import judges

    file = judges.path(kind)
    ingredient = Ingredient(
        name=name,
        kind="auxiliary-model",
        license="Apache-2.0",
        source=f"trainer/portraits/weights/judges/{file.name}",
        digest=_digest(file),
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
    with file.open("rb") as stream:
        return Digest(f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}")


def _inspect(name: str, folder: Path, public_keys: Iterable[Any] | None) -> Any:
    try:
        verifier = importlib.import_module("insightface.model_zoo.model_license")
    except ImportError as error:
        raise ModelLicenseError(
            f"the licence of the model pack {name} cannot be verified: {error}",
            "install insightface as requirements-nodeps.txt tells",
        ) from error
    return verifier.inspect_model_package_license(folder, expected_model_id=name, public_keys=public_keys)
