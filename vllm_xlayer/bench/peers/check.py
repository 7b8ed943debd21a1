"""Whether a peer's result is attention at all: a kernel that is called wrongly is fast for nothing."""

from collections.abc import Callable
from dataclasses import replace

import torch

from ..inputs import Calls, Inputs, Shape

CHECKED = (15, 16, 17, 333, 2048)
"""Lengths of the requests whose result is compared."""


def error(
    make: Callable[[Inputs, torch.Tensor | None], Calls],
    kept: Callable[[torch.Tensor], torch.Tensor],
    shape: Shape,
    device: str = "cuda",
) -> float:
    """Relative L2 error against float64 attention over what the cache keeps, with this shape's heads and
    pages and requests of ``CHECKED`` lengths."""
    inputs = Inputs(replace(shape, lens=CHECKED, layers=min(shape.layers, 2)), 1, device)
    s = inputs.shape
    size = (inputs.num_blocks, 2, s.num_kv_heads, s.block_size, s.head_size)
    kv = torch.randn(size, dtype=torch.bfloat16, device=device)
    inputs.out.fill_(torch.nan)
    make(inputs, kv)[0]()
    exact = attention(inputs, kept(kv))
    return float((inputs.out.double() - exact).norm() / exact.norm())


def attention(inputs: Inputs, kv: torch.Tensor) -> torch.Tensor:
    """Attention from its definition, each query token up to itself: (query tokens, query heads, D) float64.

    kv: (blocks, 2, heads, tokens, D), K then V.
    """
    s, results = inputs.shape, []
    queries = inputs.q.double().unflatten(1, (s.num_kv_heads, -1)).split(s.queries)
    for r, (length, count) in enumerate(zip(s.lens, s.blocks, strict=True)):
        pages = kv[inputs.tables[0][r, :count].long()].double()
        k, v = pages.movedim(3, 1).flatten(0, 1)[:length].unbind(1)  # (tokens, heads, D)
        scores = torch.einsum("qhgd,nhd->hgqn", queries[r], k) * s.head_size**-0.5
        position = torch.arange(length, device=k.device)
        last = position[-s.queries[r] :]  # of each query token
        scores = scores.masked_fill(position > last[:, None], -torch.inf)
        results.append(torch.einsum("hgqn,nhd->qhgd", scores.softmax(-1), v).flatten(1, 2))
    return torch.cat(results)
