"""Which decode kernel takes the least time for a batch of unequal query lengths."""

import functools
from collections.abc import Sequence

import numpy as np

from .extension import load

TILE_COST = {8: 1.0, 16: 1.25, 32: 1.25**2}
"""What a head tile of so many query rows takes, by one of eight (64 x 8192, an H200; 32: not measured)."""


@functools.cache
def tile_rows(head_size: int) -> tuple[int, ...]:
    """Query rows of a head tile, of each kernel for this head size, ascending."""
    return tuple(sorted({s["rows"] for s in load()["decode"]["shapes"] if s["head_size"] == head_size}))


def kernel_q_len(query_lens: np.ndarray | Sequence[int], group: int, head_size: int) -> int:
    """The ``kernel_q_len`` of ``nvfp4_paged_attention`` for which a batch takes the least time.

    A head tile belongs to one request: a kernel with few rows reads the pages of a long one several times,
    one with many leaves rows of a short one empty.

    Args:
        query_lens: query tokens of each request, on the host; those of 0 count nothing, one has more.
        group: query heads a KV head.
        head_size: one that a kernel is compiled for.
    """
    lens = np.asarray(query_lens)
    rows, sizes = lens * group, tile_rows(head_size)
    time = {size: int((-(-rows // size)).sum()) * TILE_COST[size] for size in sizes}
    mean = -(-int(lens.sum()) // int(np.count_nonzero(lens)))

    def cost(q_len: int) -> tuple[float, int, int]:
        size = next((size for size in sizes if size >= q_len * group), sizes[-1])
        # Of two kernels as dear the one with fewer tiles, which read newest tokens less often. Whether its
        # thread blocks are large ones depends on the number of tiles: it should be about what there are.
        return time[size], -size, abs(q_len - mean)

    return min(range(1, int(lens.max()) + 1), key=cost)
