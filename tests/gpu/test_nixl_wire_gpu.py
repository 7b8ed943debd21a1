"""Rows that arrive on a GPU: they land beside a step that was launched after their read began, and after all
that was launched before; and whoever seals or lands rows does not wait for the GPU."""

import numpy as np
import pytest
import torch

from vllm_xlayer.connector.nixl.reads import Rows
from vllm_xlayer.connector.nixl.seals import SealTable
from vllm_xlayer.connector.nixl.wire import BUFFERS, NixlWire, RemotePool

pytestmark = pytest.mark.gpu
PEER, BLOCKS, ROW_BYTES, SOME = ("prefill", 0), 64, 4096, 40
CHUNKS = ((0, 17), (17, 30), (30, SOME))
LONG = 4_000_000_000
"""Cycles: some two seconds, which the host does not need for what it does meanwhile."""


class FakeAgent:
    def prep_xfer_dlist(self, *_, **__):
        return 0


@pytest.fixture
def theirs():
    """A peer's sealed rows, and their seals: (uint8 [blocks, bytes], int64 [blocks, 2])."""
    rows = torch.randint(0, 256, (BLOCKS, ROW_BYTES), dtype=torch.uint8, device="cuda")
    seals = SealTable(rows)
    seals.seal(list(range(BLOCKS)), [100 + block for block in range(BLOCKS)])
    return rows, seals.table


@pytest.fixture
def wire(theirs):
    pool = torch.full((BLOCKS, ROW_BYTES), 0xFF, dtype=torch.uint8, device="cuda")
    bytes_each = BLOCKS * (ROW_BYTES + 16)
    ring = torch.empty(BUFFERS, bytes_each, dtype=torch.uint8, device="cuda")
    wire = NixlWire(FakeAgent(), "VRAM", pool, ring, lambda handle: None)
    wire.add_peer(PEER, RemotePool("agent", 1, 0, "VRAM", ROW_BYTES, BLOCKS, seals=1))
    rows, table = theirs
    for buffer, (start, stop) in enumerate(CHUNKS):
        ring[buffer, : (stop - start) * ROW_BYTES] = rows[start:stop].reshape(-1)
    ring[0, -table.nbytes :] = table.view(torch.uint8).reshape(-1)
    asked = land(wire, begin(wire))  # kernels are loaded, and pinned memory is there
    torch.cuda.synchronize()
    assert asked.done()
    pool.fill_(0xFF)
    torch.cuda.synchronize()
    return wire


def begin(wire, tag=100):
    """The first rows, into our last blocks."""
    rows = np.arange(SOME)
    return wire.begin(PEER, Rows(rows, BLOCKS - 1 - rows, 0 * rows, tag + rows))


def land(wire, begun):
    """In several chunks; their check."""
    landings = [wire.land(begun, buffer, range(*chunk)) for buffer, chunk in enumerate(CHUNKS)]
    check = wire.check(begun)
    if check.done():
        assert all(landing.done() for landing in landings)
    return check


def check_pool(wire, theirs):
    torch.cuda.synchronize()
    assert wire.pool.flip(0)[:SOME].equal(theirs[0][:SOME])
    assert (wire.pool[: BLOCKS - SOME] == 0xFF).all()


def busy():
    """An event after two seconds of the main stream."""
    torch.cuda._sleep(LONG)
    event = torch.cuda.Event()
    event.record()
    return event


def test_rows_land_beside_a_step_that_was_launched_since(wire, theirs):
    begun = begin(wire)
    step = busy()
    landing = land(wire, begun)
    while not landing.done() and not step.query():
        pass
    assert not step.query()
    assert landing.problem() is None
    check_pool(wire, theirs)


def test_rows_land_after_what_was_launched_before(wire, theirs):
    """Of the blocks' last owner."""
    before = busy()
    wire.pool.fill_(7)
    landing = land(wire, begin(wire))
    assert not landing.done() and not before.query(), "whoever lands rows waits for nothing"
    torch.cuda.synchronize()
    assert landing.done() and landing.problem() is None
    assert wire.pool.flip(0)[:SOME].equal(theirs[0][:SOME])


def test_rows_of_another_prompt_are_found(wire):
    landing = land(wire, begin(wire, tag=7))
    torch.cuda.synchronize()
    assert landing.done() and f"of {SOME} rows {SOME} are sealed for other tokens" in landing.problem()


@pytest.mark.parametrize("chunk", range(len(CHUNKS)))
def test_a_torn_row_is_found_in_whatever_chunk_it_came(wire, chunk):
    wire.ring[chunk, ROW_BYTES + 77] ^= 4
    torch.cuda.synchronize()
    landing = land(wire, begin(wire))
    torch.cuda.synchronize()
    assert landing.done() and "0 are sealed for other tokens" in landing.problem()
    assert landing.problem().endswith("and 1 are not what was sealed")


def test_rows_are_sealed_without_waiting(theirs):
    rows, _ = theirs
    seals, blocks = SealTable(rows), list(range(BLOCKS))
    seals.seal(blocks, blocks)
    torch.cuda.synchronize()
    step = busy()
    seals.seal(blocks, [1 + block for block in blocks])
    assert not step.query()
    torch.cuda.synchronize()
    assert seals.table[:, 0].tolist() == [1 + block for block in blocks]
