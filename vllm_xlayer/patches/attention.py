"""NVFP4 attention: this package's backend where it is the faster one, vLLM's where ours refuses."""

from collections.abc import Callable

from ..compat.dependence import Patch
from ..nvfp4 import KV_DTYPES, OURS_FIRST
from .wrapping import wrap

BACKEND = "vllm_xlayer.attention.backend.NVFP4Backend"
OWN_NAME = "CUSTOM"
"""The member of AttentionBackendEnum that vLLM leaves to plugins: it asks for our backend."""
NAMED_BY_VLLM = "TRITON_ATTN"
"""What vLLM names itself for heads of several sizes (Gemma 4) where FlashAttention 4 is missing. It has no
NVFP4."""


def _not_needed() -> str | None:
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        return None
    return f"the platform is {current_platform.device_name or current_platform.device_type}"


def _apply() -> None:
    from vllm.platforms.cuda import CudaPlatformBase

    wrap(CudaPlatformBase, "get_attn_backend_cls", select_nvfp4_backend, "vllm")


def select_nvfp4_backend(original, cls, selected_backend, attn_selector_config, num_heads=None) -> str:
    """The class path of the backend for a layer: as vLLM says for all but NVFP4.

    For NVFP4 on compute capability 8.x and 9.0 it is ours, and vLLM's where ours refuses; elsewhere vLLM's,
    and ours where that refuses. A backend that is named is obeyed, CUSTOM being ours; not
    TRITON_ATTN, which cannot serve NVFP4 and may be vLLM's own choice. On 10.x vLLM's pages hold their scales
    in another order: there it is asked alone.

    Raises:
        ValueError: neither serves the layer; with the reasons of both.
    """
    if selected_backend is not None and selected_backend.name == NAMED_BY_VLLM:
        selected_backend = _not_triton(selected_backend, attn_selector_config)
    name = None if selected_backend is None else selected_backend.name
    config, capability = attn_selector_config, cls.get_device_capability()

    def theirs() -> str:
        return original(cls, selected_backend, config, num_heads)

    def ours() -> str:
        if refusal := _refusal(capability, config):
            raise ValueError(refusal)
        return BACKEND

    if config.kv_cache_dtype not in KV_DTYPES or config.use_mla or capability.major == 10:
        return theirs()
    if name is not None:
        return ours() if name == OWN_NAME else theirs()
    return _first_of(*((ours, theirs) if capability.major in OURS_FIRST else (theirs, ours)))


def _not_triton(selected_backend, config):
    """The backend that was named, or None where that is Triton's and cannot serve the layer."""
    if config.kv_cache_dtype not in KV_DTYPES:
        return selected_backend
    from vllm.logger import init_logger

    said = "%s has no kernels for --kv-cache-dtype %s: the backend is chosen as if none were named."
    init_logger(__name__).warning_once(said, NAMED_BY_VLLM, config.kv_cache_dtype)
    return None


def _first_of(preferred: Callable[[], str], other: Callable[[], str]) -> str:
    from vllm.logger import init_logger

    try:
        return preferred()
    except ValueError as first:
        try:
            found = other()
        except ValueError as second:
            raise ValueError(f"{first}\n{second}") from second
        init_logger(__name__).warning_once("%s So %s serves it.", str(first), found.rpartition(".")[2])
        return found


def _refusal(capability, config) -> str | None:
    """Why our backend cannot serve a layer, in one sentence, or None."""
    from .. import ops
    from ..attention.backend import NVFP4Backend

    cannot = f"vllm-xlayer cannot serve --kv-cache-dtype {config.kv_cache_dtype}"
    try:
        built = ops.build_info()
    except ops.ExtensionMissingError as error:
        return f"{cannot}: {error}"
    if not built["cuda"]:
        return (
            f"{cannot}: expected its CUDA ops, got a build without them; reinstall it where nvcc is found "
            "(VLLM_XLAYER_CUDA=1 makes a missing one an error)."
        )
    return NVFP4Backend.explain_refusal(capability, config)


PATCH = Patch(
    feature="NVFP4 KV cache",
    owner="vllm.platforms.cuda:CudaPlatformBase",
    why="vLLM serves --kv-cache-dtype nvfp4 with its own kernels, and refuses it where they do",
    how="returns this package's backend for NVFP4 layers that it serves, and vLLM's answer for all else",
    remove_when="vLLM selects out-of-tree backends by KV cache dtype",
    methods={"get_attn_backend_cls": "selected_backend attn_selector_config num_heads"},
    apply=_apply,
    not_needed=_not_needed,
)
