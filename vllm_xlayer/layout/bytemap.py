"""Which byte holds which element, and the torch views that say the same."""

from typing import TYPE_CHECKING, NamedTuple

from vllm_xlayer.layout.descriptor import LayoutDescriptor
from vllm_xlayer.nvfp4 import GROUP, ScaleOrder

if TYPE_CHECKING:
    import torch


WORD_BYTES = 4
"""Of eight elements of nvfp4: which bits are whose, vLLM's kernels and this package's see differently."""


class Place(NamedTuple):
    """Where one item lies."""

    region: int
    byte: int
    """Offset from the start of the region."""
    element: int | None = None
    """Of a word of eight packed e2m1, whose first byte is ``byte``. None where the item is whole bytes."""


def byte_offset(
    layout: LayoutDescriptor, layer: str, block: int, head: int, token: int, which: str, element: int
) -> Place:
    """Where one element of K or V (``which``: "K" or "V") lies: its first byte, for nvfp4 its word's.

    Raises IndexError where an index is outside the layer's shape, and KeyError for an unknown layer.
    """
    spec = layout.spec_of(layer)
    start = _half_start(layout, layer, block, head, token, which)
    _check_index("element", element, spec.head_size_k if which == "K" else spec.head_size_v)
    if spec.dtype == "nvfp4":
        vector = head * spec.block_size + token
        word, in_word = divmod(element, 8)
        return Place(start.region, start.byte + vector * (spec.head_size_k // 2) + word * WORD_BYTES, in_word)
    _, h_stride, n_stride, c_stride = layout.strides(layer)
    content = element if which == "K" else spec.head_size_k + element
    return Place(start.region, start.byte + head * h_stride + token * n_stride + content * c_stride)


def scale_offset(
    layout: LayoutDescriptor, layer: str, block: int, head: int, token: int, which: str, group: int
) -> Place:
    """Where the e4m3 scale of elements 16*group .. 16*group+15 of an nvfp4 K or V vector lies.

    Raises ValueError where the layer is not nvfp4, IndexError and KeyError as ``byte_offset``.
    """
    spec = layout.spec_of(layer)
    if spec.dtype != "nvfp4":
        raise ValueError(f"{layer}: expected dtype nvfp4, got {spec.dtype}")
    start = _half_start(layout, layer, block, head, token, which)
    scales = spec.head_size_k // GROUP
    _check_index("group", group, scales)
    if which == "V" and layout.scale_order is ScaleOrder.SWIZZLED:
        quarter = scales // 4
        token, group = token // 4 * 4 + group // quarter, group % quarter * 4 + token % 4
    data_bytes = spec.num_kv_heads * spec.block_size * spec.head_size_k // 2
    vector = head * spec.block_size + token
    return Place(start.region, start.byte + data_bytes + vector * scales + group)


def _half_start(layout: LayoutDescriptor, layer: str, block: int, head: int, token: int, which: str) -> Place:
    """The first byte of a layer's page, or of the V half of an nvfp4 page, with all indices checked."""
    spec, slot = layout.spec_of(layer), layout.slot_of(layer)
    if which not in ("K", "V"):
        raise ValueError(f"which: expected 'K' or 'V', got {which!r}")
    _check_index("block", block, None)
    _check_index("head", head, spec.num_kv_heads)
    _check_index("token", token, spec.block_size)
    half = spec.page_bytes // 2 if spec.dtype == "nvfp4" and which == "V" else 0
    return Place(slot.region, block * layout.block_stride + slot.offset + half)


def _check_index(name: str, index: int, size: int | None) -> None:
    if index < 0 or (size is not None and index >= size):
        limit = "" if size is None else f" and less than {size}"
        raise IndexError(f"{name}: expected at least 0{limit}, got {index}")


def page_view(region: "torch.Tensor", layout: LayoutDescriptor, layer: str) -> "torch.Tensor":
    """The (B, H, N, C) view of one layer that kernels get.

    Args:
        region: 1-D tensor of one byte an item: the pool, or in layer-outer layouts the layer's own region.

    Returns:
        A view without copy: torch.uint8 for nvfp4 and fp8, else the cache's dtype.

    Raises:
        ValueError: the region is not a 1-D dense byte tensor of whole blocks.
    """
    import torch

    if region.dim() != 1 or region.element_size() != 1 or not region.is_contiguous():
        raise ValueError(
            f"region: expected a dense 1-D byte tensor, got {region.dtype}, shape {tuple(region.shape)}, "
            f"strides {region.stride()}"
        )
    if region.numel() % layout.block_stride:
        raise ValueError(
            f"region: expected a multiple of {layout.block_stride} bytes (one block), got {region.numel()}"
        )
    spec = layout.spec_of(layer)
    as_bytes = spec.dtype == "nvfp4" or spec.dtype.startswith("fp8")
    items = region.view(torch.uint8 if as_bytes else getattr(torch, spec.dtype))
    strides = [stride // spec.item_bytes for stride in layout.strides(layer)]
    offset = items.storage_offset() + layout.slot_of(layer).offset // spec.item_bytes
    return items.as_strided((region.numel() // layout.block_stride, *spec.shape), strides, offset)
