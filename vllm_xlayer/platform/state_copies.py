"""States of speculating models that are copied from block to block, in plain Python.

vLLM keeps a request's running states in the block of its newest token and in blocks behind it, one for each
draft. Before a step they go to the step's block, and after it to the block that is full now, where one is.
What it hands its kernels are addresses: these functions take what they take, and stand in for them.
"""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class States(NamedTuple):
    """Where states lie: one entry of each tensor for a layer's state.

    Attributes:
        tables: int64 [groups], addresses of block tables, int32 [requests, columns].
        table_stride: from a request's table to the next, in elements.
        bases: int64, addresses of states [blocks, ...].
        block_strides: int64, bytes from a block to the next.
        element_sizes: int32, bytes.
        inner_sizes: int64, elements of a token's part of a convolution's state, or of all of another state.
        widths: int32, tokens in a convolution's state; 0: it is another.
        groups: int32, whose block table it is.
        rows, row_strides: where a token's part is not in one piece: int32, how many it has, and int64, bytes
            from one to the next.
    """

    tables: torch.Tensor
    table_stride: int
    bases: torch.Tensor
    block_strides: torch.Tensor
    element_sizes: torch.Tensor
    inner_sizes: torch.Tensor
    widths: torch.Tensor
    groups: torch.Tensor
    rows: torch.Tensor
    row_strides: torch.Tensor

    def copy(self, request: int, source: int, target: int, tokens: int, in_rows: bool) -> None:
        """Copies a request's states, as they were after so many more tokens, between columns of its table."""
        for i, base in enumerate(self.bases.tolist()):
            table = int(self.tables[self.groups[i]]) + 4 * request * self.table_stride
            stride, size = int(self.block_strides[i]), int(self.element_sizes[i])
            inner, width = int(self.inner_sizes[i]), int(self.widths[i])

            def address(column: int, table: int = table, base: int = base, stride: int = stride) -> int:
                return base + stride * ctypes.c_int32.from_address(table + 4 * column).value

            if width == 0:  # each token's is in a block of its own
                ctypes.memmove(address(target), address(source + tokens), inner * size)
                continue
            part = size if in_rows else inner * size
            for row in range(int(self.rows[i]) if in_rows else 1):
                begin = row * int(self.row_strides[i])
                ctypes.memmove(
                    address(target) + begin, address(source) + begin + tokens * part, (width - tokens) * part
                )


def before_a_step(
    columns: torch.Tensor,
    sources: torch.Tensor,
    tokens: torch.Tensor,
    *states: Any,
    CONV_STATE_DIM_FIRST: bool,
    HAS_IDX_MAPPING: bool = True,
    **_: Any,
) -> None:
    """In place of ``precopy_mamba_align_fused_kernel``: to the step's block, where that is another one.

    Args:
        columns, sources: int [requests], where a request's states are to be, and where they are; -1: nowhere.
        tokens: int [requests], of the step before that were accepted, less 1.
        states: the fields of `States`, a mapping of requests, and their number.
    """
    *fields, _mapping, count = states
    if HAS_IDX_MAPPING:
        raise NotImplementedError("states of drafts: expected model runner V1, got a mapping of requests")
    layout = States(*fields)
    for request in range(count):
        source, target = int(sources[request]), int(columns[request])
        if source >= 0 and source != target:
            layout.copy(request, source, target, int(tokens[request]), CONV_STATE_DIM_FIRST)


def after_a_step(
    accepted: torch.Tensor,
    columns: torch.Tensor,
    scheduled: torch.Tensor,
    computed: torch.Tensor,
    drafts: torch.Tensor,
    *states: Any,
    block_size: int,
    CONV_STATE_DIM_FIRST: bool,
    HAS_IDX_MAPPING: bool = False,
    PRECOMPUTED_NEW_COMPUTED: bool = False,
    **_: Any,
) -> None:
    """In place of ``postprocess_mamba_fused_kernel``: to a block that is full now, as they were at its end.

    Args:
        accepted: int [requests], tokens of the step, at least 1.
        columns: int [requests], where their states are.
        scheduled, computed, drafts: int [requests], tokens of the step, before it, and of it the drafts.
        states: the fields of `States`, int [requests] of which a request's becomes 1 where its states stay in
            their block, a mapping of requests, and their number.
    """
    *fields, accepted_out, _mapping, count = states
    if HAS_IDX_MAPPING or PRECOMPUTED_NEW_COMPUTED:
        raise NotImplementedError("states of drafts: expected model runner V1, got a mapping of requests")
    layout = States(*fields)
    for request in range(count):
        running = int(computed[request]) + int(scheduled[request]) - int(drafts[request])
        full = (running + int(accepted[request]) - 1) // block_size
        if full * block_size < running:
            continue
        source, target, tokens = int(columns[request]), full - 1, full * block_size - running
        if source == target:
            accepted_out[request] = 1
        if source != target or tokens:
            layout.copy(request, source, target, tokens, CONV_STATE_DIM_FIRST)


KERNELS: dict[str, Callable[..., Any]] = {
    "vllm.v1.worker.mamba_utils.precopy_mamba_align_fused_kernel": before_a_step,
    "vllm.v1.worker.mamba_utils.postprocess_mamba_fused_kernel": after_a_step,
}
"""vLLM's kernel -> what stands in for it."""
