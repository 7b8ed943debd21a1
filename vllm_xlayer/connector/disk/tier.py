"""The disk behind the host tier: a secondary tier of vLLM's tiering machinery.

vLLM's TieringOffloadingManager moves chunks between host memory and secondary tiers, all in the scheduler's
process: it keeps them pinned, tells a request to wait for them, and has one view of all TP ranks' bytes. So
a load counts only when every rank has its rows, and one file holds them all. What it does not have is a disk
tier that checks what it reads, bounds what it writes, or survives a bad disk: that is here. `manager` mends
the rest.

Threads of its own call the disk: one reads, one writes, one looks for what other engines wrote. The
scheduler's thread never does, and waits for none of them. Anything the disk does wrong while writing turns
the tier off, with one line in the log; a call that does not return turns it off until it does. The engine
goes on with host memory.

What the threads do is in `jobs`.
"""

import errno
import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from itertools import takewhile
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
)
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager, TransferJob

from .finder import EntryFinder
from .format import TierIdentity
from .jobs import DiskJobs, Unused
from .store import DiskStore
from .weights import AcrossSleep
from .worker import Task

logger = init_logger(__name__)

HUNG_SECONDS = 5.0
"""A call to the disk that takes longer hangs. A disk that was asleep or writes back much takes a few seconds,
and no request waits longer than manager.DEADLINE_SECONDS."""
FLUSH_SECONDS = 3.0
"""A clean stop waits so long for what is still to be written. vLLM kills its core 5 s after telling it to."""


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
        hung: What call to the disk it is waiting for, and off until then; else empty.
        limit: bytes, as given.
        chunk_bytes: of all TP ranks.
        jobs: what its threads do.
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
        self.hung = ""
        self.limit = limit
        self.chunk_bytes = view.shape[1]
        self._max_waiting = max_waiting
        self._lock = threading.Condition()
        self._done: deque[JobResult] = deque()
        self.jobs = DiskJobs(view, unused, self._lock, self._report)
        self._finder = EntryFinder(self._lock)
        self.sleep = AcrossSleep()
        self._workers = (self.jobs.reader, self.jobs.writer, self._finder.worker)
        try:
            self.jobs.store = self._open(folder, identity)
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
        result: list[DiskStore | Exception] = []

        def make(task: Task) -> bool:
            self.jobs.writer.calls(f"opening {folder}")
            try:
                result.append(
                    DiskStore(folder, self.limit, identity, self.chunk_bytes, self.jobs.writer.goes_on)
                )
            except Exception as error:  # whatever it is, the start must not wait for it
                result.append(error)
            return True

        self.jobs.writer.put(Task(make))
        with self._lock:
            while not result:
                self._lock.wait(HUNG_SECONDS / 10)
                if slow := self.jobs.writer.overdue(HUNG_SECONDS):
                    raise OSError(errno.ETIMEDOUT, f"{slow}. Restart the engine when the disk answers again")
        if isinstance(result[0], Exception):
            raise result[0]
        return result[0]

    @property
    def used(self) -> int:
        """Bytes of all entries in the folder, as far as known."""
        return self._store.total

    @property
    def problem(self) -> str:
        """Why the tier is off; empty while it works."""
        return self.jobs.problem

    @property
    def counts(self) -> Counter[str]:
        """Numbers of chunks by what became of them: stored, hit, "miss: <reason>" (there, but not usable),
        "not stored: <reason>" and "not loaded: <reason>"."""
        return self.jobs.counts

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent writing what was stored ("store"), and reading what was a hit ("load")."""
        return self.jobs.seconds

    @property
    def _store(self) -> DiskStore:
        return self.jobs.store

    @property
    def chunks_to_write(self) -> int:
        """Taken, and not yet written."""
        with self._lock:
            return sum(task.chunks for task in self.jobs.writer.tasks())

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        # Not counted: a request asks again in every step until what it found has been read.
        self.wake()
        if self.problem or self.hung:
            return LookupResult.MISS
        there = self._store.known(key)
        if there is None and self._finder.ask(key, req_context.req_id):
            return LookupResult.RETRY
        return LookupResult.HIT if there else LookupResult.MISS

    def ask(self, keys: Iterable[OffloadKey], req_context: ReqContext) -> int:
        """How many keys from the first on only the disk knows of. It is asked for these."""
        known, ask, request = self._store.known, self._finder.ask, req_context.req_id
        return sum(1 for _ in takewhile(lambda key: known(key) is None and ask(key, request), keys))

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def on_request_finished(self, req_context: ReqContext) -> None:
        self._finder.end_request(req_context.req_id)

    def on_schedule_end(self, context: ScheduleEndContext) -> None:
        self._finder.end_step(self._store)

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        if not self.problem:
            self._store.touch(reversed(list(keys)))  # so that a prompt's end goes before its beginning

    def submit_load(self, job_metadata: TransferJob) -> None:
        if self.hung or self.problem:
            self._refuse(job_metadata, f"not loaded: {'off' if self.problem else 'disk hangs'}")
        else:
            self.jobs.reader.put(Task(self.jobs.load, job_metadata, len(job_metadata.keys)))

    def submit_store(self, job_metadata: TransferJob) -> None:
        self.wake()
        if reason := self._refusal(job_metadata):
            self._refuse(job_metadata, f"not stored: {reason}")
        else:
            self.jobs.writer.put(Task(self.jobs.write, job_metadata, len(job_metadata.keys)))

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
        for worker, done in ((self.jobs.reader, "loaded"), (self.jobs.writer, "stored")):
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
        engine, and the identity only knows the files that they came from. A sleep is a reset too: `wake`
        takes it back if the weights are still the same.
        """
        self.sleep.reset(self._store.identity)
        with self._lock:
            self.jobs.store = self._store.for_identity(replace(self._store.identity, epoch=uuid4().hex))

    def wake(self) -> None:
        if identity := self.sleep.ends():
            with self._lock:
                self.jobs.store = self._store.for_identity(identity)

    def shutdown(self) -> None:
        give_up = time.monotonic() + FLUSH_SECONDS
        self._watch()
        with self._lock:
            self._lock.wait_for(lambda: self.hung or not self.jobs.writer.tasks(), FLUSH_SECONDS)
            if left := sum(task.chunks for task in self.jobs.writer.tasks()):
                logger.warning("XLayerConnector: stopped with %d chunks not yet on disk", left)
            self._take_back()
            for worker in self._workers:
                worker.stop()
        for worker in self._workers:
            worker.thread.join(0 if self.hung else max(0.0, give_up - time.monotonic()))

    def _report(self, task: Task, good: bool) -> None:
        if task.chunks:
            self._done.append(JobResult(task.job.job_id, good, tuple(task.done)))
