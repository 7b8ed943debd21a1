"""The plugin's own settings, from the environment and from ``kv_connector_extra_config``.

    setting                  environment                          extra config             default
    debug                    VLLM_XLAYER_DEBUG                    -                        0
    host_bytes               VLLM_XLAYER_HOST_BYTES               host_bytes               4 GiB
    gather_workspace_bytes   VLLM_XLAYER_GATHER_WORKSPACE_BYTES   gather_workspace_bytes   256 MiB
    scale_choice             VLLM_XLAYER_SCALE_CHOICE             scale_choice             best_of_9

The extra config wins over the environment, since it is said to one engine. The environment also has
those settings that are of use without a connector.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm_xlayer.nvfp4 import ScaleChoice

PREFIX = "VLLM_XLAYER_"
BUILD_VARIABLES = frozenset({"VLLM_XLAYER_CUDA"})
"""Read by setup.py; they may still be set when the package runs."""


class ConfigError(ValueError):
    """A setting is unknown or has a bad value; says which, what was expected and what came."""


@dataclass(frozen=True)
class Config:
    """Settings of one process."""

    debug: bool = False
    """Check slots and other arguments whose check costs a synchronisation."""
    host_bytes: int = 4 << 30
    """Host memory of the connector's tier."""
    gather_workspace_bytes: int = 256 << 20
    """Upper limit of the buffer that cached NVFP4 tokens are dequantised into."""
    scale_choice: ScaleChoice = ScaleChoice.BEST_OF_9
    """How the writer picks block scales."""

    @classmethod
    def load(
        cls,
        extra_config: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        other_keys: Collection[str] = (),
        default_host_bytes: int = 4 << 30,
    ) -> "Config":
        """Reads and checks all settings.

        Args:
            extra_config: ``kv_connector_extra_config``, None without a connector.
            env: the environment, os.environ where None.
            other_keys: keys of the extra config that are somebody else's (vLLM's): not looked at.
            default_host_bytes: the host tier where nobody says its size.

        Raises:
            ConfigError: an unknown VLLM_XLAYER_ variable, an unknown key, or a bad value.
        """
        env = os.environ if env is None else env
        extra_config = {} if extra_config is None else extra_config
        names = [field.name for field in fields(cls)]
        variables = {PREFIX + name.upper(): name for name in names}
        keys = [name for name in names if name != "debug"]
        ours = sorted(name for name in env if name.startswith(PREFIX) and name not in BUILD_VARIABLES)
        for variable in ours:
            if variable not in variables:
                raise ConfigError(f"environment: expected one of {', '.join(variables)}, got {variable}")
        for key in extra_config:
            if key not in keys and key not in other_keys:
                raise ConfigError(f"kv_connector_extra_config: expected one of {', '.join(keys)}, got {key}")
        values: dict[str, Any] = {"host_bytes": default_host_bytes}
        for variable in ours:
            values[variables[variable]] = _parse(variable, variables[variable], env[variable])
        for key in keys:
            if key in extra_config:
                values[key] = _parse(f"kv_connector_extra_config.{key}", key, extra_config[key])
        return cls(**values)


def _parse(source: str, name: str, value: Any) -> Any:
    """One value, as text from the environment or as JSON gives it."""
    if name == "debug":
        return _parse_bool(source, value)
    if name == "scale_choice":
        return _parse_scale_choice(source, value)
    return _parse_bytes(source, value)


def _parse_bool(source: str, value: str) -> bool:
    if value not in ("0", "1"):
        raise ConfigError(f"{source}: expected 0 or 1, got {value!r}")
    return value == "1"


def _parse_bytes(source: str, value: Any) -> int:
    # isdecimal alone would take other scripts' digits; int alone would take " 5_0 " and True.
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{source}: expected a positive number of bytes, got {value!r}")
    return value


def _parse_scale_choice(source: str, value: Any) -> ScaleChoice:
    choices = {choice.name.lower(): choice for choice in ScaleChoice}
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{source}: expected one of {', '.join(choices)}, got {value!r}")
    return choices[value]
