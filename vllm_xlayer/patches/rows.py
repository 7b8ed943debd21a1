"""Rows: make vLLM 0.26 allocate the KV cache with one contiguous row a block."""

import functools

from ..layout import NegotiationError, one_line
from .registry import FOUND, Finding, Patch, Phase, missing, not_needed
from .wrapping import wrap

FEATURE = "cross-layer rows"


def _probe() -> Finding:
    import inspect

    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import KVCacheTensor

    if "layer_stride" in KVCacheTensor.__dataclass_fields__:
        return not_needed("the connector class asks for a layout")
    parameters = list(inspect.signature(kv_cache_utils._use_packed_kv_cache_config).parameters)
    if parameters != ["vllm_config", "kv_cache_groups"]:
        return missing(f"expected parameters vllm_config, kv_cache_groups, got {', '.join(parameters)}")
    return FOUND


def _apply() -> None:
    from vllm.v1.core import kv_cache_utils

    wrap(kv_cache_utils, "_use_packed_kv_cache_config", use_rows_where_asked, "vllm")


def use_rows_where_asked(original, vllm_config, kv_cache_groups) -> bool:
    """True where upstream says so, and for every model served with XLayerConnector."""
    from .. import compat

    if original(vllm_config, kv_cache_groups):
        return True
    api = compat.current()
    if not kv_cache_groups or not api.asks_for_rows(vllm_config):
        return False
    decision = api.negotiate_rows(vllm_config, kv_cache_groups)
    _log_once(one_line(decision))
    return True


@functools.cache
def _log_once(line: str) -> None:
    from vllm.logger import init_logger

    init_logger(__name__).info("%s", line)


__all__ = ["FEATURE", "PATCHES", "NegotiationError"]

PATCHES = (
    Patch(
        target="vllm.v1.core.kv_cache_utils._use_packed_kv_cache_config",
        why="a model with one KV cache group gets one tensor a layer, so a block moves in one copy a layer",
        how="answers yes for models served with XLayerConnector; both runners then honour the block stride",
        upstream="vllm-project/vllm#42082",
        remove_when="the function is gone (vLLM 0.33 negotiates layouts with the connector class)",
        phase=Phase.PLUGIN,
        probe=_probe,
        apply=_apply,
    ),
)
