"""land_rows: every byte of the pool's memory is compared, also what is between its rows and on both sides,
and digests with what numpy makes of the rows."""

import threading

import numpy as np
import pytest
import torch
from reference.landed_rows import Landing, digest_of

from vllm_xlayer import ops
from vllm_xlayer.connector.nixl.seals import RowDigest

CPU = torch.device("cpu")
TILE_BYTES = 512 * 8 * 16
ROW_OF_AN_8B_MODEL = 589_824
SIZES = [8, 16, 40, 4096, TILE_BYTES - 8, TILE_BYTES, TILE_BYTES + 16, ROW_OF_AN_8B_MODEL]


def land(given: Landing, digested: bool = True) -> None:
    extra = (given.factors, given.digests) if digested else ()
    ops.land_rows(given.rows, given.pool, given.blocks, *extra)


def land_and_compare(given: Landing, digested: bool = True) -> None:
    expected = given.expected()
    land(given, digested)
    given.check(expected, digested)


@pytest.mark.parametrize("digested", [True, False], ids=["digests", "none"])
@pytest.mark.parametrize(
    ("gap", "shift"), [(0, 0), (48, 0), (8, 0), (0, 8)], ids=["dense", "strided", "odd", "off"]
)
@pytest.mark.parametrize("row_bytes", SIZES)
def test_rows_and_gaps(device, row_bytes, gap, shift, digested):
    land_and_compare(Landing.make(device, row_bytes, 7, gap, shift), digested)


@pytest.mark.parametrize(
    ("row_bytes", "n"), [(64, 1000), (TILE_BYTES, 1), (3 << 20, 1), (3 << 20, 3), (TILE_BYTES, 100)]
)
def test_one_row_and_many(device, row_bytes, n):
    land_and_compare(Landing.make(device, row_bytes, n, gap=32))


