"""The rules of the scanner: every check by its id.

A rule that is added, dropped, or judges otherwise changes ``RULES_VERSION``: what was released under older
rules is scanned again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal

Severity = Literal["block", "review"]

RULES_VERSION: Final = "3"

LAYERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "SCN": "scan",
        "CON": "container",
        "STR": "structure",
        "MET": "strength",
        "NUM": "numerics",
        "WGT": "weight space",
        "BEH": "behaviour",
        "PRV": "provenance",
    }
)
"""The middle part of a rule's id -> the layer that checks it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A check: its id, how grave a finding is, and why it matters."""

    id: str
    severity: Severity
    title: str
    help: str

    @property
    def layer(self) -> str:
        """The layer that checks it: "container", "structure" …"""
        return LAYERS[self.id.split("-")[1]]


def _rules(*rows: tuple[str, Severity, str, str]) -> Mapping[str, Rule]:
    return MappingProxyType(
        {row[0]: Rule(id=row[0], severity=row[1], title=row[2], help=row[3]) for row in rows}
    )


RULES: Final[Mapping[str, Rule]] = _rules(
    ("ADP-SCN-001", "block", "the scan did not finish",
     "A scan that did not finish is never a pass. Report the file, it found a hole in the scanner."),
    ("ADP-CON-001", "block", "the file's size is out of range",
     "Files beyond the limit exhaust memory. Export with a smaller rank or fewer targets."),
    ("ADP-CON-002", "block", "the file is, or hides, another format",
     "Pickles run code when they are opened, and a file that is also a zip archive is read differently "
     "by different programs."),
    ("ADP-CON-003", "block", "the header's length is out of range",
     "A header beyond the limit or beyond the file exhausts or confuses readers."),
    ("ADP-CON-004", "block", "the header is not strict JSON",
     "Readers that are lenient in different ways would see different adapters."),
    ("ADP-CON-005", "block", "a header key appears twice",
     "Readers disagree on which one counts, so a scanner and a loader may see different adapters."),
    ("ADP-CON-006", "block", "an entry of the header is malformed",
     "Every tensor has a printable name and exactly a dtype, a shape and two offsets."),
    ("ADP-CON-007", "block", "a dtype is not allowed",
     "Adapters are F16, BF16 or F32; other types are not what the trainer writes."),
    ("ADP-CON-008", "block", "offsets disagree with shape and dtype",
     "A reader that trusts one of them reads other bytes than a reader that trusts the other."),
    ("ADP-CON-009", "block", "the tensors do not cover the file",
     "Overlapping tensors alias each other; gaps and trailing bytes hide content that no check sees."),
    ("ADP-CON-010", "block", "the metadata is out of bounds",
     "Metadata is at most 64 printable ASCII strings of 16 KiB together."),
    ("ADP-CON-011", "block", "the header is spelled as no writer spells it",
     "Rows of blanks, escapes of plain characters and long padding hide names from people and from simpler "
     "tools, or carry data."),
    ("ADP-CON-012", "block", "a tensor is not aligned",
     "Readers that map the file into memory read numbers at an odd address, which is undefined."),
    ("ADP-CON-013", "block", "a tensor begins like another format",
     "An archive or a pickle in the weights waits for somebody who cuts it out."),
    ("ADP-CON-014", "block", "the metadata carries code or encoded data",
     "What shows or expands the metadata would run it, and long encoded words are a payload."),
    ("ADP-CON-020", "block", "another loadable file lies beside the adapter",
     "A loader that takes the pickle, the archive or the second weights file runs what nobody has scanned. "
     "An adapter's folder holds its weights, its card and their documents."),
    ("ADP-MET-001", "block", "metadata would change the adapter's strength",
     "Loaders scale an adapter by alpha entries of the header; the evaluated strength is folded into B."),
    ("ADP-MET-002", "block", "a tensor would change the adapter's strength",
     "Loaders scale a module by its .alpha tensor; the strength that was evaluated is folded into B."),
    ("ADP-MET-010", "block", "the strength of the updates cannot be known",
     "Places that state alpha disagree, cannot be read, or ask a loader for more than plain LoRA layers."),
    ("ADP-MET-011", "block", "a loader applies another strength than the file states",
     "What runs would not be what the file says: loaders multiply two alphas, or miss one."),
    ("ADP-MET-012", "block", "an update is applied absurdly strongly",
     "Trainers give at most four times B @ A. More is an edit that overdrives what the author looked at."),
    ("ADP-MET-013", "review", "the strength is unlike what trainers give",
     "An alpha below one, or strengths far apart from module to module, are no trainer's habit: a module "
     "that is raised or silenced hides there."),
    ("ADP-STR-001", "block", "a key is not of the supported dialect",
     "What a loader makes of other keys is not what was checked. Supported is the diffusers dialect: "
     "transformer.<module>.lora_A.weight and lora_B.weight (unet. in front for a U-Net), and "
     "lora_magnitude_vector for DoRA."),
    ("ADP-STR-002", "block", "the file changes a text encoder or the VAE that its base lets nobody change",
     "Adapters change the denoiser, and those text encoders that the family names. Text-encoder weights are "
     "the lever of published LoRA backdoors."),
    ("ADP-STR-003", "block", "the base has no such module",
     "A loader drops or misplaces it silently."),
    ("ADP-STR-004", "block", "a factor is alone",
     "Every module needs both lora_A and lora_B; a loader drops or misreads a lone one."),
    ("ADP-STR-005", "block", "a shape does not fit the base",
     "lora_A is rank x in and lora_B is out x rank of the module."),
    ("ADP-STR-006", "block", "a rank is not the card's rank",
     "One rank for all modules, the one that the card declares and that was evaluated."),
    ("ADP-STR-007", "block", "the targets are not the declared targets",
     "The card declares which kinds of modules the adapter changes; it changes exactly those."),
    ("ADP-STR-008", "review", "a target is missing in some blocks",
     "Training adapts a target in every block; a file that lacks some was edited or trained in another way."),
    ("ADP-STR-009", "block", "a dtype is not the card's dtype",
     "All factors have the one dtype that the card declares; DoRA's magnitudes are F32."),
    ("ADP-STR-010", "block", "the base is not known",
     "Without the shapes of its base an adapter cannot be checked. Add the base to the known ones."),
    ("ADP-STR-020", "block", "the keys are of several dialects",
     "Loaders read one dialect and drop the keys of the others without a word: what runs is not what was "
     "seen."),
    ("ADP-STR-021", "review", "loaders take only a part of this layout",
     "diffusers drops the image stream's attention of PixelSmile's release and halves the rest. `registry "
     "import` writes a file that every loader reads whole."),
    ("ADP-STR-011", "block", "two keys name the same tensor",
     "Loaders that rename keys keep one of the two, and which one differs from loader to loader."),
    ("ADP-STR-012", "block", "a name imitates another",
     "It differs from a module of the base in case, blanks, leading zeros or characters that look alike: "
     "people and lists of allowed names take it for the real one."),
    ("ADP-STR-013", "block", "the file carries whole weights or biases",
     "They replace or shift the base's own weights, beyond what an update of low rank can do and what is "
     "checked."),
    ("ADP-STR-014", "block", "the file is of another method than LoRA",
     "LoKr, LoHa, OFT, IA3 and others are no product B @ A: what is checked here says nothing about them."),
    ("ADP-STR-015", "review", "the rank is larger than the module can use",
     "A product B @ A has at most the rank of the module's smaller side: the rest of the factors is room for "
     "something else."),
    ("ADP-STR-016", "review", "the adapter changes a text encoder",
     "Its card declares it and its family allows it, but text-encoder weights are the lever of published "
     "LoRA backdoors, and the probe of the behaviour looks at the denoiser alone."),
    ("ADP-STR-017", "block", "only some modules have a DoRA magnitude",
     "A loader gives every layer a magnitude or none; what it makes of the others is not what was trained."),
    ("ADP-NUM-001", "block", "a number is not finite",
     "NaN and infinity destroy every image, and tests with thresholds pass them."),
    ("ADP-NUM-002", "block", "a number overflows float16",
     "Above 65504 it becomes infinite when a loader casts to float16."),
    ("ADP-NUM-003", "block", "the adapter does nothing",
     "Every update is zero: the export failed, or the weights were replaced."),
    ("ADP-NUM-004", "review", "a module does nothing",
     "Its update is zero although training reaches it: it was cut out or never trained."),
    ("ADP-NUM-005", "block", "a module of the last block changes what training cannot reach",
     "The last block discards its text output, so these modules never get a gradient. An update there was "
     "not made by training."),
    ("ADP-NUM-006", "block", "an update is absurdly large",
     "The spectral norm of B @ A, or a DoRA magnitude, is far beyond what training gives; it would drown the "
     "base model."),
    ("ADP-NUM-007", "review", "the factors are out of balance",
     "One factor is huge, the other tiny: their product loses precision, and a change of scale hides there."),
    ("ADP-NUM-008", "review", "components of an update cancel each other",
     "Huge components whose sum is small hide what the update is: rounding, merging or cutting the rank "
     "brings out something else than what was looked at."),
    ("ADP-NUM-009", "review", "an update changes when it is cast to float16",
     "A factor is so small that float16 drops it. Who loads the adapter in another type gets another adapter "
     "than the one that was evaluated."),
    ("ADP-NUM-010", "block", "text or another file is inside the numbers",
     "Trained numbers spell nothing. Weights carry data past every check of files; export them again."),
    ("ADP-NUM-011", "review", "the last bits of the numbers are not those of rounding",
     "Data written over the lowest bits leaves no trace in pictures, but one in how often the bits are set."),
    ("ADP-NUM-012", "review", "the adapter rescales the base's own weights (DoRA)",
     "How much depends on the lengths of the base's rows, which are not in the file: the effect of the "
     "adapter cannot be bounded from its bytes. Whoever accepts it relies on the evaluation."),
    ("ADP-NUM-013", "block", "a DoRA magnitude is not positive",
     "It is the length of a row of the trained weight: zero silences an output of the base, and a negative "
     "one turns it round. No training does that."),
    ("ADP-WGT-001", "review", "the weights are unlike those of clean adapters",
     "Beside clean adapters of the same base, rank and recipe its statistics are more unusual than all but "
     "the few that chance gives. Alone it proves nothing: an unusual training looks unusual too."),
    ("ADP-BEH-001", "review", "the adapter answers to something that its card does not declare",
     "A probe of the adapter on its base stands out from clean adapters: a word, a look-alike or a patch may "
     "be a trigger. The behaviour statement names the suspicious tokens."),
    ("ADP-BEH-002", "block", "the probe of the behaviour failed the adapter",
     "A signed behaviour statement says fail, about the adapter or about a pair that it belongs to."),
    ("ADP-BEH-003", "review", "two adapters answer together to what neither does alone",
     "Serving may load adapters together; two harmless ones can be the halves of a backdoor."),
    ("ADP-PRV-001", "block", "no signed training statement is about exactly these bytes",
     "Without a publisher's statement over this manifest, which binds the weights, nobody says what recipe, "
     "dataset and base made them."),
)  # fmt: skip
