"""What land_rows is given in tests, and what it must leave: worked out by numpy from what a digest is."""

from dataclasses import dataclass

import numpy as np
import torch

GARBAGE = -77
"""In place of digests, and on both sides of them."""


def digest_of(row: np.ndarray, factors: np.ndarray) -> int:
    """The sum of a row's 8-byte words, each times its factor, modulo 2**64, as a signed number."""
    total = (row.view(np.uint64) * factors.view(np.uint64)).sum(dtype=np.uint64)
    return int(total.astype(np.int64))


@dataclass
class Landing:
    """Rows, and a pool in the midst of bytes that are nobody's.

    Attributes:
        memory: uint8 [bytes], random; the pool, what is between its rows, and as much as a row on both sides.
        pool: uint8 [blocks, row_bytes], of `memory`.
        rows: uint8 [n, row_bytes].
        blocks: int64 [n], in any order; all but `SPARE` of the pool's.
        factors: int64 [row_bytes / 8], odd.
        all_digests: int64 [n + 2]; the first and the last are nobody's.
    """

    memory: torch.Tensor
    pool: torch.Tensor
    rows: torch.Tensor
    blocks: torch.Tensor
    factors: torch.Tensor
    all_digests: torch.Tensor
    begin: int

    SPARE = 5

    @classmethod
    def make(cls, device: torch.device, row_bytes: int, n: int, gap: int = 0, shift: int = 0) -> "Landing":
        """gap: bytes between rows of the pool. shift: bytes that rows and pool are off a multiple of 16."""
        draw = np.random.default_rng(row_bytes + n)
        blocks, stride = n + cls.SPARE, row_bytes + gap
        begin = -(-stride // 16) * 16 + shift
        memory = draw.integers(0, 256, begin + blocks * stride + stride, np.uint8)
        rows = draw.integers(0, 256, shift + n * row_bytes, np.uint8)
        factors = draw.integers(-(2**63), 2**63, row_bytes // 8) | 1
        in_memory = torch.from_numpy(memory).to(device)
        return cls(
            in_memory,
            in_memory.as_strided((blocks, row_bytes), (stride, 1), begin),
            torch.from_numpy(rows).to(device)[shift:].view(n, row_bytes),
            torch.from_numpy(draw.permutation(blocks)[:n]).to(device),
            torch.from_numpy(factors).to(device),
            torch.full((n + 2,), GARBAGE, device=device),
            begin,
        )

    @property
    def digests(self) -> torch.Tensor:
        return self.all_digests[1:-1]

    def expected(self) -> tuple[np.ndarray, list[int]]:
        """All memory after the rows have landed, and their digests; such as go nowhere have 0."""
        memory, rows, factors = (t.cpu().numpy().copy() for t in (self.memory, self.rows, self.factors))
        digests = [0] * len(rows)
        for i, block in enumerate(self.blocks.tolist()):
            if 0 <= block < len(self.pool):
                start = self.begin + block * self.pool.stride(0)
                memory[start : start + rows.shape[1]] = rows[i]
                digests[i] = digest_of(rows[i], factors)
        return memory, digests

    def check(self, expected: tuple[np.ndarray, list[int]], digested: bool = True) -> None:
        """That memory and digests are those, and nothing beside them has changed."""
        memory, digests = expected
        assert np.array_equal(self.memory.cpu().numpy(), memory)
        if not digested:
            digests = [GARBAGE] * len(digests)
        assert self.all_digests.tolist() == [GARBAGE, *digests, GARBAGE]
