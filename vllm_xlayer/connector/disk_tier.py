"""The disk behind the host tier: a secondary tier of vLLM's tiering machinery.

vLLM's TieringOffloadingManager moves chunks between host memory and secondary tiers, all in the scheduler's
process: it keeps them pinned, tells a request to wait for them, and has one view of all TP ranks' bytes. So
a load counts only when every rank has its rows, and one file holds them all. What it does not have is a disk
tier that checks what it reads, bounds what it writes, or survives a bad disk: that is here. `tiering` mends
the rest.

One thread reads, one writes; both report through `get_finished_jobs`. Anything the disk does wrong while
writing turns the tier off, with one line in the log; the engine goes on with host memory.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import uuid4

import numpy as np
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext, RequestOffloadingContext
from vllm.v1.kv_offload.tiering.base import JobMetadata, JobResult, SecondaryTierManager

from .disk_format import EntryError, TierIdentity
from .disk_store import DiskStore

logger = init_logger(__name__)

FLUSH_SECONDS = 5.0
"""A clean stop waits so long for what is still to be written."""
MIN_RESCAN_SECONDS = 10.0
RESCAN_SHARE = 0.01
"""Of the writing thread's time, for looking at what other engines wrote."""


@dataclass
class HostOnly(ReqContext):
    """Of a request whose keys do not say what its items are: tiers that outlive the engine are not for it."""


