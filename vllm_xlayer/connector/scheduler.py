"""The connector in the scheduler's process: vLLM's, where a transfer may fail.

A request whose load failed is computed, and does not ask the tier again: the next load would be the next
chance to fail, and without that rule a tier that always fails would hold the request up for ever.
"""

from collections.abc import Iterable

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import TransferJob
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    GroupOffloadConfig,
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
from .disk.manager import TieredManager
from .disk.tier import HostOnly
from .host.accounts import check_accounts
from .host.manager import HostTierManager
from .item_names import is_by_content
from .stats.activity import TierActivity, queues
from .step_news import without_idle, without_reloaded, without_unwanted_states
from .windows import incomplete, with_window_as_stored
from .worker import RowWorkerMetadata

logger = init_logger(__name__)

NULL_BLOCK = 0
"""vLLM's, in place of blocks that a window has left behind."""


class RowConnectorScheduler(OffloadingConnectorScheduler):
    """Takes what OffloadingConnectorScheduler takes; the spec must be a RowOffloadingSpec.

    With VLLM_XLAYER_DEBUG=1 the tier's accounts are checked after every step.

    Raises:
        AccountingError: (in that mode) they do not balance.
    """

    manager: HostTierManager | TieredManager  # type: ignore[assignment]

    def __init__(self, spec: OffloadingSpec, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig):
        super().__init__(spec, vllm_config, kv_cache_config)
        groups = tuple(map(with_window_as_stored, self.config.kv_group_configs))
        self.config = self.config._replace(kv_group_configs=groups)
        self._load_failed: set[str] = set()
        disk = self.manager.disk if isinstance(self.manager, TieredManager) else None
        self.activity = TierActivity(self.manager.host, disk, spec.config.worker_kv_bytes_per_block)
        self._describes_events = spec.kv_events_config.self_describing_kv_events
        self._debug = Config.load().debug
        self._said_host_only: set[str] = set()

    def on_new_request(self, request: Request) -> None:
        super().on_new_request(request)
        self._keep_from_disk(self._req_status[request.request_id])

    def _keep_from_disk(self, status: RequestOffloadState) -> None:
        """Where a request's keys do not say whose KV it is."""
        if isinstance(self.manager, TieredManager) and (reason := _why_host_only(status.req)):
            status.req_context.set_state(HostOnly(reason))
            if reason not in self._said_host_only:
                self._said_host_only.add(reason)
                logger.warning(
                    "XLayerConnector: %s do not use the disk tier (counted, said once): %s",
                    *HOST_ONLY[reason],
                )

    def _begin_turn(self, status: RequestOffloadState) -> None:
        """A request that takes more input as it goes on (a streaming session) begins, or has got some."""
        request = status.req
        self._keep_from_disk(status)  # there may be images in it
        for group in status.group_states:
            group.block_ids.clear()  # all are told again, and vLLM 0.31 would take them for additional ones
        # It leaves out the last token of the turn before, whose hash vLLM 0.31 keeps where it ends a block.
        del request.block_hashes[request.num_computed_tokens // self.config.tokens_per_hash :]
        request.update_block_hashes()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, RowWorkerMetadata):
            self.activity.moved(meta.transfer_stats, meta.rows_stored, meta.rows_loaded)
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
        # What was to be loaded counts as stored already (0.33 forgets that by itself, 0.31 does not). It is
        # computed now, and can be stored again.
        for config, group in zip(self.config.kv_group_configs, request.group_states, strict=True):
            held = request.num_locally_computed_tokens // config.tokens_per_chunk
            group.next_stored_chunk_idx = min(group.next_stored_chunk_idx, held)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int, max_num_new_tokens: int | None = None
    ) -> tuple[int | None, bool]:
        wanted = self._may_load(request, num_computed_tokens)
        limit = wanted if max_num_new_tokens is None else min(wanted, max_num_new_tokens)
        found, is_async = super().get_num_new_matched_tokens(
            request, num_computed_tokens, max_num_new_tokens=limit
        )
        if found and self.manager.fetches(self._req_status[request.request_id].req_context):
            # vLLM waits for what is fetched only where the answer depends on it: not for a window's end that
            # is no use without what is missing before it. What was found may have gone for it.
            return None, False
        asked = not request.skip_reading_prefix_cache and request.request_id not in self._load_failed
        if found is not None and asked:
            self._note_answer(self._req_status[request.request_id], num_computed_tokens, found)
        return found, is_async

    def _may_load(self, request: Request, num_computed_tokens: int) -> int:
        """Tokens beyond those computed. Never a prompt's last one: it is computed in any case, for the next.

        vLLM's device cache leaves the block that ends with it to be computed, and so must the tier: else a
        prompt that is on the device waits for one row from the host, and NVFP4 gives a restored prompt other
        tokens than a cached one, as more of it is seen quantised.
        """
        if request.request_id in self._load_failed:
            return 0
        if self._mamba_align_size is not None:
            # Where states are looked for, vLLM leaves out the last token by itself, also within a block.
            return request.num_tokens - num_computed_tokens
        groups = self.config.kv_group_configs
        span = max(group.tokens_per_chunk for group in groups)
        last = (request.num_tokens - 1) // span * span
        # Where a group has a window, vLLM leaves out one token by itself.
        windows = any(group.sliding_window_size_in_chunks is not None for group in groups)
        return max(0, last + int(windows) - num_computed_tokens)

    def _maximal_prefix_lookup(
        self,
        keys: Iterable[OffloadKey],
        req_context: ReqContext,
        req: Request,
        group_config: GroupOffloadConfig,
        start_chunk_idx: int,
    ) -> int | None:
        keys = list(keys)
        # vLLM's describes every key that it finds, where events shall carry tokens.
        hits = 0 if self._describes_events else self.manager.count_hits(keys)
        asked = 0 if self._describes_events else self.manager.ask_disk(keys[hits:], req_context)
        known = hits + asked
        rest = super()._maximal_prefix_lookup(  # what is neither simply there nor simply unknown
            keys[known:], req_context, req, group_config, start_chunk_idx + known
        )
        return None if asked or rest is None else hits + rest

    def _note_answer(self, status: RequestOffloadState, computed: int, found: int) -> None:
        """Remembers what a request found (tokens), for when it is admitted."""
        span = max(group.tokens_per_chunk for group in self.config.kv_group_configs)
        # The last token is always computed: see _may_load.
        could = self._calc_num_offloadable_tokens(status, status.req.num_tokens - 1) // span * span
        misses = max(0, could - computed - found)
        late = self.manager.is_late(status.req_context)
        host = self.manager.host
        reason = "off" if host.problem else "starting" if host.waits_for else "late" if late else "absent"
        self.activity.lookups.answered(status.req.request_id, found, misses, reason)

    def has_pending_push_work(self) -> bool:
        # Only steps bring the news that a worker's memory is ready: without them an idle engine would serve
        # its first request without the tier.
        return super().has_pending_push_work() or self.manager.host.waits_for > 0

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        # Stores that still read these blocks are waited for, also where another connector loads into them
        # (vLLM 0.31 looks at no block where it has nothing to load itself).
        ids = {block.block_id for group in blocks.blocks for block in group}
        self._current_batch_allocated_block_ids |= ids - {NULL_BLOCK}
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

    def _has_news(self, request_id: str, scheduled_tokens: int) -> bool:
        """Whether a running request has chunks to store after this step; vLLM takes its hashes then."""
        status = self._req_status[request_id]
        tokens = status.req.num_computed_tokens + scheduled_tokens
        for config, group in zip(self.config.kv_group_configs, status.group_states, strict=True):
            if config.requires_cow_source:  # its states are handed over with the step: see without_idle
                continue
            span, stored = config.tokens_per_chunk, group.next_stored_chunk_idx
            if tokens // span > stored and self._calc_num_offloadable_tokens(status, tokens) // span > stored:
                return True
        return False

    def _is_reloaded(self, request_id: str) -> bool:
        """Whether a preempted request has nothing under way but a load that begins with this step."""
        status = self._req_status.get(request_id)
        jobs = status.transfer_jobs if status is not None else set()
        return bool(jobs) and jobs <= self._current_batch_load_jobs.keys()

    def _most_tokens(self, request_id: str) -> int:
        """Of a request, that may be stored of those that it has."""
        status = self._req_status.get(request_id)
        return 0 if status is None else self._calc_num_offloadable_tokens(status, status.req.num_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        for data in scheduler_output.scheduled_new_reqs:
            if (status := self._req_status[data.req_id]).req.resumable:
                self._begin_turn(status)
        wanted = without_unwanted_states(scheduler_output, self._most_tokens)
        with_news = without_idle(wanted, self._has_news)
        meta = super().build_connector_meta(without_reloaded(with_news, self._is_reloaded))
        self._check()
        return meta

    def _build_store_jobs(self, scheduler_output: SchedulerOutput) -> dict[int, TransferJob]:
        if self.config.blocks_per_chunk > 1 and self._sliding_window_groups:
            finished = scheduler_output.finished_req_ids or set()
            for request in (*scheduler_output.num_scheduled_tokens, *finished):
                if (status := self._req_status.get(request)) is not None:
                    self._leave_out_incomplete(status, request in finished)
        return super()._build_store_jobs(scheduler_output)

    def _leave_out_incomplete(self, status: RequestOffloadState, finished: bool) -> None:
        for index in self._sliding_window_groups:
            group, config = status.group_states[index], self.config.kv_group_configs[index]
            first, per_chunk = group.next_stored_chunk_idx, self.config.blocks_per_chunk
            if finished and self.config.alignment_tokens != config.tokens_per_chunk:
                first = 0  # of several chunks between two places where hits end, vLLM looks at some again
            for last in incomplete(group.block_ids, first, per_chunk):
                group.block_ids[last] = NULL_BLOCK

    def reset_cache(self) -> None:
        # vLLM offers what running requests have stored once more. Of a window's blocks some were given away.
        for status in self._req_status.values():
            for group in (status.group_states[index] for index in self._sliding_window_groups):
                stored = min(group.next_stored_chunk_idx * self.config.blocks_per_chunk, len(group.block_ids))
                group.block_ids[:stored] = [NULL_BLOCK] * stored
        super().reset_cache()

    def request_finished(self, request: Request):
        self._load_failed.discard(request.request_id)
        self.activity.lookups.forget(request.request_id)
        return super().request_finished(request)

    def _check(self) -> None:
        if self._debug:
            check_accounts(self)


ADAPTER, ITEMS = "LoRA adapter", "items not named by content"
HOST_ONLY = {
    ADAPTER: (
        "requests with a LoRA adapter",
        "their keys have its name and path, and other weights may come to lie there. Requests without one do",
    ),
    ITEMS: (
        "a request's images, audio or video",
        "expected names that are hashes of their content, got the user's or vLLM's own. Those are content "
        "hashes without multi_modal_uuids, and with prefix caching or a processor cache",
    ),
}
"""What the keys of a request's blocks do not say -> (whose keys, why and what would), for the log."""


def _why_host_only(request: Request) -> str:
    """The key in HOST_ONLY of a request whose KV must not outlive the engine; else empty."""
    if request.lora_request is not None:
        return ADAPTER
    by_content = is_by_content(feature.identifier for feature in request.mm_features)
    return "" if by_content else ITEMS
