"""`ops.kernel_q_len`: which kernel a batch gets, by what its head tiles take. Nothing runs but the choice."""

import pytest

from vllm_xlayer import ops
from vllm_xlayer.ops.head_tiles import TILE_COST, tile_rows


def rows_of(query_lens: list[int], group: int, head_size: int = 128) -> int:
    """Of the head tiles of the kernel that is chosen."""
    q_len = ops.kernel_q_len(query_lens, group, head_size)
    assert 1 <= q_len <= max(query_lens)
    return next((r for r in tile_rows(head_size) if r >= q_len * group), tile_rows(head_size)[-1])


def test_kernels():
    assert [tile_rows(d) for d in (64, 80, 128, 256)] == [(8, 16, 32), (8,), (8, 16), (8,)]
    assert set(TILE_COST) == {rows for d in (64, 80, 96, 112, 128, 192, 256) for rows in tile_rows(d)}


@pytest.mark.parametrize("q_len", [1, 2, 4])
@pytest.mark.parametrize(("group", "head_size"), [(1, 128), (4, 128), (16, 128), (4, 64), (8, 64), (4, 256)])
def test_equal_lengths_get_what_a_graph_of_them_gets(q_len, group, head_size):
    assert ops.kernel_q_len([q_len] * 3, group, head_size) == q_len


@pytest.mark.parametrize(
    ("query_lens", "group", "head_size", "rows"),
    [
        ([4, 1, 2, 1], 4, 128, 16),  # 5 tiles, or 4 at 1.25: as dear, and fewer
        ([4, 1, 2, 1, 0, 0], 4, 128, 16),  # padded
        ([4, 1, 1, 1, 1], 4, 128, 8),  # 6, or 5 at 1.25
        ([4] + [1] * 15, 4, 128, 8),  # 17, or 20
        ([4, 4, 4, 1], 4, 128, 16),  # 7, or 5
        ([4] + [1] * 15, 1, 128, 8),  # four rows at most
        ([8, 1, 2, 1], 1, 128, 8),
        ([2, 1, 1, 1], 16, 128, 16),  # no request has fewer
        ([4, 1, 2, 1], 4, 64, 16),
        ([8, 8, 1], 4, 64, 32),  # 9, 5 at 1.25, or 3 at 1.56
        ([8, 1, 1, 1, 1, 1, 1, 1], 4, 64, 8),  # 11, 9 at 1.25, or 8 at 1.56
        ([4, 1, 2, 1], 4, 80, 8),  # the only kernel
    ],
)
def test_the_kernel_that_takes_least(query_lens, group, head_size, rows):
    assert rows_of(query_lens, group, head_size) == rows


def test_among_lengths_of_one_kernel_the_mean():
    """By it thread blocks are chosen: a KV head's tiles are to be about as many as they are."""
    assert ops.kernel_q_len([1, 4, 8, 8], 1, 128) == 6
    assert ops.kernel_q_len([8, 8, 8, 1], 16, 128) == 7
    assert ops.kernel_q_len([4, 1, 2, 1], 4, 128) == 3  # the mean is 2, of eight rows
