"""Whether the installed vLLM can be served: decided by its features, not by its version."""

import importlib.metadata
import importlib.util

SUPPORTED = "vLLM 0.31 to 0.33"


class UnsupportedVllm(RuntimeError):
    """The installed vLLM lacks something that this package is built on, or there is none."""


def check_vllm() -> None:
    """Returns if the installed vLLM has what this package is built on.

    Raises:
        UnsupportedVllm: says what is missing, and which versions are served.
    """
    try:
        version = importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        raise UnsupportedVllm(f"expected {SUPPORTED} to be installed, found none") from None
    if problem := missing_feature():
        raise UnsupportedVllm(f"expected {SUPPORTED}, found {version}: {problem}")


def missing_feature() -> str | None:
    """What this vLLM lacks, or None.

    Rows need layouts that are negotiated with the connector (0.29); failed loads are told by request since
    0.30; a backend's block sizes depend on the cache spec since 0.31.
    """
    import inspect

    if importlib.util.find_spec("vllm.v1.kv_cache_layout") is None:
        return "there is no vllm.v1.kv_cache_layout"
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheTensor, KVQuantMode

    if "layer_stride" not in KVCacheTensor.__dataclass_fields__:
        return "KVCacheTensor has no layer_stride"
    if "kv_cache_layout" not in KVCacheConfig.__dataclass_fields__:
        return "KVCacheConfig has no kv_cache_layout"
    if not hasattr(KVQuantMode, "NVFP4"):
        return "KVQuantMode has no NVFP4"
    if "kv_cache_spec" not in inspect.signature(AttentionBackend.get_supported_kernel_block_sizes).parameters:
        return "AttentionBackend.get_supported_kernel_block_sizes takes no kv_cache_spec"
    return None
