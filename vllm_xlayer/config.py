"""The package's settings: of a process, from the environment, and of the connector.

Both are shown in docs/configuration.md, whose tables are made from what stands here.
"""

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from .nvfp4 import ScaleChoice

logger = logging.getLogger(__name__)

PREFIX = "VLLM_XLAYER_"
VARIABLES = {
    "debug": (
        "0",
        "1: check slots, tables (outside CUDA graphs) and tiers where that costs time, and say how much of K "
        "and V the global scales do not suit",
    ),
    "gather_workspace_bytes": ("256 MiB", "buffer that cached NVFP4 tokens are dequantised into, in bytes"),
    "scale_choice": ("best_of_9", "how the writer picks block scales: best_of_9, amax_6 or four_over_six"),
    "kv_scales": ("none", "a file of global scales, which `vllm-xlayer quality --calibrate` writes"),
    "newest_tokens": (
        "64 where they can be",
        "16, 32, 64 or 128: so many of a running request's newest tokens are kept in the model's dtype, too, "
        "and attention reads those instead of their NVFP4 pages, or the start is refused where they cannot "
        "be; 0: off",
    ),
}
"""Fields of Config -> default and meaning, for people. The variable is PREFIX and the name in capitals."""
OTHER_VARIABLES = frozenset(
    {"VLLM_XLAYER_CUDA", "VLLM_XLAYER_ARCHS", "VLLM_XLAYER_FORCE_SM80", "VLLM_XLAYER_COMMIT"}
)
"""Read by setup.py and by provenance.py; they may be set when an engine starts."""


class ConfigError(ValueError):
    """A setting is unknown or has a bad value; says which, what was expected and what came."""


@dataclass(frozen=True)
class Config:
    """Settings of one process."""

    debug: bool = False
    gather_workspace_bytes: int = 256 << 20
    scale_choice: ScaleChoice = ScaleChoice.BEST_OF_9
    kv_scales: Path | None = None
    newest_tokens: int | None = None
    """None: what `attention.newest.newest_tokens_of` says."""

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
            "kv_scales": _parse_file,
            "newest_tokens": _parse_newest_tokens,
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


def _parse_file(source: str, value: str) -> Path:
    if not Path(value).is_file():
        raise ConfigError(f"{source}: expected a file, found none: {value!r}")
    return Path(value)


def _parse_scale_choice(source: str, value: str) -> ScaleChoice:
    choices = {choice.name.lower(): choice for choice in ScaleChoice}
    if value not in choices:
        raise ConfigError(f"{source}: expected one of {', '.join(choices)}, got {value!r}")
    return choices[value]


def _parse_newest_tokens(source: str, value: str) -> int:
    if value not in ("0", "16", "32", "64", "128"):
        raise ConfigError(f"{source}: expected 0, 16, 32, 64 or 128, got {value!r}")
    return int(value)


def nearest(name: Any, known: Sequence[str]) -> str:
    """The known name that is most like one that nobody knows; all of them where none is like it."""
    near = get_close_matches(str(name), known, n=1)
    return near[0] if near else f"one of {', '.join(known)}"


def _whole_number(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


ByteCount = Annotated[int, BeforeValidator(_whole_number), Field(gt=0)]
"""Also 4e9, as JSON has it."""

VLLMS_SETTINGS = {
    "blocks_per_chunk": "blocks that the tiers treat as one",
    "block_size": "the same in tokens",
    "offload_prompt_only": "whether answers stay out of the tiers; vLLM's default is true",
    "eviction_policy": "lru or arc",
    "cache_policy_module_path": "where another eviction_policy comes from",
    "store_threshold": "a chunk is stored when it was computed so often",
    "max_tracker_size": "chunks of which that is counted",
    "self_describing_kv_events": "whether KV events carry tokens",
    "spec_name": "another offloading spec instead of this package's",
    "spec_module_path": "where that comes from",
    "secondary_tiers": "",
    "tier_poll_interval_s": "",
    "backpressure": "",
    "canonical_layout": "",
    "sync_load_budget_bytes": "",
}
"""What vLLM's OffloadingConnector reads from kv_connector_extra_config; without a text: nothing here."""

REFUSED = {
    "canonical_layout": "rows of one tensor-parallel size are not those of another",
    "sync_load_budget_bytes": "a load within a step cannot be computed instead where it fails",
}
"""Why those of vLLM's may not be set."""


class ConnectorSettings(BaseModel, extra="forbid", strict=True, frozen=True):
    """What this package reads from kv_connector_extra_config; a field's description says what is expected."""

    cpu_bytes_to_use: ByteCount | None = Field(
        None,
        description="bytes of the host tier, of all ranks, above 0 (not given: 4 GiB, or a quarter of the "
        "machine's memory where that is less)",
    )
    disk_path: str | None = Field(
        None, min_length=1, description="the folder of the disk tier (not given: there is none)"
    )
    disk_bytes_to_use: ByteCount | None = Field(
        None, description="bytes of all entries in that folder, above 0 (needed with disk_path)"
    )

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> "ConnectorSettings":
        """Takes ours, checks that every other key is one of vLLM's, and warns of those that do nothing.

        Raises:
            ConfigError: an unknown key, a bad value, or one that this package cannot serve.
        """
        known = [*cls.model_fields, *VLLMS_SETTINGS]
        for name, value in extra.items():
            if name not in known:
                raise ConfigError(
                    f"kv_connector_extra_config: expected {nearest(name, known)}, got unknown key {name!r}"
                )
            if name in REFUSED and value:
                raise _bad(name, f"nothing: {REFUSED[name]}", repr(value))
            if VLLMS_SETTINGS.get(name) == "" and name not in REFUSED:
                _say_that_it_does_nothing(name)
        try:
            settings = cls.model_validate({name: extra[name] for name in cls.model_fields if name in extra})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            raise _bad(name, str(cls.model_fields[name].description), repr(first["input"])) from error
        for one, other in (("disk_path", "disk_bytes_to_use"), ("disk_bytes_to_use", "disk_path")):
            if getattr(settings, one) is None and getattr(settings, other) is not None:
                raise _bad(one, str(cls.model_fields[one].description), "none")
        return settings


@functools.cache  # both sides of the connector read the settings
def _say_that_it_does_nothing(name: str) -> None:
    logger.warning("XLayerConnector: kv_connector_extra_config: %s does nothing here", name)


def _bad(name: str, expected: str, got: str) -> ConfigError:
    return ConfigError(f"kv_connector_extra_config: {name}: expected {expected}, got {got}")
