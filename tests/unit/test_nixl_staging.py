"""Reads into the staging ring, over a wire that fails in every way: no buffer is used again too early."""

import random
import time

import pytest

from vllm_xlayer.connector.nixl import staging
from vllm_xlayer.connector.nixl.reads import REASONS, Failure
from vllm_xlayer.connector.nixl.staging import StagedReads, Stay

PEER, OTHER = ("prefill", 0), ("prefill", 1)
CAPACITY = 4


class FakeLanding:
    """And a read's check: over when it is asked the second time."""

    def __init__(self, problem=None):
        self.steps, self._problem = 1, problem

    def done(self):
        self.steps -= 1
        return self.steps < 0

    def problem(self):
        assert self.steps < 0, "asked before it is done"
        return self._problem


class FakeWire:
    """Transfers by hand. A buffer that is posted to while another transfer may write it, or while what it
    holds is copied, is a failure."""

    def __init__(self):
        self.now = 0.0
        self.states, self.buffers, self.landed, self.released = {}, {}, [], []
        self.bad_row = None
        self.dead, self.fast = False, False
        self.begun, self.checked, self.checks, self.landing = [], [], [], {}
        self.asked_too_late = False
        self.broken, self.keeps = "", set()

    def begin(self, peer, rows):
        if self.broken == "begin":
            raise RuntimeError("out of memory")
        self.begun.append((peer, rows))
        return len(self.begun) - 1

    def capacity(self, begun, first):
        return CAPACITY - 1 if first else CAPACITY

    def post(self, begun, buffer, rows):
        if self.dead:
            raise RuntimeError("REMOTE_DISCONNECT")
        writing = [h for h, b in self.buffers.items() if b == buffer and self.states[h] == "PROC"]
        assert not writing, f"buffer {buffer} may still be written by {writing}"
        copied = self.landing.pop(buffer, None)
        assert copied is None or copied.steps < 0, f"buffer {buffer} is being copied"
        assert 0 < len(rows) <= self.capacity(begun, rows.start == 0)
        assert rows.step == 1 and rows.start >= 0 and rows.stop <= len(self.begun[begun][1])
        handle = len(self.states)
        self.states[handle], self.buffers[handle] = "DONE" if self.fast else "PROC", buffer
        return handle

    def state(self, handle):
        self.asked_too_late |= handle in self.released
        return self.states[handle]

    def release(self, handle):
        assert self.states[handle] != "PROC", "released, and rows go on arriving"
        if handle in self.keeps:
            return False
        self.released.append(handle)
        return True

    def launched(self):
        self.landing = dict.fromkeys(self.landing, landing := FakeLanding())
        return landing

    def land(self, begun, buffer, rows):
        if self.broken == "land":
            raise RuntimeError("out of memory")
        self.landed += self.begun[begun][1][rows.start : rows.stop]
        self.landing[buffer] = FakeLanding()
        return self.landing[buffer]

    def check(self, begun):
        if self.broken == "check":
            raise RuntimeError("out of memory")
        rows = self.begun[begun][1]
        assert begun not in self.checked and set(rows) <= set(self.landed), "not all of it is landing"
        self.checked.append(begun)
        self.checks.append(FakeLanding("torn" if self.bad_row in rows else None))
        return self.checks[-1]


@pytest.fixture
def wire():
    return FakeWire()


@pytest.fixture
def reads(wire):
    return StagedReads(wire, buffers=2, timeout=10, clock=lambda: wire.now)


def rows(n, start=0):
    return list(range(start, start + n))


def add(reads, request, peer, some):
    reads.add(request, peer, len(some), some)


def test_a_read_that_is_all_posted_is_not_looked_at_before_the_step(reads, wire):
    """However fast it is: vLLM hears of its end, or of its peer's, after the step, as of vLLM's own reads."""
    wire.fast = True
    add(reads, "a", "peer", rows(CAPACITY - 1))
    assert list(wire.states.values()) == ["DONE"] and wire.landed == [] and wire.released == []
    reads.poll()
    assert wire.landed == rows(CAPACITY - 1)


