"""Poisoned KV pools and awkward inputs for the op tests."""

from dataclasses import dataclass

import numpy as np
import torch
from reference import nvfp4_ref as ref

POISON = 0xFF  # as an e4m3 scale: NaN


@dataclass
class Pool:
    """Blocks of ``layers`` NVFP4 pages each (BLHNC), every byte poisoned, and the view of one layer."""

    raw: torch.Tensor
    """uint8 [B, layers * page]"""
    cache: torch.Tensor
    """uint8 (B, H, N, 9D/8): the pages of ``layer``"""
    heads: int
    block_size: int
    head_size: int
    layer: int

    @property
    def page_bytes(self) -> int:
        return self.heads * self.block_size * self.head_size * 9 // 8

    def page(self, block: int) -> np.ndarray:
        """The bytes of the viewed layer's page of a block, on the CPU."""
        start = self.layer * self.page_bytes
        return self.raw[block, start : start + self.page_bytes].cpu().numpy()


def make_pool(
    device: torch.device,
    blocks: int = 5,
    heads: int = 2,
    block_size: int = 16,
    head_size: int = 64,
    layers: int = 3,
    layer: int = 1,
) -> Pool:
    content = head_size * 9 // 8
    page = heads * block_size * content
    raw = torch.full((blocks, layers * page), POISON, dtype=torch.uint8, device=device)
    cache = raw[:, layer * page : (layer + 1) * page].unflatten(-1, (heads, block_size, content))
    return Pool(raw, cache, heads, block_size, head_size, layer)


def scalar(value: float, device: torch.device) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32, device=device)


def strided_rows(x: torch.Tensor, pad: int) -> torch.Tensor:
    """x [T, H, D] as a view with gaps between heads and tokens, the gaps NaN. pad: elements."""
    tokens, heads, head_size = x.shape
    wide = torch.full((tokens, heads + 1, head_size + pad), torch.nan, dtype=x.dtype, device=x.device)
    view = wide[:, 1:, pad:]
    view.copy_(x)
    return view


def put_token(
    page: np.ndarray, pool: Pool, is_v: bool, n: int, nibbles: np.ndarray, scales: np.ndarray, swizzled: bool
) -> None:
    """Write one token's nibbles [H, D] and scales [H, S] into a page's bytes, byte by byte."""
    shape = (pool.heads, pool.block_size, pool.head_size)
    for h in range(pool.heads):
        for i, byte in enumerate(ref.packed(nibbles[h])):
            page[ref.data_byte(*shape, is_v, h, n, i)] = byte
        for s in range(pool.head_size // ref.GROUP):
            page[ref.scale_byte(*shape, is_v, h, n, s, swizzled)] = scales[h, s]
