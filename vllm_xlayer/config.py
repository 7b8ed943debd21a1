"""The package's own settings, from the environment. (The connector's are vLLM's: kv_connector_extra_config.)

variable                             default      meaning
VLLM_XLAYER_DEBUG                    0            1: check slots, tables and tiers where that costs time
VLLM_XLAYER_GATHER_WORKSPACE_BYTES   256 MiB      buffer that cached NVFP4 tokens are dequantised into
VLLM_XLAYER_SCALE_CHOICE             best_of_9    how the writer picks block scales: amax_6, four_over_six
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .nvfp4 import ScaleChoice

PREFIX = "VLLM_XLAYER_"
OTHER_VARIABLES = frozenset(
    {"VLLM_XLAYER_CUDA", "VLLM_XLAYER_ARCHS", "VLLM_XLAYER_FORCE_SM80", "VLLM_XLAYER_COMMIT"}
)
"""Read by setup.py and by bench/record.py; they may be set when an engine starts."""


class ConfigError(ValueError):
    """A setting is unknown or has a bad value; says which, what was expected and what came."""


@dataclass(frozen=True)
class Config:
    """Settings of one process."""

    debug: bool = False
    gather_workspace_bytes: int = 256 << 20
    scale_choice: ScaleChoice = ScaleChoice.BEST_OF_9

    @classmethod
    def load(cls, env: Mapping[str, str] | None = None) -> "Config":
        """Reads and checks all settings; ``env`` is os.environ where None.

        Raises:
            ConfigError: an unknown VLLM_XLAYER_ variable, or a bad value.
        """
        env = os.environ if env is None else env
        parsers: dict[str, Callable[[str, str], Any]] = {
            "debug": _parse_bool,
            "gather_workspace_bytes": _parse_bytes,
            "scale_choice": _parse_scale_choice,
        }
        names = {PREFIX + name.upper(): name for name in parsers}
        ours = sorted(name for name in env if name.startswith(PREFIX) and name not in OTHER_VARIABLES)
        if unknown := [name for name in ours if name not in names]:
            raise ConfigError(f"environment: expected one of {', '.join(names)}, got {unknown[0]}")
        return cls(**{names[name]: parsers[names[name]](name, env[name]) for name in ours})


def _parse_bool(source: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise ConfigError(f"{source}: expected 0 or 1, got {value!r}")
    return value == "1"


def _parse_bytes(source: str, value: str) -> int:
    # isdecimal alone would take other scripts' digits; int alone would take " 5_0 ".
    if not (value.isascii() and value.isdecimal()) or int(value) < 1:
        raise ConfigError(f"{source}: expected a positive number of bytes, got {value!r}")
    return int(value)


def _parse_scale_choice(source: str, value: str) -> ScaleChoice:
    choices = {choice.name.lower(): choice for choice in ScaleChoice}
    if value not in choices:
        raise ConfigError(f"{source}: expected one of {', '.join(choices)}, got {value!r}")
    return choices[value]
