"""Which chunk of the host tier goes first: the one whose last use is the longest ago, as of vLLM's "lru".

vLLM keeps a heap of chunks. It is built anew as it fills with entries that no longer hold, in which time the
step loop stands still: half a second with 260,000 chunks, and a long prompt that is stored into a full tier
takes tens of milliseconds each time. Here chunks are kept by use: a request's chunks have one place in the
order of uses, so that what a request does costs time by its own chunks only, and that a request whose chunks
nobody else has used meanwhile has finished takes no time a chunk.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from vllm.v1.kv_offload.base import OffloadKey, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy, ChunkStatus, order_request_keys
from vllm.v1.kv_offload.cpu.policies.factory import CachePolicyFactory

POLICY = "xlayer-lru"


@dataclass(eq=False)
class _Use:
    """One use of chunks, by a request under way or before."""

    rank: int
    """Of two uses, the later one has the higher."""
    under_way: bool
    """Whether the request may use more chunks."""
    ends: dict[OffloadKey, int] = field(default_factory=dict)
    """Chunk -> the token of the prompt that it ends with. Those that end later go first, of several (of as
    many KV cache groups) the one that came last."""
    in_order: bool = False
    """Whether ``ends`` is in the order in which they go."""

    def first_to_last(self) -> Iterable[OffloadKey]:
        if not self.in_order:
            self.ends = dict(sorted(reversed(self.ends.items()), key=lambda item: -item[1]))
            self.in_order = True
        return self.ends


class RecencyPolicy(CachePolicy):
    """Takes what vLLM's policies take.

    Attributes:
        chunks: by key.
    """

    def __init__(self, cache_capacity: int):
        super().__init__(cache_capacity)
        self.chunks: dict[OffloadKey, ChunkStatus] = {}
        self._use_of: dict[OffloadKey, _Use] = {}
        self._uses: OrderedDict[_Use, None] = OrderedDict()  # in order of their ranks
        self._rank = 0

    def _begin(self, under_way: bool = False) -> _Use:
        """A use that is later than all others."""
        self._rank += 1
        use = _Use(self._rank, under_way)
        self._uses[use] = None
        return use

    def _use_by(self, req_context: ReqContext) -> _Use:
        """The use that a request under way makes of all its chunks."""
        use = req_context.get_state(_Use)
        if use is None or use not in self._uses:  # the first time, or the first time since it was cleared
            use = self._begin(under_way=True)
            req_context.set_state(use)
        return use

    def _put(self, key: OffloadKey, use: _Use, end: int) -> None:
        """Makes this the chunk's use, in place of the one it had."""
        before = self._use_of.get(key)
        if before is not None:
            del before.ends[key]
            self._drop_if_empty(before)
        use.ends[key] = end
        use.in_order = False
        self._use_of[key] = use

    def _drop_if_empty(self, use: _Use) -> None:
        if not use.ends and not use.under_way:
            self._uses.pop(use, None)

    def get(self, key: OffloadKey) -> ChunkStatus | None:
        return self.chunks.get(key)

    def insert(self, key: OffloadKey, chunk: ChunkStatus, req_context: ReqContext | None = None) -> None:
        """vLLM before 0.33 does not say whose chunk it is: each is a use of its own."""
        self.chunks[key] = chunk
        end = None if req_context is None else req_context.get_offload_key_position(key)
        if req_context is None or end is None:
            self._put(key, self._begin(), 0)
        else:
            self._put(key, self._use_by(req_context), end)

    def remove(self, key: OffloadKey) -> None:
        del self.chunks[key]
        use = self._use_of.pop(key)
        del use.ends[key]
        self._drop_if_empty(use)

    def touch(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        self._use_now(reversed(list(keys)))

    def _use_now(self, keys: Iterable[OffloadKey]) -> None:
        """Makes a use of those that are here, the last one last."""
        use = self._begin()
        for place, key in enumerate(keys):
            if key in self.chunks:
                self._put(key, use, -place)
        self._drop_if_empty(use)

    def on_request_access(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> None:
        use = self._use_by(req_context)
        for key in keys:
            before, end = self._use_of.get(key), req_context.get_offload_key_position(key)
            if before is not None and end is not None and before.rank < use.rank:
                self._put(key, use, end)

    def on_request_finished(
        self,
        key_groups: Sequence[Sequence[OffloadKey]],
        insertion_only_keys: set[OffloadKey],
        reused_keys: set[OffloadKey],
        req_context: ReqContext,
    ) -> None:
        """Makes a request's use the latest of all, of what is still here."""
        use = req_context.get_state(_Use)
        if use is None or use not in self._uses:
            self._use_now(reversed(order_request_keys(key_groups, req_context)))
            return
        use.under_way = False
        find = self._use_of.get
        if all(find(key, use) is use for keys in key_groups for key in keys):
            self._rank += 1
            use.rank = self._rank
            self._uses.move_to_end(use)
        else:
            self._use_now(reversed(order_request_keys(key_groups, req_context)))
        self._drop_if_empty(use)

    def evict(self, n: int, protected: set[OffloadKey]) -> list[tuple[OffloadKey, ChunkStatus]] | None:
        found: list[tuple[OffloadKey, ChunkStatus]] = []
        for use in self._uses:
            if len(found) == n:
                break
            for key in use.first_to_last():
                chunk = self.chunks[key]
                if chunk.ref_cnt == 0 and key not in protected:
                    found.append((key, chunk))
                    if len(found) == n:
                        break
        if len(found) < n:
            return None
        for key, _ in found:
            self.remove(key)
        return found

    def clear(self) -> None:
        self.chunks.clear()
        self._use_of.clear()
        self._uses.clear()


CachePolicyFactory.register_cache_policy(POLICY, __name__, RecencyPolicy.__name__)
