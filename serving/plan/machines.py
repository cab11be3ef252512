"""The machines that a plan reckons with: what they hold, what they can do, what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

GIB: Final = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A GPU, or a small computer without one.

    Attributes:
        name: as recipes write it.
        memory: bytes that the driver shows; None is not judged.
        peak: floating-point operations a second, dense bf16 with fp32 sums (CPU: fp32, two cores).
        price: US dollars an hour on demand; an assumption of this table, to be replaced by ``--price``.
        utilisation: share of ``peak`` at which the counted operations are assumed to run.
    """

    name: str
    memory: int | None
    peak: float
    price: float
    utilisation: float


def _gpu(name: str, mebibytes: int, teraflops: float, price: float) -> Machine:
    return Machine(name=name, memory=mebibytes << 20, peak=teraflops * 1e12, price=price, utilisation=0.4)


# Peaks from NVIDIA's data sheets (SXM parts, no sparsity), memory as nvidia-smi shows it.
MACHINES: Final[Mapping[str, Machine]] = MappingProxyType(
    {
        machine.name: machine
        for machine in (
            _gpu("H200", 143_771, 989, 3.5),
            _gpu("H100", 81_559, 989, 2.5),
            _gpu("A100", 81_920, 312, 1.8),
            _gpu("L40S", 46_068, 362, 1.1),
            _gpu("RTX4090", 24_564, 165, 0.5),
            Machine(name="CPU", memory=None, peak=0.25e12, price=0.1, utilisation=0.4),
        )
    }
)