def end_all(wire, state="DONE"):
    wire.states = {h: state if s == "PROC" else s for h, s in wire.states.items()}


def poll_until_over(reads, wire, times=30):
    over = {}
    for _ in range(times):
        end_all(wire)
        over |= reads.poll()
    return over


def test_what_has_arrived_lands_before_more_is_asked_for(reads, wire, monkeypatch):
    """To post a chunk may take as long as to read it: one at a time, and in between what came is copied."""
    calls = []

    def noted(name):
        method = getattr(wire, name)

        def call(*args):
            calls.append(name)
            return method(*args)

        return call

    for name in ("post", "land"):
        monkeypatch.setattr(wire, name, noted(name))
    wire.fast = True
    reads.stay = Stay(5.0, 5.0)
    add(reads, "a", PEER, rows(39))  # a first chunk of 3, and 9 of 4
    assert calls == ["post", "land", "post"]
    assert reads.poll() == {"a": None}
    assert calls == ["post", "land"] * 10


def test_more_rows_than_the_ring_holds_all_land_once(reads, wire):
    add(reads, "a", PEER, rows(19))
    add(reads, "b", PEER, rows(3, start=100))
    assert len(wire.states) == 2 and reads.free == []
    assert poll_until_over(reads, wire) == {"a": None, "b": None}
    assert sorted(wire.landed) == sorted(rows(19) + rows(3, start=100))
    assert sorted(reads.free) == [0, 1] and not reads.reads


@pytest.mark.parametrize("bad", [None, 5])
def test_nobody_hears_of_rows_before_they_are_checked(reads, wire, monkeypatch, bad):
    """However long the check takes, and though the ring is free again."""
    checked, done = False, FakeLanding.done
    monkeypatch.setattr(FakeLanding, "done", lambda self: done(self) and (checked or self not in wire.checks))
    wire.fast, wire.bad_row = True, bad
    add(reads, "a", PEER, rows(9))
    for _ in range(20):
        assert reads.poll() == {}
    assert sorted(wire.landed) == rows(9) and sorted(reads.free) == [0, 1] and wire.checked == [0]
    assert reads.peers() == {PEER}
    checked = True
    assert reads.poll() == {"a": bad and Failure("seal", "torn")} and not reads.checks


def test_a_poll_stays_while_rows_come(reads, wire):
    """Else the ring would be all that a step of the engine can bring."""
    reads.stay = Stay(60.0, 30.0)
    wire.fast = True
    add(reads, "a", PEER, rows(100 * CAPACITY))
    assert reads.poll() == {"a": None} and wire.landed == rows(100 * CAPACITY)


def test_a_poll_does_not_wait_for_rows_that_do_not_come(reads, wire):
    reads.stay = Stay(60.0, staging.BESIDE_STEPS.quiet)
    add(reads, "a", PEER, rows(1))
    begin = time.monotonic()
    assert reads.poll() == {}
    assert time.monotonic() - begin < 20


def test_a_poll_ends_while_rows_come_and_come(reads, wire):
    """Steps of other requests wait for it."""
    reads.stay = Stay(staging.BESIDE_STEPS.most, 30.0)
    wire.fast = True
    add(reads, "a", PEER, rows(100_000 * CAPACITY))
    begin = time.monotonic()
    assert reads.poll() == {} and 0 < len(wire.landed) < 100_000 * CAPACITY
    assert time.monotonic() - begin < 20


def test_rows_land_for_the_read_that_they_are_of(reads, wire, monkeypatch):
    landed = []
    land = wire.land
    monkeypatch.setattr(wire, "land", lambda *args: landed.append(args[0]) or land(*args))
    add(reads, "a", PEER, rows(3 * CAPACITY))
    add(reads, "b", PEER, rows(1))
    poll_until_over(reads, wire)
    assert sorted(landed) == [0, 0, 0, 0, 1] and sorted(wire.checked) == [0, 1]


