"""The kernel of land_rows without a GPU, thread by thread: all memory and all digests are looked at."""

import ctypes

import pytest
import torch
from reference.emulated import library, why_not
from reference.landed_rows import Landing

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

CPU = torch.device("cpu")
TILE_BYTES = 512 * 8 * 16


def check(given: Landing, ctas: int, digested: bool = True, wide: bool = True) -> None:
    """By so many thread blocks. wide: by words of 16 bytes."""
    expected = given.expected()
    if digested:
        given.digests.zero_()
    at = [t.data_ptr() for t in (given.rows, given.pool, given.blocks, given.factors, given.digests)]
    rows, pool, blocks, factors, digests = map(ctypes.c_void_p, at)
    n, row_bytes = given.rows.shape
    sizes = [ctypes.c_int64(x) for x in (given.pool.stride(0), row_bytes, n, len(given.pool), wide, ctas)]
    library("land_rows").run_land_rows(
        rows,
        pool,
        *sizes[:2],
        blocks,
        *sizes[2:4],
        *((factors, digests) if digested else (None, None)),
        *sizes[4:],
    )
    given.check(expected, digested)


@pytest.mark.parametrize("digested", [True, False], ids=["digests", "none"])
@pytest.mark.parametrize("row_bytes", [16, 4096, TILE_BYTES - 16, TILE_BYTES, 2 * TILE_BYTES + 16])
@pytest.mark.parametrize("ctas", [1, 2, 5])
def test_shares_of_tiles(row_bytes, ctas, digested):
    """They begin and end within a column, or between two."""
    check(Landing.make(CPU, row_bytes, 4, gap=32), ctas, digested)


@pytest.mark.parametrize("digested", [True, False], ids=["digests", "none"])
@pytest.mark.parametrize("row_bytes", [8, 40, TILE_BYTES // 2 + 8])
def test_words_of_eight_bytes(row_bytes, digested):
    check(Landing.make(CPU, row_bytes, 4, gap=8, shift=8), 3, digested, wide=False)


def test_more_thread_blocks_than_tiles():
    check(Landing.make(CPU, 48, 2), 5)


def test_one_row():
    check(Landing.make(CPU, 3 * TILE_BYTES, 1), 2)


@pytest.mark.parametrize("outside", [-1, 9, 2**40, -(2**63), 2**63 - 1])
def test_blocks_that_the_pool_does_not_have(outside):
    given = Landing.make(CPU, TILE_BYTES + 16, 4)
    given.blocks[[0, 2]] = torch.tensor([outside, outside])
    check(given, 3)
