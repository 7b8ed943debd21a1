"""Decode attention of this package and of its peers, on the same shapes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from .. import ops


@dataclass(frozen=True)
class Shape:
    """A batch of decode requests; lens in tokens."""

    name: str
    lens: tuple[int, ...]
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_size: int = 128
    block_size: int = 16
    q_len: int = 1
    layers: int = 1
    """Pages of so many layers lie between two blocks of one: cross-layer rows where it is more than 1."""

    @property
    def tokens(self) -> int:
        return sum(self.lens)

    @property
    def blocks(self) -> list[int]:
        return [-(-n // self.block_size) for n in self.lens]


@dataclass
class Inputs:
    """Tensors all peers share. ``tables``: one a copy of the cache, with blocks of their own, shuffled."""

    shape: Shape
    copies: int
    q: torch.Tensor = field(init=False)
    out: torch.Tensor = field(init=False)
    seq_lens: torch.Tensor = field(init=False)
    tables: list[torch.Tensor] = field(init=False)
    num_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        size = (len(s.lens) * s.q_len, s.num_q_heads, s.head_size)
        self.q = torch.randn(size, dtype=torch.bfloat16, device="cuda")
        self.out = torch.empty_like(self.q)
        self.seq_lens = torch.tensor(s.lens, dtype=torch.int32, device="cuda")
        self.num_blocks = sum(s.blocks) * self.copies
        order = torch.randperm(self.num_blocks, dtype=torch.int32)
        self.tables, at = [], 0
        for _ in range(self.copies):
            table = torch.zeros(len(s.lens), max(s.blocks), dtype=torch.int32)
            for r, count in enumerate(s.blocks):
                table[r, :count] = order[at : at + count]
                at += count
            self.tables.append(table.cuda())


Calls = list[Callable[[], Any]]


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


def bytes_per_token(name: str, shape: Shape) -> float:
    """Of K and V of one layer."""
    bits = {"nvfp4": 4.5, "fa3_fp8": 8, "fa3_bf16": 16}[name]
    return 2 * shape.num_kv_heads * shape.head_size * bits / 8


PEERS: dict[str, Callable[[Inputs], Calls]] = {
    "nvfp4": nvfp4,
    "fa3_fp8": lambda inputs: flash_attention_3(inputs, torch.float8_e4m3fn),
    "fa3_bf16": lambda inputs: flash_attention_3(inputs, torch.bfloat16),
}
TITLES = {"nvfp4": "ours, NVFP4", "fa3_fp8": "FA3 fp8", "fa3_bf16": "FA3 bf16"}
