"""The connector vLLM creates: vLLM's OffloadingConnector with rows and our copy path.

Block hashing, lookup, eviction and scheduling are vLLM's. What is ours: the layout the KV
cache must have (rows), the check that the engine really allocated it, and the copies.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from vllm.config import ParallelConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.config import build_offloading_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadPromMetrics
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.base import OffloadingSpec
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from .. import compat
from ..layout import LayoutDescriptor, check_allocation
from ..patches.registry import REGISTRY
from ..patches.rows import FEATURE as ROWS
from .identity import tier_identity
from .metrics import RowConnectorStats, RowPromMetrics
from .offload import DiskSettings, RowOffloadingSpec, default_host_bytes
from .scheduler import RowConnectorScheduler
from .worker import RowConnectorWorker

logger = init_logger(__name__)


class XLayerConnector(OffloadingConnector):
    """Stores and loads whole rows; see the module docstring.

    ``kv_connector_extra_config`` takes what OffloadingConnector takes; ``cpu_bytes_to_use``
    (bytes of the host tier over all ranks) has a default here. ``disk_path`` names the folder of
    a disk tier, ``disk_bytes_to_use`` bounds it.

    Attributes (worker side, after `register_kv_caches`):
        layout: What was negotiated; what a transfer peer or a tier must agree with.
        pool: uint8 [num_blocks, row_bytes], the whole KV cache of this rank.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        # Not OffloadingConnector's: it would create the spec from the class name in the user's config.
        KVConnectorBase_V1.__init__(self, vllm_config, role, kv_cache_config)
        REGISTRY.require(ROWS)
        groups = compat.current().groups_with_own_pages(kv_cache_config)
        self.layout: LayoutDescriptor = compat.current().negotiate_rows(vllm_config, groups).descriptor
        self.pool: torch.Tensor | None = None
        spec = _offloading_spec(vllm_config, kv_cache_config, self.layout, role)
        self.connector_scheduler = None
        self.connector_worker = None
        ours = isinstance(spec, RowOffloadingSpec)
        if role == KVConnectorRole.SCHEDULER:
            scheduler = RowConnectorScheduler if ours else OffloadingConnectorScheduler
            self.connector_scheduler = scheduler(spec, vllm_config, kv_cache_config)
            if ours:
                _recompute_failed_loads(vllm_config)
        else:
            worker = RowConnectorWorker if ours else OffloadingConnectorWorker
            self.connector_worker = worker(spec, kv_cache_config)

    @property
    def prefer_cross_layer_blocks(self) -> bool:
        # Runner V1 would answer "yes" with one tensor in BHLNC, in which NVFP4 pages are not dense.
        # Rows come from the block stride of the allocation instead, on both runners.
        return False

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """kv_caches: layer name -> (B, H, N, C) view of the pool."""
        assert self.connector_worker is not None
        own = [name for group in self.layout.groups for name in group.layers]
        check_allocation(self.layout, compat.current().allocations({n: kv_caches[n] for n in own}))
        storage = kv_caches[own[0]].untyped_storage()
        self.pool = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self.pool = self.pool.view(-1, self.layout.row_bytes)
        self.connector_worker.register_kv_caches(dict(kv_caches))

    def wait_for_save(self) -> None:
        # vLLM's runners call this in steps only in which the model runs.
        if isinstance(self.connector_worker, RowConnectorWorker):
            self.connector_worker.model_ran = True

    def get_block_ids_with_load_errors(self) -> set[int]:
        if isinstance(self.connector_worker, RowConnectorWorker):
            return self.connector_worker.take_invalid_blocks()
        return set()

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
        assert vllm_config.kv_transfer_config is not None
        ours = _has_our_spec(vllm_config.kv_transfer_config.kv_connector_extra_config)
        make = RowPromMetrics if ours else OffloadPromMetrics
        return make(vllm_config, metric_types, labelnames, per_engine_labelvalues)


