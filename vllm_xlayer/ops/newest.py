"""Which of a request's newest tokens are at hand unquantised."""

import torch

from .extension import load, require_cuda_build

TILE = 16
"""Tokens that are read together, from one place."""
JUST_STARTED = -1
"""Both numbers of a row of ``newest_step``'s state whose request was just started, or that has none."""


def newest_step(
    query_starts: torch.Tensor,
    seq_lens: torch.Tensor,
    rows: torch.Tensor,
    slot_mapping: torch.Tensor,
    state: torch.Tensor,
    newest_slots: torch.Tensor,
    newest_from: torch.Tensor,
    newest_tokens: int,
) -> None:
    """Say where a step's tokens go in the memory of the newest tokens, and which may be read from there.

    Once a step, before its layers; on the device, so that nothing waits for lengths. Token p of a request may
    be read from its place p % newest_tokens if this request wrote it since it was last started, and nothing
    over it: drafts that were rejected took the places of tokens newest_tokens before them. Whoever starts a
    request in a row, or starts it again, sets the row of ``state`` to ``JUST_STARTED`` before.

    Args:
        query_starts: int32 [R + 1], ascending from 0: where each request's tokens begin in the batch.
        seq_lens: int32 [R], tokens of each request, those of this step included.
        rows: int32 [R], each request's row; -1: none. Two requests with tokens have different ones.
        slot_mapping: int64 [T] as in ``reshape_and_cache_nvfp4``. A request whose first token has none, or
            that has no tokens, changes nothing: a padding row, or a run without a cache.
        state: int32 [rows, 2]: the first token that this request wrote into its row, and one past the
            furthest. Updated.
        newest_slots: int64 [T]. Written: row * newest_tokens + place of each token, or -1.
        newest_from: int32 [R]. Written: the first token that may be read from its place; if there is none,
            one past seq_len.
        newest_tokens: places of a row, a multiple of 16.
    """
    require_cuda_build("newest_step", state)
    load()
    torch.ops.vllm_xlayer.newest_step(
        query_starts, seq_lens, rows, slot_mapping, state, newest_slots, newest_from, newest_tokens
    )
