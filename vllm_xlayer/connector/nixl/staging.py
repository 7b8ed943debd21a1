"""Reads of rows into a staging ring: chunks, deadlines, and what a read that was given up may still write.

Nothing but a final state ends a read: NIXL lets go of a handle at once, and rows go on arriving. So rows are
read into a ring, never into the KV cache. A read that is given up takes its buffer into quarantine until its
handle is final, and the request can be computed at once.

A chunk is copied on as soon as it has arrived. Whether all rows are what they must be is asked once a read,
after its last chunk: until then nobody hears of any of them.

No vLLM and no NIXL here: `Wire` is what this needs of them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .reads import Check, Failure, Landing, Peer, Wire


class Stay(NamedTuple):
    """How long a poll stays, in seconds: at most, and while nothing comes."""

    most: float
    quiet: float


BESIDE_STEPS, IDLE = Stay(2e-3, 1e-3), Stay(10e-3, 2e-3)
"""Of an engine whose step computes something, and of one that has nothing else to do: then its steps are what
reads wait for. 64 MiB take 0.6 ms over NVLink, 1.4 ms over 400 Gbit/s."""


@dataclass(eq=False)
class Chunk:
    """Rows of one read in one buffer."""

    read: "Read"
    buffer: int
    rows: range
    handle: Any
    posted: float
    landing: Landing | None = None
    final: bool = False
    """In quarantine: whether nothing arrives any more, and its handle is to be given back."""


@dataclass(eq=False)
class Read:
    """All rows of one request from one peer."""

    request: str
    peer: Peer
    rows: int
    begun: Any
    waits_since: float
    """When it was added, or had its last chunk."""
    posted: int = 0
    """Rows that are on their way or here."""
    under_way: int = 0
    """Chunks."""
    landing: int = 0
    """Rows that have arrived, and are copied or being copied."""
    check: Check | None = None
    checked: bool = False
    """Whether the check is done, and nothing was wrong."""
    failure: Failure | None = None

    @property
    def over(self) -> bool:
        return self.under_way == 0 and (self.failure is not None or self.checked)


@dataclass
class StagedReads:
    """All reads of one rank.

    Args:
        wire: what moves bytes.
        buffers: number of buffers of the ring.
        timeout: seconds that a chunk may take, and that a read may wait for a buffer.
        stay: how long a poll stays.
    """

    wire: Wire
    buffers: int
    timeout: float
    clock: Callable[[], float] = time.monotonic
    reads: dict[str, list[Read]] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)
    checks: list[Read] = field(default_factory=list)
    """Reads whose check is not done."""
    quarantined: list[Chunk] = field(default_factory=list)
    unreleased: list[Any] = field(default_factory=list)
    """Handles of chunks that have arrived, which the wire keeps for now."""
    stay: Stay = BESIDE_STEPS
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.free = list(range(self.buffers))

    def add(self, request: str, peer: Peer, count: int, rows: Any) -> None:
        """Reads rows for a request; several peers may be asked for parts of one request.

        rows: so many, as the wire wants them.
        """
        read = Read(request, peer, count, None, self.clock())
        try:
            read.begun = self.wire.begin(peer, rows)
        except Exception as error:
            text = f"the read could not be begun: {type(error).__name__}: {error}"
            read.failure = Failure("lost", text)
        self.reads.setdefault(request, []).append(read)
        for _ in range(self.buffers):  # so many are posted at most
            self._move()
            if read.over or read.posted == read.rows:
                break

    def poll(self) -> dict[str, Failure | None]:
        """Moves everything on. Returns the requests that are over: with their failure, or None.

        Stays while chunks come: an engine polls once a step, and a step takes as long as dozens of chunks.
        """
        begin = last = now = time.monotonic()
        self._look_at_quarantined()
        while now - begin < self.stay.most and now - last < self.stay.quiet:
            came = self._move()
            now = time.monotonic()
            last = now if came else last
            if not self.chunks and not self.checks:
                break
        self._post()  # also where nothing came: a read that waits may have waited long enough
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
        """Whether a chunk arrived, or has landed, or was posted, or a read is checked."""
        # One that fails takes others of its read to quarantine.
        came = [self._advance(chunk) for chunk in list(self.chunks) if chunk in self.chunks]
        came += [self._look_at_check(read) for read in list(self.checks)]
        if any(came):
            self._look_at_quarantined()
        if any(came) or self.free:
            # One: to post it may take as long as to read it, and what arrives meanwhile would not land.
            came.append(self._post(most=1) > 0)
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
            if not self.wire.release(chunk.handle):
                self.unreleased.append(chunk.handle)
            self._land(chunk)
            return True
        if state != "PROC":
            self._give_up(chunk.read, Failure("lost", f"the read failed: {state}"))
        elif self.clock() - chunk.posted > self.timeout:
            text = f"expected {len(chunk.rows)} rows within {self.timeout:g} s"
            self._give_up(chunk.read, Failure("late", text))
        return False

    def _land(self, chunk: Chunk) -> None:
        read = chunk.read
        if read.failure:
            self._drop(chunk)
            return
        try:
            chunk.landing = self.wire.land(read.begun, chunk.buffer, chunk.rows)
            read.landing += len(chunk.rows)
            if read.landing == read.rows:
                read.check = self.wire.check(read.begun)
                self.checks.append(read)
        except Exception as error:  # a GPU without memory left: a part of it may be launched
            chunk.landing = self.wire.launched()
            self._give_up(read, Failure("lost", f"rows could not be copied: {type(error).__name__}: {error}"))
        self._look_at_landing(chunk)

    def _look_at_landing(self, chunk: Chunk) -> bool:
        """Whether it is over."""
        assert chunk.landing is not None
        if not chunk.landing.done():
            return False
        self._drop(chunk)
        return True

    def _look_at_check(self, read: Read) -> bool:
        """Whether it is over."""
        assert read.check is not None
        if not read.check.done():
            return False
        self.checks.remove(read)
        problem = read.check.problem()
        read.checked = problem is None
        if problem:
            self._give_up(read, Failure("seal", problem))
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
        self.unreleased = [handle for handle in self.unreleased if not self.wire.release(handle)]
        for chunk in list(self.quarantined):
            chunk.final = chunk.final or self._state(chunk) != "PROC"
            if chunk.final and self.wire.release(chunk.handle):
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

    def _post(self, most: int | None = None) -> int:
        """Fills free buffers, so many at most, first come first served. Returns how many."""
        # Not those whose reads were given up for another reason, and end soon.
        late = self.clock() - self.timeout
        hung = {chunk.read.peer for chunk in self.quarantined if chunk.posted < late and not chunk.final}
        full = len(self.quarantined) == self.buffers and all(c.posted < late for c in self.quarantined)
        posted = 0
        for read in [read for reads in self.reads.values() for read in reads if not read.over]:
            if read.peer in hung:
                self._give_up(read, Failure("busy", "an earlier read from this peer has not ended yet"))
            elif full and read.posted < read.rows:
                self._give_up(read, Failure("busy", "reads that hang have all of the ring"))
            while self.free and posted != most and not read.failure and read.posted < read.rows:
                posted += self._post_chunk(read)
            if read.under_way:
                read.waits_since = self.clock()
            elif not read.over and self.clock() - read.waits_since > self.timeout:
                text = f"expected room in the ring within {self.timeout:g} s: reads that hang have it"
                self._give_up(read, Failure("late", text))
        return posted

    def _post_chunk(self, read: Read) -> bool:
        """Whether it began; else the read is given up."""
        capacity = self.wire.capacity(read.begun, first=read.posted == 0)
        rows = range(read.posted, min(read.rows, read.posted + capacity))
        buffer = self.free.pop()
        try:
            handle = self.wire.post(read.begun, buffer, rows)
        except Exception as error:  # as in _state: nothing was begun
            self.free.append(buffer)
            text = f"the read could not be started: {type(error).__name__}: {error}"
            self._give_up(read, Failure("lost", text))
            return False
        read.posted += len(rows)
        read.under_way += 1
        self.chunks.append(Chunk(read, buffer, rows, handle, self.clock()))
        return True
