"""A word where a model chose its attention backend itself, and that keeps no NVFP4 (MiMo-V2's on Hopper)."""

from typing import Any

from ..compat.dependence import Patch
from ..nvfp4 import KV_DTYPES
from .wrapping import wrap


def _apply() -> None:
    from vllm.model_executor.layers.attention import Attention

    wrap(Attention, "__init__", say_what_keeps_no_nvfp4, "vllm")


def say_what_keeps_no_nvfp4(original: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
    """Attention.__init__; then a warning, once a backend, if the layer's was asked for an NVFP4 cache and
    does not list it. vLLM asks that of backends that it chooses itself, not of a model's."""
    original(layer, *args, **kwargs)
    dtype, backend = getattr(layer, "kv_cache_dtype", None), getattr(layer, "attn_backend", None)
    if dtype not in KV_DTYPES or backend is None or backend.supports_kv_cache_dtype(dtype):
        return
    from vllm.logger import init_logger

    init_logger(__name__).warning_once(
        "--kv-cache-dtype %s: expected an attention backend that keeps NVFP4, got %s, which the model chose "
        "itself: these layers' tokens are not in NVFP4 (fp8 takes as much memory, and says what it is)",
        dtype, backend.get_name(),
    )  # fmt: skip


PATCH = Patch(
    feature="a warning where a model's own attention backend keeps no NVFP4",
    owner="vllm.model_executor.layers.attention:Attention",
    why="a model that names its backend gets it, also where that takes --kv-cache-dtype nvfp4 and keeps fp8",
    how="wrapped: looks at a layer's backend after vLLM has made the layer",
    remove_when="vLLM refuses a model's backend that does not list the KV cache dtype",
    methods={"__init__": "attn_backend"},
    apply=_apply,
)
