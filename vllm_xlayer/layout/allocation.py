"""Compare what an engine allocated with what was negotiated."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from vllm_xlayer.layout.descriptor import LayoutDescriptor
from vllm_xlayer.layout.rows import Opaque, RowDescriptor

if TYPE_CHECKING:
    import torch


class Allocation(NamedTuple):
    """What an engine allocated for one layer."""

    shape: tuple[int, ...]
    """(B, H, N, C)"""
    strides: tuple[int, ...]
    """Bytes, for each of B, H, N, C."""
    offset: int
    """Bytes from the start of the region to the layer's first byte."""


class AllocationError(RuntimeError):
    """The engine's allocation is not what was negotiated."""


def allocation_of(tensor: "torch.Tensor") -> Allocation:
    """What ``check_allocation`` wants to know of a layer's tensor; the region is the tensor's storage."""
    size = tensor.element_size()
    return Allocation(
        tuple(tensor.shape), tuple(s * size for s in tensor.stride()), int(tensor.storage_offset()) * size
    )


def check_allocation(
    layout: LayoutDescriptor | RowDescriptor,
    tensors: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], int]],
) -> None:
    """Compares what the engine allocated with what was negotiated.

    Args:
        tensors: for each layer its (shape, strides in bytes, offset in bytes), see ``Allocation``.
            Strides of axes of size 1 are free: no byte depends on them. Of an opaque page only the offset
            and the distance between blocks are compared.

    Raises:
        AllocationError: with the expected and the actual value of every layer that differs.
    """
    expected_names = {name for spec in layout.groups for name in spec.layers}
    wrong = []
    if missing := sorted(expected_names - tensors.keys()):
        wrong.append(f"expected also layers {', '.join(missing)}, got none")
    if extra := sorted(tensors.keys() - expected_names):
        wrong.append(f"expected no layers {', '.join(extra)}, got them")
    known = {name: Allocation(*tensors[name]) for name in tensors if name in expected_names}
    blocks = next((got.shape[0] for got in known.values() if got.shape), 0)
    for name, got in known.items():
        want = _expected(layout, name, blocks)
        if len(want.shape) == 1:
            got = Allocation(tuple(got.shape[:1]), tuple(got.strides[:1]), got.offset)
        if not _same_bytes(want, got):
            wrong.append(f"{name}: expected {_say(want)}, got {_say(got)}")
    if wrong:
        shown = wrong[:4] + ([f"and {len(wrong) - 4} more"] if len(wrong) > 4 else [])
        raise AllocationError(
            f"the KV cache is not allocated as negotiated ({layout.layout.value}): " + "; ".join(shown)
        )


def _expected(layout: LayoutDescriptor | RowDescriptor, layer: str, blocks: int) -> Allocation:
    """What a layer's tensor must be; of an opaque page's axes only B."""
    if isinstance(layout, LayoutDescriptor):
        spec, offset = layout.spec_of(layer), layout.slot_of(layer).offset
    else:
        page = layout.page_of(layer)
        if isinstance(page.content, Opaque):
            return Allocation((blocks,), (layout.row_bytes,), page.offset)
        spec, offset = page.content, page.offset
    return Allocation((blocks, *spec.shape), layout.strides(layer), offset)


def _same_bytes(want: Allocation, got: Allocation) -> bool:
    if want.shape != tuple(got.shape) or want.offset != got.offset or len(got.strides) != len(want.shape):
        return False
    pairs = zip(want.shape, want.strides, got.strides, strict=True)
    return all(size == 1 or a == b for size, a, b in pairs)


def _say(found: Allocation) -> str:
    return f"shape {tuple(found.shape)}, strides {tuple(found.strides)} bytes, offset {found.offset}"
