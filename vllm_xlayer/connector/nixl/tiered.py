"""Hand-over and tiers in one connector: of a prompt the tiers load what they have, the link the rest.

vLLM's MultiConnector has both as its connectors, and does for each what it does for any. It gives a prompt to
one of them; here both can load a part of it.
"""

import copy
import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    PromMetric,
    PromMetricT,
)
from vllm.distributed.kv_transfer.kv_connector.v1.multi_connector import (
    MultiConnector,
    MultiKVConnectorMetadata,
)
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request

from ...compat.extension_points import CONNECTOR, NIXL_CONNECTOR, TIERED_NIXL_CONNECTOR
from ...compat.private import require
from ..failure_policy import recompute_failed_loads
from .parts import Joining, Parts, cut
from .settings import settings_of_both

if TYPE_CHECKING:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource  # not in vLLM 0.31

NOTHING = Parts(0, 0, 0)
OF_THE_WHOLE = ("kv_connector", "kv_connector_module_path", "kv_connector_extra_config", "engine_id")
"""Settings that are not handed on to the two as they are."""


@dataclass
class TieredNixlMetadata(MultiKVConnectorMetadata):
    """What workers are told in a step.

    Attributes:
        both: requests whose blocks both of the two begin to load.
    """

    both: frozenset[str] = frozenset()


class XLayerTieredNixlConnector(MultiConnector):
    """XLayerNixlConnector and XLayerConnector as one; see the module docstring.

    ``kv_connector_extra_config`` takes what either of the two takes.

    Raises:
        ConfigError: neither of them knows a key.
        ValueError: one of the two cannot serve this engine; says why.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        require(TIERED_NIXL_CONNECTOR)
        super().__init__(_with_both(vllm_config), role, kv_cache_config)
        if role == KVConnectorRole.SCHEDULER:
            recompute_failed_loads(vllm_config, type(self).__name__)
        self.link, self.tiers = self.sub_connectors
        self.block_sizes = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
        self.parts: dict[str, Parts] = {}
        """Scheduler side: request -> what it was told that can be loaded, when it asked last."""
        self.begun: set[str] = set()
        """Scheduler side: requests that both load from the next step on."""
        self.joining = Joining()
        """Worker side."""

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: VllmConfig) -> str | None:
        return "BLHNC"

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        return super().build_prom_metrics(
            _with_both(vllm_config), metric_types, labelnames, per_engine_labelvalues
        )

    # The scheduler's side.

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        self.parts.pop(request.request_id, None)
        offered, _ = self.link.get_num_new_matched_tokens(request, num_computed_tokens)
        held, later = self.tiers.get_num_new_matched_tokens(request, num_computed_tokens)
        if offered is None or held is None:
            return None, False
        if offered and not later:  # within the step, as another spec than ours may load
            held = 0
        parts = cut(num_computed_tokens, held, offered, self.block_sizes)
        self.parts[request.request_id] = parts
        return parts.loaded, later or parts.link > 0

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        """Groups whose new blocks are not zeroed, since whoever loads a part loads all of it."""
        parts = self.parts.get(request.request_id, NOTHING)
        loading = [one for one, tokens in ((self.tiers, parts.tiers), (self.link, parts.link)) if tokens]
        groups = [set(one.get_loaded_kv_cache_group_ids(request)) for one in loading]
        return tuple(sorted(set.intersection(*groups))) if groups else ()

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> "dict[CacheHitSource, int]":
        parts = self.parts.get(request.request_id, NOTHING)
        sources: Counter[CacheHitSource] = Counter()
        for one, tokens in ((self.tiers, parts.tiers), (self.link, parts.link)):
            sources.update(one.get_external_cache_hit_sources(request, tokens))
        return dict(sources)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        parts = self.parts.get(request.request_id, NOTHING)
        if num_external_tokens != parts.loaded:
            # Nothing is to be loaded, or less than was offered: then one of the two sees to it.
            one = dict(link=num_external_tokens) if parts.link else dict(tiers=num_external_tokens)
            parts = NOTHING._replace(**one)
            self.parts[request.request_id] = parts
        self.tiers.update_state_after_alloc(request, blocks, parts.tiers)
        if parts.both:
            blocks = self._after(blocks, parts.computed + parts.tiers)
            self.begun.add(request.request_id)
        # The link reads every block that it is shown and that has no hash yet. Also without tokens it tells
        # the other engine that it need not keep them.
        self.link.update_state_after_alloc(request, blocks, parts.link)

    def _after(self, blocks: KVCacheBlocks, tokens: int) -> KVCacheBlocks:
        """Without the blocks of the first tokens, which end a block in every group."""
        groups = zip(blocks.blocks, self.block_sizes, strict=True)
        return KVCacheBlocks(tuple(group[tokens // size :] for group, size in groups))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> TieredNixlMetadata:
        meta = super().build_connector_meta(scheduler_output)
        begun, self.begun = self.begun, set()
        return TieredNixlMetadata(meta.metadata, meta.extra_async_saves, frozenset(begun))

    def request_finished(self, request: Request, blocks: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self.parts.pop(request.request_id, None)
        return super().request_finished(request, blocks)

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self.parts.pop(request.request_id, None)
        return super().request_finished_all_groups(request, block_ids)

    # The worker's side.

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(connector_metadata, TieredNixlMetadata)
        self.joining.begin(connector_metadata.both)
        super().bind_connector_metadata(connector_metadata)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        results = KVConnectorTransferResults()
        for part, one in enumerate((self.link, self.tiers)):
            its = one.get_transfer_results(finished_req_ids)
            finished, failed = self.joining.ended(part, its.finished_recving, its.failed_recving)
            results.finished_recving |= finished
            results.failed_recving |= failed
            results.finished_sending |= its.finished_sending  # the link's only: tiers keep no blocks
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """None: both name the requests that failed, and of a request in two parts the blocks of one would
        make vLLM believe in the other, which may still be under way."""
        super().get_block_ids_with_load_errors()
        return set()


def _with_both(vllm_config: VllmConfig) -> VllmConfig:
    """As it would be for MultiConnector, with our two as its connectors.

    Raises:
        ConfigError: neither of them knows a key of kv_connector_extra_config.
    """
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    names = (field.name for field in dataclasses.fields(transfer))
    common = {name: getattr(transfer, name) for name in names if name not in OF_THE_WHOLE}
    common["kv_load_failure_policy"] = "recompute"
    extras = zip(
        (NIXL_CONNECTOR, CONNECTOR), settings_of_both(transfer.kv_connector_extra_config), strict=True
    )
    connectors = [
        common | {"kv_connector": name, "kv_connector_extra_config": extra} for name, extra in extras
    ]
    config = copy.copy(vllm_config)
    config.kv_transfer_config = dataclasses.replace(
        transfer, kv_connector_extra_config={"connectors": connectors}
    )
    return config
