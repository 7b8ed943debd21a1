"""Host tier with a disk behind it: vLLM's TieringOffloadingManager, where transfers may fail or take long."""

import time
from collections.abc import Collection, Iterable, Sequence
from itertools import takewhile

from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
)
from vllm.v1.kv_offload.tiering.manager import TieringOffloadingManager

from ..host.manager import HostTierManager
from .tier import DiskTier, HostOnly

DEADLINE_SECONDS = 2.0
"""A request that has waited so long for the disk is computed instead."""


class TieredManager(TieringOffloadingManager):
    """The manager of a host tier, whose kv_view is set, and its disk tier."""

    primary_tier: HostTierManager  # type: ignore[assignment]

    def __init__(self, host: HostTierManager, disk: DiskTier):
        super().__init__(primary_tier=host, secondary_tiers=[disk])  # type: ignore[arg-type]
        self.disk = disk
        self._waits_since: dict[str, float] = {}

    @property
    def host(self) -> HostTierManager:
        return self.primary_tier

    def turn_off(self, problem: str) -> None:
        self.host.turn_off(problem)

    def fail(self, keys: Iterable[OffloadKey]) -> None:
        self.host.fail(keys)

    def transfers(self) -> Iterable[tuple[Collection[OffloadKey], bool]]:
        """Keys of every transfer between host and disk, and whether it writes to host memory."""
        for job in self._jobs.values():
            yield job.transfer_job.keys, job.transfer_job.is_promotion
        for by_request in self._pending_load_submissions.values():
            for pending in by_request.values():
                yield pending.keys, True

    def lookup(self, key: OffloadKey, req_context: ReqContext, **exclude: int | None) -> LookupResult:
        if not self.host.serves or self.host.has_failed(key):
            return LookupResult.MISS
        if self.is_late(req_context) or req_context.get_state(HostOnly) is not None:
            # Also ends two requests' taking each other's chunks out of a host tier too small for both.
            self._maybe_process_finished_jobs()
            found = self.host.lookup(key, req_context)
            return found if found is LookupResult.HIT else LookupResult.MISS
        found = super().lookup(key, req_context, **exclude)
        if found is LookupResult.HIT_PENDING:  # on its way from the disk, or from a device
            self._waits_since.setdefault(req_context.req_id, time.monotonic())
        return found

    def count_hits(self, keys: Iterable[OffloadKey]) -> int:
        """As HostTierManager's: a chunk that is in host memory is asked of no other tier."""
        self._maybe_process_finished_jobs()
        return self.host.count_hits(keys)

    def ask_disk(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> int:
        """How many keys from the first on only the disk knows of. It is asked for these, and the request has
        to come again.

        A new prompt has thousands of them: one goes vLLM's way, which says whether the disk may be asked.
        """
        if not keys or self.lookup(keys[0], req_context) is not LookupResult.RETRY:
            return 0
        not_here = takewhile(lambda key: not self.host.holds(key), keys[1:])
        return 1 + self.disk.ask(not_here, req_context)

    def is_late(self, req_context: ReqContext) -> bool:
        since = self._waits_since.get(req_context.req_id)
        return since is not None and time.monotonic() - since > DEADLINE_SECONDS

    def fetches(self, req_context: ReqContext) -> bool:
        by_tier = self._pending_load_submissions.values()
        return any(req_context.req_id in by_request for by_request in by_tier)

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        self._waits_since.pop(req_context.req_id, None)
        self.disk.touch(keys, req_context)
        return super().prepare_load(keys, req_context)

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        self.disk.touch(keys, req_context)
        return super().prepare_store(keys, req_context)

    def on_request_finished(self, req_context: ReqContext, **exclude: int | None) -> None:
        self._waits_since.pop(req_context.req_id, None)
        super().on_request_finished(req_context, **exclude)

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        success = success and not any(self.host.has_failed(key) for key in keys)
        super().complete_store(keys, req_context, success)

    def reset_cache(self) -> None:
        super().reset_cache()
        self.disk.forget()
