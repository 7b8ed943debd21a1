"""The connector vLLM creates: vLLM's OffloadingConnector with rows and our copy path.

Block hashing, lookup, eviction and scheduling are vLLM's. What is ours: the layout the KV
cache must have (rows), the check that the engine really allocated it, and the copies.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import ParallelConfig, VllmConfig
from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import OffloadingConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadPromMetrics
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.forward_context import ForwardContext
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.base import OffloadingSpec
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from ..compat.dependence import CONNECTOR_FEATURE
from ..compat.private import require
from ..compat.rows import allocations, negotiate_rows
from ..config import ConnectorSettings
from ..layout import RowDescriptor, check_allocation, row_line
from .disk.identity import tier_identity
from .disk.jobs import Unused
from .disk.manager import TieredManager
from .disk.weights import loaded_weights
from .failure_policy import recompute_failed_loads
from .flushes import flushed_first
from .limits import NotServedError, check_served
from .scheduler import RowConnectorScheduler
from .spec import DiskSettings, RowOffloadingSpec, default_host_bytes, least_rows
from .stats.metrics import RowConnectorStats
from .worker import RowConnectorWorker

logger = init_logger(__name__)

OUR_SPEC = RowOffloadingSpec.__name__
OffloadingSpecFactory.register_spec(OUR_SPEC, RowOffloadingSpec.__module__, OUR_SPEC)


class XLayerConnector(OffloadingConnector):
    """Stores and loads whole rows; see the module docstring.

    ``kv_connector_extra_config`` takes what OffloadingConnector takes, and ConnectorSettings.

    Attributes:
        loads_follow_streams: What it writes to blocks waits for what the model's stream has by then.

    Attributes (worker side, after `register_kv_caches`):
        layout: What was negotiated; what a transfer peer or a tier must agree with.
        pool: uint8 [num_blocks, row_bytes], the whole KV cache of this rank.
    """

    loads_follow_streams = True

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        # Not OffloadingConnector's: it would create the spec from the class name in the user's config.
        KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)
        require(CONNECTOR_FEATURE)
        decision = negotiate_rows(vllm_config, kv_cache_config)
        self.layout: RowDescriptor = decision.descriptor
        self.pool: torch.Tensor | None = None
        self.zeroed_early = vllm_config.use_v2_model_runner and kv_cache_config.needs_kv_cache_zeroing
        transfer = vllm_config.kv_transfer_config
        assert transfer is not None
        ours = _has_our_spec(transfer.kv_connector_extra_config)
        check_served(vllm_config, kv_cache_config, self.layout, ours)
        if role == KVConnectorRole.WORKER:
            logger.info("XLayerConnector: %s", row_line(decision))
        spec = _offloading_spec(vllm_config, kv_cache_config, self.layout, role)
        self.connector_scheduler = None
        self.connector_worker = None
        if role == KVConnectorRole.SCHEDULER:
            scheduler = RowConnectorScheduler if ours else OffloadingConnectorScheduler
            self.connector_scheduler = scheduler(spec, vllm_config, kv_cache_config)
            if ours:
                recompute_failed_loads(vllm_config, type(self).__name__)
        else:
            worker = RowConnectorWorker if ours else OffloadingConnectorWorker
            self.connector_worker = worker(spec, vllm_config, kv_cache_config)

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        return "BLHNC"

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """kv_caches: layer name -> its view of the pool, of attention layers (B, H, N, C)."""
        assert self.connector_worker is not None
        if self.zeroed_early and not flushed_first():
            raise NotServedError(
                "XLayerConnector cannot serve this model on model runner V2: expected to be called before "
                "new blocks are zeroed, and this vLLM's runner is another (`vllm-xlayer doctor` says what is "
                "missing): set VLLM_USE_V2_MODEL_RUNNER=0, or leave --kv-connector out"
            )
        own = [name for group in self.layout.groups for name in group.layers]
        check_allocation(self.layout, allocations({n: kv_caches[n] for n in own}))
        storage = kv_caches[own[0]].untyped_storage()
        self.pool = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self.pool = self.pool.view(-1, self.layout.row_bytes)
        if isinstance(self.connector_worker, RowConnectorWorker):
            assert isinstance(self.connector_worker.spec, RowOffloadingSpec)
            self.connector_worker.spec.early_loads = _all_follow_streams()
            self.connector_worker.register_pool(self.pool, self.layout)
        else:
            self.connector_worker.register_kv_caches(dict(kv_caches))

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        # Both runners call this after all that a step does to blocks before its launch.
        super().bind_connector_metadata(connector_metadata)
        if isinstance(self.connector_worker, RowConnectorWorker):
            assert isinstance(connector_metadata, OffloadingConnectorMetadata)
            self.connector_worker.before_launch(connector_metadata)

    def before_blocks_change(self, connector_metadata: KVConnectorMetadata) -> None:
        """Worker side, on model runner V2: `handle_preemptions` in time, which vLLM calls once more later."""
        super().handle_preemptions(connector_metadata)

    def start_load_kv(self, forward_context: ForwardContext, **kwargs: Any) -> None:
        if isinstance(self.connector_worker, RowConnectorWorker):
            # Runner V2 passes what it ran, V1 the context in which it ran; where neither did, there is none.
            self.connector_worker.model_ran = bool(kwargs) or forward_context.attn_metadata is not None
        super().start_load_kv(forward_context, **kwargs)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = super().get_transfer_results(finished_req_ids)
        if isinstance(self.connector_worker, RowConnectorWorker):
            results.failed_recving |= self.connector_worker.take_failed_loads()
        return results

    def before_sleep(self, collective_rpc: Callable[..., list[Any]]) -> None:
        """Scheduler side: the next reset is because the engine sleeps. Runs functions on all its workers."""
        if not isinstance(self.connector_scheduler, RowConnectorScheduler):
            return
        manager, jobs = self.connector_scheduler.manager, {*self.connector_scheduler._jobs}

        def weights() -> list[Any]:
            # The reset gives their host memory away, and vLLM 0.31 fills it from the disk without waiting.
            collective_rpc(_end_transfers, args=(jobs,))
            return collective_rpc(loaded_weights)

        if isinstance(manager, TieredManager):
            manager.disk.sleep.begins(weights)

    def before_weights_may_change(self, collective_rpc: Callable[..., list[Any]]) -> None:
        """Scheduler side: as before a sleep, but that no reset follows. What the disk has counts again if the
        weights are seen to be the same when it is asked next. Runs functions on all workers."""
        scheduler = self.connector_scheduler
        if isinstance(scheduler, RowConnectorScheduler) and isinstance(scheduler.manager, TieredManager):
            scheduler.manager.disk.wake()  # what an earlier call has left open
            self.before_sleep(collective_rpc)
            scheduler.manager.disk.forget()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return RowConnectorStats() if data is None else RowConnectorStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        config = _naming_our_spec(vllm_config)
        return OffloadPromMetrics(config, metric_types, labelnames, per_engine_labelvalues)


def _end_transfers(worker: Any, jobs: set[int]) -> None:
    """Run in a worker: returns when none of these jobs touches memory any more."""
    group = get_kv_transfer_group()
    for one in getattr(group, "_connectors", [group]):
        if isinstance(one, XLayerConnector):
            one.handle_preemptions(OffloadingConnectorMetadata({}, {}, jobs))


def _all_follow_streams() -> bool:
    """Of all connectors of this worker; of others than ours nothing is known."""
    if not has_kv_transfer_group():
        return True
    group = get_kv_transfer_group()
    return all(getattr(one, "loads_follow_streams", False) for one in getattr(group, "_connectors", [group]))


def _naming_our_spec(vllm_config: VllmConfig) -> VllmConfig:
    """With the name of our spec, where the user has named no other: vLLM registers the metrics of the spec
    that is named, and asserts that it knows every metric it is sent."""
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    if not _has_our_spec(transfer.kv_connector_extra_config):
        return vllm_config
    named = copy.copy(vllm_config)
    named.kv_transfer_config = copy.copy(transfer)
    named.kv_transfer_config.kv_connector_extra_config = {
        **transfer.kv_connector_extra_config, "spec_name": OUR_SPEC
    }  # fmt: skip
    return named


def _has_our_spec(extra: Mapping[str, Any]) -> bool:
    """Whether the tiers are ours; the user may have named another spec."""
    return extra.get("spec_name", CPUOffloadingSpec.__name__) in (CPUOffloadingSpec.__name__, OUR_SPEC)


def _offloading_spec(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, layout: RowDescriptor, role: KVConnectorRole
) -> OffloadingSpec:
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    extra = transfer.kv_connector_extra_config
    if not _has_our_spec(extra):
        if role == KVConnectorRole.SCHEDULER:
            logger.warning(
                "XLayerConnector: spec_name %s: this package's copies, disk tier and metrics are off, and a "
                "copy that fails ends the engine. Without spec_name they are on.", extra["spec_name"],
            )  # fmt: skip
        return OffloadingSpecFactory.create_spec(build_offloading_config(vllm_config, kv_cache_config))
    settings = ConnectorSettings.read(extra)
    config = build_offloading_config(vllm_config, kv_cache_config)
    host_bytes = settings.cpu_bytes_to_use or default_host_bytes(_block_bytes(config), len(layout.groups))
    if role == KVConnectorRole.SCHEDULER:
        _say_if_small(config, host_bytes, len(layout.groups))
        latents = vllm_config.model_config.use_mla and kv_cache_config.kv_tp_replicas > 1
        if latents and not config.replicated_layout:
            _say_that_each_has_a_copy(vllm_config.parallel_config)
    config = replace(config, extra_config={**extra, "cpu_bytes_to_use": host_bytes})
    disk = _disk_settings(vllm_config, layout, settings, config)
    if disk is not None and (reason := off_one_host(vllm_config.parallel_config)):
        if role == KVConnectorRole.SCHEDULER:
            logger.warning(
                "XLayerConnector: the engine runs without its disk tier, which needs all ranks on the "
                "scheduler's host: %s. The host tier works as it does without a disk tier", reason,
            )  # fmt: skip
        disk = None
    # Users may give two engines one id.
    engine = f"{transfer.engine_id} {vllm_config.instance_id}"
    return RowOffloadingSpec(config, disk, engine=engine, takes_failures=True)


def _say_that_each_has_a_copy(parallel: ParallelConfig) -> None:
    logger.warning(
        "XLayerConnector: each rank keeps its own copy of latents, which are equal. The tiers have one for "
        "all with tensor parallelism alone, of ranks that the engine starts on its host "
        "(distributed_executor_backend mp), got tensor parallelism of %d, %d ranks, backend %s on %d nodes",
        parallel.tensor_parallel_size, parallel.world_size, parallel.distributed_executor_backend,
        parallel.nnodes_within_dp,
    )  # fmt: skip


def _block_bytes(config: OffloadingConfig) -> int:
    """Of one block in host memory, all ranks."""
    return config.worker_kv_bytes_per_block * (1 if config.replicated_layout else config.parallel.world_size)


def _say_if_small(config: OffloadingConfig, host_bytes: int, groups: int) -> None:
    """Hybrid models have rows of tens of megabytes, and a prompt's blocks in every group."""
    least = least_rows(groups) * _block_bytes(config)
    if groups > 1 and host_bytes < least:
        logger.warning(
            "XLayerConnector: the host tier holds %d blocks of %d bytes, which %d KV cache groups share: few "
            "prompts will be found again. Expected cpu_bytes_to_use of at least %d, got %d",
            host_bytes // _block_bytes(config), _block_bytes(config), groups, least, host_bytes,
        )  # fmt: skip


def _disk_settings(
    vllm_config: VllmConfig, layout: RowDescriptor, settings: ConnectorSettings, config: OffloadingConfig
) -> DiskSettings | None:
    if settings.disk_path is None or settings.disk_bytes_to_use is None:
        return None
    chunk, one_copy = config.cache.blocks_per_chunk, config.replicated_layout
    return DiskSettings(
        path=Path(settings.disk_path),
        limit=settings.disk_bytes_to_use,
        identity=lambda: tier_identity(vllm_config, layout, chunk, one_copy),
        in_process=vllm_config.parallel_config.distributed_executor_backend == "uni",
        unused=Unused(layout.row_bytes, {i: list(layout.gaps(i)) for i in range(len(layout.groups))}),
    )


def off_one_host(parallel: ParallelConfig) -> str:
    """Why the configuration alone says that ranks do not share the scheduler's memory; else empty.

    Not the proof that they do: that is what the scheduler is told when it takes the memory (host/memory.py).
    """
    if parallel.nnodes_within_dp > 1:
        return f"expected one node, got {parallel.nnodes_within_dp} (--nnodes)"
    if parallel.distributed_executor_backend == "external_launcher":
        return "with distributed_executor_backend external_launcher each rank has a scheduler of its own"
    return ""
