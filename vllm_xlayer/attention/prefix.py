"""Which prompts attend to the pages before them as they are, and how a step's are given to the kernel.

`ops.nvfp4_prefix_attention` reads NVFP4 pages, which FlashAttention cannot: its thread blocks dequantise what
they multiply. So only the newest tokens go into a workspace first; for all of them that is a third of the
time where prompts go on by a few tokens (short turns). Each of its thread blocks dequantises all that its
request has cached: with many query tokens a request that is better done once, and with few thread blocks the
GPU is not busy.
"""

from dataclasses import dataclass

import numpy as np
import torch

TILE = 16
"""Newest tokens are in tiles of so many, of which a page has whole ones only."""


@dataclass(frozen=True)
class Limits:
    """Where reading pages as they are is faster than dequantising them first (``bench gather`` tells).

    Attributes:
        least_tokens: of a request in pages. With fewer there is little to dequantise, and what comes after
            them is a launch of its own.
        most_blocks: Thread blocks of a request and KV head: as often its tokens are dequantised.
        least_busy: Share of the device that is busy until the last thread block ends, if all take as long.
    """

    least_tokens: int = 1024
    most_blocks: int = 8
    least_busy: float = 0.8


LIMITS = Limits()


@dataclass(frozen=True)
class PrefixKernel:
    """What a layer's kernel is like.

    Attributes:
        rows: Query rows of a thread block.
        group: Query heads a KV head.
        kv_heads: of the layer.
        at_once: Thread blocks that the device computes at once.
        newest_tokens: that are kept in 16 bits beside the pages, and are not read from them.
        limits: where it is used.
    """

    rows: int
    group: int
    kv_heads: int
    at_once: int
    newest_tokens: int
    limits: Limits

    def lens(self, query_lens: np.ndarray, seq_lens: np.ndarray) -> np.ndarray | None:
        """Tokens of each request that the kernel is to attend to, 0 for some; None if it is not to be used.

        Args:
            query_lens: int [R], tokens of this step of each request.
            seq_lens: int [R], tokens of each request including this step's.
        """
        lens = (seq_lens - query_lens - self.newest_tokens).clip(0) // TILE * TILE
        blocks = -(-query_lens * self.group // self.rows)
        limits = self.limits
        lens = np.where(
            (lens >= limits.least_tokens) & (blocks > 0) & (blocks <= limits.most_blocks), lens, 0
        )
        used = self.kv_heads * int(blocks[lens > 0].sum())
        there = -(-used // self.at_once) * self.at_once
        return lens if used > 0 and used >= limits.least_busy * there else None


@dataclass
class Prefix:
    """A step's, for all layers with such a kernel; int32 on the device, made of one transfer.

    Attributes:
        starts: int [R] on the host, tokens of each request that the kernel attends to.
        tokens: The requests' query tokens in the batch, half-open.
        max_query_len: Most query tokens of a request that has such tokens.
        lens: [R], as ``starts``.
        query_starts: [R + 1], running query tokens from 0.
        block_table: [R, M].
    """

    starts: np.ndarray
    tokens: slice
    max_query_len: int
    lens: torch.Tensor
    query_starts: torch.Tensor
    block_table: torch.Tensor


def on_device(starts: np.ndarray, query_starts: np.ndarray, block_table: torch.Tensor) -> Prefix:
    """starts: int [R]; query_starts: int [R + 1] in the batch; block_table: int32 [R, M] on the device."""
    n, device = len(starts), block_table.device
    host = torch.empty(2 * n + 1, dtype=torch.int32, pin_memory=device.type == "cuda")
    ints = host.numpy()
    ints[:n] = starts
    ints[n:] = query_starts - query_starts[0]
    lens, running = host.to(device, non_blocking=True).split((n, n + 1))
    return Prefix(
        starts=starts,
        tokens=slice(int(query_starts[0]), int(query_starts[-1])),
        max_query_len=int(np.diff(query_starts)[starts > 0].max()),
        lens=lens,
        query_starts=running,
        block_table=block_table,
    )
