"""The decode part of a batch: requests of few query tokens, which attend straight to the cache.

A schedule is computed on the device once a step and window, outside the layers; everything the kernels read
stays at the same address, so a captured graph follows the lengths.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from .. import ops


@dataclass(frozen=True)
class Limits:
    """What the decode kernel is compiled for.

    Attributes:
        head_sizes: ascending.
        max_group: query heads a KV head.
        max_query_len: query tokens of a request.
    """

    head_sizes: tuple[int, ...]
    max_group: int
    max_query_len: int

    def include(self, head_size: int, num_heads: int, num_kv_heads: int) -> bool:
        """Whether decode requests of such layers can attend to the cache without dequantising it first."""
        return head_size in self.head_sizes and num_heads <= self.max_group * num_kv_heads


@functools.cache
def limits() -> Limits:
    """What the decode kernel takes, as the extension says it; one without CUDA says the same."""
    decode = ops.build_info()["decode"]
    sizes = sorted({shape["head_size"] for shape in decode["shapes"]})
    return Limits(tuple(sizes), decode["max_group"], decode["max_q_len"])


@dataclass(frozen=True)
class DecodeBatch:
    """The first ``num_requests`` requests of a batch.

    Attributes:
        q_len: query tokens of each; with query_starts the most of one.
        num_tokens: of all of them.
        seq_lens: int32 [num_requests], exact, on the device; 0 for padding.
        block_table: int32 [num_requests, M].
        workspaces: by window (0: none), each with this batch's schedule.
        query_starts: int32 [num_requests + 1] on the device, where their query tokens begin; None if all have
            ``q_len`` (a captured graph has them so).
        kernel_q_len: as `ops.nvfp4_paged_attention` takes it: the kernel that takes the least time for them.
    """

    num_requests: int
    q_len: int
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    workspaces: dict[int, ops.AttentionWorkspace]
    num_tokens: int
    query_starts: torch.Tensor | None
    kernel_q_len: int


class DecodePlanner:
    """Makes a `DecodeBatch` of the first requests of each step's batch.

    Args:
        windows: sliding windows of the layers served, in tokens; None for full attention.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_size: int,
        max_requests: int,
        max_query_len: int,
        windows: Iterable[int | None],
    ):
        self._group, self._head_size = num_heads // num_kv_heads, head_size
        first = ops.AttentionWorkspace.create(
            device,
            num_q_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            max_requests=max_requests,
            max_q_len=max_query_len,
        )
        # Layers run one after the other: they share the partial results' memory, but not schedules.
        self._workspaces = {
            window or 0: replace(first, schedule=torch.zeros_like(first.schedule)) for window in windows
        }

    def plan(
        self,
        query_lens: np.ndarray,
        query_starts: torch.Tensor,
        seq_lens: torch.Tensor,
        block_table: torch.Tensor,
        newest_from: torch.Tensor | None = None,
    ) -> DecodeBatch:
        """The batch of the first n requests.

        Args:
            query_lens: [n] on the host, the query tokens of each. Those at the end may have none: a batch is
                padded for a graph. If the others have equally many, q and output have room for theirs, too.
            query_starts: int32 [R + 1], on the device as all that follows, R >= n.
            seq_lens: int32 [R].
            block_table: int32 [R, M].
            newest_from: int32 [R], if layers have newest tokens in 16 bits: which (``NewestBatch.begin``).
        """
        n, q_len = len(query_lens), int(query_lens.max())
        lens, starts, tokens, kernel_q_len = seq_lens[:n], None, n * q_len, q_len
        there = int(np.count_nonzero(query_lens))
        if (query_lens[:there] != q_len).any():
            starts, tokens = query_starts[: n + 1], int(query_lens.sum())
            kernel_q_len = ops.kernel_q_len(query_lens, self._group, self._head_size)
        newest = None if newest_from is None else newest_from[:n]
        for window, workspace in self._workspaces.items():
            ops.nvfp4_attention_schedule(lens, workspace, q_len, window, starts, kernel_q_len, newest)
        return DecodeBatch(n, q_len, lens, block_table[:n], self._workspaces, tokens, starts, kernel_q_len)
