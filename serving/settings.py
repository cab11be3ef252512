"""Settings of serving: ``ADAPTER_FOUNDRY_SERVING_<KEY>``, then ``[serving]`` of the file, then defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from registry.settings import load as _load


class ServingSettings(BaseModel):
    """Settings of serving.

    Attributes:
        bases: base model id -> the folder that holds it, for bases kept outside of the data folder.
        device: where a base runs: ``cpu``, ``cuda``, ``cuda:1`` …
        dtype: of the base's weights; None is float32 on a CPU and bfloat16 elsewhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bases: Mapping[str, Path] = Field(default_factory=dict)
    device: str = Field(default="cpu", pattern=r"^(cpu|mps|xpu|cuda(:[0-9]{1,3})?)$")
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


def load(env: Mapping[str, str] | None = None, home: Path | None = None) -> ServingSettings:
    """Read the settings.

    Args:
        env: environment variables; None is the environment of this process.
        home: the data folder; None is the registry's.

    Raises:
        registry.errors.UsageError: a setting is unknown or has a wrong value.
    """
    return _load("serving", ServingSettings, env, data_folder=home)
