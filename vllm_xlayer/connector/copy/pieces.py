"""What a transfer moves: the used bytes of its rows, in pieces of at most one batch.

A group's pages are a prefix of the row, and a group that needs less than the widest leaves the rest to
whoever had the block before: that is not copied. Rows of hybrid models have tens of megabytes, more than one
batch should have (transfers.py), so they are cut.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

Runs = Sequence[tuple[int, int]]
"""(rows, bytes of each from its start), of the ids of a transfer in order."""


class Piece(NamedTuple):
    """The same bytes, begin to end, of some rows."""

    src_ids: torch.Tensor
    dst_ids: torch.Tensor
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return len(self.src_ids) * (self.end - self.begin)

    def split(self, nbytes: int) -> tuple["Piece", "Piece | None"]:
        """The first rows, as many as fit and at least one, and the others if any are left."""
        rows = max(1, nbytes // (self.end - self.begin))
        first = Piece(self.src_ids[:rows], self.dst_ids[:rows], self.begin, self.end)
        if rows >= len(self.src_ids):
            return first, None
        return first, Piece(self.src_ids[rows:], self.dst_ids[rows:], self.begin, self.end)


def pieces_of(
    src_ids: torch.Tensor, dst_ids: torch.Tensor, runs: Runs, most: int | None = None
) -> Iterator[Piece]:
    """A transfer's pieces.

    Args:
        src_ids, dst_ids: int64 [rows], a row's place in the memory that it is copied from and to.
        runs: rows and bytes of a row, one behind the other.
        most: bytes of one row in one piece, a multiple of 16; None for no bound.

    Raises:
        ValueError: the runs are not those of the ids.
    """
    if sum(rows for rows, _ in runs) != len(src_ids) or len(src_ids) != len(dst_ids):
        raise ValueError(
            f"transfer: expected {sum(rows for rows, _ in runs)} rows, got {len(src_ids)} to copy from and "
            f"{len(dst_ids)} to copy to"
        )
    at = 0
    for rows, length in runs:
        these = slice(at, at + rows)
        at += rows
        for begin in range(0, length, most or length):
            end = length if most is None else min(length, begin + most)
            yield Piece(src_ids[these], dst_ids[these], begin, end)
