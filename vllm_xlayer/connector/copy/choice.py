"""Copy engine or kernel: a rule, by the way of a copy and the bytes of its pieces.

Over a link, a copy engine reaches the link's rate with pieces of 64 KiB, and leaves the SMs to the model.
With smaller ones it waits for the host, which tells it every piece. The kernel has nine tenths of the link
whatever the size. Inside the device an engine copies piece after piece; the kernel is many times as fast.

The rule is checked against what `vllm-xlayer bench copy` measured (tests/unit/test_copy_choice.py).
"""

from enum import Enum

import torch

from ...ops import CopyMethod

ENGINE_FROM = 1 << 16
"""Bytes of a piece from which on the copy engine moves it between device and host."""


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


def choose(way: Way, piece_bytes: int) -> CopyMethod:
    """For pieces that the kernel can read 16 bytes at a time, and host memory that is pinned."""
    if way is Way.D2D or piece_bytes < ENGINE_FROM:
        return CopyMethod.KERNEL
    return CopyMethod.ENGINE


def rule() -> str:
    """The rule in words, for people."""
    return f"between device and host: copy engine from {ENGINE_FROM:,} bytes; inside the device: kernel"
