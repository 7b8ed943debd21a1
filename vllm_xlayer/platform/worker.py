"""The worker: vLLM's CPU worker, without its warm-up, NUMA and thread settings."""

from dataclasses import replace
from typing import Any

import psutil
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import init_worker_distributed_environment

from vllm_xlayer.attention import newest
from vllm_xlayer.attention.cpu import CpuReferenceBackend
from vllm_xlayer.attention.cpu_mla import CpuMlaBackend
from vllm_xlayer.attention.newest_rows import NamedRows, use_rows

DEFAULT_KV_CACHE_BYTES = 2 << 30
"""Most KV cache memory taken where the user asked for no size."""
STATES = ("SHORT_CONV", "GDN_ATTN", "MAMBA2")
"""vLLM's names of the layers with a state in place of a KV cache whose ops this platform has."""


class CpuReferenceRunner(CPUModelRunner):
    """vLLM's, which also says which requests start and end: attention keeps something of each that runs."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        rows = newest.num_rows(vllm_config) if newest.newest_tokens_of(vllm_config) else 0
        self.request_rows = NamedRows(rows, lambda: self.input_batch.req_ids)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        """Before vLLM's: a step's metadata is built after it, of the rows of its own engine's requests."""
        use_rows(self.request_rows)
        self.request_rows.end(scheduler_output.finished_req_ids)
        self.request_rows.end(scheduler_output.preempted_req_ids or ())
        self.request_rows.start(new.req_id for new in scheduler_output.scheduled_new_reqs)
        self.request_rows.start(scheduler_output.scheduled_cached_reqs.resumed_req_ids)
        return super()._update_states(scheduler_output)


class CpuReferenceWorker(CPUWorker):
    """One rank of a model, in float32 or 16 bit, on model runner V1."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        local_rank: int,
        rank: int,
        distributed_init_method: str,
        is_driver_worker: bool = False,
    ) -> None:
        cache_config = vllm_config.cache_config
        self.kv_cache_size_is_default = cache_config.kv_cache_memory_bytes is None
        if self.kv_cache_size_is_default:
            # Without a size the parent wants 92 % of the machine's memory to be free.
            free = psutil.virtual_memory().available
            cache_config.kv_cache_memory_bytes = min(DEFAULT_KV_CACHE_BYTES, free // 4)
        super().__init__(vllm_config, local_rank, rank, distributed_init_method, is_driver_worker)

    def init_device(self) -> None:
        """Set up the process groups and the model runner.

        Not the parent's: that one replaces torch.set_num_threads for the whole process and
        warns about libraries that were not preloaded.
        """
        self.device = torch.device("cpu")
        init_worker_distributed_environment(
            self.vllm_config,
            self.rank,
            self.distributed_init_method,
            self.local_rank,
            current_platform.dist_backend,
        )
        set_random_seed(self.model_config.seed)
        self.model_runner = CpuReferenceRunner(self.vllm_config, self.device)

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """As the parent, with states at block boundaries from chunks that end there.

        Kernels for GPUs also export states from inside a chunk; the ops of this platform do not.
        ValueError where a layer has a state that it has no ops for, or an attention backend of its own.
        """
        self._refuse_other_backends()
        specs = super().get_kv_cache_spec()
        for layer, spec in specs.items():
            if not isinstance(spec, MambaSpec):
                continue
            if spec.mamba_type.name not in STATES:
                raise ValueError(
                    f"CPU reference platform: {layer}: expected {', '.join(STATES)} beside attention, got "
                    f"{spec.mamba_type.name}, whose kernels need a GPU"
                )
            if spec.num_prefill_checkpoint_blocks:
                specs[layer] = replace(
                    spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None
                )
        return specs

    def _refuse_other_backends(self) -> None:
        """Some models do not leave the choice to the platform (MiMo-V2, whose K and V differ in size)."""
        for name, layer in self.vllm_config.compilation_config.static_forward_context.items():
            if not isinstance(layer, Attention | MLAAttention):
                continue
            if not issubclass(backend := layer.get_attn_backend(), CpuReferenceBackend | CpuMlaBackend):
                raise ValueError(
                    f"CPU reference platform: {name}: expected its attention backend to be this package's, "
                    f"got {backend.get_name()}, which the model chose and whose kernels need a GPU"
                )

    def determine_available_memory(self) -> int:
        """Bytes for the KV cache: what was asked for, else what full batches can use, capped.

        The newest tokens' memory is not part of it, as on GPUs. The parent first runs the model on a full
        batch to compile it. Nothing is compiled here.
        """
        limit = self.cache_config.kv_cache_memory_bytes
        assert limit is not None, "kv_cache_memory_bytes: expected bytes, got None"
        if not self.kv_cache_size_is_default:
            return limit
        # Allocating writes every byte: a small model's engine should not wait for gigabytes.
        one_request = sum(
            spec.max_memory_usage_bytes(self.vllm_config) for spec in self.get_kv_cache_spec().values()
        )
        return min(limit, one_request * (self.scheduler_config.max_num_seqs + 1))
