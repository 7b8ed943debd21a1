"""What is in the disk tier's folder as far as an engine knows, and what goes first.

Memory only. The scheduler's thread waits for the lock that is here, so nothing under it may call the disk, or
take long with many entries.
"""

import heapq
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable

ABSENT_SECONDS = 5.0
"""A file that was looked for and not found is not looked for again for so long: a request that waits to be
admitted asks in every step."""

Entry = tuple[int, float]
"""Bytes, and the time of last use, as time.time()."""


class Account:
    """Entries and temporary files by path. Every method may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[str, Entry] = OrderedDict()  # the least recently used first
        self._total = 0
        self._absent: OrderedDict[str, float] = OrderedDict()  # until when, the first to end first
        self._changes: dict[str, Entry | None] | None = None  # while a scan is under way: since it began

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return self._total

    def has(self, path: str) -> bool | None:
        """Whether the file is there; None if only the disk knows."""
        with self._lock:
            if path in self._known:
                return True
            until = self._absent.get(path)
        return None if until is None or time.monotonic() > until else False

    def last_use(self, path: str) -> float:
        """0 if the file is not known."""
        with self._lock:
            return self._known.get(path, (0, 0.0))[1]

    def add(self, path: str, size: int) -> None:
        """The file is there, and was used just now."""
        with self._lock:
            self._absent.pop(path, None)
            self._set(path, (size, time.time()))

    def touch(self, paths: Iterable[str]) -> None:
        """The files were used just now, the last one last, as far as they are known."""
        with self._lock:
            for path in paths:
                if path in self._known:
                    self._set(path, (self._known[path][0], time.time()))

    def forget(self, paths: Iterable[str]) -> None:
        """The files are not there."""
        now = time.monotonic()
        with self._lock:
            for path in paths:
                self._set(path, None)
                self._absent.pop(path, None)
                self._absent[path] = now + ABSENT_SECONDS
            while self._absent and now > next(iter(self._absent.values())):
                self._absent.popitem(last=False)

    def oldest(self, suffix: str) -> str | None:
        """The least recently used file with such a name."""
        with self._lock:
            return next((path for path in self._known if path.endswith(suffix)), None)

    def begin_scan(self) -> None:
        """From now on changes are remembered: the scan may see a file before it changes, or after."""
        with self._lock:
            self._changes = {}

    def end_scan(self, folders: Iterable[list[tuple[float, str, int]]]) -> None:
        """Takes what a scan found for what is there, and then what changed since it began.

        Args:
            folders: of each folder (time of last use, path, bytes) of its files, in any order.
        """
        # Not one sort of all of them: that is a tenth of a second for 100,000 in which no thread can run.
        ordered = heapq.merge(*(sorted(folder) for folder in folders))
        known = OrderedDict((path, (size, used)) for used, path, size in ordered)
        total = sum(size for size, _ in known.values())
        with self._lock:
            changes, self._changes = self._changes or {}, None
            self._known, self._total = known, total
            for path, entry in changes.items():
                self._set(path, entry)

    def _set(self, path: str, entry: Entry | None) -> None:
        """With the lock held."""
        self._total -= self._known.pop(path, (0, 0.0))[0]
        if entry is not None:
            self._known[path] = entry
            self._total += entry[0]
        if self._changes is not None:
            self._changes.pop(path, None)  # so that they stay in the order in which they happened
            self._changes[path] = entry
