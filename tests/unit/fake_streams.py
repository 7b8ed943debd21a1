"""Streams, events and a copy engine without a GPU: what runs when is up to the test.

A stream is a queue. Events and waits are passed as soon as they can be; copies and the model's kernels run
when the test says so, one at a time, and change memory only then.
"""

from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace


@dataclass(eq=False)
class Stream:
    device: "Device"
    queue: deque = field(default_factory=deque)
    """("copy" or "kernel", what it does), ("record" or "wait", (event, which record of it))."""

    def wait_event(self, event):
        self.queue.append(("wait", (event, event.recorded)))

    def synchronize(self):
        self.device.run_until(lambda: not self.queue)


class Event:
    def __init__(self, device, enable_timing):
        self.device, self.timing = device, enable_timing
        self.recorded = self.passed = 0
        self.at = None

    def record(self, stream):
        self.recorded += 1
        stream.queue.append(("record", (self, self.recorded)))

    def query(self):
        self.device.check()
        self.device.advance()
        return self.passed == self.recorded

    def synchronize(self):
        self.device.run_until(self.query)

    def elapsed_time(self, end):
        self.device.check()
        assert self.timing and end.timing and self.query() and end.query()
        return end.at - self.at


class Device:
    """What `torch.cuda` is to pacing.py, by ``as_cuda``."""

    def __init__(self):
        self.clock = 0.0
        """Milliseconds."""
        self.copies = 0
        """Done."""
        self.broken = False
        self.streams: list[Stream] = []
        self.model = self.current = self.stream()
        self._taken: Stream | None = None

    def stream(self, _=None):
        self.streams.append(Stream(self))
        return self.streams[-1]

    def as_cuda(self):
        return SimpleNamespace(
            Stream=self.stream,
            Event=lambda enable_timing=False: Event(self, enable_timing),
            stream=self.use,
            current_stream=lambda: self.current,
        )

    @contextmanager
    def use(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def put(self, kind, action):
        self.current.queue.append((kind, action))

    def check(self):
        if self.broken:
            raise RuntimeError("the device is broken")

    def advance(self):
        """Passes what takes no time."""
        moved = True
        while moved:
            moved = False
            for queue in (s.queue for s in self.streams):
                while queue and queue[0][0] in ("wait", "record"):
                    kind, (event, number) = queue[0]
                    if kind == "wait" and event.passed < number:
                        break
                    if kind == "record":
                        event.passed, event.at = number, self.clock
                    queue.popleft()
                    moved = True

    def runnable(self, kind="copy"):
        self.advance()
        return [s for s in self.streams if s.queue and s.queue[0][0] == kind]

    def run(self, stream, milliseconds=1.0):
        """The copy or kernel at the head of a stream."""
        self.check()
        kind, action = stream.queue.popleft()
        self.clock += milliseconds
        action()
        self.copies += kind == "copy"
        self.advance()

    def run_a_copy(self):
        """As an engine does that stays with a stream as long as it can, and then goes to the next one."""
        streams = self.runnable()
        if self._taken not in streams:
            at = 0 if self._taken is None else self.streams.index(self._taken) + 1
            in_turn = self.streams[at:] + self.streams[:at]
            self._taken = next(s for s in in_turn if s in streams)
        self.run(self._taken)

    def run_until(self, reached):
        self.check()
        self.advance()
        while not reached():
            kernels = self.runnable("kernel")
            if kernels:
                self.run(kernels[0])
            else:
                assert self.runnable(), "streams wait for each other"
                self.run_a_copy()
