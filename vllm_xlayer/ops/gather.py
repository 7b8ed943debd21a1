"""Dense K and V of what a step's attention sees: from the cache, or where it is at hand as it was."""

import itertools

import torch

from ..nvfp4 import ScaleOrder
from .extension import checks_values, load, require_cuda_build


def gather_nvfp4(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_starts: torch.Tensor,
    cu_seqlens: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    scale_order: int = ScaleOrder.LINEAR,
    rotated_keys: bool = False,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    query_starts: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    newest: torch.Tensor | None = None,
    newest_rows: torch.Tensor | None = None,
    newest_from: torch.Tensor | None = None,
) -> None:
    """Gather tokens of one layer into dense K and V, dequantised where only an NVFP4 page has them.

    Request r's tokens seq_starts[r] ... seq_starts[r] + len_r - 1, len_r = cu_seqlens[r+1] - cu_seqlens[r],
    go to rows cu_seqlens[r] ... of the outputs. Other rows of the outputs are not touched.

    Each token is read from the first of these that has it:

    1. ``key`` and ``value``: the request's own tokens, which are the last query_starts[r+1] - query_starts[r]
       of its seq_lens[r]. Without ``key`` they are read from pages.
    2. its row of ``newest``: of the n tokens before seq_lens[r] those before the own ones whose tile of 16
       begins at newest_from[r] or later, if newest_rows[r] is 0 or more.
    3. its page.

    Args:
        kv_cache: (B, H, N, 9D/8) uint8 as in ``reshape_and_cache_nvfp4``.
        block_table: int32 [R, M], a request's blocks in order; entries past its tokens are not read.
        seq_starts: int32 [R].
        cu_seqlens: int32 [R + 1], ascending from 0, its last value at most T.
        k_scale: float32, one element: K's global decode scale. v_scale: the same for V.
        k_out: [T, H, D] bfloat16, float16 or float32; D dense, rows start at multiples of 16 bytes.
        v_out: as k_out, same shape and dtype.
        scale_order, rotated_keys: as the pages were written, and ``newest``. ``k_out`` is K itself, not
            rotated.
        key: [Q, H, D] of k_out's dtype (any of the three where that is float32), D dense, any strides in Q
            and H; or None. It is fastest where heads start at multiples of 16 bytes.
        value: as key, same shape and dtype; with ``key``.
        query_starts: int32 [R + 1], ascending, where each request's own tokens begin in ``key``; with ``key``
            or ``newest``.
        seq_lens: int32 [R], tokens of each request, the own ones included; with ``query_starts``.
        newest: (rows, 2, H, n, D) of key's dtype as ``reshape_and_cache_nvfp4`` writes it, or None.
        newest_rows: int32 [R] with ``newest``: the row of each request, negative for none.
        newest_from: int32 [R] with ``newest``, as ``newest_step`` makes it.

    From a page the result is exact for a global scale of 1 (e2m1 * e4m3 fits both 16-bit types); else the
    exact product is multiplied by the global scale in float32 and rounded to the output's dtype. K that was
    kept rotated is rotated back in float32 before that, and so is K of ``newest``. Own tokens and V of
    ``newest`` have the bits that they were given with.

    Raises:
        RuntimeError: an argument is of another device, dtype, shape or layout; on the CPU, and in debug mode
            (``VLLM_XLAYER_DEBUG=1``), also where a block, a row or a token that is asked for is not there.
    """
    require_cuda_build("gather_nvfp4", kv_cache, k_out, v_out)
    load()
    if checks_values(kv_cache):
        _check_indices(kv_cache, block_table, seq_starts, cu_seqlens, k_out.shape[0])
        if query_starts is not None and seq_lens is not None:
            _check_sources(seq_starts, cu_seqlens, query_starts, seq_lens, key, newest, newest_rows)
    torch.ops.vllm_xlayer.gather_nvfp4(
        kv_cache, block_table, seq_starts, cu_seqlens, k_scale, v_scale, k_out, v_out, int(scale_order),
        rotated_keys, key, value, query_starts, seq_lens, newest, newest_rows, newest_from,
    )  # fmt: skip


def _check_indices(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_starts: torch.Tensor,
    cu_seqlens: torch.Tensor,
    num_tokens: int,
) -> None:
    """Debug mode's check of what lies in device memory; the CPU op does the same."""
    blocks, block_size = kv_cache.shape[0], kv_cache.shape[2]
    table, starts, cumulative = block_table.cpu(), seq_starts.tolist(), cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(cumulative)]
    if cumulative[0] != 0 or min(lengths, default=0) < 0 or cumulative[-1] > num_tokens:
        raise RuntimeError(
            f"cu_seqlens: expected ascending values from 0 to at most {num_tokens}, got {cumulative}"
        )
    for r, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if length == 0:
            continue
        last = (start + length - 1) // block_size
        if start < 0 or last >= table.shape[1]:
            raise RuntimeError(
                f"block_table: expected blocks for tokens {start} to {start + length} of request {r}, "
                f"got {table.shape[1]} blocks of {block_size} tokens"
            )
        used = table[r, start // block_size : last + 1]
        if int(used.min()) < 0 or int(used.max()) >= blocks:
            raise RuntimeError(
                f"block_table: expected blocks from 0 to {blocks - 1}, got {used.tolist()} for request {r}"
            )


def _check_sources(
    seq_starts: torch.Tensor,
    cu_seqlens: torch.Tensor,
    query_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    key: torch.Tensor | None,
    newest: torch.Tensor | None,
    newest_rows: torch.Tensor | None,
) -> None:
    """The same for own and newest tokens."""
    first, last = query_starts[:-1], query_starts[1:]
    lengths = cu_seqlens.diff()
    used = lengths > 0
    wrong = (first < 0) | (last < first)
    if key is not None:
        wrong |= last > key.shape[0]
    if bool((used & wrong).any()):
        raise RuntimeError(
            f"query_starts: expected ascending values from 0 to the tokens of key "
            f"({0 if key is None else key.shape[0]}), got {query_starts.tolist()}"
        )
    if bool((used & (seq_lens < torch.maximum(seq_starts + lengths, last - first))).any()):
        raise RuntimeError(
            f"seq_lens: expected at least the tokens that are gathered and the own ones, got "
            f"{seq_lens.tolist()} for tokens up to {(seq_starts + lengths).tolist()}"
        )
    if (
        newest is not None
        and newest_rows is not None
        and bool((used & (newest_rows >= newest.shape[0])).any())
    ):
        raise RuntimeError(f"newest_rows: expected rows below {newest.shape[0]}, got {newest_rows.tolist()}")
