"""Reads of rows into a staging ring: chunks, deadlines, and what a read that was given up may still write.

Nothing but a final state ends a read: NIXL lets go of a handle at once, and rows go on arriving. So rows are
read into a ring, never into the KV cache. A read that is given up takes its buffer into quarantine until its
handle is final, and the request can be computed at once.

No vLLM and no NIXL here: `Wire` is what this needs of them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

Peer = tuple[str, int]
"""(engine id, rank)"""


POLL_SECONDS, QUIET_SECONDS = 2e-3, 0.5e-3
"""How long a poll stays at most, and how long while nothing comes: 16 MiB take 0.05 ms over NVLink, 0.35 ms
over 400 Gbit/s."""
REASONS = ("late", "seal", "lost", "busy")
"""Why a read fails: no answer in time; rows that are not what they must be; the peer or the link is gone; an
earlier read from that peer has not ended."""


class Failure(NamedTuple):
    """A reason, and a text for people."""

    reason: str
    text: str


class Row(NamedTuple):
    """One row to read."""

    remote: int
    local: int
    group: int
    tag: int


class Landing(Protocol):
    """A chunk's way from the ring into the KV cache."""

    def done(self) -> bool:
        """Whether the ring's buffer is free again."""

    def problem(self) -> str | None:
        """After `done`: why its rows are not what they must be, or None."""


class Wire(Protocol):
    """What moves bytes."""

    def capacity(self, peer: Peer) -> int:
        """Rows of that peer that one buffer holds."""

    def post(self, peer: Peer, buffer: int, rows: Sequence[Row]) -> Any:
        """Starts to read rows, and their seals, into a buffer; returns a handle. May raise."""

    def state(self, handle: Any) -> str:
        """DONE, PROC, or an error's name. May raise, where the peer is gone."""

    def release(self, handle: Any) -> bool:
        """Lets go of a handle that is final; False where it must be kept, and asked again."""

    def begin(self) -> Any:
        """Called when a read begins, whose blocks nothing uses that is launched later; for `land`."""

    def land(self, peer: Peer, buffer: int, rows: Sequence[Row], begun: Any) -> Landing:
        """Checks what a buffer holds and copies it into the KV cache. begun: what `begin` returned."""


@dataclass(eq=False)
class Chunk:
    """Rows of one read in one buffer."""

    read: "Read"
    buffer: int
    rows: Sequence[Row]
    handle: Any
    posted: float
    landing: Landing | None = None


@dataclass(eq=False)
class Read:
    """All rows of one request from one peer."""

    request: str
    peer: Peer
    rows: Sequence[Row]
    begun: Any
    waits_since: float
    """When it was added, or had its last chunk."""
    posted: int = 0
    """Rows that are on their way or here."""
    under_way: int = 0
    """Chunks."""
    failure: Failure | None = None

    @property
    def over(self) -> bool:
        return self.under_way == 0 and (self.failure is not None or self.posted == len(self.rows))


