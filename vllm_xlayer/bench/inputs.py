"""A batch of decode requests, and the tensors that all peers share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

KEYS = 3.0
"""Standard deviation of an element of K where times are measured, and so of the logits. This package's kernel
takes longer the wider they are: it brings up to date what it has added up only when a logit is far above all
before. FlashAttention does that in every tile."""
POOL = 256
"""Blocks that are different: a cache holds them over and over."""


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
    """Query tokens of each request; with q_lens the most."""
    q_lens: tuple[int, ...] = ()
    """Query tokens of the first request, the second and so on, and from the start again."""
    layers: int = 1
    """Pages of so many layers lie between two blocks of one: cross-layer rows where it is more than 1."""

    @property
    def tokens(self) -> int:
        return sum(self.lens)

    @property
    def queries(self) -> list[int]:
        """Query tokens of each request."""
        lens = self.q_lens or (self.q_len,)
        return [lens[r % len(lens)] for r in range(len(self.lens))]

    @property
    def blocks(self) -> list[int]:
        return [-(-n // self.block_size) for n in self.lens]


@dataclass
class Inputs:
    """``tables``: one a copy of the cache, with blocks of their own, shuffled."""

    shape: Shape
    copies: int
    device: str = "cuda"
    q: torch.Tensor = field(init=False)
    out: torch.Tensor = field(init=False)
    seq_lens: torch.Tensor = field(init=False)
    starts: torch.Tensor = field(init=False)
    """Of each request's query tokens, int32; one more at the end."""
    tables: list[torch.Tensor] = field(init=False)
    num_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        s = self.shape
        size = (sum(s.queries), s.num_q_heads, s.head_size)
        self.q = torch.randn(size, dtype=torch.bfloat16, device=self.device)
        self.out = torch.empty_like(self.q)
        self.seq_lens = torch.tensor(s.lens, dtype=torch.int32, device=self.device)
        self.starts = torch.tensor([0, *s.queries], device=self.device).cumsum(0).int()
        self.num_blocks = sum(s.blocks) * self.copies
        order = torch.randperm(self.num_blocks, dtype=torch.int32)
        self.tables, at = [], 0
        for _ in range(self.copies):
            table = torch.zeros(len(s.lens), max(s.blocks), dtype=torch.int32)
            for r, count in enumerate(s.blocks):
                table[r, :count] = order[at : at + count]
                at += count
            self.tables.append(table.to(self.device))

    def some_kv(self) -> torch.Tensor:
        """K and V (blocks, 2, heads, tokens, D) bfloat16 of so many blocks as differ."""
        s = self.shape
        size = (min(POOL, self.num_blocks), 2, s.num_kv_heads, s.block_size, s.head_size)
        kv = torch.randn(size, dtype=torch.bfloat16, device=self.device)
        kv[:, 0] *= KEYS
        return kv

    def pages(self, page_bytes: int) -> torch.Tensor:
        """(blocks, page_bytes) bytes of one layer, whatever is in them; other layers' pages lie between them
        where the shape has more than one."""
        size = (self.num_blocks, self.shape.layers * page_bytes)
        return torch.empty(size, dtype=torch.uint8, device=self.device)[:, :page_bytes]


def fill(cache: torch.Tensor, blocks: torch.Tensor) -> None:
    """Copies ``blocks`` to ``cache``, (blocks, ...) each, over and over until it is full."""
    for at in range(0, len(cache), len(blocks)):
        here = cache[at : at + len(blocks)]
        here.copy_(blocks[: len(here)])


Calls = list[Callable[[], Any]]
"""The same attention on each copy of the cache, into ``Inputs.out``."""
