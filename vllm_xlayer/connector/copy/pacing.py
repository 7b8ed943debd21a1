"""Copies of one direction, batch after batch, so that others' small copies get in between.

vLLM makes small copies in every step: indices to the device, sampled tokens back. A copy engine does not
interrupt what it was given, and takes streams in turn, or for as long as one has commands that may run. So no
stream may ever have two batches that may run one after the other:

    stream 0   | batch 0 |                       | batch 3 | waits for batch 1
    stream 1             | batch 1 |                       | batch 4 | waits for batch 2
    stream 2                       | batch 2 |                       | ...
                                   ^ waits for batch 0

Batch k waits for batch k - 2, on another stream. At any time two batches may run and all others wait at an
event: the engine has the next one when it is done with one, and a small copy waits for three batches at most,
one a stream.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import cuda

IN_FLIGHT = 2
"""Batches that may run. With one the link would be idle while the next one's stream wakes up."""


@dataclass(frozen=True)
class Paced:
    """A batch on the device: events before and after it, and after the batch before it."""

    start: cuda.Event
    end: cuda.Event
    before: cuda.Event | None

    def seconds(self) -> float:
        """How long the link had this batch, and not the one before. Both must be done.

        Raises:
            RuntimeError: the copy failed on the device.
        """
        milliseconds = self.start.elapsed_time(self.end)
        if self.before is not None:
            milliseconds = min(milliseconds, self.before.elapsed_time(self.end))
        return milliseconds * 1e-3

    def let_current_stream_follow(self) -> None:
        """Lets what is put on the current stream from now on run after this batch and all before it.

        Raises:
            RuntimeError: an earlier call failed on the device.
        """
        stream = cuda.current_stream()
        stream.wait_event(self.end)
        if self.before is not None:  # this batch came after the one two before it, and may overtake that one
            stream.wait_event(self.before)


class Chain:
    """Streams that take turns."""

    def __init__(self, device: torch.device):
        # One more than may run: the next batch of any stream then waits for a batch of another.
        self._streams = deque(cuda.Stream(device) for _ in range(IN_FLIGHT + 1))
        self._ends: deque[cuda.Event] = deque(maxlen=IN_FLIGHT)
        self._ready = cuda.Event()
        self._not_waiting: set[cuda.Stream] = set()

    def follow(self) -> None:
        """Lets batches that are submitted from now on run after what the current stream has so far.

        Raises:
            RuntimeError: an earlier call failed on the device.
        """
        self._ready.record(cuda.current_stream())
        self._not_waiting.update(self._streams)

    def run(self, copy: Callable[[], None]) -> Paced:
        """Calls ``copy`` with the next stream as current stream.

        What it raises passes through; a part of the batch may then be running.
        """
        stream = self._streams[0]
        self._streams.rotate(-1)
        if stream in self._not_waiting:
            stream.wait_event(self._ready)
            self._not_waiting.remove(stream)
        if len(self._ends) == IN_FLIGHT:
            stream.wait_event(self._ends[0])
        start, end = (cuda.Event(enable_timing=True) for _ in range(2))
        with cuda.stream(stream):
            start.record(stream)
            copy()
            end.record(stream)
        before = self._ends[-1] if self._ends else None
        self._ends.append(end)
        return Paced(start, end, before)

    def synchronize(self) -> None:
        """Returns when nothing runs any more. RuntimeError: the device does not answer."""
        for stream in self._streams:
            stream.synchronize()
