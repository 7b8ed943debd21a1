"""The platform class: vLLM's CPU platform, without the compiled kernels that one needs."""

import functools
import os
import sys
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform
from vllm.platforms.interface import DeviceCapability

from vllm_xlayer.compat import UnsupportedVllm, check_vllm
from vllm_xlayer.compat.dependence import PLATFORM_FEATURE, FeatureUnavailable
from vllm_xlayer.compat.private import require
from vllm_xlayer.nvfp4 import KV_DTYPES
from vllm_xlayer.platform.kernels import define_missing_ops

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

# A library of vLLM's starts compilers in the background when it is imported, of kernels for GPUs.
os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")

logger = init_logger(__name__)

WORKER = "vllm_xlayer.platform.worker.CpuReferenceWorker"
BLOCK_SIZE = 16
DRAFTERS = ("ngram", "eagle", "mtp")
"""Methods of speculative decoding whose kernels this platform has."""
NO_GPU = DeviceCapability(0, 0)
KV_CACHE_DTYPES = ("auto", "bfloat16", "float16", *KV_DTYPES)
RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"


class CpuReferencePlatform(CpuPlatform):
    """Runs the engine of vLLM's CUDA wheel on a CPU: for correctness, never for speed."""

    @classmethod
    def pre_register_and_update(cls, parser: "FlexibleArgumentParser | None" = None) -> None:
        """Chooses model runner V1, before vLLM looks for Triton, which V2 needs, and warns of its absence."""
        os.environ.setdefault(RUNNER_VARIABLE, "0")

    @classmethod
    def import_kernels(cls) -> None:
        define_missing_ops()

    @classmethod
    @functools.cache
    def register_triton_kernel_overrides(cls) -> None:
        """As the parent: replaces Triton's kernels, which it looks for in every object of every module.

        Once a process, as a second engine would look for them again only to wrap what replaced them. One of
        the parent's functions writes to a copy of what is not int64, as temperatures are: ours is taken.
        """
        from vllm.triton_utils import HAS_TRITON
        from vllm.triton_utils.dispatcher import register_kernels
        from vllm.utils import cpu_triton_utils

        from vllm_xlayer.platform.speculation import expand
        from vllm_xlayer.platform.state_copies import KERNELS

        _let_humming_be_looked_at()
        cpu_triton_utils._expand_kernel_impl = expand
        super().register_triton_kernel_overrides()
        if not HAS_TRITON:
            register_kernels(KERNELS)

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: "AttentionBackendEnum | None",
        attn_selector_config: "AttentionSelectorConfig",
        num_heads: int | None = None,
    ) -> str:
        """The class path of this package's attention; ValueError where that cannot serve a layer."""
        from vllm_xlayer.attention.backend import NVFP4Backend
        from vllm_xlayer.attention.cpu import CpuReferenceBackend
        from vllm_xlayer.attention.cpu_mla import CpuMlaBackend

        ours = CpuMlaBackend if attn_selector_config.use_mla else CpuReferenceBackend
        reasons = ours.validate_configuration(device_capability=NO_GPU, **attn_selector_config._asdict())
        names = [ours.get_name()]
        if ours is CpuReferenceBackend:  # its place on a GPU has this package's kernels, by this name
            names.append(NVFP4Backend.get_name())
        if selected_backend is not None and selected_backend.name not in names:
            reasons.append(f"attention backend {selected_backend.name} needs a GPU")
        if reasons:
            raise ValueError(f"CPU reference platform: {'; '.join(reasons)} ({attn_selector_config})")
        return f"{ours.__module__}.{ours.__qualname__}"

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        from vllm.config import CompilationMode

        try:
            check_vllm()
            require(PLATFORM_FEATURE)
        except (UnsupportedVllm, FeatureUnavailable) as error:
            raise ValueError(f"{PLATFORM_FEATURE}: {error}") from error
        refusal = _machine_refusal(vllm_config) or _refusal(vllm_config)
        if refusal is not None:
            raise ValueError(f"CPU reference platform: {refusal}")
        parallel_config, cache_config = vllm_config.parallel_config, vllm_config.cache_config
        preload = os.environ.get("LD_PRELOAD")
        if parallel_config.worker_cls == "auto":
            parallel_config.worker_cls = WORKER
        kept = (
            # The parent prepares thread binding: a process of its own for the worker, with libraries
            # preloaded. Nothing is bound here.
            (parallel_config, "distributed_executor_backend"),
            # For the sake of its own kernels: of states with AVX-512, of latent attention anywhere.
            (cache_config, "mamba_ssm_cache_dtype"),
            (cache_config, "block_size"),
            (cache_config, "enable_prefix_caching"),
            (vllm_config.scheduler_config, "enable_chunked_prefill"),
            (vllm_config.scheduler_config, "max_num_batched_tokens"),
        )
        before = [getattr(config, name) for config, name in kept]
        cache_config.mamba_ssm_cache_dtype = "float32"
        super().check_and_update_config(vllm_config)
        for (config, name), value in zip(kept, before, strict=True):
            setattr(config, name, value)
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # Threads that spin while they wait make small models ten times slower on a busy machine.
        # This process has read the setting already: it is for the engine's own processes.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload

        if not cache_config.user_specified_block_size:
            cache_config.block_size = BLOCK_SIZE
        _leave_out_triton(vllm_config)
        vllm_config.compilation_config.mode = CompilationMode.NONE
        vllm_config.compilation_config.custom_ops = ["none"]

    @classmethod
    def discover_numa_topology(cls) -> list[list[int]]:
        """None: vLLM's NixlConnector would pin the worker to the last core of each node, and two engines on
        one machine to the same one."""
        return []

    @classmethod
    def update_block_size_for_backend(cls, vllm_config: "VllmConfig") -> None:
        """As on GPUs, where layers left out of an nvfp4 cache get a block size that fits both."""
        super(CpuPlatform, cls).update_block_size_for_backend(vllm_config)


