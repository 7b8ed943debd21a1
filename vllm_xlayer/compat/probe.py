"""Which compatibility module fits the installed vLLM: decided by features, not by version strings."""

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import cache
from types import ModuleType


class UnsupportedVllm(RuntimeError):
    """No compatibility module fits the installed vLLM."""


def _packed_rows() -> str | None:
    """0.26: rows come from ``KVCacheTensor.block_stride``; later versions have layouts instead."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import KVCacheTensor, KVQuantMode

    if "block_stride" not in KVCacheTensor.__dataclass_fields__:
        return "KVCacheTensor has no block_stride"
    if not hasattr(kv_cache_utils, "_use_packed_kv_cache_config"):
        return "kv_cache_utils has no _use_packed_kv_cache_config"
    if not hasattr(KVQuantMode, "NVFP4"):
        return "KVQuantMode has no NVFP4"
    return None


def _layouts() -> str | None:
    from vllm.v1.kv_cache_interface import KVCacheTensor

    return None if "layer_stride" in KVCacheTensor.__dataclass_fields__ else "KVCacheTensor has no layer_stride"


CANDIDATES: dict[str, Callable[[], str | None]] = {"v0_31": _layouts, "v0_26": _packed_rows}
"""Module name -> a function that returns None where it fits, else what is missing."""


@cache
def current() -> ModuleType:
    """The compatibility module for the installed vLLM.

    Raises:
        UnsupportedVllm: vLLM is not installed, or none fits; says what each one missed.
    """
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedVllm("expected vLLM 0.26 to be installed, found none") from None
    misses = []
    for name, probe in CANDIDATES.items():
        try:
            reason = probe()
        except ImportError as error:
            reason = str(error)
        if reason is None:
            return importlib.import_module(f".{name}", __package__)
        misses.append(f"{name}: {reason}")
    raise UnsupportedVllm(f"expected vLLM 0.26, found {version} ({'; '.join(misses)})")