def test_a_row_that_fails_beside_other_chunks_of_its_read(reads, wire, monkeypatch):
    """They have arrived, too, and must be let go once; no exception reaches the engine."""
    monkeypatch.setattr(FakeLanding, "done", lambda self: setattr(self, "steps", -1) or True)
    wire.fast, wire.bad_row = True, 0
    add(reads, "a", PEER, rows(2 * CAPACITY))
    assert reads.poll() == {"a": Failure("seal", "torn")}
    assert sorted(reads.free) == [0, 1] and not reads.chunks and not reads.quarantined
    assert not wire.asked_too_late


def test_a_peer_is_in_use_while_its_reads_wait_for_room(reads, wire):
    """Its descriptors are needed yet."""
    add(reads, "a", PEER, rows(2 * CAPACITY))
    add(reads, "b", OTHER, rows(1))
    assert reads.peers() == {PEER, OTHER}
    poll_until_over(reads, wire)
    assert reads.peers() == set()


def test_a_row_that_is_not_what_was_sealed_fails_its_request_only(reads, wire):
    wire.bad_row = 5
    add(reads, "a", PEER, rows(19))
    add(reads, "b", PEER, rows(3, start=100))
    assert poll_until_over(reads, wire) == {"a": Failure("seal", "torn"), "b": None}
    assert sorted(reads.free) == [0, 1]


def test_a_read_that_hangs_is_given_up_and_its_buffers_are_not_reused(reads, wire):
    add(reads, "a", PEER, rows(8))
    wire.now = 9.9
    assert reads.poll() == {}
    wire.now = 10.1
    assert reads.poll() == {"a": Failure("late", "expected 3 rows within 10 s")}
    assert reads.free == [] and len(reads.quarantined) == 2 and not reads.chunks
    add(reads, "b", PEER, rows(1))
    assert reads.poll()["b"].reason == "busy"
    add(reads, "c", OTHER, rows(1))
    assert reads.poll() == {"c": Failure("busy", "reads that hang have all of the ring")}
    end_all(wire)
    reads.poll()
    add(reads, "c", OTHER, rows(1))
    assert poll_until_over(reads, wire) == {"c": None}
    assert sorted(reads.free) == [0, 1] and not reads.quarantined
    assert wire.landed == rows(1), "what came too late must not land"
    add(reads, "d", PEER, rows(1))
    assert poll_until_over(reads, wire) == {"d": None}


def test_a_read_waits_for_room_only_so_long(reads, wire):
    """One buffer is in quarantine, the other one in use by a read that goes on and on."""
    add(reads, "hung", PEER, rows(3))
    wire.now = 10.1
    assert reads.poll()["hung"].reason == "late"
    add(reads, "long", OTHER, rows(50))
    add(reads, "waits", OTHER, rows(1, start=100))
    over = {}
    for _ in range(6):
        wire.now += 2
        wire.states[max(wire.states)] = "DONE"
        for _ in range(3):
            over |= reads.poll()
    assert over.keys() == {"waits"} and over["waits"].reason == "late"
    assert "room in the ring" in over["waits"].text


def test_requests_that_wait_for_a_peer_that_hangs_are_over_with_it(reads, wire):
    for i in range(5):
        add(reads, f"r{i}", PEER, rows(1))
    assert len(wire.states) == 2, "there is no room for more"
    wire.now = 10.1
    over = reads.poll() | reads.poll()
    assert {name: failure.reason for name, failure in over.items()} == dict(
        r0="late", r1="late", r2="busy", r3="busy", r4="busy"
    )
    assert not reads.reads


def test_a_dead_peer_fails_its_reads_and_leaves_the_ring_whole(reads, wire):
    add(reads, "a", PEER, rows(8))
    end_all(wire, "ERR")
    assert reads.poll() == {"a": Failure("lost", "the read failed: ERR")}
    wire.dead = True
    add(reads, "b", PEER, rows(1))
    text = "the read could not be started: RuntimeError: REMOTE_DISCONNECT"
    assert reads.poll()["b"] == Failure("lost", text)
    assert sorted(reads.free) == [0, 1]


