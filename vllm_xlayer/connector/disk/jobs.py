"""What the disk tier's threads do: chunks go from host memory to the disk and back.

A call that hangs may return when its chunk of host memory has long been given to somebody else. So the disk
is read into and written from buffers that only the thread has. It copies between them and host memory under
the lock, after it has seen that the job is still its own; and jobs are taken back under that lock.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import OffloadKey, get_offload_group_idx

from .format import EntryError
from .store import DiskStore
from .worker import DiskWorker, Task

logger = init_logger(__name__)

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


class DiskJobs:
    """The reading and the writing thread, and what they do.

    Args:
        view: uint8 [chunks, chunk bytes], the host tier's memory.
        unused: what of a chunk is no page's, and so the former owner's: zeros in an entry. None is nothing.
        lock: guards the jobs, and is notified whenever one ends.
        report: as of DiskWorker.

    Attributes:
        store: the folder; set before the first job.
        problem, counts, seconds: as of DiskTier.
    """

    store: DiskStore

    def __init__(
        self,
        view: np.ndarray,
        unused: Unused | None,
        lock: threading.Condition,
        report: Callable[[Task, bool], None],
    ):
        self.problem = ""
        self.counts: Counter[str] = Counter()
        self.seconds = {"store": 0.0, "load": 0.0}
        self.reader = DiskWorker("xlayer-disk-read", lock, report)
        self.writer = DiskWorker("xlayer-disk-write", lock, report)
        self.view = view
        self._unused = unused
        self._read_buffer, self._write_buffer = np.empty((2, view.shape[1]), dtype=np.uint8)
        self._scan_at = time.monotonic() + MIN_RESCAN_SECONDS

    def load(self, task: Task) -> bool:
        good = True
        for key, chunk in zip(task.job.keys, task.job.chunk_ids, strict=True):
            with self.reader.holding(task) as ours:
                store = self.store
            if not ours:
                return False
            if self.problem:
                good = False
                self.counts["not loaded: off"] += 1
                continue
            started = time.perf_counter()
            try:
                self.reader.calls(f"reading {store.path_of(key)}")
                store.read(key, self._read_buffer.data)
            except EntryError as error:
                good = False
                self._count_once(f"miss: {error.reason}", str(error))
            except Exception as error:  # a thread that dies would leave requests waiting for ever
                good = False
                self.counts["not loaded: disk error"] += 1
                self._turn_off(error)
            else:
                with self.reader.holding(task) as ours:
                    if not ours:
                        return False
                    self.view[int(chunk)] = self._read_buffer
                task.done.append(key)
                self.counts["hit"] += 1
                self.seconds["load"] += time.perf_counter() - started
        return good

    def write(self, task: Task) -> bool:
        for key, chunk in zip(task.job.keys, task.job.chunk_ids, strict=True):
            if self.problem:
                self.counts["not stored: off"] += 1
                continue
            with self.writer.holding(task) as ours:
                if not ours:
                    return False
                store = self.store  # of the time when the bytes were copied: see `forget`
                self._write_buffer[:] = self.view[int(chunk)]
            if self._unused is not None:
                self._unused.blank(key, self._write_buffer)
            self.writer.calls(f"writing {store.path_of(key)}")
            self._write_chunk(store, key)
        if time.monotonic() > self._scan_at:
            self._scan_at = time.monotonic() + MIN_RESCAN_SECONDS
            self.writer.put(Task(self._rescan))
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
        self.writer.calls(f"looking through {self.store.root}")
        try:
            self.store.rescan()
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
