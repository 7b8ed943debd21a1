"""The decode part of a batch: requests of the same few query tokens, which attend straight to the cache.

A schedule is computed on the device once a step and window, outside the layers; everything the kernels read
stays at the same address, so a captured graph follows the lengths.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

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
    """As the extension says them, also one without CUDA."""
    decode = ops.build_info()["decode"]
    sizes = sorted({shape["head_size"] for shape in decode["shapes"]})
    return Limits(tuple(sizes), decode["max_group"], decode["max_q_len"])


@dataclass(frozen=True)
class DecodeBatch:
    """The first ``num_requests`` requests of a batch, ``q_len`` query tokens each.

    Attributes:
        seq_lens: int32 [num_requests], exact, on the device; 0 for padding.
        block_table: int32 [num_requests, M].
        workspaces: by window (0: none), each with this batch's schedule.
    """

    num_requests: int
    q_len: int
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    workspaces: dict[int, ops.AttentionWorkspace]

    @property
    def num_tokens(self) -> int:
        return self.num_requests * self.q_len


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
        self, num_requests: int, q_len: int, seq_lens: torch.Tensor, block_table: torch.Tensor
    ) -> DecodeBatch:
        """seq_lens int32 [R], block_table int32 [R, M], R >= num_requests; both on the device."""
        lens = seq_lens[:num_requests]
        for window, workspace in self._workspaces.items():
            ops.nvfp4_attention_schedule(lens, workspace, q_len, window)
        return DecodeBatch(num_requests, q_len, lens, block_table[:num_requests], self._workspaces)
