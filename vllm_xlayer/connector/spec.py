"""The worker's side of the host tier: which host row belongs to which block, and both directions of copies.

The manager (which chunk is where, what is evicted) is host_manager's, on vLLM's CPUOffloadingManager.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from .copy import directions
from .copy.pieces import Runs
from .disk.format import TierIdentity
from .disk.identity import NoIdentity
from .disk.manager import TieredManager
from .disk.tier import DiskTier, Unused
from .host import pinning
from .host.manager import HostTierManager
from .host.memory import GIB, HostShape, scheduler_memory, worker_memory
from .host.pinning import Pinning
from .stats.metrics import DEFINITIONS

logger = init_logger(__name__)


LEAST_ROWS, LEAST_BOUNDARIES = 64, 4
"""A useful host tier: so many blocks, and of so many places in a prompt the blocks of every group."""


def default_host_bytes(row_bytes: int = 0, groups: int = 1) -> int:
    """4 GiB, or what a useful tier needs if that is more, or a quarter of the machine's memory if less.

    Args:
        row_bytes: of one block of all ranks.
        groups: KV cache groups of the model.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(4 * GIB, least_rows(groups) * row_bytes), memory // 4)


def least_rows(groups: int) -> int:
    """Blocks below which a host tier is of little use."""
    return max(LEAST_ROWS, LEAST_BOUNDARIES * groups)


@dataclass(frozen=True)
class DiskSettings:
    """Where the disk tier is.

    Args:
        path: the folder; created if its parent is there.
        limit: bytes of all entries in it, also those of other engines and models.
        engine: a name that no other engine has, known to its scheduler and all its workers.
        identity: says whose KV this engine's is; NoIdentity if it must not outlive the engine.
        in_process: scheduler and worker are in one process.
        unused: what of a row no layer has.
    """

    path: Path
    limit: int
    engine: str
    identity: Callable[[], TierIdentity]
    in_process: bool
    unused: Unused


def _no_tiers(extra_config: dict[str, Any]) -> dict[str, Any]:
    """Without tiers of vLLM's, which there are none of here."""
    return {**extra_config, "secondary_tiers": []}


