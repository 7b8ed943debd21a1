"""What XLayerNixlConnector, and XLayerTieredNixlConnector, read from kv_connector_extra_config."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from ...config import VLLMS_SETTINGS, ByteCount, ConfigError, ConnectorSettings, nearest

VLLMS = (
    "backends",
    "num_threads",
    "kv_lease_duration",
    "engine_ttl",
    "enforce_handshake_compat",
    "kv_recompute_threshold",
)
"""Keys of vLLM's NixlConnector that work here."""
REFUSED = {
    "bidirectional_kv_xfer": "rows go from the prefill engine to the decode engine only",
    "decoder_kv_blocks_ttl": "rows go from the prefill engine to the decode engine only",
}


class NixlSettings(BaseModel, extra="forbid", strict=True, frozen=True):
    """A field's description says what is expected."""

    row_seals: bool = Field(
        True,
        description="true or false, the same on both sides: a tag of its tokens and a checksum beside each "
        "row, without which rows that were given to another request while they waited are not noticed (not "
        "given: true)",
    )
    staging_bytes: ByteCount = Field(
        256 << 20,
        description="bytes of the ring of each rank that rows are read into, and copied from into the cache, "
        "above 0; on a GPU a quarter more while rows of another tensor parallel size come (not given: "
        "256 MiB)",
    )
    read_timeout_seconds: float = Field(
        30.0,
        gt=0,
        strict=False,
        description="seconds that a quarter of the ring may take, or a read wait for one, before the request "
        "is computed, above 0; what a late answer may still write is left alone (not given: 30)",
    )

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> "NixlSettings":
        """Takes ours, and checks that every other key is one of vLLM's.

        Raises:
            ConfigError: an unknown key, a bad value, or one that this package cannot serve.
        """
        known = (*cls.model_fields, *VLLMS)
        where = "XLayerNixlConnector: kv_connector_extra_config"
        for name, value in extra.items():
            if name in REFUSED and value:
                raise ConfigError(f"{where}: {name}: expected nothing, got {value!r}: {REFUSED[name]}")
            if name not in cls.model_fields and name not in VLLMS and name not in REFUSED:
                raise ConfigError(f"{where}: expected {nearest(name, known)}, got unknown key {name!r}")
        try:
            return cls.model_validate({name: extra[name] for name in cls.model_fields if name in extra})
        except ValidationError as error:
            first = error.errors()[0]
            name = str(first["loc"][0])
            expected = cls.model_fields[name].description
            raise ConfigError(f"{where}: {name}: expected {expected}, got {first['input']!r}") from error


def settings_of_both(extra: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """XLayerTieredNixlConnector's keys, cut into XLayerNixlConnector's and XLayerConnector's, which check
    the values.

    Raises:
        ConfigError: a key of neither.
    """
    link = (*NixlSettings.model_fields, *VLLMS, *REFUSED)
    tiers = (*ConnectorSettings.model_fields, *VLLMS_SETTINGS)
    for name in extra:
        if name not in link and name not in tiers:
            raise ConfigError(
                "XLayerTieredNixlConnector: kv_connector_extra_config: expected "
                f"{nearest(name, (*link, *tiers))}, got unknown key {name!r}"
            )
    return (
        {name: value for name, value in extra.items() if name in link},
        {name: value for name, value in extra.items() if name in tiers},
    )
