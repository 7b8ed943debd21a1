"""NVFP4 attention: select our backend on GPUs whose NVFP4 kernels vLLM 0.26 does not have."""

from .registry import FOUND, Finding, Patch, Phase, missing, not_needed
from .wrapping import wrap

FEATURE = "NVFP4 KV cache"
BACKEND = "vllm_xlayer.attention.backend.NVFP4Backend"


def _probe() -> Finding:
    import inspect

    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return not_needed(f"the platform is {current_platform.device_name or current_platform.device_type}")
    found = list(inspect.signature(type(current_platform).get_attn_backend_cls).parameters)
    expected = ["selected_backend", "attn_selector_config", "num_heads"]
    return FOUND if found == expected else missing(f"expected parameters {expected}, got {found}")


def _apply() -> None:
    from vllm.platforms import current_platform

    platform = type(current_platform)
    owner = next(c for c in platform.__mro__ if "get_attn_backend_cls" in vars(c))
    wrap(owner, "get_attn_backend_cls", select_nvfp4_backend, "vllm")


def select_nvfp4_backend(original, cls, selected_backend, attn_selector_config, num_heads=None) -> str:
    """Our backend for nvfp4 where upstream has no kernels; upstream's choice for everything else."""
    config = attn_selector_config
    if config.kv_cache_dtype != "nvfp4" or config.use_mla or cls.is_device_capability_family(100):
        return original(cls, selected_backend, attn_selector_config, num_heads)
    from .. import ops
    from ..attention.backend import NVFP4Backend

    if selected_backend is not None and selected_backend.name != NVFP4Backend.get_name():
        raise ValueError(
            f"--attention-backend: expected none (or {NVFP4Backend.get_name()}) with --kv-cache-dtype nvfp4 "
            f"on this GPU, got {selected_backend.name}, which has no NVFP4 kernels for it"
        )
    if not ops.build_info()["cuda"]:
        raise ValueError(
            "--kv-cache-dtype nvfp4: expected this package's CUDA ops, got a build without them; reinstall "
            "it where nvcc is found (VLLM_XLAYER_CUDA=1 makes a missing one an error)"
        )
    if refusal := NVFP4Backend.explain_refusal(cls.get_device_capability(), config):
        raise ValueError(refusal)
    return BACKEND


PATCHES = (
    Patch(
        target="vllm.platforms.cuda.CudaPlatformBase.get_attn_backend_cls",
        why="--kv-cache-dtype nvfp4 is refused on every GPU but compute capability 10.x",
        how="returns this package's backend for nvfp4 on other GPUs, and upstream's answer for all else",
        upstream="none",
        remove_when="vLLM selects out-of-tree backends by KV cache dtype",
        phase=Phase.PLUGIN,
        probe=_probe,
        apply=_apply,
    ),
)
