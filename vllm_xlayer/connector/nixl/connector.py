"""The connector that vLLM creates: its NixlConnector (pull), with rows.

Handshakes, leases, heartbeats, scheduling and failure reports are vLLM's. What is ours: the layout, what two
engines must agree on, and how rows are read.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
    PromMetric,
    PromMetricT,
)
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.connector import NixlBaseConnector, NixlPullConnector
from vllm.distributed.nixl_utils import NixlWrapper
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import KVCacheConfig

from ...compat.private import require
from ...compat.private_nixl import NIXL_FEATURE
from ...compat.rows import negotiate_rows
from ...layout import LayoutDescriptor, RowDescriptor
from ..failure_policy import recompute_failed_loads
from .engine import problems
from .scheduler import RowNixlMetadata, RowNixlScheduler
from .settings import NixlSettings
from .stats import RowNixlPromMetrics, RowNixlStats
from .worker import RowNixlWorker

logger = init_logger(__name__)


class XLayerNixlConnector(NixlPullConnector):
    """Hands rows from a prefill engine to a decode engine; both name this connector.

    ``kv_connector_extra_config`` takes NixlSettings, and most of what NixlConnector takes.

    Raises:
        ValueError: this engine cannot hand over rows, or nixl is not installed; says why.
    """

    loads_follow_streams = True
    """As XLayerConnector's: rows come into the ring first."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        # Not NixlPullConnector's: it would create vLLM's scheduler and worker.
        NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        require(NIXL_FEATURE)
        if NixlWrapper is None:
            raise ValueError('XLayerNixlConnector: nixl is not installed: pip install "vllm-xlayer[nixl]"')
        if wrong := list(problems(vllm_config)):
            raise ValueError(f"XLayerNixlConnector: {'; '.join(wrong)}")
        assert vllm_config.kv_transfer_config is not None
        settings = NixlSettings.read(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self.layout = _uniform(negotiate_rows(vllm_config, kv_cache_config).descriptor)
        if role == KVConnectorRole.SCHEDULER:
            self.connector_scheduler = RowNixlScheduler(vllm_config, self.engine_id, kv_cache_config)
            recompute_failed_loads(vllm_config, type(self).__name__)
        else:
            self.connector_worker = RowNixlWorker(
                vllm_config, self.engine_id, kv_cache_config, self.layout, settings
            )

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        return "BLHNC"

    def bind_kv_cache_manager(self, kv_cache_manager: KVCacheManager) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        assert isinstance(self.connector_scheduler, RowNixlScheduler)
        self.connector_scheduler.kv_cache_manager = kv_cache_manager

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """The worker's, or the scheduler's."""
        if not isinstance(self.connector_scheduler, RowNixlScheduler):
            return super().get_kv_connector_stats()
        stats = self.connector_scheduler.stats
        return None if stats.is_empty() else stats.clone_and_reset()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        return RowNixlStats() if data is None else RowNixlStats(data)

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        return RowNixlPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    def wait_for_save(self) -> None:
        """Both runners call this once a step's work has been launched."""
        super().wait_for_save()
        if isinstance(self.connector_worker, RowNixlWorker):
            assert isinstance(self._connector_metadata, RowNixlMetadata)
            self.connector_worker.seal(self._connector_metadata.seals)


def _uniform(rows: RowDescriptor) -> LayoutDescriptor:
    """Raises ValueError if pages are of several kinds or sizes."""
    if (layout := rows.uniform) is None:
        kinds = "; ".join(f"group {i}: {', '.join(group.kinds)}" for i, group in enumerate(rows.groups))
        raise ValueError(
            f"XLayerNixlConnector: expected pages of one kind and size in all KV cache groups, got {kinds}: "
            "hybrid models cannot be handed over yet"
        )
    return layout
