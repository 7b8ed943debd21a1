"""FlashAttention-3 as vLLM's FLASH_ATTN backend calls it where decode runs in full CUDA graphs: K and V of a
token side by side, its scheduler's metadata made beforehand, the number of splits bounded."""

from functools import partial

import torch

from ..inputs import Calls, Inputs, fill

NUM_SPLITS = 32
"""vLLM's default bound (flash_attn_max_num_splits_for_cuda_graph)."""
FP8 = torch.float8_e4m3fn


def bf16(inputs: Inputs, kv: torch.Tensor | None = None) -> Calls:
    """Calls over a bfloat16 cache."""
    return make(inputs, torch.bfloat16, kv)


def fp8(inputs: Inputs, kv: torch.Tensor | None = None) -> Calls:
    """Calls over an fp8 cache, with queries in fp8, which a kernel that is not timed made so."""
    return make(inputs, FP8, kv)


def kept_fp8(kv: torch.Tensor) -> torch.Tensor:
    """K and V rounded to fp8."""
    return kv.to(FP8).double()


def key_and_value(inputs: Inputs, dtype: torch.dtype, kv: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    """K and V, (blocks, tokens, heads, D) each: views of vLLM's cache, (blocks, heads, tokens, 2D) in memory,
    so that a token's stride is 2D."""
    s = inputs.shape
    pages = inputs.pages(2 * s.num_kv_heads * s.block_size * s.head_size * dtype.itemsize)
    cache = pages.view(dtype).unflatten(-1, (s.num_kv_heads, s.block_size, 2 * s.head_size))
    kv = inputs.some_kv() if kv is None else kv
    fill(cache, torch.cat(kv.unbind(1), dim=-1).to(dtype))
    return cache.transpose(1, 2).split(s.head_size, dim=-1)


def make(inputs: Inputs, dtype: torch.dtype, kv: torch.Tensor | None, num_splits: int = NUM_SPLITS) -> Calls:
    """Calls over a cache of that dtype. num_splits: 0 leaves their number to the kernel, as vLLM does outside
    of full CUDA graphs."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    s = inputs.shape
    k, v = key_and_value(inputs, dtype, kv)
    q = inputs.q.to(dtype)
    requests = len(s.lens)
    scales = torch.ones(1, device=inputs.device).expand(requests, s.num_kv_heads) if dtype == FP8 else None
    metadata = get_scheduler_metadata(
        batch_size=requests, max_seqlen_q=s.q_len, max_seqlen_k=max(s.lens), num_heads_q=s.num_q_heads,
        num_heads_kv=s.num_kv_heads, headdim=s.head_size, cache_seqlens=inputs.seq_lens, qkv_dtype=dtype,
        cu_seqlens_q=inputs.starts, page_size=s.block_size, causal=True, num_splits=num_splits,
    )  # fmt: skip

    def call(table: torch.Tensor) -> None:
        flash_attn_varlen_func(
            q=q, k=k, v=v, out=inputs.out, cu_seqlens_q=inputs.starts, max_seqlen_q=s.q_len,
            max_seqlen_k=max(s.lens), seqused_k=inputs.seq_lens, block_table=table, causal=True,
            softmax_scale=s.head_size**-0.5, scheduler_metadata=metadata, fa_version=3,
            q_descale=scales, k_descale=scales, v_descale=scales, num_splits=num_splits,
        )  # fmt: skip

    return [partial(call, table) for table in inputs.tables]
