"""The platform class: vLLM's CPU platform, without the compiled kernels that one needs."""

import os
from typing import TYPE_CHECKING

from vllm.logger import init_logger
from vllm.platforms.cpu import CpuPlatform

from vllm_xlayer.platform.kernels import define_missing_ops

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

logger = init_logger(__name__)

ATTENTION_BACKEND = "vllm_xlayer.attention.cpu.CpuReferenceBackend"
WORKER = "vllm_xlayer.platform.worker.CpuReferenceWorker"
BLOCK_SIZE = 16


class CpuReferencePlatform(CpuPlatform):
    """Runs the engine of vLLM's CUDA wheel on a CPU: for correctness, never for speed."""

    @classmethod
    def import_kernels(cls) -> None:
        define_missing_ops()

    @classmethod
    def get_attn_backend_cls(
        cls,
        selected_backend: "AttentionBackendEnum | None",
        attn_selector_config: "AttentionSelectorConfig",
        num_heads: int | None = None,
    ) -> str:
        return ATTENTION_BACKEND

    @classmethod
    def check_and_update_config(cls, vllm_config: "VllmConfig") -> None:
        from vllm.config import CompilationMode

        parallel_config = vllm_config.parallel_config
        executor, preload = parallel_config.distributed_executor_backend, os.environ.get("LD_PRELOAD")
        if parallel_config.worker_cls == "auto":
            parallel_config.worker_cls = WORKER
        cache_config = vllm_config.cache_config
        super().check_and_update_config(vllm_config)

        # The parent serves thread binding: a process of its own for the worker, and libraries
        # preloaded into it. Nothing is bound here.
        parallel_config.distributed_executor_backend = executor
        if preload is None:
            os.environ.pop("LD_PRELOAD", None)
        else:
            os.environ["LD_PRELOAD"] = preload

        if not cache_config.user_specified_block_size:
            cache_config.block_size = BLOCK_SIZE

        compilation_config = vllm_config.compilation_config
        compilation_config.mode = CompilationMode.NONE
        compilation_config.custom_ops = ["none"]
