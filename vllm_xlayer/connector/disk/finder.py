"""Whether there are entries that an engine has not seen: another one may have written them. No vLLM.

Only the disk knows, and the thread that schedules must not ask it. So a new prompt waits for one step: its
unknown keys are one run, which a thread looks for while the step goes on. In the next step they are known, to
be there or to be absent, and a request that has to wait to be admitted does not wait for this again.
"""

import threading
import time

from .store import DiskStore
from .worker import DiskWorker, Task

ASK_SECONDS = 0.2
"""A request waits so long for answers, in all. Then what is not known is not there for it."""


class EntryFinder:
    """Runs of unknown keys, by request. All but the looking is for the scheduler's thread."""

    def __init__(self, lock: threading.Condition):
        self.worker = DiskWorker("xlayer-disk-find", lock, lambda task, good: None)
        self._asked: set[bytes] = set()
        self._runs: dict[str, list[bytes]] = {}
        self._since: dict[str, float] = {}

    def ask(self, key: bytes, request: str) -> bool:
        """Whether to ask again in the next step; else the key is to be taken for absent."""
        now = time.monotonic()
        if now - self._since.setdefault(request, now) > ASK_SECONDS:
            return False
        if key not in self._asked:
            self._asked.add(key)
            self._runs.setdefault(request, []).append(key)
        return True

    def end_step(self, store: DiskStore) -> None:
        """Starts to look for what was asked in this step."""
        for run in self._runs.values():
            self.worker.put(Task(lambda task, run=run: self._find(store, run)))  # type: ignore[misc]
        self._runs.clear()

    def end_request(self, request: str) -> None:
        self._since.pop(request, None)

    def cancel(self) -> None:
        """Forgets what is not answered yet; whoever asks again starts a new run."""
        self.worker.take_back()
        self._asked.clear()
        self._runs.clear()

    def _find(self, store: DiskStore, run: list[bytes]) -> bool:
        there = 0
        for key in run:
            self.worker.calls(f"looking for {store.path_of(key)}")
            if not store.contains(key):
                break
            there += 1
        # The rest of a prompt is of no use without this. (A sliding window's run begins at the prompt's end:
        # there, a hit on what another engine wrote may be lost. That is found by the next scan.)
        store.assume_absent(run[there:])
        self._asked.difference_update(run)
        return True
