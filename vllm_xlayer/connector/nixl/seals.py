"""Seals: what a row must be for a request, and what its bytes are.

The prefill engine seals each row that it offers: a tag of the tokens up to the row's end, which the decode
engine can work out for itself, and a digest of the row's bytes. The decode engine reads rows and seals, in
any order, and checks both. A row whose block was given to another prompt has another tag; one that is being
written, or arrived in part, does not match its digest. This finds accidents; it keeps out no attacker.
"""

import json
from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xxhash

BYTES = 16
"""Of one seal: a tag and a digest, int64 each."""
ROWS_AT_ONCE = 32
"""Rows that are digested together: what is made on the way is as large as they are."""


def prompt_tags(
    tokens: Sequence[int], block_size: int, group: int, salt: str, items: Sequence[tuple[int, str]] = ()
) -> np.ndarray:
    """int64, one tag for each block of a prompt, the last partly filled one included.

    A tag is mixed from the sum of one random number for each token and its position, up to the block's end.

    Args:
        group: index of the KV cache group whose blocks these are.
        salt: the request's cache salt.
        items: (first token, identifier) of multimodal items.
    """
    at_positions = np.arange(len(tokens), dtype=np.uint64) << np.uint64(32)
    at_positions |= np.frombuffer(array("I", tokens), np.uint32)  # from a list, a third of numpy's time
    sums = np.add.reduceat(_mixed(at_positions), range(0, len(tokens), block_size))
    np.cumsum(sums, out=sums)
    for at, name in items:
        if at < len(tokens):
            sums[at // block_size :] += _number([at, name])
    return _mixed(sums + _number([group, block_size, salt])).view(np.int64)


def _number(of: list[Any]) -> np.uint64:
    return np.uint64(xxhash.xxh3_64_intdigest(json.dumps(of).encode()))


class RowDigest:
    """A 64-bit digest of rows: the sum of their 8-byte words, each times its own odd number.

    A change of one word always changes it, any other but once in 2**64. The same on every device.

    Args:
        row_bytes: a multiple of 8, which whole pages of 16 tokens are.
    """

    def __init__(self, row_bytes: int, device: torch.device):
        if row_bytes % 8:
            raise ValueError(f"row_bytes: expected a multiple of 8, got {row_bytes}")
        self.factors = torch.from_numpy(_odd_numbers(row_bytes // 8)).to(device)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """int64 [n] of uint8 rows [n, row_bytes] that are dense."""
        digests = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
        self.into(digests, rows.view(torch.int64))
        return digests

    def into(self, digests: torch.Tensor, words: torch.Tensor) -> None:
        """Writes the digests of rows of words, int64 [n, row_bytes / 8], into int64 [n]."""
        if words.is_cuda:  # there is no such product of integers there
            torch.sum(words * self.factors, -1, out=digests)
        else:  # needs no memory as large as the rows
            torch.mv(words, self.factors, out=digests)


def _odd_numbers(count: int) -> np.ndarray:
    """int64, random and the same everywhere."""
    return (_mixed(np.arange(count, dtype=np.uint64)) | np.uint64(1)).view(np.int64)


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """uint64: splitmix64 of each, which is one-to-one and looks random."""
    x = (numbers + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def to_device(numbers: Sequence[int] | np.ndarray, device: torch.device) -> torch.Tensor:
    """int64 of the same shape, ready for what is launched next. Does not wait for what the device is doing,
    as a copy from ordinary memory would."""
    host = torch.from_numpy(np.array(numbers, dtype=np.int64))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class SealTable:
    """The seals of a pool's rows: int64 [blocks, 2], which other engines read."""

    def __init__(self, pool: torch.Tensor):
        self.pool = pool
        self.table = torch.zeros(len(pool), 2, dtype=torch.int64, device=pool.device)
        self.digest = RowDigest(pool.shape[1], pool.device)

    def seal(self, blocks: Sequence[int], tags: Sequence[int] | np.ndarray) -> None:
        """Seals rows as they are once all work launched so far is done."""
        all_ids, all_tags = to_device(blocks, self.pool.device), to_device(tags, self.pool.device)
        for ids, tag in zip(all_ids.split(ROWS_AT_ONCE), all_tags.split(ROWS_AT_ONCE), strict=True):
            self.table[ids] = torch.stack((tag, self.digest(self.pool[ids])), 1)
