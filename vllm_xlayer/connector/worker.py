"""The connector in a worker process: vLLM's, where a transfer may fail.

vLLM asserts that every transfer succeeded. Here a failed load is told to vLLM as a request that received
nothing, and every failure to the scheduler's side of the connector, which then drops what was lost.
"""

from dataclasses import dataclass, field

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorWorkerMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.base import (
    CanonicalKVCacheRef,
    CanonicalKVCaches,
    CanonicalKVCacheTensor,
    OffloadingSpec,
    TransferResult,
)

from ..layout import RowDescriptor
from .offloading_worker import NoTierWorker, RowOffloadingWorker


@dataclass
class RowWorkerMetadata(OffloadingWorkerMetadata):
    """What the workers tell the scheduler after a step."""

    failed_jobs: set[int] = field(default_factory=set)
    """Jobs that some worker could not do; they are in completed_jobs as well."""
    problem: str = ""
    """Why some worker has no tier; said once."""
    rows_stored: int = 0
    rows_loaded: int = 0
    """Rows of transfers that ended well, added up over ranks: their bytes differ between KV cache groups."""
    ready: int = 0
    """Workers whose host memory may be used from now on; each says so once."""

    def aggregate(self, other: KVConnectorWorkerMetadata) -> "RowWorkerMetadata":
        assert isinstance(other, RowWorkerMetadata)
        merged = super().aggregate(other)
        assert isinstance(merged, OffloadingWorkerMetadata)
        return RowWorkerMetadata(
            merged.completed_jobs,
            merged.transfer_stats,
            self.failed_jobs | other.failed_jobs,
            self.problem or other.problem,
            self.rows_stored + other.rows_stored,
            self.rows_loaded + other.rows_loaded,
            self.ready + other.ready,
        )


class RowConnectorWorker(OffloadingConnectorWorker):
    """Takes what OffloadingConnectorWorker takes; the spec must be a RowOffloadingSpec."""

    worker: RowOffloadingWorker | NoTierWorker | None  # type: ignore[assignment]
    _connector_worker_meta: RowWorkerMetadata

    def __init__(self, spec: OffloadingSpec, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig):
        super().__init__(spec, vllm_config, kv_cache_config)
        self._connector_worker_meta = RowWorkerMetadata()
        self._failed_loads: set[str] = set()
        self._said_state = False
        self.model_ran = False
        """In the step that `get_finished` is asked after."""

    def register_pool(self, pool: torch.Tensor, layout: RowDescriptor) -> None:
        """Takes the place of register_kv_caches, which would derive what moves from views of layers.

        Args:
            pool: uint8 [num_blocks, row_bytes].
        """
        groups = [
            [CanonicalKVCacheRef(0, layout.used_bytes(group.group_id))] for group in self.spec.config.groups
        ]
        tensors = [CanonicalKVCacheTensor(pool, layout.row_bytes)]
        self.worker = self.spec.get_worker(CanonicalKVCaches(tensors, groups))  # type: ignore[assignment]

    def before_launch(self, metadata: OffloadingConnectorMetadata) -> None:
        """Called in every step before the model's launch: its loads need not wait for what is launched then.

        vLLM hands them over after the launch. By then the stream has the whole step, which touches none of
        their blocks; what earlier steps still write to them, and this step's zeroing, it has already.
        """
        if metadata.load_jobs and isinstance(self.worker, RowOffloadingWorker):
            self.worker.before_launch()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str], set[str]]:
        """Returns (nothing, requests whose load ended, well or not)."""
        assert self.worker is not None
        results = self.worker.get_finished(self.model_ran)
        return set(), {req for result in results if (req := self._finish(result))}

    def _finish(self, result: TransferResult) -> str | None:
        """Books one transfer; the request that waited for it, if it was a load."""
        meta, job_id = self._connector_worker_meta, result.job_id
        is_load = job_id in self._load_jobs
        request = self._load_jobs.pop(job_id, None)
        meta.mark_completed(job_id)
        rows = 0 if self.worker is None else self.worker.take_rows(job_id)
        if not result.success:
            meta.failed_jobs.add(job_id)
            if request is not None:
                self._failed_loads.add(request)
        elif result.transfer_size is not None and result.transfer_time is not None:
            stats = meta.transfer_stats.load if is_load else meta.transfer_stats.store
            stats.record(result.transfer_size, result.transfer_time)
            if is_load:
                meta.rows_loaded += rows
            else:
                meta.rows_stored += rows
        return request

    def take_failed_loads(self) -> set[str]:
        """Requests whose load failed, since the last call; `get_finished` has returned them as well."""
        failed, self._failed_loads = self._failed_loads, set()
        return failed

    def build_connector_worker_meta(self) -> RowWorkerMetadata | None:
        meta = self._connector_worker_meta
        if self.worker is not None and not self._said_state:
            self._say_state(self.worker)
        if not meta.completed_jobs and not meta.problem and not meta.ready:
            return None
        self._connector_worker_meta = RowWorkerMetadata()
        return meta

    def _say_state(self, worker: RowOffloadingWorker | NoTierWorker) -> None:
        if worker.problem:
            if isinstance(worker, RowOffloadingWorker):  # its memory could not be pinned: let go of it
                worker.shutdown()
                self.worker = NoTierWorker(worker.problem)
            self._connector_worker_meta.problem = worker.problem
        elif worker.ready:
            self._connector_worker_meta.ready = 1
        else:
            return
        self._said_state = True

    def shutdown(self) -> None:
        super().shutdown()
        self._connector_worker_meta = RowWorkerMetadata()
        self._failed_loads.clear()