class RowOffloadingSpec(CPUOffloadingSpec):
    """vLLM's CPU offloading with our managers and worker, which also run where there is no GPU."""

    _worker: OffloadingWorker | None  # type: ignore[assignment]

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        return {**TieringOffloadingSpec.build_metric_definitions(_no_tiers(extra_config)), **DEFINITIONS}

    @classmethod
    def config_info_keys(cls, extra_config: dict[str, Any]) -> tuple[str, ...]:
        """Labels of what our manager says of its configuration; vLLM 0.33 and newer ask."""
        spec = TieringOffloadingSpec if extra_config.get("disk_path") else CPUOffloadingSpec
        return spec.config_info_keys(_no_tiers(extra_config))

    def __init__(self, config: OffloadingConfig, disk: DiskSettings | None = None):
        super().__init__(config)
        self._disk = disk
        self._shape = HostShape(
            chunks=self.num_chunks,
            rows_per_chunk=self.blocks_per_chunk,
            row_bytes=config.worker_kv_bytes_per_block,
            ranks=config.parallel.world_size,
            # With a disk tier the scheduler reads and writes what the workers do.
            shared_as=None if disk is None else disk.engine,
            in_process=disk is None or disk.in_process,
        )

    def get_manager(self) -> OffloadingManager:
        if self._manager is None:
            host = HostTierManager(
                num_chunks=self.num_chunks,
                cache_policy=self.eviction_policy,
                cache_policy_module_path=self.cache_policy_module_path,
                enable_events=self.kv_events_config.enable_kv_cache_events,
                store_threshold=int(self.extra_config.get("store_threshold", 0)),
                max_tracker_size=int(self.extra_config.get("max_tracker_size", 64_000)),
                workers_to_wait_for=self.config.parallel.world_size if pinning.needed() else 0,
                **_info(self),
            )
            self._manager = host if self._disk is None else self._with_disk(host, self._disk)
        return self._manager

    def _with_disk(self, host: HostTierManager, settings: DiskSettings) -> OffloadingManager:
        try:
            view = scheduler_memory(self._shape).numpy()  # first: the workers' side waits for it to be taken
            host.kv_view = view.data
            if int(self.extra_config.get("store_threshold", 0)) >= 2:
                raise NoIdentity("store_threshold does not work with several tiers")
            identity = settings.identity()
            # The host tier must keep room for loads while the disk is behind.
            waiting = max(1, self.num_chunks // 4)
            disk = DiskTier(view, settings.path, settings.limit, identity, waiting, settings.unused)
        except (NoIdentity, OSError, MemoryError) as error:
            logger.warning("XLayerConnector: the engine runs without its disk tier: %s", error)
            return host
        except Exception:  # a vLLM that is not as expected must not end the engine
            logger.exception("XLayerConnector: the engine runs without its disk tier")
            return host
        return TieredManager(host, disk)

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            self._worker = self._make_worker(kv_caches)
        return self._worker

    def _make_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        pool = _pool_of(kv_caches)
        try:
            host, pins = worker_memory(
                self._shape, self.config.parallel.rank, pool.device if pinning.needed() else None
            )
        except MemoryError as error:
            return NoTierWorker(str(error))
        used = [ref.page_size_bytes for (ref,) in kv_caches.group_data_refs]
        return RowOffloadingWorker(
            pool, host, self.blocks_per_chunk, pins, early_loads=self._disk is None, used_bytes=used
        )


def _info(spec: CPUOffloadingSpec) -> dict[str, Any]:
    """What the manager publishes of its configuration, where vLLM asks for that (0.33 does)."""
    return {"info": spec.cpu_info} if hasattr(spec, "cpu_info") else {}


def _pool_of(kv_caches: CanonicalKVCaches) -> torch.Tensor:
    """The pool as uint8 [num_blocks, row_bytes]. ValueError if the cache was not allocated in rows."""
    if len(kv_caches.tensors) != 1:
        raise ValueError(
            f"XLayerConnector: expected one tensor of rows, got {len(kv_caches.tensors)} tensors "
            "(the KV cache is not in cross-layer rows)"
        )
    return kv_caches.tensors[0].tensor.view(torch.uint8)


def _ids(device: GPULoadStoreSpec) -> torch.Tensor:
    """Device blocks, as the copies take them: vLLM has them in 32 bits."""
    return torch.from_numpy(device.block_ids.astype(np.int64))


class RowOffloadingWorker(OffloadingWorker):
    """Moves rows between the device pool and host memory.

    Args:
        pool: uint8 [num_blocks, row_bytes], on the device.
        host: uint8 [num_chunks * blocks_per_chunk, row_bytes].
        blocks_per_chunk: Blocks that the manager treats as one.
        pins: pins the host memory, started and closed with this; None if it need not be.
        early_loads: Whether only this worker's transfers write to the host memory (copy/early_loads.py).
        used_bytes: of a row, for each KV cache group; None is all of it for one group.
    """

    def __init__(
        self,
        pool: torch.Tensor,
        host: torch.Tensor,
        blocks_per_chunk: int,
        pins: Pinning | None = None,
        early_loads: bool = False,
        used_bytes: Sequence[int] | None = None,
    ):
        self.used_bytes = [pool.shape[1]] if used_bytes is None else list(used_bytes)
        self.blocks_per_chunk = blocks_per_chunk
        self.host = host
        self._pins = pins
        self._rows_of: dict[int, int] = {}
        self._store = directions.make_direction(pool, host, pool.device)
        self._load = directions.make_direction(host, pool, pool.device, early=early_loads)
        if pins is not None:
            pins.start()

    @property
    def ready(self) -> bool:
        """Whether transfers may be submitted."""
        return self._pins is None or self._pins.ready

    @property
    def problem(self) -> str:
        """Why that will never be; empty as long as it may."""
        return "" if self._pins is None else self._pins.problem

    @property
    def rows_stored(self) -> int:
        return self._store.rows

    @property
    def rows_loaded(self) -> int:
        return self._load.rows

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        try:
            host_rows = self._host_rows(src_spec, dst_spec)
        except ValueError as error:
            self._store.fail(job_id, error)
        else:
            self._rows_of[job_id] = len(host_rows)
            self._store.submit(job_id, _ids(src_spec), host_rows, self._runs(src_spec))
        return True

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        try:
            host_rows = self._host_rows(dst_spec, src_spec)
        except ValueError as error:
            self._load.fail(job_id, error)
        else:
            self._rows_of[job_id] = len(host_rows)
            self._load.submit(job_id, host_rows, _ids(dst_spec), self._runs(dst_spec))
        return True

    def _host_rows(self, device: GPULoadStoreSpec, host: LoadStoreSpec) -> torch.Tensor:
        """Host row of every device block, in order. A group's first block may lie inside a chunk."""
        if not isinstance(host, BlockIDsLoadStoreSpec):
            raise ValueError(f"transfer: expected host chunks, got {type(host).__name__}")
        n, rows, at = self.blocks_per_chunk, [], 0
        for size, first in zip(device.group_sizes, device.block_indices, strict=True):
            if size == 0:
                continue
            skip = first % n
            chunks = host.block_ids[at : at - (-(skip + size) // n)].astype(np.int64)
            at += len(chunks)
            rows.append((chunks[:, None] * n + np.arange(n)).ravel()[skip : skip + size])
        found = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        if len(found) != len(device.block_ids) or at != len(host.block_ids):
            raise ValueError(
                f"transfer: expected host chunks for {len(device.block_ids)} device blocks, got "
                f"{len(host.block_ids)} chunks of {n} blocks ({len(found)} usable)"
            )
        return torch.from_numpy(found)

    def _runs(self, device: GPULoadStoreSpec) -> Runs:
        """Of every group that has blocks in a transfer: how many, and the bytes that can be its own."""
        found = zip(device.group_sizes, self.used_bytes, strict=True)
        return [(rows, used) for rows, used in found if rows]

    def take_rows(self, job_id: int) -> int:
        """How many rows a transfer had that ended; asked once."""
        return self._rows_of.pop(job_id, 0)

    def before_launch(self) -> None:
        """Loads that are submitted until `get_finished` need not wait for what is launched from now on."""
        self._load.before_launch()

    def get_finished(self, model_ran: bool = True) -> list[TransferResult]:
        """What finished since the last call.

        model_ran: whether it did in the step that this is asked after.
        """
        return self._store.take_finished(model_ran) + self._load.take_finished(model_ran)

    def wait(self, job_ids: set[int]) -> None:
        self._store.wait(job_ids)
        self._load.wait(job_ids)

    def shutdown(self) -> None:
        self._store.drain()
        self._load.drain()
        self._rows_of.clear()
        if self._pins is not None:
            self._pins.close()


class NoTierWorker(OffloadingWorker):
    """Stands in where no host memory was to be had: no transfer succeeds.

    Args:
        problem: Why there is no tier; the scheduler's side is told and stops asking.
    """

    rows_stored = rows_loaded = 0
    ready = False

    def __init__(self, problem: str):
        logger.warning("XLayerConnector: the engine runs without its host tier: %s", problem)
        self.problem = problem
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        self._done.append(TransferResult(job_id, False))
        return True

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        self._done.append(TransferResult(job_id, False))
        return True

    def take_rows(self, job_id: int) -> int:
        return 0

    def get_finished(self, model_ran: bool = True) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        pass