def _has_our_spec(extra: Mapping[str, Any]) -> bool:
    """Whether the tiers are ours; the user may have named another spec of vLLM's."""
    return extra.get("spec_name", "CPUOffloadingSpec") == "CPUOffloadingSpec"


def _recompute_failed_loads(vllm_config: VllmConfig) -> None:
    """vLLM ends requests whose load failed, unless told otherwise. It reads the policy after this."""
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    if transfer.kv_load_failure_policy != "recompute":
        logger.info(
            "XLayerConnector: kv_load_failure_policy is recompute (was %s): no request ends because "
            "its KV could not be loaded", transfer.kv_load_failure_policy,
        )  # fmt: skip
        transfer.kv_load_failure_policy = "recompute"


def _offloading_spec(
    vllm_config: VllmConfig, kv_cache_config: KVCacheConfig, layout: LayoutDescriptor, role: KVConnectorRole
) -> OffloadingSpec:
    assert vllm_config.kv_transfer_config is not None
    _check_block_size(vllm_config.kv_transfer_config.kv_connector_extra_config, kv_cache_config)
    config = build_offloading_config(vllm_config, kv_cache_config)
    extra = dict(config.extra_config)
    if not _has_our_spec(extra):
        return OffloadingSpecFactory.create_spec(config)
    extra.setdefault("cpu_bytes_to_use", default_host_bytes())
    disk = _disk_settings(vllm_config, layout, extra, config.cache.blocks_per_chunk)
    if disk is not None and (reason := off_one_host(vllm_config.parallel_config)):
        if role == KVConnectorRole.SCHEDULER:
            logger.warning(
                "XLayerConnector: the engine runs without its disk tier, which needs all ranks on the "
                "scheduler's host: %s. The host tier works as it does without a disk tier", reason,
            )  # fmt: skip
        disk = None
    if disk is not None and role == KVConnectorRole.SCHEDULER:
        compat.current().use_stable_block_hashes()
    return RowOffloadingSpec(replace(config, extra_config=extra), disk)


def _check_block_size(extra: Mapping[str, Any], kv_cache_config: KVCacheConfig) -> None:
    """vLLM asserts this, without a word."""
    size = extra.get("block_size")
    for group in kv_cache_config.kv_cache_groups:
        tokens = group.kv_cache_spec.block_size
        if size is not None and (int(size) <= 0 or int(size) % tokens):
            raise ValueError(
                f"kv_connector_extra_config: block_size: expected a multiple of {tokens}, got {size}"
            )


def _disk_settings(
    vllm_config: VllmConfig, layout: LayoutDescriptor, extra: dict[str, Any], blocks_per_chunk: int
) -> DiskSettings | None:
    path, limit = extra.get("disk_path"), extra.get("disk_bytes_to_use")
    if path is None and limit is None:
        return None
    if not isinstance(path, str) or not path:
        raise ValueError(f"kv_connector_extra_config: disk_path: expected a folder, got {path!r}")
    if not isinstance(limit, int) or isinstance(limit, bool) or limit <= 0:
        raise ValueError(
            f"kv_connector_extra_config: disk_bytes_to_use: expected a number of bytes above 0, got {limit!r}"
        )
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    return DiskSettings(
        path=Path(path),
        limit=limit,
        # Users may give two engines one id.
        engine=f"{transfer.engine_id} {vllm_config.instance_id}",
        identity=lambda: tier_identity(vllm_config, layout, blocks_per_chunk),
        in_process=vllm_config.parallel_config.distributed_executor_backend == "uni",
    )


def off_one_host(parallel: ParallelConfig) -> str:
    """Why the configuration alone says that ranks do not share the scheduler's memory; else empty.

    Not the proof that they do: that is what the scheduler is told when it takes the memory (host_memory.py).
    """
    if parallel.nnodes_within_dp > 1:
        return f"expected one node, got {parallel.nnodes_within_dp} (--nnodes)"
    if parallel.distributed_executor_backend == "external_launcher":
        return "with distributed_executor_backend external_launcher each rank has a scheduler of its own"
    return ""
