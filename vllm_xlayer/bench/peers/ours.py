"""This package's kernel, and pages in the format that it shares with vLLM's FlashInfer backend."""

from functools import partial
from typing import Any

import torch

from ... import ops
from ...nvfp4 import (
    ROTATED_KEYS,
    content_bytes,
    decode,
    encode,
    pack,
    page_bytes,
    page_views,
    rotate,
    rotate_back,
)
from ...ops.newest import TILE
from ..inputs import KEYS, Calls, Inputs, fill

NEWEST = 64
"""Tokens of each request that `make_newest` reads in 16 bits."""


def make_newest(inputs: Inputs, kv: torch.Tensor | None = None) -> Calls:
    """`make` with the ``NEWEST`` newest tokens of each request read from memory of their own."""
    return make(inputs, kv, NEWEST)


def make(inputs: Inputs, kv: torch.Tensor | None = None, newest_tokens: int = 0) -> Calls:
    """Calls with a schedule that is made once a step for all layers, and not timed."""
    s = inputs.shape
    cache = nvfp4_cache(inputs, kv)
    one = torch.ones(1, device=inputs.device)
    workspace = ops.AttentionWorkspace.create(
        inputs.q.device,
        num_q_heads=s.num_q_heads,
        num_kv_heads=s.num_kv_heads,
        head_size=s.head_size,
        max_requests=len(s.lens),
        max_q_len=s.q_len,
    )
    starts = inputs.starts if s.q_lens else None
    kernel_q_len = ops.kernel_q_len(s.queries, s.num_q_heads // s.num_kv_heads, s.head_size)
    newest: dict[str, Any] = newest_arguments(inputs, cache, kv, newest_tokens) if newest_tokens else {}
    ops.nvfp4_attention_schedule(
        inputs.seq_lens, workspace, s.q_len, 0, starts, kernel_q_len, newest.get("newest_from")
    )

    def call(table: torch.Tensor) -> None:
        ops.nvfp4_paged_attention(
            inputs.q, cache, table, inputs.seq_lens, workspace, one, one, inputs.out,
            scale=s.head_size**-0.5, q_len=s.q_len, query_starts=starts, kernel_q_len=kernel_q_len,
            rotated_keys=ROTATED_KEYS, **newest,
        )  # fmt: skip

    return [partial(call, table) for table in inputs.tables]


def nvfp4_cache(inputs: Inputs, kv: torch.Tensor | None, ours: bool = True) -> torch.Tensor:
    """(blocks, heads, tokens, 9D/8) bytes that hold ``kv``; `Inputs.some_kv` where that is None.

    ours: as this package keeps them, else in NVFP4's usual order.
    """
    s = inputs.shape
    pages = inputs.pages(page_bytes(s.num_kv_heads, s.block_size, s.head_size))
    cache = pages.unflatten(-1, (s.num_kv_heads, s.block_size, content_bytes(s.head_size)))
    kv = inputs.some_kv() if kv is None else kv
    data, scale = encode(_written(kv) if ours else kv.float())
    data = pack(data) if ours else data
    views = page_views(cache)
    parts = ((views.k_data, data[:, 0]), (views.k_scale, scale[:, 0]),
             (views.v_data, data[:, 1]), (views.v_scale, scale[:, 1]))  # fmt: skip
    for view, part in parts:
        fill(view, part)
    return cache


def newest_arguments(
    inputs: Inputs, cache: torch.Tensor, kv: torch.Tensor | None, places: int
) -> dict[str, torch.Tensor]:
    """A row of newest tokens for each request, as full as it gets.

    It holds what ``cache`` keeps of ``kv``, and the pages of those tokens are overwritten: who reads them
    there has another result.
    """
    s, device = inputs.shape, inputs.device
    size = (len(s.lens), 2, s.num_kv_heads, places, s.head_size)
    newest = torch.randn(size, dtype=inputs.q.dtype, device=device)
    newest[:, 0] *= KEYS
    begin = [-(-max(0, length - places) // TILE) * TILE for length in s.lens]
    if kv is not None:
        views, pages = page_views(cache), decode(*encode(_written(kv))).to(newest.dtype)
        for r, (first, length) in enumerate(zip(begin, s.lens, strict=True)):
            for token in range(first, length):
                block, row = inputs.tables[0][r, token // s.block_size], token % s.block_size
                newest[r, :, :, token % places] = pages[block, :, :, row]
                for page_part in (views.k_data, views.k_scale, views.v_data, views.v_scale):
                    page_part[block, :, row] = 0x55
    rows = torch.arange(len(s.lens), dtype=torch.int32, device=device)
    starts = torch.tensor(begin, dtype=torch.int32, device=device)
    return dict(newest=newest, newest_rows=rows, newest_from=starts)


def kept(kv: torch.Tensor) -> torch.Tensor:
    """K and V after a round trip through NVFP4."""
    read = decode(*encode(_written(kv)))
    return torch.stack((rotate_back(read[:, 0]), read[:, 1]), 1) if ROTATED_KEYS else read


def kept_as_it_is(kv: torch.Tensor) -> torch.Tensor:
    """The same where K is not rotated."""
    return decode(*encode(kv.float()))


def _written(kv: torch.Tensor) -> torch.Tensor:
    """K and V [blocks, 2, ...] as pages hold them, before they are quantised."""
    exact = kv.float()
    return torch.stack((rotate(exact[:, 0]), exact[:, 1]), 1) if ROTATED_KEYS else exact