def _machine_refusal(vllm_config: "VllmConfig") -> str | None:
    """Why this platform cannot run in this environment, or None."""
    from vllm.triton_utils import HAS_TRITON

    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" and HAS_TRITON:
        return (
            'CUDA_VISIBLE_DEVICES="" makes vLLM take Triton for usable, which finds no driver here: unset '
            "the variable"
        )
    if vllm_config.use_v2_model_runner:
        return f"model runner V2 is not supported (it needs Triton): unset {RUNNER_VARIABLE}"
    return None


def _leave_out_triton(vllm_config: "VllmConfig") -> None:
    """Takes back the choice that vLLM makes for models with heads of several sizes (Gemma 4)."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if vllm_config.attention_config.backend == AttentionBackendEnum.TRITON_ATTN:
        logger.info("CPU reference platform: attention backend TRITON_ATTN is replaced by this package's")
        vllm_config.attention_config.backend = None


def _let_humming_be_looked_at() -> None:
    """Lets its object for the current GPU say that it lacks an attribute, in place of loading the driver.

    Up to 0.1.16, which vLLM 0.31 brings along, whoever looks at the object on a machine without a GPU gets an
    ImportError. To be removed with vLLM 0.31.
    """
    module = sys.modules.get("humming.device")
    try:
        hasattr(getattr(module, "current_device", None), "__dict__")
    except ImportError:
        info = module.DeviceInfo  # type: ignore[union-attr]
        original = info.__getattr__

        def get(self: object, name: str) -> object:
            if name.startswith("_"):
                raise AttributeError(name)
            return original(self, name)

        info.__getattr__ = get


def _refusal(vllm_config: "VllmConfig") -> str | None:
    """Why this platform cannot run that configuration, or None."""
    cache_config, parallel_config = vllm_config.cache_config, vllm_config.parallel_config
    if cache_config.cache_dtype not in KV_CACHE_DTYPES:
        return f"kv_cache_dtype: expected one of {', '.join(KV_CACHE_DTYPES)}, got {cache_config.cache_dtype}"
    if cache_config.block_size is not None and cache_config.block_size % BLOCK_SIZE != 0:
        return f"block_size: expected a multiple of {BLOCK_SIZE}, got {cache_config.block_size}"
    if parallel_config.decode_context_parallel_size > 1 or parallel_config.prefill_context_parallel_size > 1:
        return "context parallelism is not supported"
    model_config = vllm_config.model_config
    if (speculative := vllm_config.speculative_config) is not None:
        if speculative.method not in DRAFTERS:
            return (
                f"speculative decoding: expected method {', '.join(DRAFTERS)}, got {speculative.method}, "
                "whose kernels need Triton"
            )
        is_hybrid = model_config is not None and model_config.is_hybrid
        # vLLM's path on CPUs keeps a state for each draft of gated delta nets only.
        if is_hybrid and not hasattr(model_config.hf_text_config, "linear_num_value_heads"):
            return "speculative decoding of models with states beside attention: expected gated delta nets"
    if model_config is None:
        return None
    if model_config.is_attention_free:
        return "models without attention are not supported"
    if model_config.is_encoder_decoder:
        return "encoder-decoder models are not supported"
    return None
