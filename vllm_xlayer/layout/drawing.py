"""A layout for people: one line for the log, and a picture of where one token's K lies."""

from vllm_xlayer.layout.bytemap import WORD_BYTES, byte_offset, scale_offset
from vllm_xlayer.layout.descriptor import LayoutDescriptor
from vllm_xlayer.layout.rows import RowDecision
from vllm_xlayer.nvfp4 import GROUP, ScaleOrder

WIDTH = 100
CELLS = 64

Span = tuple[int, int]
"""First byte and the one after the last."""


def row_line(decision: RowDecision) -> str:
    """The decision about a row in one line, for the log."""
    row = decision.descriptor
    layers = sum(len(group.pages) for group in row.groups)
    kinds = dict.fromkeys(kind for group in row.groups for kind in group.kinds)
    groups = ", ".join(
        f"{len(group.pages)} x {'+'.join(group.kinds)} ({group.block_size} tokens)" for group in row.groups
    )
    return (
        f"KV layout {row.layout.value} {'+'.join(kinds)}: {layers} layers in "
        f"{count(len(row.groups), 'group')} ({groups}), row {row.row_bytes:,} bytes, "
        f"fingerprint {row.fingerprint[:8]}; accepted by {', '.join(decision.accepted_by)}"
    )


def draw(layout: LayoutDescriptor, layer: str, head: int, token: int) -> str:
    """Where K and V of one token and head lie in a block: plain text, at most 100 columns.

    Raises IndexError and KeyError where there is no such layer, head or token.
    """
    spec, slot = layout.spec_of(layer), layout.slot_of(layer)
    parts = _parts(layout, layer, head, token)
    keys = [span for name, span in parts.items() if name.startswith("K")]
    page = _page_spans(layout, layer)
    zoom = next(span for span in page if span[0] <= keys[0][0] < span[1])
    whole = (0, layout.block_stride)
    what = "row: one block, all layers" if layout.layout.block_outer else "page, in the layer's own region"
    letters = [(span, name[0].lower() if "scale" in name else name[0]) for name, span in parts.items()]
    scales = ", k v its scales" if spec.dtype == "nvfp4" else ""
    slots, heads = count(len(layout.slots), "page slot"), count(spec.num_kv_heads, "KV head")
    lines = [
        f"{_name(layout)}: {slots}, {heads}, {spec.block_size} tokens in a block",
        f"slot {layout.slots.index(slot)}, head {head}, token {token} of {layer}",
        "",
        f"{what} ({whole[1]:,} bytes). = this layer, # this token's K",
        bar(whole, [(span, "=") for span in page] + [(span, "#") for span in keys]),
        "",
        f"of it, bytes {zoom[0]:,} .. {zoom[1] - 1:,}. K V this token's data{scales}",
        bar(zoom, letters),
        "",
    ]
    for name, (first, end) in parts.items():
        swizzled = name == "V scale" and layout.scale_order is ScaleOrder.SWIZZLED
        note = " (of 4 tokens, swizzled)" if swizzled else ""
        lines.append(f"{name:8} bytes {first:>13,} .. {end - 1:>13,}  {end - first:>6,} bytes{note}")
    return "\n".join(line[:WIDTH] for line in lines)


def _name(layout: LayoutDescriptor) -> str:
    dtypes = "+".join(dict.fromkeys(spec.dtype for spec in layout.groups))
    order = layout.scale_order
    return f"{layout.layout.value} {dtypes}" + ("" if order is None else f" ({order.name.lower()} scales)")


def count(number: int, noun: str) -> str:
    """A number with its noun: "1 page", "2 pages"."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _parts(layout: LayoutDescriptor, layer: str, head: int, token: int) -> dict[str, Span]:
    """Byte spans of block 0 that hold one token's K and V."""
    spec = layout.spec_of(layer)
    parts = {}
    for which, size in (("K", spec.head_size_k), ("V", spec.head_size_v)):
        first = byte_offset(layout, layer, 0, head, token, which, 0).byte
        last = byte_offset(layout, layer, 0, head, token, which, size - 1).byte
        size_of_last = WORD_BYTES if spec.dtype == "nvfp4" else spec.item_bytes
        parts[f"{which} data" if spec.dtype == "nvfp4" else which] = (first, last + size_of_last)
        if spec.dtype == "nvfp4":
            swizzled = which == "V" and layout.scale_order is ScaleOrder.SWIZZLED
            tokens = range(token // 4 * 4, token // 4 * 4 + 4) if swizzled else (token,)
            places = [
                scale_offset(layout, layer, 0, head, t, which, group).byte
                for t in tokens
                for group in range(size // GROUP)
            ]
            parts[f"{which} scale"] = (min(places), max(places) + 1)
    return parts


def _page_spans(layout: LayoutDescriptor, layer: str) -> list[Span]:
    """The contiguous spans of a layer's page in block 0."""
    spec, start = layout.spec_of(layer), layout.slot_of(layer).offset
    if layout.layout.page_is_dense:
        return [(start, start + spec.page_bytes)]
    stride, piece = layout.strides(layer)[1], spec.page_bytes // spec.num_kv_heads
    return [(start + head * stride, start + head * stride + piece) for head in range(spec.num_kv_heads)]


def bar(whole: Span, marks: list[tuple[Span, str]]) -> str:
    """A bar of CELLS cells; later marks are drawn over earlier ones, each at least one cell wide."""
    size, cells = whole[1] - whole[0], ["."] * CELLS
    for (first, end), char in marks:
        low = (first - whole[0]) * CELLS // size
        high = max(low + 1, -(-(end - whole[0]) * CELLS // size))
        cells[low:high] = char * (high - low)
    return "|" + "".join(cells) + "|"
