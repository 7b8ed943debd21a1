"""Decode attention of this package and of its peers, each called as vLLM calls it, on the same shapes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..inputs import Calls, Inputs, Shape
from . import flash_attention_3, flashinfer_fa2, ours, triton_int4, turboquant


def _as_given(kv: torch.Tensor) -> torch.Tensor:
    return kv


@dataclass(frozen=True)
class Peer:
    """A decode kernel over a cache in a format of its own."""

    title: str
    group: str
    """What ``--peers`` calls it."""
    bits: float
    """Of an element of K or V."""
    make: Callable[[Inputs, torch.Tensor | None], Calls]
    """Calls over a cache that holds the given K and V, (blocks, 2, heads, tokens, D) bfloat16; with None
    those of `Inputs.some_kv`, or anything where its time does not depend on it.
    Raises whatever the peer raises: it has no number then."""
    max_error: float
    """Relative L2 error that its result may have. Attention that reads a page wrongly is near 1."""
    kept: Callable[[torch.Tensor], torch.Tensor] = _as_given
    """K and V as its cache keeps them, which its result is compared with; as they were given where only the
    peer's own code can read what it wrote, so that ``max_error`` is of its quantisation too."""
    beside: int = 0
    """Bytes that a token and KV head has beside its elements."""

    def bytes_per_token(self, shape: Shape) -> float:
        """Of K and V of one layer."""
        return shape.num_kv_heads * (2 * shape.head_size * self.bits / 8 + self.beside)


PEERS = {
    "nvfp4": Peer("ours, NVFP4", "ours", 4.5, ours.make, 0.02, ours.kept),
    "nvfp4_newest": Peer(f"ours, {ours.NEWEST} newest exact", "ours", 4.5, ours.make_newest, 0.02, ours.kept),
    "fa3_fp8": Peer("FA3 fp8", "fa3", 8, flash_attention_3.fp8, 0.15, flash_attention_3.kept_fp8),
    "fa3_bf16": Peer("FA3 bf16", "fa3", 16, flash_attention_3.bf16, 0.02),
    "int4": Peer("Triton int4", "int4", 4, triton_int4.make, 0.3, beside=triton_int4.BESIDE),
    "turboquant": Peer("TurboQuant 4-bit", "turboquant", 4, turboquant.make, 0.3, beside=turboquant.BESIDE),
    "flashinfer_nvfp4": Peer(
        "FlashInfer NVFP4", "flashinfer", 4.5, flashinfer_fa2.make, 0.02, ours.kept_as_it_is
    ),
}
"""In the order of the tables' columns."""