@dataclass
class StagedReads:
    """All reads of one rank.

    Args:
        wire: what moves bytes.
        buffers: number of buffers of the ring.
        timeout: seconds that a chunk may take, and that a read may wait for a buffer.
    """

    wire: Wire
    buffers: int
    timeout: float
    clock: Callable[[], float] = time.monotonic
    reads: dict[str, list[Read]] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)
    quarantined: list[Chunk] = field(default_factory=list)
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.free = list(range(self.buffers))

    def add(self, request: str, peer: Peer, rows: Sequence[Row]) -> None:
        """Reads rows for a request; several peers may be asked for parts of one request."""
        self.reads.setdefault(request, []).append(Read(request, peer, rows, self.wire.begin(), self.clock()))
        self._post()

    def poll(self) -> dict[str, Failure | None]:
        """Moves everything on. Returns the requests that are over: with their failure, or None.

        Stays while chunks come: an engine polls once a step, and a step takes as long as dozens of chunks.
        """
        begin = last = now = time.monotonic()
        while now - begin < POLL_SECONDS and now - last < QUIET_SECONDS:
            came = self._move()
            if not self.chunks:
                break
            now = time.monotonic()
            last = now if came else last
        over: dict[str, Failure | None] = {}
        for request, reads in list(self.reads.items()):
            failure = next((read.failure for read in reads if read.failure), None)
            if failure:
                # The others' rows are of no use any more.
                for read in reads:
                    self._give_up(read, failure)
            if all(read.over for read in reads):
                over[request] = failure
                del self.reads[request]
        return over

    def _move(self) -> bool:
        """Whether a chunk arrived, or has landed."""
        self._look_at_quarantined()
        # One that fails takes others of its read to quarantine.
        came = [self._advance(chunk) for chunk in list(self.chunks) if chunk in self.chunks]
        self._post()
        return any(came)

    def peers(self) -> set[Peer]:
        """Those that are read from, or have transfers in quarantine."""
        reading = {read.peer for reads in self.reads.values() for read in reads}
        return reading | {chunk.read.peer for chunk in self.quarantined}

    def _advance(self, chunk: Chunk) -> bool:
        """Whether it arrived, or has landed."""
        if chunk.landing is not None:
            return self._look_at_landing(chunk)
        state = self._state(chunk)
        if state == "DONE":
            self.wire.release(chunk.handle)
            if chunk.read.failure:
                self._drop(chunk)
                return True
            chunk.landing = self.wire.land(chunk.read.peer, chunk.buffer, chunk.rows, chunk.read.begun)
            self._look_at_landing(chunk)
            return True
        if state != "PROC":
            self._give_up(chunk.read, Failure("lost", f"the read failed: {state}"))
        elif self.clock() - chunk.posted > self.timeout:
            text = f"expected {len(chunk.rows)} rows within {self.timeout:g} s"
            self._give_up(chunk.read, Failure("late", text))
        return False

    def _look_at_landing(self, chunk: Chunk) -> bool:
        """Whether it is over."""
        assert chunk.landing is not None
        if not chunk.landing.done():
            return False
        problem = chunk.landing.problem()
        self._drop(chunk)
        if problem:
            self._give_up(chunk.read, Failure("seal", problem))
        return True

    def _give_up(self, read: Read, why: Failure) -> None:
        """No more chunks; those under way go to quarantine, but for such as are landing already."""
        read.failure = read.failure or why
        for chunk in [c for c in self.chunks if c.read is read and c.landing is None]:
            self.chunks.remove(chunk)
            read.under_way -= 1
            self.quarantined.append(chunk)
        self._look_at_quarantined()

    def _look_at_quarantined(self) -> None:
        for chunk in list(self.quarantined):
            if self._state(chunk) != "PROC" and self.wire.release(chunk.handle):
                self.quarantined.remove(chunk)
                self.free.append(chunk.buffer)

    def _drop(self, chunk: Chunk) -> None:
        """Its buffer is free again."""
        self.chunks.remove(chunk)
        chunk.read.under_way -= 1
        self.free.append(chunk.buffer)

    def _state(self, chunk: Chunk) -> str:
        try:
            return self.wire.state(chunk.handle)
        except Exception as error:  # NIXL's own, of several kinds: the peer is gone
            return f"{type(error).__name__}: {error}"

    def _post(self) -> None:
        """Fills free buffers, first come first served."""
        hung = {chunk.read.peer for chunk in self.quarantined}
        for read in [read for reads in self.reads.values() for read in reads if not read.over]:
            if read.peer in hung:
                self._give_up(read, Failure("busy", "an earlier read from this peer has not ended yet"))
            while self.free and not read.failure and read.posted < len(read.rows):
                self._post_chunk(read)
            if read.under_way:
                read.waits_since = self.clock()
            elif not read.over and self.clock() - read.waits_since > self.timeout:
                text = f"expected room in the ring within {self.timeout:g} s: reads that hang have it"
                self._give_up(read, Failure("late", text))

    def _post_chunk(self, read: Read) -> None:
        rows = read.rows[read.posted : read.posted + self.wire.capacity(read.peer)]
        buffer = self.free.pop()
        try:
            handle = self.wire.post(read.peer, buffer, rows)
        except Exception as error:  # as in _state: nothing was begun
            self.free.append(buffer)
            text = f"the read could not be started: {type(error).__name__}: {error}"
            self._give_up(read, Failure("lost", text))
            return
        read.posted += len(rows)
        read.under_way += 1
        self.chunks.append(Chunk(read, buffer, rows, handle, self.clock()))
