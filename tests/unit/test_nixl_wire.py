"""Descriptors of peers: given back once, and not while a transfer may use them; what lands, and what of it is
wrong."""

import dataclasses

import numpy as np
import pytest
import torch

from vllm_xlayer import ops
from vllm_xlayer.connector.nixl.reads import Rows
from vllm_xlayer.connector.nixl.reshard import Move
from vllm_xlayer.connector.nixl.seals import BYTES, SealTable
from vllm_xlayer.connector.nixl.staging import StagedReads
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


def rows(*each):
    """Rows of (remote, local, group, tag) each."""
    return Rows(*np.array(each, np.int64).T)


def landed(wire, buffer, some):
    """What is found wrong with rows that arrived in one chunk."""
    begun = wire.begin(PEER, some)
    landing = wire.land(begun, buffer, range(len(some.remote)))
    check = wire.check(begun)
    assert landing.done() and check.done()
    return check.problem()


def remote():
    return RemotePool("agent", address=4096, device=0, memory="DRAM", row_bytes=ROW, blocks=4, seals=0)


def test_descriptors_of_a_read_in_quarantine_are_kept_until_it_ends(agent, wire):
    now = 0.0
    reads = StagedReads(wire, BUFFERS, timeout=1.0, clock=lambda: now)
    wire.add_peer(PEER, remote())
    reads.add("r", PEER, 1, rows((0, 1, 0, 0)))
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
    assert agent.held == {wire.peers[PEER].local, wire.peers[PEER].remote}


def test_a_peer_that_is_met_again_has_one_set_of_descriptors(agent, wire):
    agent.state = "DONE"
    for _ in range(2):
        wire.add_peer(PEER, remote())
    wire.release_retired(set())
    assert agent.held == {wire.peers[PEER].local, wire.peers[PEER].remote}
    wire.retire_peer(PEER)
    wire.release_retired(set())
    assert agent.held == set()


def test_a_landing_on_a_cpu_does_not_look_for_a_gpu(wire, monkeypatch):
    """Where there is none, that takes as long as all else of it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("looked for a GPU"))
    wire.add_peer(PEER, remote())
    wire.ring[0, :ROW] = 7
    assert landed(wire, 0, rows((0, 2, 0, 0))) is None
    assert wire.pool[2].eq(7).all() and wire.pool[[0, 1, 3]].eq(0).all()


def test_rows_of_several_groups_land_by_their_groups_moves(wire):
    """In one chunk: each row as its own group's layers lie."""
    half = ROW // 2
    moves = tuple((Move(start, start, half, 1, half, half),) for start in (0, half))
    wire.add_peer(PEER, dataclasses.replace(remote(), moves=moves))
    wire.ring[0, : 3 * ROW] = torch.arange(1, 4, dtype=torch.uint8).repeat_interleave(ROW)
    assert landed(wire, 0, rows((0, 3, 0, 0), (1, 0, 1, 0), (2, 2, 0, 0))) is None
    expected = torch.zeros(4, ROW, dtype=torch.uint8)
    expected[3, :half], expected[0, half:], expected[2, :half] = 1, 2, 3
    assert wire.pool.equal(expected)


THEIRS = torch.arange(4 * ROW, dtype=torch.uint8).view(4, ROW)
"""A peer's pool."""


@pytest.fixture
def sealed():
    """Its seals."""
    table = SealTable(THEIRS)
    table.seal([0, 1, 2, 3], [10, 11, 12, -13])
    return table.table


@pytest.fixture
def checking(agent):
    """A wire with room for four rows and the seals in a buffer; for five without them."""
    agent.state = "DONE"
    pool = torch.zeros(6, ROW, dtype=torch.uint8)
    ring = torch.zeros(BUFFERS, 4 * (ROW + BYTES), dtype=torch.uint8)
    wire = NixlWire(agent, "DRAM", pool, ring, lambda handle: None)
    wire.add_peer(PEER, dataclasses.replace(remote(), seals=8192))
    return wire


def test_each_row_is_checked_against_its_own_seal(checking, sealed):
    pool, ring = checking.pool, checking.ring
    some = rows((3, 0, 0, -13), (0, 2, 0, 10), (2, 1, 0, 12))
    arrived = ring[1, : 3 * ROW].view(3, ROW)
    arrived.copy_(THEIRS[[0, 2, 3]])
    ring[1, 4 * ROW :] = sealed.view(torch.uint8).flatten()
    assert landed(checking, 1, some) is None
    assert pool[[0, 2, 1]].equal(THEIRS[[3, 0, 2]]) and not pool[3].any()
    other = some._replace(tag=np.array([-13, 11, 12]))
    assert "of 3 rows 1 are sealed for other tokens" in landed(checking, 1, other)
    arrived[2, 5] ^= 1
    arrived[0, 5] ^= 1  # it is sealed for other tokens, and counts once
    problem = landed(checking, 1, other)
    assert "1 are sealed for other tokens" in problem and "1 are not what was sealed" in problem


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("wrong", [None, 0, 1, 2, 3, 4, 5])
def test_seals_come_with_the_first_chunk_and_are_for_all(checking, sealed, order, wrong):
    """Chunks of a read, in whatever order they arrive: their rows are checked together."""
    which = [3, 0, 2, 1, 0, 3]
    which.sort()  # as they are read
    some = rows(*((i, place, 0, [10, 11, 12, -13][i]) for place, i in enumerate(which)))
    begun = checking.begin(PEER, some)
    assert checking.capacity(begun, first=True) == 4 and checking.capacity(begun, first=False) == 5
    chunks = [range(2), range(2, 5), range(5, 6)]
    for buffer, chunk in enumerate(chunks):
        arrived = checking.ring[buffer, : len(chunk) * ROW].view(-1, ROW)
        arrived.copy_(THEIRS[[which[i] for i in chunk]])
        if wrong in chunk:
            arrived[chunk.index(wrong), 9] ^= 16
    checking.ring[0, 4 * ROW :] = sealed.view(torch.uint8).flatten()
    for i in order:
        assert checking.land(begun, i, chunks[i]).done()
    problem = checking.check(begun).problem()
    if wrong is None:
        assert problem is None and checking.pool.equal(THEIRS[which])
    else:
        assert "of 6 rows 0 are sealed for other tokens" in problem and "and 1 are not" in problem


