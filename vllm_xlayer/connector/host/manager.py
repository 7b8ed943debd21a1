"""The scheduler's side of the host tier: vLLM's CPUOffloadingManager, where transfers may fail.

vLLM's manager can drop a store that failed, but nobody tells it, and it has no word for a load that failed.
Here the connector names the keys of a failed job before it completes it: a chunk that was being stored
never becomes loadable, and one that could not be loaded is forgotten as soon as nobody reads it.
"""

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from vllm.v1.kv_offload.base import (
    LoadStoreSpec,
    LookupResult,
    OffloadingEvent,
    OffloadKey,
    PrepareStoreOutput,
    ReqContext,
)
from vllm.v1.kv_offload.cpu.manager import CPUOffloadingManager
from vllm.v1.kv_offload.cpu.policies.arc import ARCCachePolicy
from vllm.v1.kv_offload.cpu.policies.base import ChunkStatus
from vllm.v1.kv_offload.cpu.policies.lru import LRUCachePolicy

from .recency import RecencyPolicy

logger = logging.getLogger(__name__)


class HostTierManager(CPUOffloadingManager):
    """Takes what CPUOffloadingManager takes.

    Args:
        workers_to_wait_for: until so many have said that their memory may be used, nothing is stored or
            found.

    Attributes:
        problem: Why the tier is off; empty while it works.
        waits_for: Workers whose memory is not ready yet.
        stores_failed, loads_failed: Chunks, since the start.
        kv_view: uint8 [chunks, chunk bytes], the memory, where a tier behind this one reads and writes it.
    """

    def __init__(self, num_chunks: int, workers_to_wait_for: int = 0, **settings):
        super().__init__(num_chunks, **settings)
        self.problem = ""
        self.waits_for = workers_to_wait_for
        self.stores_failed = 0
        self.loads_failed = 0
        self._failed: set[OffloadKey] = set()
        self.kv_view: memoryview | None = None
        if num_chunks == 0:
            self.turn_off("cpu_bytes_to_use: expected at least the bytes of one chunk, got less")

    @property
    def serves(self) -> bool:
        """Whether anything is stored or found."""
        return not self.problem and self.waits_for == 0

    def ready(self, workers: int) -> None:
        """So many more workers' memory may be used."""
        self.waits_for = max(0, self.waits_for - workers)

    def turn_off(self, problem: str) -> None:
        """From now on nothing is found and nothing is stored, and events say that all is gone. Transfers
        under way end as usual; what they store is dropped."""
        self.waits_for = 0
        if not self.problem:
            self.problem = problem
            logger.warning("XLayerConnector: the host tier is off: %s", problem)
            # Routers that follow vLLM's KV events send prompts to where these were.
            chunks = {} if self.events is None else self.chunks()
            gone = [key for key, chunk in chunks.items() if chunk.is_ready and key not in self._failed]
            if gone and self.events is not None:
                self.events.append(OffloadingEvent(keys=gone, medium=self.medium, removed=True))

    def fail(self, keys: Iterable[OffloadKey]) -> None:
        """Marks chunks whose transfer failed on some worker; complete_store/complete_load follow."""
        for key in keys:
            block = self._policy.get(key)
            if block is None or key in self._failed:
                continue
            self._failed.add(key)
            if block.is_ready:
                self.loads_failed += 1
            else:
                self.stores_failed += 1

    def has_failed(self, key: OffloadKey) -> bool:
        """Whether a transfer of this chunk failed, and it is not gone yet."""
        return key in self._failed

    def is_late(self, req_context: ReqContext) -> bool:
        """Whether a request has waited too long for a tier behind this one."""
        return False

    def fetches(self, req_context: ReqContext) -> bool:
        """Whether a request has had chunks fetched from a tier behind this one in this step. They may have
        the room of what it found before."""
        return False

    @property
    def host(self) -> "HostTierManager":
        return self

    def transfers(self) -> Iterable[tuple[Collection[OffloadKey], bool]]:
        """Transfers to and from a tier behind this one: there is none."""
        return ()

    @property
    def lists_chunks(self) -> bool:
        """Whether `chunks` says all: a user's own policy (cache_policy_module_path) need not tell."""
        return isinstance(self._policy, ARCCachePolicy | LRUCachePolicy | RecencyPolicy)

    def chunks(self) -> Mapping[OffloadKey, ChunkStatus]:
        """Every chunk the tier holds, also those being written, if it `lists_chunks`; else none."""
        policy = self._policy
        if isinstance(policy, ARCCachePolicy):
            return {**policy.t1, **policy.t2}
        return policy.chunks if isinstance(policy, LRUCachePolicy | RecencyPolicy) else {}

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        if not self.serves or key in self._failed:
            return LookupResult.MISS
        return super().lookup(key, req_context)

    def count_hits(self, keys: Iterable[OffloadKey]) -> int:
        """How many keys from the first on `lookup` would find ready; perhaps fewer, never more.

        A long prompt has thousands, and its first token waits for the answer: no call a key.
        """
        if not self.serves or self._failed:
            return 0
        hits = 0
        for block in map(self._policy.get, keys):
            if block is None or block.ref_cnt < 0:
                break
            hits += 1
        return hits

    def ask_disk(self, keys: Sequence[OffloadKey], req_context: ReqContext) -> int:
        """How many keys from the first on the disk was asked for: there is none."""
        return 0

    def holds(self, key: OffloadKey) -> bool:
        """Whether there is a chunk of this key, in whatever state."""
        return self._policy.get(key) is not None

    def prepare_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext
    ) -> PrepareStoreOutput | None:
        if not self.serves:
            nowhere: LoadStoreSpec = self._get_load_store_spec([], [])
            return PrepareStoreOutput(keys_to_store=[], store_spec=nowhere, evicted_keys=[])
        return super().prepare_store(keys, req_context)

    def complete_store(
        self, keys: Collection[OffloadKey], req_context: ReqContext, success: bool = True
    ) -> None:
        lost = {*keys} if self.problem else self._failed.intersection(keys)
        if lost:
            self._failed -= lost
            super().complete_store(lost, req_context, success=False)
        super().complete_store([key for key in keys if key not in lost], req_context, success)

    def complete_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        super().complete_load(keys, req_context)
        lost = [key for key in self._failed.intersection(keys) if self._forget(key)]
        if lost and self.events is not None:
            self.events.append(OffloadingEvent(keys=lost, medium=self.medium, removed=True))

    def _forget(self, key: OffloadKey) -> bool:
        """Frees the chunk of a key that failed; False while it is still being read."""
        block = self._policy.get(key)
        if block is None or block.ref_cnt > 0:
            return False
        self._failed.discard(key)
        self._num_evictable_cache_chunks -= 1
        self._policy.remove(key)
        self._free_chunk(block)
        return True

    def reset_cache(self) -> None:
        super().reset_cache()
        self._failed.clear()

    # What vLLM's TieringOffloadingManager asks of its first tier: the same, where the other end is not the
    # device but a tier behind this one. That it is copied there is no use by a request.
    def prepare_read(self, keys: Collection[OffloadKey], req_context: ReqContext) -> LoadStoreSpec:
        return self._prepare_load(keys, req_context, record_access=False)

    complete_read = complete_load
    prepare_write, complete_write = prepare_store, complete_store

    def get_kv_memoryview(self) -> memoryview:
        assert self.kv_view is not None
        return self.kv_view
