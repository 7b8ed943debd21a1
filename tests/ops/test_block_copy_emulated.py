"""The kernel of copy_blocks without a GPU, thread by thread: every byte of the destination is looked at."""

import ctypes

import pytest
import torch
from reference.emulated import library, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

TILE_BYTES = 512 * 4 * 16
POISON = 0xA5


def check(size: int, pairs: int, gap: int, *, wide: bool, with_launch: bool, ctas: int) -> None:
    """Pieces of `size` bytes, `gap` and 2 `gap` bytes apart, sources repeated, by so many thread blocks."""
    generator = torch.Generator().manual_seed(size + pairs)
    # torch allocates at multiples of 64 bytes.
    src = torch.randint(0, 256, (pairs + 3, size + gap), dtype=torch.uint8, generator=generator)
    dst = torch.full((pairs + 5, size + 2 * gap), POISON, dtype=torch.uint8)
    src_ids = torch.randint(0, pairs + 3, (pairs,), generator=generator)
    dst_ids = torch.randperm(pairs + 5, generator=generator)[:pairs]
    expected = dst.clone()
    expected[dst_ids, :size] = src[src_ids, :size]
    ids = torch.stack((src_ids, dst_ids), dim=1).int()
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (src, dst, ids)]
    sizes = [ctypes.c_int64(n) for n in (size, src.stride(0), dst.stride(0))]
    how = [ctypes.c_int64(n) for n in (pairs, wide, with_launch, ctas)]
    assert library("block_copy").run_block_copy(*pointers[:2], *sizes, pointers[2], *how) == 0
    assert torch.equal(dst, expected)


@pytest.mark.parametrize("ctas", [1, 12])
@pytest.mark.parametrize("size", [16, 4608, 18432, TILE_BYTES - 16, TILE_BYTES, TILE_BYTES + 16])
def test_pieces_and_tiles(size, ctas):
    check(size, 23, 32, wide=True, with_launch=True, ctas=ctas)


@pytest.mark.parametrize("size", [1, 15, 511, 513])
def test_bytes(size):
    check(size, 23, 3, wide=False, with_launch=True, ctas=2)


@pytest.mark.parametrize("pairs", [448, 449, 4080])
@pytest.mark.parametrize(("size", "wide"), [(48, True), (5, False)])
def test_as_many_pairs_as_travel_with_a_launch(size, wide, pairs):
    check(size, pairs, 0, wide=wide, with_launch=True, ctas=4)


def test_more_pairs_than_travel_with_a_launch():
    check(4608, 500, 0, wide=True, with_launch=False, ctas=12)


def test_more_thread_blocks_than_tiles():
    check(48, 2, 0, wide=True, with_launch=True, ctas=12)