def test_what_is_checked_is_what_lies_in_the_cache(checking, sealed, monkeypatch):
    """Bytes that came into the ring before the copy, or after it, are no excuse."""
    ring, pool = checking.ring, checking.pool
    ring[0, : 2 * ROW].view(2, ROW).copy_(THEIRS[[0, 3]])
    ring[0, 4 * ROW :] = sealed.view(torch.uint8).flatten()
    some = rows((3, 1, 0, -13), (0, 2, 0, 10))
    copy = ops.land_rows

    def late(*args):
        copy(*args)
        ring[0, : 2 * ROW] = 0

    monkeypatch.setattr(ops, "land_rows", late)
    assert landed(checking, 0, some) is None and pool[[1, 2]].equal(THEIRS[[3, 0]])
    assert "2 are not what was sealed" in landed(checking, 0, some)  # and zeros are found


def test_rows_of_other_parallel_sizes_are_checked_as_they_arrived(checking, sealed):
    """Of which the cache has a part only."""
    half = ROW // 2
    moves = ((Move(half, 0, half, 1, half, half),),)
    checking.add_peer(PEER, dataclasses.replace(remote(), seals=8192, moves=moves))
    checking.ring[0, : 2 * ROW].view(2, ROW).copy_(THEIRS[[0, 3]])
    checking.ring[0, 4 * ROW :] = sealed.view(torch.uint8).flatten()
    some = rows((0, 2, 0, 10), (3, 1, 0, -13))
    assert landed(checking, 0, some) is None
    assert checking.pool[[2, 1], :half].equal(THEIRS[[0, 3], half:]) and not checking.pool[:, half:].any()
    checking.ring[0, 3] ^= 4
    assert "1 are not what was sealed" in landed(checking, 0, some)


def test_the_table_of_seals_is_read_once_a_read(checking, agent, monkeypatch):
    made = []
    monkeypatch.setattr(agent, "make_prepped_xfer", lambda *args: made.append(args[1:]) or 0)
    peer = checking.peers[PEER]
    begun = checking.begin(PEER, rows(*((i % 4, i % 4, 0, 0) for i in range(9))))
    checking.post(begun, 2, range(4))
    checking.post(begun, 0, range(4, 9))
    (local, local_ids, remote_, remote_ids), (_, local_ids_, _, remote_ids_) = made
    assert (local, remote_) == (peer.local, peer.remote)
    # Five places for rows in each of four buffers, then one for seals in each; four rows, then their seals.
    assert local_ids.tolist() == [10, 11, 12, 13, 22] and remote_ids.tolist() == [0, 0, 0, 1, 4]
    assert local_ids_.tolist() == [0, 1, 2, 3, 4] and remote_ids_.tolist() == [1, 2, 2, 3, 3]


def test_blocks_that_were_given_out_backwards_are_read_forwards(wire, agent, monkeypatch):
    """NIXL makes one descriptor of places that follow each other on both sides."""
    made = []
    monkeypatch.setattr(agent, "make_prepped_xfer", lambda *args: made.append(args[1:]) or 0)
    wire.add_peer(PEER, remote())
    begun = wire.begin(PEER, rows((3, 0, 0, 0), (2, 1, 0, 0), (1, 3, 0, 0)))
    wire.post(begun, 1, range(3))
    ((_, local_ids, _, remote_ids),) = made
    assert local_ids.tolist() == [4, 5, 6] and remote_ids.tolist() == [1, 2, 3]
    wire.ring[1, : 3 * ROW].view(3, ROW).copy_(THEIRS[[1, 2, 3]])
    wire.land(begun, 1, range(3))
    assert wire.pool[[0, 1, 3]].equal(THEIRS[[3, 2, 1]]) and not wire.pool[2].any()


@pytest.mark.parametrize("beyond", [-1, 4, 2**32 + 1])
def test_rows_that_the_peer_does_not_have_are_computed(checking, beyond):
    """Also in a later chunk, whose seals come with the first one."""
    reads = StagedReads(checking, BUFFERS, timeout=1.0)
    reads.add("r", PEER, 9, rows(*((i % 4, i % 4, 0, 0) for i in range(8)), (beyond, 0, 0, 0)))
    failure = reads.poll()["r"]
    assert failure.reason == "lost" and "expected rows of 0 to 3" in failure.text
    assert sorted(reads.free) == list(range(BUFFERS)) and not checking.pool.any()


def test_a_read_goes_on_with_the_peer_that_it_began_with(checking):
    """Its descriptors are kept for it, and another engine's memory would hold other rows at these places."""
    begun = checking.begin(PEER, rows((0, 0, 0, 10)))
    checking.retire_peer(PEER)
    assert checking.capacity(begun, first=True) == 4
    checking.add_peer(PEER, dataclasses.replace(remote(), seals=8192, blocks=2))
    checking.post(begun, 0, range(1))
    assert begun.peer is not checking.peers[PEER]
