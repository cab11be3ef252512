"""First layer: is the file one safetensors container and nothing else, and is its metadata harmless?"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Final

from registry.content import Content
from registry.formats import CANONICAL, FormatError, Header, Problem, Rules, read_header
from registry.scanning.polyglots import MAGIC_BYTES, hidden, is_tar, named_by_magic, pickle_import, polyglot
from registry.scanning.report import Finding, finding

_RULE_OF: Final[Mapping[Problem, str]] = {
    "size": "ADP-CON-001",
    "header-length": "ADP-CON-003",
    "json": "ADP-CON-004",
    "duplicate-key": "ADP-CON-005",
    "entry": "ADP-CON-006",
    "dtype": "ADP-CON-007",
    "offsets": "ADP-CON-008",
    "layout": "ADP-CON-009",
    "metadata": "ADP-CON-010",
    "spelling": "ADP-CON-011",
    "alignment": "ADP-CON-012",
}
# Names that loaders look at to scale an adapter or to build it in another way.
_STRENGTH = re.compile(
    r"alpha|adapter_metadata|scal(e|ing)|rslora|rank_pattern|network_(dim|args)", re.IGNORECASE
)
_LABEL = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)*", re.ASCII)
_CODE = re.compile(
    r"<\s*(script|iframe|svg|img)|javascript:|__import__|__reduce__|!!python/|\$\{|\{\{|\{%|<\?php|#!/"
    r"|\b(os\.system|subprocess\.|eval\(|exec\(|powershell|/bin/(ba)?sh)",
    re.IGNORECASE,
)
_ENCODED = re.compile(r"[A-Za-z0-9+/_=-]{129}|data:[a-z]+/|(?:%[0-9A-Fa-f]{2}){8}|(?:\\x[0-9A-Fa-f]{2}){8}")
_WAY_OUT = re.compile(r"\.\.[/\\]|file://|\\\\[A-Za-z0-9]", re.IGNORECASE)

_LOADABLE: Final = frozenset(
    [
        *(
            ".safetensors",
            ".bin",
            ".pt",
            ".pth",
            ".pt2",
            ".ckpt",
            ".pkl",
            ".pickle",
            ".dill",
            ".joblib",
            ".dat",
        ),
        *(".npy", ".npz", ".h5", ".hdf5", ".keras", ".onnx", ".gguf", ".ggml", ".pb", ".tflite", ".mlmodel"),
        *(".msgpack", ".nemo", ".mar", ".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"),
        *(".whl", ".egg", ".jar", ".py", ".pyc", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".ps1"),
    ]
)
_HARMLESS: Final = frozenset({"a page", "a document or a picture"})  # previews, and the scanner's own report
_BESIDE_BYTES: Final = 512


def check(weights: Content, rules: Rules = CANONICAL) -> tuple[Header | None, list[Finding]]:
    """Return the container's table of contents (None when it cannot be trusted) and the findings.

    Args:
        weights: the bytes of the file, hostile; of the tensors, the first few hundred of each are read.
        rules: what the container may have; metadata is judged as an adapter's only under ``CANONICAL``.
    """
    foreign = polyglot(weights)
    if foreign:
        return None, [finding("ADP-CON-002", "the file", foreign)]
    try:
        header = read_header(weights, rules)
    except FormatError as error:
        return None, [finding(_RULE_OF[error.problem], "the header", error.message)]
    findings = [
        finding("ADP-CON-013", key, f"it begins like {what}") for key, what in hidden(weights, header)
    ]
    return header, findings + _metadata_findings(header.metadata, canonical=rules is CANONICAL)


def beside(files: Mapping[str, Content | None], weights: str) -> list[Finding]:
    """Return what else in the adapter's folder a loader could take for weights, or run.

    diffusers falls back to a pickle when it finds no safetensors file, and other programs prefer one. Nothing
    of it is opened as what it claims to be: the name is looked at, and the first bytes.

    Args:
        files: name -> bytes of every entry of the folder, hostile; None for what is no plain file.
        weights: the name of the file that is scanned.
    """
    findings = []
    for name, content in sorted(files.items()):
        if name == weights:
            continue
        suffixes = {suffix.lower().strip() for suffix in PurePath(name.rstrip(". ")).suffixes}
        if content is None:
            findings.append(finding("ADP-CON-020", name, "it is a link, a folder or a device"))
        elif suffixes & _LOADABLE:
            findings.append(finding("ADP-CON-020", name, f"its name ends in {' '.join(sorted(suffixes))}"))
        else:
            kind = _kind(content)
            if kind is not None:
                findings.append(finding("ADP-CON-020", name, f"it begins like {kind}"))
    return findings


def _kind(content: Content) -> str | None:
    """Return what a file really is, if its first bytes tell; its name says nothing."""
    first = content[:_BESIDE_BYTES]
    if first[3:9] == b"\0\0\0\0\0{":
        return "a safetensors file"
    if is_tar(first):
        return "a tar archive"
    name = named_by_magic(first[:MAGIC_BYTES])
    if name is not None:
        return None if name in _HARMLESS else name
    imported = pickle_import(content, 0)
    return f"a pickle: it {imported}" if imported else None


def _metadata_findings(metadata: Mapping[str, str], *, canonical: bool) -> list[Finding]:
    findings = []
    for key, value in metadata.items():
        where = f"metadata {key}"
        code = _CODE.search(key) or _CODE.search(value)
        if code is not None:
            findings.append(finding("ADP-CON-014", where, f"code: {code[0]}"))
        if not canonical:
            continue
        hidden = _ENCODED.search(value) or _WAY_OUT.search(value)
        if _STRENGTH.search(key):
            findings.append(finding("ADP-MET-001", where, value[:100]))
        elif not _LABEL.fullmatch(key):
            findings.append(finding("ADP-CON-010", where, "its name is not a lower-case label"))
        elif key == "format" and value != "pt":
            findings.append(finding("ADP-CON-010", where, f"{value!r} instead of 'pt'"))
        elif hidden is not None and code is None:
            findings.append(
                finding("ADP-CON-014", where, f"encoded data, or a way to other files: {hidden[0]}")
            )
    return findings
