"""Does the host tier's book-keeping add up? Run in debug mode after every step, and by the tests.

Every chunk of host memory is free or belongs to one key, a key being written has exactly one writer, and a
key being read as many readers as there are transfers under way that read it.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Protocol

from vllm.v1.kv_offload.base import OffloadKey

from .manager import HostTierManager


class SchedulerSide(Protocol):
    """Who knows of the transfers under way: the connector's scheduler side, and the manager of its tiers."""

    _jobs: dict[int, Any]
    manager: Any


class AccountingError(AssertionError):
    """The accounts do not balance.

    Attributes:
        problems: where, one a line of the message.
    """

    def __init__(self, problems: list[str]):
        super().__init__("host tier: " + "\n".join(problems))
        self.problems = problems


def check_accounts(scheduler: SchedulerSide, idle: bool = False) -> None:
    """Compares the manager's books with the transfers under way.

    Args:
        idle: Nothing is under way or waiting: no job, no request, no reference may be left either.

    Raises:
        AccountingError: with every problem found.
    """
    readers: Counter[OffloadKey] = Counter()
    writers: Counter[OffloadKey] = Counter()
    for job in scheduler._jobs.values():
        (writers if job.is_store else readers).update(job.keys)
    for keys, writes in scheduler.manager.transfers():
        (writers if writes else readers).update(keys)
    host = scheduler.manager.host
    problems = []
    if host.lists_chunks:
        problems += [*_chunk_problems(host), *_key_problems(host, readers, writers)]
    if idle:
        problems += _leftovers(scheduler)
    if problems:
        raise AccountingError(problems)


def _chunk_problems(manager: HostTierManager) -> Iterator[str]:
    """Every chunk handed out so far is free or held by one key."""
    uses = Counter(block.chunk_id for block in manager.chunks().values())
    uses.update(manager._free_list)
    for chunk in range(manager._num_allocated_chunks):
        if uses[chunk] != 1:
            yield f"chunk {chunk}: expected one owner (a key or the free list), got {uses[chunk]}"
    if strange := [chunk for chunk in uses if not 0 <= chunk < manager._num_allocated_chunks]:
        yield f"chunks: expected 0 to {manager._num_allocated_chunks - 1}, got {strange}"


def _key_problems(
    manager: HostTierManager, readers: Counter[OffloadKey], writers: Counter[OffloadKey]
) -> Iterator[str]:
    chunks = manager.chunks()
    for key in {*chunks, *readers, *writers}:
        expected = -1 if writers[key] else readers[key]
        if writers[key] > 1 or (writers[key] and readers[key]):
            yield f"{key.hex()}: expected one writer or readers, got {writers[key]} and {readers[key]}"
        elif key not in chunks:
            yield f"{key.hex()}: expected a chunk for a transfer under way, got none"
        elif chunks[key].ref_cnt != expected:
            yield f"{key.hex()}: expected {expected} references, got {chunks[key].ref_cnt}"
    unused = sum(block.ref_cnt == 0 for block in chunks.values())
    written = sum(block.ref_cnt == -1 for block in chunks.values())
    for name, expected, got in (
        ("evictable chunks", unused, manager._num_evictable_cache_chunks),
        ("chunks being written", written, manager._num_write_pending_chunks),
    ):
        if expected != got:
            yield f"{name}: expected {expected}, got {got}"


def _leftovers(scheduler: SchedulerSide) -> Iterator[str]:
    books = ("_jobs", "_req_status", "_block_id_to_pending_jobs", "_chunks_being_loaded", "_load_failed")
    for name in books:
        if left := getattr(scheduler, name):
            yield f"{name}: expected nothing when idle, got {left}"
    if left := list(scheduler.manager.transfers()):
        yield f"transfers to or from the disk: expected none when idle, got {len(left)}"
    if left := scheduler.manager.host._failed:
        yield f"failed keys: expected none when idle, got {[key.hex() for key in left]}"