@pytest.mark.gpu
@pytest.mark.parametrize("row_bytes", [TILE_BYTES, ROW_OF_AN_8B_MODEL, 4 << 20])
def test_a_chunk_of_64_mib(row_bytes):
    land_and_compare(Landing.make(torch.device("cuda", 0), row_bytes, (64 << 20) // row_bytes))


def test_digests_are_those_that_rows_are_sealed_with(device):
    """Also where they were sealed on another kind of device."""
    given = Landing.make(device, ROW_OF_AN_8B_MODEL, 3)
    given.factors = RowDigest(ROW_OF_AN_8B_MODEL, device).factors
    land(given)
    for place in {device, CPU}:
        assert given.digests.tolist() == RowDigest(ROW_OF_AN_8B_MODEL, place)(given.rows.to(place)).tolist()


def test_a_digest_is_made_anew_each_time(device):
    given = Landing.make(device, 4096, 3)
    land(given)
    given.rows ^= 1
    land_and_compare(given)


def scribble(rows: torch.Tensor, until: threading.Event) -> None:
    while not until.is_set():
        for value in (1, 2, 3):
            rows.fill_(value)


def digests_of_what_lies_there(given: Landing) -> list[int]:
    lies = given.pool[given.blocks].cpu().numpy()
    return [digest_of(row, given.factors.cpu().numpy()) for row in lies]


def test_digests_are_of_what_is_stored_while_other_bytes_come():
    """Each round another mixture of them is stored."""
    given, stop = Landing.make(CPU, 4 << 20, 2), threading.Event()
    thread = threading.Thread(target=scribble, args=(given.rows, stop))
    thread.start()
    try:
        for _ in range(30):
            land(given)
            assert given.digests.tolist() == digests_of_what_lies_there(given)
    finally:
        stop.set()
        thread.join()


@pytest.mark.gpu
def test_digests_are_of_what_is_stored_while_other_bytes_come_on_a_gpu():
    given, mixed = Landing.make(torch.device("cuda", 0), 4 << 20, 16), 0
    writing, landing = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    for _ in range(20):
        with torch.cuda.stream(writing):
            for value in range(1, 40):
                given.rows.fill_(value)
        with torch.cuda.stream(landing):
            land(given)
        torch.cuda.synchronize()
        assert given.digests.tolist() == digests_of_what_lies_there(given)
        landed = given.pool[given.blocks]
        mixed += int(landed.min() != landed.max())
    assert mixed, "nothing came while rows were copied: this showed nothing"


OUTSIDE = [-1, 12, 2**40, -(2**63), 2**63 - 1]
"""The first two are in the memory around a pool of 12 blocks."""


@pytest.mark.parametrize("outside", OUTSIDE)
def test_blocks_that_the_pool_does_not_have_on_a_cpu(outside):
    given = Landing.make(CPU, 64, 7)
    before = given.memory.clone()
    given.blocks[6] = outside
    with pytest.raises(RuntimeError, match=rf"blocks: expected blocks from 0 to 11 .*got {outside} at 6"):
        land(given)
    assert given.memory.equal(before) and given.all_digests.unique().tolist() == [-77]


@pytest.mark.gpu
@pytest.mark.parametrize("digested", [True, False], ids=["digests", "none"])
@pytest.mark.parametrize("row_bytes", [64, TILE_BYTES + 16])
@pytest.mark.parametrize("outside", OUTSIDE)
def test_blocks_that_the_pool_does_not_have_on_a_gpu(monkeypatch, outside, row_bytes, digested):
    """Their rows go nowhere, the others land. In debug mode they are refused."""
    given = Landing.make(torch.device("cuda", 0), row_bytes, 7)
    given.blocks[[0, 3]] = torch.tensor([outside, outside], device="cuda")
    land_and_compare(given, digested)
    monkeypatch.setenv(ops.DEBUG_ENV, "1")
    with pytest.raises(RuntimeError, match="blocks: expected blocks from 0 to 11, got"):
        land(given)


def test_nothing_to_land(device):
    given = Landing.make(device, 64, 3)
    before = given.memory.clone()
    ops.land_rows(given.rows[:0], given.pool, given.blocks[:0], given.factors, given.digests[:0])
    assert given.memory.equal(before) and given.all_digests.unique().tolist() == [-77]
    given = Landing.make(device, 0, 3)
    land(given)
    assert given.all_digests.tolist() == [-77, 0, 0, 0, -77]


@pytest.mark.gpu
def test_on_a_side_stream_and_in_a_graph():
    """On torch's current stream, after what is already queued there; and again with other bytes."""
    given = Landing.make(torch.device("cuda", 0), TILE_BYTES, 40)
    rows, blocks = given.rows.clone(), given.blocks.clone()
    expected = given.expected()
    given.rows.zero_()
    given.blocks.fill_(-1)
    land(given)  # the kernel is loaded
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        land(given)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)  # cycles: another stream would be too early
        given.rows.copy_(rows)
        given.blocks.copy_(blocks)
        land(given)
    stream.synchronize()
    given.check(expected)
    given.rows.copy_(rows.flip(0))
    expected = given.expected()
    graph.replay()
    torch.cuda.synchronize()
    given.check(expected)


def uint8(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.uint8)


BAD = [
    ({"rows": torch.zeros(3, 16)}, "rows: expected uint8, got float32"),
    ({"rows": uint8(3, 24)}, r"rows: expected size 16 in dimension 1 .*got shape \(3, 24\)"),
    ({"rows": uint8(48)}, r"rows: expected 2 dimensions .*got shape \(48\)"),
    ({"rows": uint8(3, 32)[:, :16]}, r"rows: expected a contiguous tensor, got strides \(32, 1\)"),
    (
        {"rows": uint8(52)[4:].view(3, 16)},
        "rows: expected rows that start at multiples of 8 bytes, got address",
    ),
    ({"rows": uint8(3, 12), "pool": uint8(4, 12)}, "rows: expected a multiple of 8 bytes a row, got 12"),
    ({"pool": torch.zeros(4, 16)}, "pool: expected uint8, got float32"),
    ({"pool": uint8(4, 20)[:, :16]}, "pool: expected rows that start at multiples of 8 .*a row stride of 20"),
    ({"pool": uint8(4, 32)[:, ::2]}, "pool: expected a dense last dimension"),
    ({"pool": uint8(1, 16).expand(4, 16)}, "pool: expected a row stride of at least 16 bytes .*got 0"),
    ({"blocks": torch.arange(3, dtype=torch.int32)}, "blocks: expected int64, got int32"),
    ({"blocks": torch.arange(4)}, r"blocks: expected size 3 in dimension 0 .*got shape \(4\)"),
    ({"blocks": torch.arange(6)[::2]}, "blocks: expected a contiguous tensor"),
    ({"factors": None}, "digests: expected none without factors, got one"),
    ({"digests": None}, "digests: expected a tensor with factors, got none"),
    ({"factors": torch.ones(2)}, "factors: expected int64, got float32"),
    ({"factors": torch.arange(3)}, r"factors: expected size 2 in dimension 0 .*got shape \(3\)"),
    ({"digests": torch.zeros(3)}, "digests: expected int64, got float32"),
    ({"digests": torch.arange(2)}, r"digests: expected size 3 in dimension 0 .*got shape \(2\)"),
    ({"digests": torch.arange(6)[::2]}, "digests: expected a contiguous tensor"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input(change, message):
    good = {
        "rows": torch.ones(3, 16, dtype=torch.uint8),
        "pool": uint8(4, 16),
        "blocks": torch.arange(3),
        "factors": torch.arange(2),
        "digests": torch.full((3,), 7),
    }
    with pytest.raises(RuntimeError, match=message):
        ops.land_rows(**{**good, **change})
    assert not good["pool"].any() and good["digests"].eq(7).all()


@pytest.mark.gpu
@pytest.mark.parametrize("elsewhere", ["rows", "blocks", "factors", "digests"])
def test_other_devices_are_refused(elsewhere):
    given = Landing.make(torch.device("cuda", 0), 64, 3)
    names = ("rows", "pool", "blocks", "factors", "digests")
    call = {name: getattr(given, name) for name in names}
    with pytest.raises(RuntimeError, match=rf"{elsewhere}: expected cuda:0 \(the device of pool\), got cpu"):
        ops.land_rows(**{**call, elsewhere: call[elsewhere].cpu()})


def test_the_oracle_itself():
    """By hand: 2**63 and more, and a sum that wraps."""
    row = np.array([3, 2**64 - 1], np.uint64).view(np.uint8)
    assert digest_of(row, np.array([5, 7], np.int64)) == 15 - 7
    assert digest_of(row, np.array([2**62 + 1, 1], np.int64)) == 3 * 2**62 + 3 - 1 - 2**64
