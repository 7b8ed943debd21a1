"""The disk behind the host tier: a secondary tier of vLLM's tiering machinery.

vLLM's TieringOffloadingManager moves chunks between host memory and secondary tiers, all in the scheduler's
process: it keeps them pinned, tells a request to wait for them, and has one view of all TP ranks' bytes. So
a load counts only when every rank has its rows, and one file holds them all. What it does not have is a disk
tier that checks what it reads, bounds what it writes, or survives a bad disk: that is here. `tiering` mends
the rest.

Threads of its own call the disk: one reads, one writes, one looks for what other engines wrote. The
scheduler's thread never does, and waits for none of them. Anything the disk does wrong while writing turns
the tier off, with one line in the log; a call that does not return turns it off until it does. The engine
goes on with host memory.

A call that hangs may return when its chunk of host memory has long been given to somebody else. So the disk
is read into and written from buffers that only the thread has. It copies between them and host memory under
the lock, after it has seen that the job is still its own; and jobs are taken back under that lock.
"""

import errno
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import numpy as np
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    LookupResult,
    Medium,
    OffloadKey,
    ReqContext,
    RequestOffloadingContext,
    ScheduleEndContext,
    get_offload_group_idx,
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from .finder import EntryFinder
from .format import EntryError, TierIdentity
from .store import DiskStore
from .weights import AcrossSleep
from .worker import DiskWorker, Task

logger = init_logger(__name__)

HUNG_SECONDS = 5.0
"""A call to the disk that takes longer hangs. A disk that was asleep or writes back much takes a few seconds,
and no request waits longer than tiering.DEADLINE_SECONDS."""
FLUSH_SECONDS = 3.0
"""A clean stop waits so long for what is still to be written. vLLM kills its core 5 s after telling it to."""
MIN_RESCAN_SECONDS = 10.0
RESCAN_SHARE = 0.01
"""Of the writing thread's time, for looking at what other engines wrote."""


@dataclass(frozen=True)
class Unused:
    """What of a row is no page's.

    Args:
        row_bytes: of one block of one rank.
        spans: KV cache group -> (first byte, byte after the last) of a row.
    """

    row_bytes: int
    spans: Mapping[int, Sequence[tuple[int, int]]]

    def blank(self, key: OffloadKey, chunk: np.ndarray) -> None:
        """Makes it zeros in a chunk, uint8 [chunk bytes]: nobody's bytes lie in another's entry."""
        rows = chunk.reshape(-1, self.row_bytes)
        for begin, end in self.spans.get(get_offload_group_idx(key), ()):
            rows[:, begin:end] = 0


@dataclass(frozen=True)
class HostOnly:
    """State of a request whose keys do not say whose KV it is: no tier that outlives the engine is for it.

    reason: what the keys do not say, for metrics.
    """

    reason: str


