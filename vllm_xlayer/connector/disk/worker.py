"""A thread that calls the disk, where a call may never return. No vLLM.

Nobody waits for the thread. What it was given may be taken back at any moment, also while a call is under
way: from then on the result is nobody's, and the thread must not touch what belongs to the task's owner. A
thread in such a call cannot be ended; when the call returns after all, it goes on with the next task.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Task:
    """Something to do on a disk's thread.

    Attributes:
        work: does it, and says whether all went well.
        job: whose it is; for the one who gets the result.
        chunks: how many of them it is about.
        done: of the job's keys, those that are done; for the same.
    """

    work: Callable[["Task"], bool]
    job: Any = None
    chunks: int = 0
    done: list[Any] = field(default_factory=list)


class DiskWorker:
    """One thread, and the tasks that wait for it.

    Args:
        lock: guards the tasks, and is notified whenever one ends.
        report: called with a task that ended and whether it went well, under the lock; not if it was taken
            back.
    """

    def __init__(self, name: str, lock: threading.Condition, report: Callable[[Task, bool], None]):
        self._lock = lock
        self._report = report
        self._queue: deque[Task] = deque()
        self._task: Task | None = None
        self._call: tuple[str, float] | None = None  # what, and since when (time.monotonic())
        self._stopped = False
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def put(self, task: Task) -> None:
        """Does not wait."""
        with self._lock:
            self._queue.append(task)
            self._lock.notify_all()

    def tasks(self) -> list[Task]:
        """What is under way or waits; with the lock held."""
        return [*([] if self._task is None else [self._task]), *self._queue]

    def take_back(self) -> list[Task]:
        """What was under way or waited, and is no longer this worker's; with the lock held."""
        tasks = self.tasks()
        self._task = None
        self._queue.clear()
        return tasks

    @contextmanager
    def holding(self, task: Task) -> Iterator[bool]:
        """Holds the lock, and says whether a task is still this worker's: only then, and only inside, may its
        thread touch memory that came with the task."""
        with self._lock:
            yield self._task is task

    def calls(self, what: str) -> None:
        """By the thread: a call to the disk begins."""
        self._call = (what, time.monotonic())

    def goes_on(self) -> None:
        """By the thread: one of several calls has returned."""
        if self._call is not None:
            self.calls(self._call[0])

    def overdue(self, seconds: float) -> str:
        """What the thread is waiting for, if it has for longer than that; else empty."""
        call = self._call
        waited = 0.0 if call is None else time.monotonic() - call[1]
        return "" if call is None or waited <= seconds else f"{call[0]} has taken {waited:.1f} s"

    def stop(self) -> None:
        """The thread ends after its present task, without beginning another; with the lock held."""
        self._stopped = True
        self._lock.notify_all()

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._stopped or self._queue)
                if self._stopped:
                    return
                task = self._task = self._queue.popleft()
            good = False
            try:
                good = task.work(task)
            except Exception:  # a thread that dies would leave requests waiting for ever
                logger.exception("%s: a task failed", self.thread.name)
            with self._lock:
                self._call = None
                if self._task is task:
                    self._task = None
                    self._report(task, good)
                self._lock.notify_all()