class DiskTier(SecondaryTierManager):
    """Chunks in a folder.

    Args:
        view: uint8 [chunks, chunk bytes], the host tier's memory.
        folder: exists.
        limit: bytes of all entries in the folder.
        max_waiting: while so many chunks wait to be written, no more are taken, so that a slow disk does not
            keep the whole host tier pinned.

    Attributes:
        problem: Why the tier is off; empty while it works.
        counts: stored, hit, "miss: <reason>" (there, but not usable), "not stored: <reason>" and
            "not loaded: <reason>", in chunks.
        seconds: spent writing what was stored ("store"), and reading what was a hit ("load").
        limit: bytes, as given.

    Raises:
        OSError: the folder cannot be used.
    """

    def __init__(self, view: np.ndarray, folder: Path, limit: int, identity: TierIdentity, max_waiting: int):
        self.tier_type = "xlayer-disk"
        self.problem = ""
        self.counts: Counter[str] = Counter()
        self.seconds = {"store": 0.0, "load": 0.0}
        self.limit = limit
        self._view = view
        self._max_waiting = max_waiting
        self._identity = identity
        self._make_store = lambda: DiskStore(folder, limit, self._identity, view.shape[1])
        self._store = self._make_store()
        self._wake = threading.Condition()
        self._loads: deque[JobMetadata] = deque()
        self._stores: deque[JobMetadata] = deque()
        self._waiting = 0  # chunks in _stores and in the writer's hands
        self._busy = 0  # threads at work on a job
        self._stop = False
        self._done: deque[JobResult] = deque()
        self._threads = [
            threading.Thread(target=self._serve, args=args, name=f"xlayer-disk-{args[2]}", daemon=True)
            for args in ((self._loads, self._load, "read"), (self._stores, self._write, "write"))
        ]
        for thread in self._threads:
            thread.start()
        logger.info(
            "XLayerConnector: disk tier in %s: %.2f of %.2f GiB, identity %s",
            folder, self._store.total / 2**30, limit / 2**30, identity.digest,
        )  # fmt: skip

    @property
    def used(self) -> int:
        """Bytes of all entries in the folder, as far as known."""
        return self._store.total

    @property
    def chunk_bytes(self) -> int:
        """Of all TP ranks."""
        return self._view.shape[1]

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        # Not counted: a request asks again in every step until what it found has been read.
        if self.problem or not self._store.contains(key):
            return LookupResult.MISS
        return LookupResult.HIT

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        return RequestOffloadingContext()

    def touch(self, keys: Collection[OffloadKey], req_context: ReqContext) -> None:
        if not self.problem:
            for key in reversed(list(keys)):  # so that a prompt's end goes before its beginning
                self._store.touch(key)

    def submit_load(self, job_metadata: JobMetadata) -> None:
        with self._wake:
            self._loads.append(job_metadata)
            self._wake.notify_all()

    def submit_store(self, job_metadata: JobMetadata) -> None:
        with self._wake:
            if reason := self._refusal(job_metadata):
                self.counts[f"not stored: {reason}"] += len(job_metadata.keys)
                self._done.append(JobResult(job_metadata.job_id, False))
                return
            self._waiting += len(job_metadata.keys)
            self._stores.append(job_metadata)
            self._wake.notify_all()

    def _refusal(self, job: JobMetadata) -> str:
        """Why a store is not taken; empty if it is."""
        if self.problem:
            return "off"
        if isinstance(job.req_context, HostOnly):
            return "items not named by content"
        return "disk too slow" if self._waiting >= self._max_waiting else ""

    def get_finished_jobs(self) -> Iterable[JobResult]:
        while self._done:
            yield self._done.popleft()

    def drain_jobs(self) -> None:
        """Cancels what has not begun, and waits for the rest."""
        with self._wake:
            self._cancel()
            self._wake.wait_for(lambda: self._busy == 0)

    def forget(self) -> None:
        """From now on nothing is found that was written before, and nothing written is found by others.

        For a reset of the connector's cache: that is what a user does who changed the weights of a running
        engine, and the identity only knows the files that they came from.
        """
        self._identity = replace(self._identity, epoch=uuid4().hex)
        try:
            self._store = self._make_store()
        except OSError as error:
            self._turn_off(error)

    def shutdown(self) -> None:
        with self._wake:
            if not self._wake.wait_for(lambda: not self._stores and self._busy == 0, FLUSH_SECONDS):
                logger.warning("XLayerConnector: stopped with %d chunks not yet on disk", self._waiting)
            self._cancel()
            self._stop = True
            self._wake.notify_all()
        for thread in self._threads:
            thread.join(FLUSH_SECONDS)

    def _cancel(self) -> None:
        for queue in (self._loads, self._stores):
            self._done.extend(JobResult(job.job_id, False) for job in queue)
        self._waiting -= sum(len(job.keys) for job in self._stores)
        self._loads.clear()
        self._stores.clear()

    def _serve(self, queue: deque[JobMetadata], work: Callable[[JobMetadata], bool], name: str) -> None:
        """A thread's life. ``work`` says whether the job succeeded."""
        scan_at = time.monotonic() + MIN_RESCAN_SECONDS
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._stop or queue)
                if self._stop:
                    return
                job = queue.popleft()
                self._busy += 1
            success = False
            try:
                success = work(job)
                if name == "write" and time.monotonic() > scan_at:
                    scan_at = self._rescan()
            except OSError as error:
                self._turn_off(error)
            except Exception:  # a thread that dies would leave requests waiting for ever
                logger.exception("XLayerConnector: disk tier: job %d failed", job.job_id)
            finally:
                with self._wake:
                    self._busy -= 1
                    self._waiting -= len(job.keys) if name == "write" else 0
                    self._done.append(JobResult(job.job_id, success))
                    self._wake.notify_all()

    def _load(self, job: JobMetadata) -> bool:
        good = True
        for key, chunk in zip(job.keys, job.block_ids, strict=True):
            if self.problem:
                good = False
                self.counts["not loaded: off"] += 1
                continue
            started = time.perf_counter()
            try:
                self._store.read(key, memoryview(self._view[int(chunk)]))
            except EntryError as error:
                good = False
                self._count_once(f"miss: {error.reason}", str(error))
            except OSError as error:
                good = False
                self.counts["not loaded: disk error"] += 1
                self._turn_off(error)
            else:
                self.counts["hit"] += 1
                self.seconds["load"] += time.perf_counter() - started
        return good

    def _write(self, job: JobMetadata) -> bool:
        for key, chunk in zip(job.keys, job.block_ids, strict=True):
            if self.problem:
                self.counts["not stored: off"] += 1
                continue
            if self._store.contains(key):
                continue
            started = time.perf_counter()
            try:
                written = self._store.write(key, memoryview(self._view[int(chunk)]))
            except OSError as error:
                self.counts["not stored: disk error"] += 1
                self._turn_off(error)
                continue
            if written:
                self.counts["stored"] += 1
                self.seconds["store"] += time.perf_counter() - started
            else:
                self._count_once("not stored: no room", key.hex())
        return not self.problem

    def _rescan(self) -> float:
        """When to look again."""
        started = time.monotonic()
        self._store.rescan()
        now = time.monotonic()
        return now + max(MIN_RESCAN_SECONDS, (now - started) / RESCAN_SHARE)

    def _count_once(self, what: str, detail: str) -> None:
        self.counts[what] += 1
        if self.counts[what] == 1:
            logger.warning("XLayerConnector: disk tier: %s (counted, said once): %s", what, detail)

    def _turn_off(self, error: OSError) -> None:
        if not self.problem:
            self.problem = f"{type(error).__name__}: {error}"
            logger.warning("XLayerConnector: the disk tier is off: %s", self.problem)