class DiskTier(SecondaryTierManager):
    """Chunks in a folder.

    Args:
        view: uint8 [chunks, chunk bytes], the host tier's memory.
        folder: made if its parent is there.
        limit: bytes of all entries in the folder.
        max_waiting: while so many chunks wait to be written, no more are taken, so that a slow disk does not
            keep the whole host tier pinned.
        unused: what of a chunk is no page's, and so the former owner's: zeros in an entry. None is nothing.

    Attributes:
        problem: Why the tier is off; empty while it works.
        hung: What call to the disk it is waiting for, and off until then; else empty.
        counts: stored, hit, "miss: <reason>" (there, but not usable), "not stored: <reason>" and
            "not loaded: <reason>", in chunks.
        seconds: spent writing what was stored ("store"), and reading what was a hit ("load").
        limit: bytes, as given.
        sleep: is told that the engine is about to sleep.

    Raises:
        OSError: the folder cannot be used, or does not answer.
    """

    medium = Medium.STORAGE

    def __init__(
        self, view: np.ndarray, folder: Path, limit: int, identity: TierIdentity, max_waiting: int,
        unused: Unused | None = None,
    ):  # fmt: skip
        self.tier_type = "xlayer-disk"
        self._bp_detector = self.locality = None  # of SecondaryTierManager, whose __init__ wants a whole spec
        self.problem = self.hung = ""
        self.counts: Counter[str] = Counter()
        self.seconds = {"store": 0.0, "load": 0.0}
        self.limit = limit
        self._view = view
        self._unused = unused
        self._max_waiting = max_waiting
        self._lock = threading.Condition()
        self._done: deque[JobResult] = deque()
        self._reader = DiskWorker("xlayer-disk-read", self._lock, self._report)
        self._writer = DiskWorker("xlayer-disk-write", self._lock, self._report)
        self._finder = EntryFinder(self._lock)
        self.sleep = AcrossSleep()
        self._workers = (self._reader, self._writer, self._finder.worker)
        self._read_buffer, self._write_buffer = np.empty((2, view.shape[1]), dtype=np.uint8)
        self._scan_at = time.monotonic() + MIN_RESCAN_SECONDS
        try:
            self._store = self._open(folder, identity)
        except OSError:
            with self._lock:
                for worker in self._workers:
                    worker.stop()
            raise
        if self._store.warning:
            logger.warning("XLayerConnector: disk tier: %s", self._store.warning)
        logger.info(
            "XLayerConnector: disk tier in %s: %.2f of %.2f GiB, identity %s",
            folder, self._store.total / 2**30, limit / 2**30, identity.digest,
        )  # fmt: skip

    def _open(self, folder: Path, identity: TierIdentity) -> DiskStore:
        """Looks through the folder on the writing thread. OSError also if that thread hangs."""
        result: list[DiskStore | OSError] = []

        def make(task: Task) -> bool:
            self._writer.calls(f"opening {folder}")
            try:
                result.append(DiskStore(folder, self.limit, identity, self.chunk_bytes, self._writer.goes_on))
            except OSError as error:
                result.append(error)
            return True

        self._writer.put(Task(make))
        with self._lock:
            while not result:
                self._lock.wait(HUNG_SECONDS / 10)
                if slow := self._writer.overdue(HUNG_SECONDS):
                    raise OSError(errno.ETIMEDOUT, f"{slow}. Restart the engine when the disk answers again")
        if isinstance(result[0], OSError):
            raise result[0]
        return result[0]

    @property
    def used(self) -> int:
        """Bytes of all entries in the folder, as far as known."""
        return self._store.total

    @property
    def chunk_bytes(self) -> int:
        """Of all TP ranks."""
        return self._view.shape[1]

    @property
    def chunks_to_write(self) -> int:
        """Taken, and not yet written."""
        with self._lock:
            return sum(task.chunks for task in self._writer.tasks())

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        # Not counted: a request asks again in every step until what it found has been read.
        self._wake()
        if self.problem or self.hung:
            return LookupResult.MISS
        there = self._store.known(key)
        if there is None and self._finder.ask(key, req_context.req_id):
            return LookupResult.RETRY
        return LookupResult.HIT if there else LookupResult.MISS

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._finder.end_request(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._finder.end_step(self._store)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        if not self.problem:
            for key in reversed(list(keys)):  # so that a prompt's end goes before its beginning
                self._store.touch(key)

    def submit_load(self, job_metadata: TransferJob) -> None:
        if self.hung or self.problem:
            self._refuse(job_metadata, f"not loaded: {'off' if self.problem else 'disk hangs'}")
        else:
            self._reader.put(Task(self._load, job_metadata, len(job_metadata.keys)))

    def submit_store(self, job_metadata: TransferJob) -> None:
        self._wake()
        if reason := self._refusal(job_metadata):
            self._refuse(job_metadata, f"not stored: {reason}")
        else:
            self._writer.put(Task(self._write, job_metadata, len(job_metadata.keys)))

    def _refuse(self, job: TransferJob, why: str) -> None:
        self.counts[why] += len(job.keys)
        self._done.append(JobResult(job.job_id, False))

    def _refusal(self, job: TransferJob) -> str:
        """Why a store is not taken; empty if it is."""
        if self.problem or self.hung:
            return "off" if self.problem else "disk hangs"
        if (host_only := job.req_context.get_state(HostOnly)) is not None:
            return host_only.reason
        return "disk too slow" if self.chunks_to_write >= self._max_waiting else ""

    def get_finished_jobs(self) -> Iterable[JobResult]:
        self._watch()
        while self._done:
            yield self._done.popleft()

    def _watch(self) -> None:
        """Turns the tier off while a call to the disk hangs, and on again. vLLM asks for finished jobs in
        every step, and steps as long as there are any."""
        slow = next(filter(None, (worker.overdue(HUNG_SECONDS) for worker in self._workers)), "")
        if slow and not self.hung:
            with self._lock:
                self.hung = slow
                self._take_back("disk hangs")
            logger.warning(
                "XLayerConnector: the disk tier is off until the disk answers: %s, expected at most %g s. "
                "It comes back by itself when that call returns, or with a restart.",
                slow, HUNG_SECONDS,
            )  # fmt: skip
        elif self.hung and not slow:
            self.hung = ""
            if not self.problem:
                logger.warning("XLayerConnector: the disk answers again: the disk tier is on")

    def _take_back(self, why: str = "") -> None:
        """Reports every job as failed. From here on no thread touches its chunks, whatever call it is in.

        With the lock held.

        Args:
            why: counted, unless empty.
        """
        for worker, done in ((self._reader, "loaded"), (self._writer, "stored")):
            for task in worker.take_back():
                if not task.chunks:
                    continue
                self._done.append(JobResult(task.job.job_id, False, ()))
                if why:
                    self.counts[f"not {done}: {why}"] += task.chunks
        self._finder.cancel()

    def drain_jobs(self) -> None:
        """Afterwards no transfer touches host memory. Waits for no disk: see `_take_back`."""
        with self._lock:
            self._take_back()

    def forget(self) -> None:
        """From now on nothing is found that was written before, and nothing written is found by others.

        For a reset of the connector's cache: that is what a user does who changed the weights of a running
        engine, and the identity only knows the files that they came from. A sleep is a reset too: `_wake`
        takes it back if the weights are still the same.
        """
        self.sleep.reset(self._store.identity)
        with self._lock:
            self._store = self._store.for_identity(replace(self._store.identity, epoch=uuid4().hex))

    def _wake(self) -> None:
        if identity := self.sleep.ends():
            with self._lock:
                self._store = self._store.for_identity(identity)

    def shutdown(self) -> None:
        give_up = time.monotonic() + FLUSH_SECONDS
        self._watch()
        with self._lock:
            self._lock.wait_for(lambda: self.hung or not self._writer.tasks(), FLUSH_SECONDS)
            if left := sum(task.chunks for task in self._writer.tasks()):
                logger.warning("XLayerConnector: stopped with %d chunks not yet on disk", left)
            self._take_back()
            for worker in self._workers:
                worker.stop()
        for worker in self._workers:
            worker.thread.join(0 if self.hung else max(0.0, give_up - time.monotonic()))

    def _report(self, task: Task, good: bool) -> None:
        if task.chunks:
            self._done.append(JobResult(task.job.job_id, good, tuple(task.done)))

    def _load(self, task: Task) -> bool:
        good = True
        for key, chunk in zip(task.job.keys, task.job.chunk_ids, strict=True):
            with self._reader.holding(task) as ours:
                store = self._store
            if not ours:
                return False
            if self.problem:
                good = False
                self.counts["not loaded: off"] += 1
                continue
            started = time.perf_counter()
            try:
                self._reader.calls(f"reading {store.path_of(key)}")
                store.read(key, self._read_buffer.data)
            except EntryError as error:
                good = False
                self._count_once(f"miss: {error.reason}", str(error))
            except Exception as error:  # a thread that dies would leave requests waiting for ever
                good = False
                self.counts["not loaded: disk error"] += 1
                self._turn_off(error)
            else:
                with self._reader.holding(task) as ours:
                    if not ours:
                        return False
                    self._view[int(chunk)] = self._read_buffer
                task.done.append(key)
                self.counts["hit"] += 1
                self.seconds["load"] += time.perf_counter() - started
        return good

    def _write(self, task: Task) -> bool:
        for key, chunk in zip(task.job.keys, task.job.chunk_ids, strict=True):
            if self.problem:
                self.counts["not stored: off"] += 1
                continue
            with self._writer.holding(task) as ours:
                if not ours:
                    return False
                store = self._store  # of the time when the bytes were copied: see `forget`
                self._write_buffer[:] = self._view[int(chunk)]
            if self._unused is not None:
                self._unused.blank(key, self._write_buffer)
            self._writer.calls(f"writing {store.path_of(key)}")
            self._write_chunk(store, key)
        if time.monotonic() > self._scan_at:
            self._scan_at = time.monotonic() + MIN_RESCAN_SECONDS
            self._writer.put(Task(self._rescan))
        return not self.problem

    def _write_chunk(self, store: DiskStore, key: OffloadKey) -> None:
        started = time.perf_counter()
        try:
            if store.contains(key):
                return
            written = store.write(key, self._write_buffer.data)
        except EntryError as error:
            self._count_once(f"not stored: {error.reason}", str(error))
        except Exception as error:
            self.counts["not stored: disk error"] += 1
            self._turn_off(error)
        else:
            if written:
                self.counts["stored"] += 1
                self.seconds["store"] += time.perf_counter() - started
            else:
                self._count_once("not stored: no room", key.hex())

    def _rescan(self, task: Task) -> bool:
        started = time.monotonic()
        self._writer.calls(f"looking through {self._store.root}")
        try:
            self._store.rescan()
        except Exception as error:
            self._turn_off(error)
        now = time.monotonic()
        self._scan_at = now + max(MIN_RESCAN_SECONDS, (now - started) / RESCAN_SHARE)
        return True

    def _count_once(self, what: str, detail: str) -> None:
        self.counts[what] += 1
        if self.counts[what] == 1:
            logger.warning("XLayerConnector: disk tier: %s (counted, said once): %s", what, detail)

    def _turn_off(self, error: Exception) -> None:
        if not self.problem:
            self.problem = f"{type(error).__name__}: {error}"
            logger.warning("XLayerConnector: the disk tier is off: %s", self.problem)
