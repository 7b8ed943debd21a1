"""Attention of a prompt's query tokens to the pages before them."""

import torch

from .extension import checks_values, load, require_cuda_build


def nvfp4_prefix_attention(
    q: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    query_starts: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    rotated_keys: bool = False,
) -> None:
    """Attend to the first tokens of each request, which all of its queries see, in their NVFP4 pages.

    What comes after them is another kernel's, which has run: the result is merged with its own, in place.

    Args:
        q: [T, Hq, D] bfloat16 or float16; D dense, rows start at multiples of 16 bytes. Hq a multiple of H.
        kv_cache: (B, H, N, 9D/8) uint8 as in ``reshape_and_cache_nvfp4``, V's scales in order.
        block_table: int32 [R, M], a request's blocks in order; entries past its ``lens`` are not read.
        lens: int32 [R], tokens of each request that are attended to; 0: nothing of it is changed.
        query_starts: int32 [R + 1], ascending, where each request's tokens begin in ``q``.
        k_scale: float32, one element: K's global decode scale. v_scale: the same for V.
        out: as q, attention to other tokens; then to both.
        lse: float32 [Hq, T], T dense: natural logarithm of the sum of exp(score), as out; -inf: nothing
            was attended to, and out is not read.
        scale: Factor of Q K^T.
        max_query_len: Most query tokens of a request with ``lens`` above 0.
        rotated_keys: as the pages were written.

    Raises:
        RuntimeError: an argument is of another device, dtype, shape or layout, or there is no kernel
            (``nvfp4_prefix_rows``); on the CPU, and in debug mode (``VLLM_XLAYER_DEBUG=1``), also where a
            block or a query token that is asked for is not there.
    """
    require_cuda_build("nvfp4_prefix_attention", q, kv_cache, out)
    load()
    if checks_values(kv_cache):
        _check_values(kv_cache, block_table, lens, query_starts, max_query_len, q.shape[0])
    torch.ops.vllm_xlayer.nvfp4_prefix_attention(
        q, kv_cache, block_table, lens, query_starts, k_scale, v_scale, out, lse, scale, max_query_len,
        rotated_keys,
    )  # fmt: skip


def nvfp4_prefix_rows(like: torch.Tensor, head_size: int) -> int:
    """Query rows (tokens x query heads a KV head) of a thread block of ``nvfp4_prefix_attention`` on the
    device of ``like``; 0 if there is no kernel for such heads there. There is one for heads of 128 on Hopper
    (sm_90a), and the CPU's."""
    require_cuda_build("nvfp4_prefix_rows", like)
    load()
    return torch.ops.vllm_xlayer.nvfp4_prefix_rows(like, head_size)


def _check_values(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    lens: torch.Tensor,
    query_starts: torch.Tensor,
    max_query_len: int,
    tokens: int,
) -> None:
    starts, capacity = query_starts.tolist(), block_table.shape[1] * kv_cache.shape[2]
    for r, length in enumerate(lens.tolist()):
        begin, end = starts[r : r + 2]
        if not 0 <= begin <= end <= tokens or (length and end - begin > max_query_len):
            raise RuntimeError(
                f"query_starts: expected 0 to {max_query_len} of {tokens} query tokens, got {end - begin} "
                f"from {begin} on for request {r}"
            )
        if not 0 <= length <= capacity:
            raise RuntimeError(f"lens: expected 0 to {capacity} tokens, got {length} for request {r}")
        blocks = block_table[r, : -(-length // kv_cache.shape[2])]
        if len(blocks) and not 0 <= int(blocks.min()) <= int(blocks.max()) < kv_cache.shape[0]:
            raise RuntimeError(
                f"block_table: expected blocks from 0 to {kv_cache.shape[0] - 1}, got {blocks.tolist()} for "
                f"request {r}"
            )
