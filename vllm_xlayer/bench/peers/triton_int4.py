"""vLLM's Triton attention over ``int4_per_token_head``, as its TRITON_ATTN backend calls it for a batch of
decode requests. The rotations of query and output, kernels of their own, are timed with it."""

from functools import partial

import torch

from ..inputs import Calls, Inputs

SCALE = 4
"""Bytes of a float32 scale, which lies behind a token's and head's K, and behind its V."""
BESIDE = 2 * SCALE
GRID, SEGMENTS = 128, 16
"""vLLM's constants: fewer blocks than GRID in the kernel's grid, and a request is cut into SEGMENTS."""


def make(inputs: Inputs, kv: torch.Tensor | None = None) -> Calls:
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    from vllm.v1.kv_cache_interface import KVQuantMode

    s = inputs.shape
    k, v, k_scale, v_scale = cache_views(inputs)
    if kv is not None:
        _store(kv, k, v, k_scale, v_scale)
    # One-query batches of at most so many requests are cut: it is a size that vLLM captures, too.
    threshold = GRID // s.num_kv_heads
    padded = 1 << (s.head_size - 1).bit_length()
    partial_size = (threshold * s.q_len, s.num_q_heads, SEGMENTS)
    part, most, total = (
        torch.empty(size, dtype=torch.float32, device=inputs.device)
        for size in ((*partial_size, padded), partial_size, partial_size)
    )

    def call(table: torch.Tensor) -> None:
        unified_attention(
            q=inputs.q, k=k, v=v, out=inputs.out, cu_seqlens_q=inputs.starts, max_seqlen_q=s.q_len,
            seqused_k=inputs.seq_lens, max_seqlen_k=max(s.lens), softmax_scale=s.head_size**-0.5,
            causal=True, window_size=(-1, -1), block_table=table, softcap=0,
            q_descale=None, k_descale=None, v_descale=None,
            seq_threshold_3D=threshold, num_par_softmax_segments=SEGMENTS, softmax_segm_output=part,
            softmax_segm_max=most, softmax_segm_expsum=total,
            kv_quant_mode=KVQuantMode.INT4_PER_TOKEN_HEAD, k_scale_cache=k_scale, v_scale_cache=v_scale,
        )  # fmt: skip

    return [partial(call, table) for table in inputs.tables]


def cache_views(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """K and V (blocks, tokens, heads, D/2 + 4) bytes and their scales (blocks, tokens, heads) float32: views
    of vLLM's cache, (blocks, heads, tokens, [K, scale, V, scale]) in memory. Random bytes, scales of 1."""
    s = inputs.shape
    half = s.head_size // 2 + SCALE
    pages = inputs.pages(2 * s.num_kv_heads * s.block_size * half)
    cache = pages.unflatten(-1, (s.num_kv_heads, s.block_size, 2 * half)).random_(0, 256)
    sides = cache.transpose(1, 2).split(half, dim=-1)
    scales = [side[..., -SCALE:].view(torch.float32).squeeze(-1).fill_(1.0) for side in sides]
    return sides[0], sides[1], scales[0], scales[1]


def _store(kv: torch.Tensor, *cache: torch.Tensor) -> None:
    """All blocks, written by vLLM."""
    from vllm.v1.attention.ops.int4_per_token_head import reshape_and_cache_int4

    k, v, k_scale, v_scale = cache
    key, value = kv.transpose(2, 3).unbind(1)  # (blocks, tokens, heads, D)
    slots = torch.arange(k.shape[0] * k.shape[1], device=kv.device)
    reshape_and_cache_int4(
        key.flatten(0, 1), value.flatten(0, 1), k, v, slots, k_scale_cache=k_scale, v_scale_cache=v_scale
    )
