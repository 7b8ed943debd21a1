"""Copy engine or kernel: chosen from what both took on this machine (copy_measure), for any size and number
of pieces.

A copy of n pieces is taken to last fixed + n * each seconds. Both are known for some piece sizes and
interpolated between them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from ..ops import CopyMethod

KERNEL_GAIN = 1.1
"""The kernel takes SMs from the model: it must be so many times as fast as the copy engine."""
ENOUGH = 1 << 24
"""Bytes of a copy whose fixed costs hardly count."""


class Way(Enum):
    H2D = "host to device"
    D2H = "device to host"
    D2D = "inside the device"

    @classmethod
    def of(cls, src: torch.device, dst: torch.device) -> "Way":
        """ValueError if both are the host."""
        if src.type == dst.type == "cpu":
            raise ValueError("expected a CUDA device in src or dst, got cpu and cpu")
        if src.type == "cpu":
            return cls.H2D
        return cls.D2H if dst.type == "cpu" else cls.D2D


@dataclass(frozen=True)
class Sample:
    """Seconds of a copy of pieces of one size: fixed + each * pieces."""

    piece_bytes: int
    fixed: float
    each: float


@dataclass(frozen=True)
class CopyTimes:
    """Samples in ascending order of piece size, for every way and method."""

    samples: Mapping[tuple[Way, CopyMethod], Sequence[Sample]]

    def seconds(self, way: Way, method: CopyMethod, piece_bytes: int, pieces: int) -> float:
        """Expected seconds of one copy."""
        samples = self.samples[way, method]
        first, last = samples[0], samples[-1]
        if piece_bytes <= first.piece_bytes:
            return first.fixed + first.each * pieces
        if piece_bytes >= last.piece_bytes:
            return last.fixed + last.each * pieces * piece_bytes / last.piece_bytes
        at = next(i for i, s in enumerate(samples) if s.piece_bytes > piece_bytes)
        a, b = samples[at - 1], samples[at]
        x = (piece_bytes - a.piece_bytes) / (b.piece_bytes - a.piece_bytes)
        return (a.fixed + a.each * pieces) * (1 - x) + (b.fixed + b.each * pieces) * x

    def choose(self, way: Way, piece_bytes: int, pieces: int) -> CopyMethod:
        """For pieces that the kernel can read 16 bytes at a time, and host memory that is pinned."""
        engine, kernel = (self.seconds(way, method, piece_bytes, pieces) for method in CopyMethod)
        return CopyMethod.KERNEL if kernel * KERNEL_GAIN < engine else CopyMethod.ENGINE

    def crossover(self, way: Way) -> int | None:
        """The piece size from which on large copies take the copy engine; None if they never do."""

        def by_engine(size: int) -> bool:
            return self.choose(way, size, max(1, ENOUGH // size)) is CopyMethod.ENGINE

        sizes = [s.piece_bytes for s in self.samples[way, CopyMethod.ENGINE]]
        by_kernel = [i for i, size in enumerate(sizes) if not by_engine(size)]
        if not by_kernel:
            return 0
        if by_kernel[-1] == len(sizes) - 1:
            return None
        low, high = sizes[by_kernel[-1]], sizes[by_kernel[-1] + 1]
        while high - low > 16:
            middle = (low + high) // 2
            low, high = (low, middle) if by_engine(middle) else (middle, high)
        return high

    def rates(self, way: Way) -> list[tuple[int, float, float]]:
        """(piece size, bytes a second of the copy engine, of the kernel) of long copies."""
        both = zip(*(self.samples[way, method] for method in CopyMethod), strict=True)
        return [(e.piece_bytes, e.piece_bytes / e.each, k.piece_bytes / k.each) for e, k in both]

    def to_json(self) -> dict[str, Any]:
        return {
            f"{way.name} {method.name}": [[s.piece_bytes, s.fixed, s.each] for s in samples]
            for (way, method), samples in self.samples.items()
        }

    @classmethod
    def from_json(cls, data: Any) -> "CopyTimes":
        """ValueError if it is not what ``to_json`` gives."""
        try:
            found = {
                (way, method): [
                    Sample(int(size), float(fixed), float(each))
                    for size, fixed, each in data[f"{way.name} {method.name}"]
                ]
                for way in Way
                for method in CopyMethod
            }
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"copy times: expected samples of all ways and methods: {error!r}") from error
        sizes = {tuple(s.piece_bytes for s in samples) for samples in found.values()}
        one = min(sizes)
        if len(sizes) > 1 or not one or one[0] < 1 or list(one) != sorted(set(one)):
            raise ValueError(f"copy times: expected the same ascending piece sizes everywhere, got {sizes}")
        for s in (s for samples in found.values() for s in samples):
            if not (0 <= s.fixed < math.inf and 0 < s.each < math.inf):
                raise ValueError(f"copy times: expected finite seconds, more than 0 a piece, got {s}")
        return cls(found)


def choose(times: CopyTimes | None, way: Way, piece_bytes: int, pieces: int) -> CopyMethod:
    """``CopyTimes.choose``; the copy engine where nothing is known."""
    return CopyMethod.ENGINE if times is None else times.choose(way, piece_bytes, pieces)
