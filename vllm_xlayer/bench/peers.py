"""Decode attention of this package and of its peers, on the same shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from .. import ops
from . import flashinfer_peer
from .inputs import Calls, Inputs, Shape


def nvfp4(inputs: Inputs) -> Calls:
    """This package's kernel; its schedule, made once a step for all layers, is not timed."""
    s = inputs.shape
    page = 2 * s.num_kv_heads * s.block_size * s.head_size * 9 // 16
    # Any byte below 0x7F is a positive block scale; any nibble is data.
    pool = torch.randint(0, 0x60, (inputs.num_blocks, s.layers * page), dtype=torch.uint8, device="cuda")
    content = 9 * s.head_size // 8
    cache = pool[:, :page].unflatten(-1, (s.num_kv_heads, s.block_size, content))
    one = torch.ones(1, device="cuda")
    workspace = ops.AttentionWorkspace.create(
        inputs.q.device,
        num_q_heads=s.num_q_heads,
        num_kv_heads=s.num_kv_heads,
        head_size=s.head_size,
        max_requests=len(s.lens),
        max_q_len=s.q_len,
    )
    ops.nvfp4_attention_schedule(inputs.seq_lens, workspace, s.q_len)

    def call(table: torch.Tensor) -> None:
        ops.nvfp4_paged_attention(
            inputs.q, cache, table, inputs.seq_lens, workspace, one, one, inputs.out,
            scale=s.head_size**-0.5, q_len=s.q_len,
        )  # fmt: skip

    return [partial(call, table) for table in inputs.tables]


def flash_attention_3(inputs: Inputs, dtype: torch.dtype) -> Calls:
    """FlashAttention-3 as vLLM calls it, with its scheduler's metadata made beforehand."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    s = inputs.shape
    size = (inputs.num_blocks, s.block_size, s.num_kv_heads, s.head_size)
    # (B, 2, N, H, D) strides, as vLLM has them: K and V of a block side by side.
    k, v = torch.randn((size[0], 2, *size[1:]), dtype=torch.bfloat16, device="cuda").to(dtype).unbind(1)
    q = inputs.q.to(dtype)
    requests = len(s.lens)
    starts = torch.arange(0, requests * s.q_len + 1, s.q_len, dtype=torch.int32, device="cuda")
    eight_bit = dtype == torch.float8_e4m3fn
    scales = torch.ones(requests, s.num_kv_heads, device="cuda") if eight_bit else None
    metadata = get_scheduler_metadata(
        batch_size=requests, max_seqlen_q=s.q_len, max_seqlen_k=max(s.lens), num_heads_q=s.num_q_heads,
        num_heads_kv=s.num_kv_heads, headdim=s.head_size, cache_seqlens=inputs.seq_lens, qkv_dtype=dtype,
        cu_seqlens_q=starts, page_size=s.block_size, causal=True,
    )  # fmt: skip

    def call(table: torch.Tensor) -> None:
        flash_attn_varlen_func(
            q=q, k=k, v=v, out=inputs.out, cu_seqlens_q=starts, max_seqlen_q=s.q_len,
            max_seqlen_k=max(s.lens), seqused_k=inputs.seq_lens, block_table=table, causal=True,
            softmax_scale=s.head_size**-0.5, scheduler_metadata=metadata, fa_version=3,
            q_descale=scales, k_descale=scales, v_descale=scales,
        )  # fmt: skip

    return [partial(call, table) for table in inputs.tables]


@dataclass(frozen=True)
class Peer:
    """A decode kernel."""

    title: str
    group: str
    """What ``--peers`` calls it."""
    bits: float
    """Of an element of K or V."""
    make: Callable[[Inputs], Calls]
    error: Callable[[Shape], float] | None = None
    """Relative error of its result with a shape's heads and pages; None where tests elsewhere see to it."""

    def bytes_per_token(self, shape: Shape) -> float:
        """Of K and V of one layer."""
        return 2 * shape.num_kv_heads * shape.head_size * self.bits / 8


PEERS = {
    "nvfp4": Peer("ours, NVFP4", "ours", 4.5, nvfp4),
    "fa3_fp8": Peer("FA3 fp8", "fa3", 8, lambda inputs: flash_attention_3(inputs, torch.float8_e4m3fn)),
    "fa3_bf16": Peer("FA3 bf16", "fa3", 16, lambda inputs: flash_attention_3(inputs, torch.bfloat16)),
    "flashinfer_nvfp4": Peer(
        "FlashInfer NVFP4", "flashinfer", 4.5, flashinfer_peer.nvfp4, flashinfer_peer.error
    ),
}
