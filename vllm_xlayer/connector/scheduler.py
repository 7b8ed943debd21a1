"""The connector in the scheduler's process: vLLM's, where a transfer may fail.

A request whose load failed is computed, and does not ask the tier again: the next load would be the next
chance to fail, and without that rule a tier that always fails would hold the request up for ever.
"""

import math
import time
from collections.abc import Iterable

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
    RequestOffloadState,
)
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.kv_offload.base import OffloadingSpec, OffloadKey, ReqContext
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request

from ..config import Config
from ..patches.item_names import is_by_content
from .accounting import check_accounts
from .activity import TierActivity, queues
from .disk_tier import HostOnly
from .host_manager import HostTierManager
from .step_news import without_idle
from .tiering import TieredManager
from .worker import RowWorkerMetadata

logger = init_logger(__name__)

TOUCH_SECONDS = 5.0
"""Between two times that a running request's chunks count as used."""


class RowConnectorScheduler(OffloadingConnectorScheduler):
    """Takes what OffloadingConnectorScheduler takes; the spec must be a RowOffloadingSpec.

    With VLLM_XLAYER_DEBUG=1 the tier's accounts are checked after every step.

    Raises:
        AccountingError: (in that mode) they do not balance.
    """

    manager: HostTierManager | TieredManager  # type: ignore[assignment]

    def __init__(self, spec: OffloadingSpec, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig):
        super().__init__(spec, vllm_config, kv_cache_config)
        self._load_failed: set[str] = set()
        self._touched: dict[str, float] = {}
        disk = self.manager.disk if isinstance(self.manager, TieredManager) else None
        self.activity = TierActivity(self.manager.host, disk, spec.config.worker_kv_bytes_per_block)
        self._debug = Config.load().debug
        self._said_host_only = False

    def on_new_request(self, request: Request) -> None:
        super().on_new_request(request)
        if isinstance(self.manager, TieredManager) and not is_by_content(
            feature.identifier for feature in request.mm_features
        ):
            status = self._req_status[request.request_id]
            status.req_context = HostOnly(**vars(status.req_context))
            self._say_host_only()

    def _say_host_only(self) -> None:
        if not self._said_host_only:
            self._said_host_only = True
            logger.warning(
                "XLayerConnector: a request's images, audio or video do not use the disk tier (counted, said "
                "once): expected names that are hashes of their content, got the user's or vLLM's own. Those "
                "are content hashes without multi_modal_uuids, and with prefix caching or a processor cache"
            )

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, RowWorkerMetadata):
            self.activity.moved(meta.transfer_stats)
            if meta.problem:
                self.manager.turn_off(meta.problem)
            self.manager.host.ready(meta.ready)
            for job_id in meta.failed_jobs:
                self._fail(job_id)
        super().update_connector_output(connector_output)
        self._check()

    def _fail(self, job_id: int) -> None:
        job = self._jobs.get(job_id)
        if job is None:  # from before the last reset
            return
        self.manager.fail(job.keys)
        request = self._req_status[job.req_id]
        if job.is_store or request.req.is_finished():
            return
        self._load_failed.add(job.req_id)
        # What was to be loaded counted as stored already. It is computed now, and can be stored again.
        for config, group in zip(self.config.kv_group_configs, request.group_states, strict=True):
            held = request.num_locally_computed_tokens // config.tokens_per_chunk
            group.next_stored_chunk_idx = min(group.next_stored_chunk_idx, held)

    def _lookup(self, req_status: RequestOffloadState) -> int | None:
        """Tokens to load. Never a prompt's last token: it is computed in any case, for the next one.

        vLLM's device cache leaves the block that ends with it to be computed, and so must the tier: else a
        prompt that is on the device waits for one row from the host, and NVFP4 gives a restored prompt other
        tokens than a cached one, as more of it is seen quantised.
        """
        if req_status.req.request_id in self._load_failed:
            return 0
        tokens = super()._lookup(req_status)
        if tokens and req_status.num_locally_computed_tokens + tokens == req_status.req.num_tokens:
            # Sliding windows: vLLM has left it out already.
            tokens -= max(group.tokens_per_chunk for group in self.config.kv_group_configs)
        return tokens

    def _maximal_prefix_lookup(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> int | None:
        keys = list(keys)
        hits = self.manager.count_hits(keys)
        rest = super()._maximal_prefix_lookup(keys[hits:], req_context)  # what is not simply there
        return None if rest is None else hits + rest

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        found, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        asked = not request.skip_reading_prefix_cache and request.request_id not in self._load_failed
        if found is not None and asked:
            self._note_answer(self._req_status[request.request_id], num_computed_tokens, found)
        return found, is_async

    def _note_answer(self, status: RequestOffloadState, computed: int, found: int) -> None:
        """Remembers what a request found (tokens), for when it is admitted."""
        span = self.config.kv_group_configs[0].tokens_per_chunk
        # The last token is always computed: see _lookup.
        could = super()._calc_num_offloadable_tokens(status, status.req.num_tokens - 1)
        hits = (computed + found) // span - computed // span
        misses = max(0, could // span - (computed + found) // span)
        late = self.manager.is_late(status.req_context)
        host = self.manager.host
        reason = "off" if host.problem else "starting" if host.waits_for else "late" if late else "absent"
        self.activity.lookups.answered(status.req.request_id, hits, misses, reason)

    def has_pending_push_work(self) -> bool:
        # Only steps bring the news that a worker's memory is ready: without them an idle engine would serve
        # its first request without the tier.
        return super().has_pending_push_work() or self.manager.host.waits_for > 0

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        self.activity.lookups.admitted(request.request_id)

    def get_stats(self) -> OffloadingConnectorStats:
        """What happened since the last call; vLLM asks after every step."""
        under_way = [(job.keys, not job.is_store) for job in self._jobs.values()]
        ours = self.activity.report(queues(under_way, self.manager.transfers()))
        vllms = super().get_stats()
        if vllms is not None:
            ours.aggregate(vllms)
        return ours

    def shutdown(self) -> None:
        super().shutdown()
        self.activity.report({})  # with what was written to the disk just now
        self.activity.log()

    def _calc_num_offloadable_tokens(self, req_status: RequestOffloadState, num_computed_tokens: int) -> int:
        request = req_status.req
        if request.is_finished():
            # vLLM 0.26 asks for all tokens of a finished request. The last one has not been through the
            # model, and of an aborted one perhaps only the first few: the rest of its blocks is not KV.
            # What was still being loaded counts as computed, but then its blocks are not known here.
            known = [
                len(group.block_ids) * config.tokens_per_block
                for config, group in zip(self.config.kv_group_configs, req_status.group_states, strict=True)
            ]
            num_computed_tokens = min(request.num_computed_tokens, request.num_tokens - 1, *known)
        return super()._calc_num_offloadable_tokens(req_status, num_computed_tokens)

    def _touch(self, req_status: RequestOffloadState) -> None:
        # vLLM 0.26 does it for all chunks of a request with every chunk that it stores: for 64 requests of
        # 8,192 tokens, 32,768 chunks whenever each has filled one more block.
        request, now = req_status.req, time.monotonic()
        if not request.is_finished():
            if now - self._touched.get(request.request_id, -math.inf) < TOUCH_SECONDS:
                return
            self._touched[request.request_id] = now
        super()._touch(req_status)

    def _has_news(self, request_id: str, scheduled_tokens: int) -> bool:
        """Whether a running request has chunks to store after this step; vLLM takes its hashes then."""
        status = self._req_status[request_id]
        tokens = status.req.num_computed_tokens + scheduled_tokens
        for config, group in zip(self.config.kv_group_configs, status.group_states, strict=True):
            span, stored = config.tokens_per_chunk, group.next_stored_chunk_idx
            if tokens // span > stored and self._calc_num_offloadable_tokens(status, tokens) // span > stored:
                return True
        return False

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        meta = super().build_connector_meta(without_idle(scheduler_output, self._has_news))
        self._check()
        return meta

    def request_finished(self, request: Request):
        self._load_failed.discard(request.request_id)
        self._touched.pop(request.request_id, None)
        self.activity.lookups.forget(request.request_id)
        return super().request_finished(request)

    def _check(self) -> None:
        if self._debug:
            check_accounts(self)