def test_one_peer_of_two_fails_the_request_once_and_as_a_whole(reads, wire):
    add(reads, "a", PEER, rows(2))
    add(reads, "a", OTHER, rows(2))
    wire.states[0] = "ERR"
    over = reads.poll()
    assert over == {"a": Failure("lost", "the read failed: ERR")} and reads.poll() == {}
    assert len(reads.quarantined) == 1, "the other peer may still write"
    end_all(wire)
    reads.poll()
    assert sorted(reads.free) == [0, 1]


@pytest.mark.parametrize("seed", range(100))
def test_any_order_of_events(seed):
    """Every request is over once, with exactly its rows unless it failed; no buffer is lost."""
    draw, wire = random.Random(seed), FakeWire()
    reads = StagedReads(wire, buffers=3, timeout=10, clock=lambda: wire.now)
    wanted, over = {}, {}
    for step in range(120):
        wire.now += draw.choice([0, 0, 0, 1, 6])
        wire.dead = draw.random() < 0.05
        if step < 60 and draw.random() < 0.5:
            name = f"request {step}"
            wanted[name] = rows(draw.randint(1, 20), start=100 * step)
            add(reads, name, draw.choice([PEER, OTHER]), wanted[name])
        for handle, state in wire.states.items():
            if state == "PROC" and draw.random() < 0.3:
                wire.states[handle] = draw.choices(["DONE", "ERR"], [9, 1])[0]
        for name, failure in reads.poll().items():
            assert name not in over
            over[name] = failure
    over |= poll_until_over(reads, wire, times=200)
    assert over.keys() == wanted.keys() and not reads.reads
    assert sorted(reads.free) == [0, 1, 2] and not reads.chunks and not reads.quarantined
    assert not wire.asked_too_late
    for name, failure in over.items():
        landed = [row for row in wire.landed if row in wanted[name]]
        assert len(landed) == len(set(landed))
        assert failure or sorted(landed) == sorted(wanted[name])
    reasons = {failure.reason for failure in over.values() if failure}
    assert None in over.values() and reasons <= {*REASONS}


@pytest.mark.parametrize("where", ["begin", "land", "check"])
def test_what_the_wire_raises_fails_one_request(reads, wire, where):
    wire.broken = where
    add(reads, "a", PEER, rows(5))
    over = poll_until_over(reads, wire)
    assert over["a"].reason == "lost" and "out of memory" in over["a"].text
    assert sorted(reads.free) == [0, 1] and not reads.reads and not reads.chunks and not reads.quarantined
    wire.broken = ""
    add(reads, "b", PEER, rows(5))
    assert poll_until_over(reads, wire) == {"b": None}


def test_a_ring_that_hangs_as_a_whole_lets_nobody_wait(reads, wire):
    """Requests from other engines are computed at once, and read again once the hung reads have ended."""
    add(reads, "hung", PEER, rows(9))
    wire.now = 11
    assert reads.poll()["hung"].reason == "late" and len(reads.quarantined) == 2
    add(reads, "other", OTHER, rows(3))
    assert reads.poll()["other"].reason == "busy"
    end_all(wire)
    reads.poll()
    add(reads, "another", OTHER, rows(3))
    assert poll_until_over(reads, wire) == {"another": None}


def test_a_sibling_that_was_given_up_is_no_peer_that_hangs(wire):
    """One rank's rows are stale while the other's are on their way: others' reads from both go on."""
    reads = StagedReads(wire, buffers=4, timeout=10, clock=lambda: wire.now)
    wire.bad_row = 1
    add(reads, "stale", PEER, rows(3))
    add(reads, "stale", OTHER, rows(3, start=10))
    wire.states[0] = "DONE"
    over = {}
    for _ in range(5):
        over |= reads.poll()
    assert over["stale"].reason == "seal" and len(reads.quarantined) == 1
    add(reads, "fine", OTHER, rows(3, start=20))
    assert poll_until_over(reads, wire) == {"fine": None}


def test_handles_that_are_kept_are_asked_for_again(reads, wire):
    wire.keeps = {0}
    add(reads, "a", PEER, rows(3))
    assert poll_until_over(reads, wire) == {"a": None} and reads.unreleased == [0]
    wire.keeps = set()
    reads.poll()
    assert reads.unreleased == [] and wire.released == [0]
