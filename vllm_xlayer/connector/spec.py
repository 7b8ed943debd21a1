"""What vLLM's offloading asks for its manager (which chunk is where, what is evicted) and worker (copies)."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingWorker,
)
from vllm.v1.kv_offload.config import OffloadingConfig
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from .disk.format import TierIdentity
from .disk.jobs import Unused
from .disk.manager import TieredManager
from .disk.tier import DiskTier
from .disk.weight_files import NoIdentity
from .host import pinning, recency
from .host.manager import HostTierManager
from .host.memory import GIB, HostShape, scheduler_memory, worker_memory
from .offloading_worker import NoTierWorker, RowOffloadingWorker
from .stats.metrics import DEFINITIONS

logger = init_logger(__name__)


NOT_FROM_ELSEWHERE = (
    "RowOffloadingSpec: expected kv_connector XLayerConnector, got another one with spec_name and "
    "spec_module_path. vLLM's OffloadingConnector ends the engine where a copy fails, does not wait until "
    "host memory is pinned, and asks for a layout (LBHNC) that is not rows. Name XLayerConnector, without "
    "spec_name"
)
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
        identity: says whose KV this engine's is; NoIdentity if it must not outlive the engine.
        in_process: scheduler and worker are in one process.
        unused: what of a row no layer has.
    """

    path: Path
    limit: int
    identity: Callable[[], TierIdentity]
    in_process: bool
    unused: Unused


def _no_tiers(extra_config: dict[str, Any]) -> dict[str, Any]:
    """Without tiers of vLLM's, which there are none of here."""
    return {**extra_config, "secondary_tiers": []}


class RowOffloadingSpec(CPUOffloadingSpec):
    """vLLM's CPU offloading with our managers and worker, which also run where there is no GPU."""

    _worker: OffloadingWorker | None  # type: ignore[assignment]
    early_loads = True
    """Whether loads may be reported shortly before they end; set before the worker is made."""

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        return {**TieringOffloadingSpec.build_metric_definitions(_no_tiers(extra_config)), **DEFINITIONS}

    @classmethod
    def config_info_keys(cls, extra_config: dict[str, Any]) -> tuple[str, ...]:
        """Labels of what our manager says of its configuration; vLLM 0.33 and newer ask."""
        spec = TieringOffloadingSpec if extra_config.get("disk_path") else CPUOffloadingSpec
        return spec.config_info_keys(_no_tiers(extra_config))

    def __init__(
        self,
        config: OffloadingConfig,
        disk: DiskSettings | None = None,
        *,
        engine: str = "",
        takes_failures: bool = False,
    ):
        """vLLM's factory, which passes the configuration alone, is refused.

        Args:
            config: with `replicated_layout`, which vLLM sets where every layer's KV is the same on all ranks
                (latents) and these share a host, the host tier keeps one copy of a row. vLLM's worker then
                stores the first rank's, and a store counts when that rank has it.
            engine: a name that no other engine has, known to its scheduler and all its workers.
            takes_failures: the connector computes what could not be loaded, and asks for rows.

        Raises:
            ValueError: it does not.
        """
        if not takes_failures:
            raise ValueError(NOT_FROM_ELSEWHERE)
        super().__init__(config)
        self._disk = disk
        self._shape = HostShape(
            chunks=self.num_chunks,
            rows_per_chunk=self.blocks_per_chunk,
            row_bytes=config.worker_kv_bytes_per_block,
            ranks=config.parallel.world_size,
            # With a disk tier the scheduler reads and writes what the workers do.
            shared_as=engine if disk is not None or self.replicated_layout else None,
            in_process=disk is not None and disk.in_process,
            one_copy=self.replicated_layout,
        )

    def _uses_shared_region(self) -> bool:
        """Whether ranks can have one copy of equal rows: with this memory they can on every platform."""
        return True

    def get_manager(self) -> OffloadingManager:
        if self._manager is None:
            host = HostTierManager(
                num_chunks=self.num_chunks,
                cache_policy=recency.POLICY if self.eviction_policy == "lru" else self.eviction_policy,
                cache_policy_module_path=self.cache_policy_module_path,
                enable_events=self.kv_events_config.enable_kv_cache_events,
                store_threshold=int(self.extra_config.get("store_threshold", 0)),
                max_tracker_size=int(self.extra_config.get("max_tracker_size", 64_000)),
                workers_to_wait_for=self.config.parallel.world_size if pinning.needed() else 0,
                **_info(self),
            )
            self._manager = self._with_disk(host)
        return self._manager

    def _with_disk(self, host: HostTierManager) -> OffloadingManager:
        """The host tier, with the disk behind it if there is one."""
        if self._shape.shared_as is None:
            return host
        try:  # first: the workers' side waits for it to be taken. It is also the proof that all ranks have it
            memory = scheduler_memory(self._shape)
        except (MemoryError, OSError) as error:
            if self._shape.one_copy:
                host.turn_off(f"the ranks were to have one copy of their rows, which are equal: {error}")
            else:
                logger.warning(
                    "XLayerConnector: the engine runs without its disk tier: %s. The host tier works as it "
                    "does without one", error,
                )  # fmt: skip
            return host
        return host if self._disk is None else self._before_disk(host, memory.numpy(), self._disk)

    def _before_disk(
        self, host: HostTierManager, view: np.ndarray, settings: DiskSettings
    ) -> OffloadingManager:
        try:
            host.kv_view = view.data
            if int(self.extra_config.get("store_threshold", 0)) >= 2:
                raise NoIdentity("store_threshold does not work with several tiers")
            identity = settings.identity()
            # The host tier must keep room for loads while the disk is behind.
            waiting = max(1, self.num_chunks // 4)
            disk = DiskTier(view, settings.path, settings.limit, identity, waiting, settings.unused)
        except (NoIdentity, OSError) as error:
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
        # Else a disk tier or another rank writes to host memory, too.
        early = self.early_loads and self._shape.shared_as is None
        return RowOffloadingWorker(
            pool, host, self.blocks_per_chunk, pins, early_loads=early, used_bytes=used
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
