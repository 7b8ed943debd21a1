"""Descriptors of peers: given back once, and not while a transfer may use them; what lands, and what of it is
wrong."""

import dataclasses

import pytest
import torch

from vllm_xlayer.connector.nixl.reshard import Move
from vllm_xlayer.connector.nixl.seals import BYTES, SealTable
from vllm_xlayer.connector.nixl.staging import Row, StagedReads
from vllm_xlayer.connector.nixl.wire import BUFFERS, NixlWire, RemotePool

PEER = ("prefill", 0)
ROW = 64


class FakeAgent:
    """NIXL's part of a wire: one transfer's state by hand, and the handles of descriptors that are held."""

    def __init__(self):
        self.state, self.held, self.made = "PROC", set(), 0

    def prep_xfer_dlist(self, agent, descriptors, mem_type):
        self.made += 1
        self.held.add(self.made)
        return self.made

    def release_dlist_handle(self, handle):
        assert self.state != "PROC", "a transfer may use it"
        self.held.remove(handle)

    def make_prepped_xfer(self, operation, local, local_ids, remote, remote_ids):
        assert {local, remote} <= self.held
        return 0

    def transfer(self, handle):
        pass

    def check_xfer_state(self, handle):
        return self.state

    def release_xfer_handle(self, handle):
        assert self.state != "PROC"


@pytest.fixture
def agent():
    return FakeAgent()


@pytest.fixture
def wire(agent):
    pool, ring = torch.zeros(4, ROW, dtype=torch.uint8), torch.zeros(BUFFERS, 4 * ROW, dtype=torch.uint8)
    return NixlWire(agent, "DRAM", pool, ring, lambda handle: None)


def remote():
    return RemotePool("agent", address=4096, device=0, memory="DRAM", row_bytes=ROW, blocks=4, seals=0)


def test_descriptors_of_a_read_in_quarantine_are_kept_until_it_ends(agent, wire):
    now = 0.0
    reads = StagedReads(wire, BUFFERS, timeout=1.0, clock=lambda: now)
    wire.add_peer(PEER, remote())
    reads.add("r", PEER, [Row(0, 1, 0, 0)])
    now = 2.0
    assert reads.poll()["r"].reason == "late" and reads.peers() == {PEER}
    wire.retire_peer(PEER)
    wire.release_retired(reads.peers())
    wire.add_peer(PEER, remote())  # it is met again, meanwhile
    wire.release_retired(reads.peers())
    assert len(agent.held) == 4
    agent.state = "DONE"
    reads.poll()
    wire.release_retired(reads.peers())
    assert agent.held == set(wire.peers[PEER][1:])


def test_a_peer_that_is_met_again_has_one_set_of_descriptors(agent, wire):
    agent.state = "DONE"
    for _ in range(2):
        wire.add_peer(PEER, remote())
    wire.release_retired(set())
    assert agent.held == set(wire.peers[PEER][1:])
    wire.retire_peer(PEER)
    wire.release_retired(set())
    assert agent.held == set()


def test_a_landing_on_a_cpu_does_not_look_for_a_gpu(wire, monkeypatch):
    """Where there is none, that takes as long as all else of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("looked for a GPU"))
    wire.add_peer(PEER, remote())
    wire.ring[0, :ROW] = 7
    landing = wire.land(PEER, 0, [Row(0, 2, 0, 0)], wire.begin())
    assert landing.done() and landing.problem() is None
    assert wire.pool[2].eq(7).all() and wire.pool[[0, 1, 3]].eq(0).all()


def test_rows_of_several_groups_land_by_their_groups_moves(wire):
    """In one chunk: each row as its own group's layers lie."""
    half = ROW // 2
    moves = tuple((Move(start, start, half, 1, half, half),) for start in (0, half))
    wire.add_peer(PEER, dataclasses.replace(remote(), moves=moves))
    wire.ring[0, : 3 * ROW] = torch.arange(1, 4, dtype=torch.uint8).repeat_interleave(ROW)
    wire.land(PEER, 0, [Row(0, 3, 0, 0), Row(1, 0, 1, 0), Row(2, 2, 0, 0)], wire.begin())
    expected = torch.zeros(4, ROW, dtype=torch.uint8)
    expected[3, :half], expected[0, half:], expected[2, :half] = 1, 2, 3
    assert wire.pool.equal(expected)


def test_each_row_is_checked_against_its_own_seal(agent):
    theirs = torch.arange(4 * ROW, dtype=torch.uint8).view(4, ROW)
    sealed = SealTable(theirs)
    sealed.seal([0, 1, 2, 3], [10, 11, 12, -13])
    pool = torch.zeros(4, ROW, dtype=torch.uint8)
    ring = torch.zeros(BUFFERS, 4 * (ROW + BYTES), dtype=torch.uint8)
    wire = NixlWire(agent, "DRAM", pool, ring, lambda handle: None)
    wire.add_peer(PEER, dataclasses.replace(remote(), seals=8192))
    rows = [Row(3, 0, 0, -13), Row(0, 2, 0, 10), Row(2, 1, 0, 12)]
    arrived = ring[1, : 3 * ROW].view(3, ROW)
    arrived.copy_(theirs[[3, 0, 2]])
    ring[1, 4 * ROW :] = sealed.table.view(torch.uint8).flatten()
    assert wire.land(PEER, 1, rows, wire.begin()).problem() is None
    assert pool[[0, 2, 1]].equal(theirs[[3, 0, 2]]) and not pool[3].any()
    other = [rows[0], rows[1]._replace(tag=11), rows[2]]
    assert "of 3 rows 1 are sealed for other tokens" in wire.land(PEER, 1, other, wire.begin()).problem()
    arrived[2, 5] ^= 1
    problem = wire.land(PEER, 1, other, wire.begin()).problem()
    assert "1 are sealed for other tokens" in problem and "1 are not what was sealed" in problem
