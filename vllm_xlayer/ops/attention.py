"""Decode attention that reads NVFP4 pages."""

import itertools
from dataclasses import dataclass

import torch

from ..nvfp4 import ScaleOrder
from .extension import checks_values, load, require_cuda_build

UNIT_TOKENS = 64
"""Tokens of one unit of the split-KV schedule."""


@dataclass(frozen=True)
class AttentionWorkspace:
    """Memory for the schedule and the partial results of ``nvfp4_paged_attention``.

    Made once; serves every batch up to its limits, also in captured CUDA graphs, since no address changes.
    A schedule is for one set of lengths, heads and window: layers that differ in them need a workspace
    each, layers that run one after the other on one stream share it.
    """

    num_q_heads: int
    num_kv_heads: int
    head_size: int
    split_units: int
    """0: a batch is cut into parts of equal work. n > 0: every request is cut into parts of n units of
    ``UNIT_TOKENS`` tokens, so that its result has the same bits in any batch, at some cost in speed."""
    parts: tuple[int, ...]
    """Parts to cut a batch into, for 1, 2, ... query tokens a request."""
    schedule: torch.Tensor
    """int32 [entries]: where requests begin, and which of their parts have finished"""
    partial: torch.Tensor
    """float32 [floats], empty on the CPU"""

    @classmethod
    def create(
        cls,
        device: torch.device,
        *,
        num_q_heads: int,
        num_kv_heads: int,
        head_size: int,
        max_requests: int,
        max_q_len: int = 1,
        split_units: int = 0,
        max_tokens: int = 0,
    ) -> "AttentionWorkspace":
        """For up to ``max_requests`` requests of 1 to ``max_q_len`` query tokens each, of which
        ``build_info()["decode"]["max_q_len"]`` is the most.

        ``max_tokens`` matters only with ``split_units``: the most tokens a request's row of the block table
        has room for (its width times the block size).
        """
        if split_units > 0 and max_tokens <= 0:
            raise ValueError(f"max_tokens: expected a positive number with split_units, got {max_tokens}")
        like = torch.empty(0, device=device)
        require_cuda_build("nvfp4_paged_attention", like)
        most = load()["decode"]["max_q_len"]
        if max_requests < 0 or not 1 <= max_q_len <= most:
            raise ValueError(
                f"max_requests, max_q_len: expected 0 or more requests and 1 to {most} query tokens, "
                f"got {max_requests} and {max_q_len}"
            )
        shape, parts, floats = (num_q_heads, num_kv_heads, head_size), [], 0
        # Of a request: one for 8 query rows of a KV head (csrc/kernels/nvfp4_attention/params.h).
        counters = num_kv_heads * -(-max_q_len * (num_q_heads // num_kv_heads) // 8)
        for q_len in range(1, max_q_len + 1):
            rows = q_len * (num_q_heads // num_kv_heads)
            parts.append(torch.ops.vllm_xlayer.nvfp4_attention_parts(like, head_size, rows))
            needed = torch.ops.vllm_xlayer.nvfp4_attention_workspace_size(
                like, max_requests, max_tokens, q_len, *shape, parts[-1], split_units
            )
            floats = max(floats, needed)
        return cls(
            *shape,
            split_units=split_units,
            parts=tuple(parts),
            schedule=torch.zeros(
                5 + max(parts) + max_requests * (1 + counters), dtype=torch.int32, device=device
            ),
            partial=torch.empty(floats, dtype=torch.float32, device=device),
        )

    def parts_for(self, q_len: int) -> int:
        if not 1 <= q_len <= len(self.parts):
            raise ValueError(f"q_len: expected 1 to {len(self.parts)} (max_q_len), got {q_len}")
        return self.parts[q_len - 1]


def nvfp4_attention_schedule(
    seq_lens: torch.Tensor,
    workspace: AttentionWorkspace,
    q_len: int = 1,
    window: int = 0,
    query_starts: torch.Tensor | None = None,
    kernel_q_len: int | None = None,
    newest_from: torch.Tensor | None = None,
) -> None:
    """Write the split-KV schedule of a batch into ``workspace.schedule``; once for all its layers.

    Runs on the device, so that a captured graph follows the lengths. On the CPU there is nothing to do.

    Args:
        seq_lens: int32 [R], as in ``nvfp4_paged_attention``. q_len, window, query_starts, kernel_q_len,
            newest_from: as there, and the same values.
    """
    require_cuda_build("nvfp4_attention_schedule", seq_lens)
    load()
    torch.ops.vllm_xlayer.nvfp4_attention_schedule(
        seq_lens,
        workspace.schedule,
        q_len,
        workspace.num_q_heads,
        workspace.num_kv_heads,
        workspace.head_size,
        window,
        workspace.parts_for(kernel_q_len or q_len),
        workspace.split_units,
        query_starts,
        kernel_q_len or q_len,
        newest_from,
    )


def nvfp4_paged_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    workspace: AttentionWorkspace,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    q_len: int = 1,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    scale_order: int = ScaleOrder.LINEAR,
    newest: torch.Tensor | None = None,
    newest_rows: torch.Tensor | None = None,
    newest_from: torch.Tensor | None = None,
    query_starts: torch.Tensor | None = None,
    kernel_q_len: int | None = None,
    rotated_keys: bool = False,
) -> None:
    """Attend from the last ``q_len`` tokens of each request to the request's tokens in an NVFP4 cache.

    Query token i of a request of n tokens is at position n - q_len + i and sees the tokens up to itself,
    which are in the cache already. Where that position is negative (n < q_len; n = 0 is a request that does
    not exist) the output is 0 and the LSE -inf.

    Args:
        q: [T, Hq, D] bfloat16 or float16; D dense, rows start at multiples of 16 bytes. On CUDA D
            is 64, 80, 96, 112, 128, 192 or 256; on the CPU any multiple of 16 up to 256.
        kv_cache: (B, H, N, 9D/8) uint8 as in ``reshape_and_cache_nvfp4``, on CUDA with a block stride below
            4 GiB. Hq is 1 to 16 times H.
        block_table: int32 [R, M], a request's blocks in order; entries past its tokens, and those of blocks
            that lie wholly before its window, are not read.
        seq_lens: int32 [R], tokens of each request, its q_len new ones included; at most M * N.
        workspace: for these heads, with the schedule of exactly these seq_lens, q_len, window and newest_from
            (``nvfp4_attention_schedule``).
        k_scale: float32, one element: K's global decode scale. v_scale: the same for V.
        out: as q, not the same memory. Written in place.
        scale: what q . k is multiplied by (usually D**-0.5), positive.
        q_len: query tokens a request, 1 to 8: T is R * q_len. With ``query_starts`` the most of a request.
        window: how many tokens a query sees, itself included; 0: all before it.
        soft_cap: if not 0, a score s becomes soft_cap * tanh(s / soft_cap).
        sinks: float32 [Hq] or None: a logit a head that takes part in the softmax but has no value.
        lse: float32 [Hq, T] or None; last dimension dense. Written: natural logarithm of the sum of
            exp(score), the sink's term included.
        scale_order, rotated_keys: as the pages were written, and ``newest``.
        newest: (rows, 2, H, n, D) of q's dtype, dense, or None: memory of each running request's newest
            tokens, as in ``reshape_and_cache_nvfp4``. Token p of request r is read from place p % n of its
            row there, and not from its page, where p // 16 * 16 >= newest_from[r].
        newest_rows: int32 [R] with ``newest``; anything where the request reads none.
        newest_from: int32 [R] with ``newest``, at least seq_len - n, as ``newest_step`` makes them.
        query_starts: int32 [R + 1] or None: where in q each request's query tokens begin, and their end; 0 to
            q_len of them each. What q has beyond the last is not read, and ``out`` not written there.
        kernel_q_len: with ``query_starts``: the kernel is the one for requests of so many query tokens. Any
            number up to q_len gives the result, and `kernel_q_len` the least time; None is q_len.

    A NaN in a cached token makes the heads NaN that it belongs to; a NaN in a query makes its head and token
    NaN. With several query tokens, on CUDA, a NaN in V of a new token also reaches the earlier new ones.
    """
    require_cuda_build("nvfp4_paged_attention", q, kv_cache)
    load()
    if checks_values(seq_lens):
        _check_indices(kv_cache, block_table, seq_lens, q_len, window)
        check_schedule(workspace.schedule, newest_from)
        if query_starts is not None:
            _check_query_starts(query_starts, q_len, q.shape[0])
        if newest is not None and newest_rows is not None and newest_from is not None:
            _check_newest_indices(seq_lens, newest, newest_rows, newest_from)
    torch.ops.vllm_xlayer.nvfp4_paged_attention(
        q,
        kv_cache,
        block_table,
        seq_lens,
        workspace.schedule,
        k_scale,
        v_scale,
        out,
        lse,
        sinks,
        workspace.partial,
        scale,
        q_len,
        window,
        soft_cap,
        int(scale_order),
        workspace.parts_for(kernel_q_len or q_len),
        workspace.split_units,
        newest,
        newest_rows,
        newest_from,
        query_starts,
        kernel_q_len or q_len,
        rotated_keys,
    )


def _check_query_starts(query_starts: torch.Tensor, q_len: int, tokens: int) -> None:
    """Debug mode's check of what lies in device memory; the CPU op does the same."""
    starts = query_starts.tolist()
    counts = [end - begin for begin, end in itertools.pairwise(starts)]
    if min(starts) < 0 or starts[-1] > tokens or any(not 0 <= count <= q_len for count in counts):
        raise RuntimeError(f"query_starts: expected 0 to {q_len} of {tokens} query tokens each, got {starts}")


def check_schedule(schedule: torch.Tensor, newest_from: torch.Tensor | None) -> None:
    """Debug mode's check that schedule and attention count tokens alike (struct Schedule in params.h)."""
    made, wanted = bool(schedule[3].item()), newest_from is not None
    if made != wanted:
        how = {True: "with", False: "without"}
        raise RuntimeError(f"schedule: expected one made {how[wanted]} newest_from, got one {how[made]}")


def _check_newest_indices(
    seq_lens: torch.Tensor, newest: torch.Tensor, newest_rows: torch.Tensor, newest_from: torch.Tensor
) -> None:
    """Debug mode's check of what lies in device memory; the CPU op does the same."""
    rows, tokens = newest.shape[0], newest.shape[3]
    table = zip(seq_lens.tolist(), newest_rows.tolist(), newest_from.tolist(), strict=True)
    for r, (length, row, first) in enumerate(table):
        if first < length and not (0 <= row < rows and first >= max(0, length - tokens)):
            raise RuntimeError(
                f"newest: expected a row below {rows} and tokens from {max(0, length - tokens)} on, got row "
                f"{row} and tokens from {first} on for request {r}"
            )


def _check_indices(
    kv_cache: torch.Tensor, block_table: torch.Tensor, seq_lens: torch.Tensor, q_len: int, window: int
) -> None:
    """Debug mode's check of what lies in device memory; the CPU op does the same."""
    blocks, block_size = kv_cache.shape[0], kv_cache.shape[2]
    table = block_table.cpu()
    capacity = table.shape[1] * block_size
    for r, length in enumerate(seq_lens.tolist()):
        if not 0 <= length <= capacity:
            raise RuntimeError(
                f"seq_lens: expected 0 to {capacity} ({table.shape[1]} blocks of {block_size} tokens), "
                f"got {length} for request {r}"
            )
        first = max(0, length - q_len - window + 1) if window else 0
        used = table[r, first // block_size : -(-length // block_size)]
        if used.numel() and (int(used.min()) < 0 or int(used.max()) >= blocks):
            raise RuntimeError(
                f"block_table: expected blocks from 0 to {blocks - 1}, got {used.tolist()} for request {r}"
            )
