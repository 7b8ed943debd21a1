"""Byte maps are bijections, and torch views, strides and drawings say the same as they do."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_xlayer.layout import (
    Allocation,
    AllocationError,
    CacheSpec,
    Layout,
    LayoutDescriptor,
    allocation_of,
    byte_offset,
    check_allocation,
    draw,
    page_view,
    scale_offset,
)
from vllm_xlayer.nvfp4 import ScaleOrder

ITEM = {"bfloat16": 2, "float16": 2, "float32": 4, "fp8": 1, "fp8_e4m3": 1, "fp8_e5m2": 1}
BLOCKS = 3


def plain_spec(layers, heads, size_k, size_v, tokens, dtype, pad=0):
    page = heads * tokens * (size_k + size_v) * ITEM[dtype]
    return CacheSpec(
        tuple(layers), heads, size_k, size_v, tokens, dtype, page, page + pad * ITEM[dtype] if pad else None
    )


def nvfp4_spec(layers, heads, size, tokens, pad=0):
    page = heads * tokens * size * 9 // 8
    return CacheSpec(
        tuple(layers), heads, size, size, tokens, "nvfp4", page, page + 16 * pad if pad else None
    )


def group_names(counts):
    return [[f"g{g}.{i}" for i in range(count)] for g, count in enumerate(counts)]


@st.composite
def plain_layouts(draw_from):
    layout = draw_from(st.sampled_from(Layout))
    names = group_names(draw_from(st.lists(st.integers(1, 3), min_size=1, max_size=2)))
    small = st.integers(1, 3)
    heads, size_k, size_v, tokens = (draw_from(small) for _ in range(4))
    dtype = draw_from(st.sampled_from(sorted(ITEM)))
    pad = draw_from(st.integers(0, 2)) if layout.page_is_dense else 0
    specs = [plain_spec(layers, heads, size_k, size_v, tokens, dtype, pad) for layers in names]
    return LayoutDescriptor(layout, tuple(specs))


@st.composite
def nvfp4_layouts(draw_from):
    layout = draw_from(st.sampled_from([Layout.BLHNC, Layout.LBHNC]))
    names = group_names(draw_from(st.lists(st.integers(1, 2), min_size=1, max_size=2)))
    order = draw_from(st.sampled_from(ScaleOrder))
    size = draw_from(st.sampled_from([16, 48, 64] if order is ScaleOrder.LINEAR else [64, 128]))
    heads, pad = draw_from(st.integers(1, 2)), draw_from(st.integers(0, 2))
    return LayoutDescriptor(layout, tuple(nvfp4_spec(n, heads, size, 16, pad) for n in names), order)


def places(layout, spec):
    """Every (place, bytes) of a group: data items and scales."""
    for layer, block, head, token in itertools.product(
        spec.layers, range(BLOCKS), range(spec.num_kv_heads), range(spec.block_size)
    ):
        for which, size in (("K", spec.head_size_k), ("V", spec.head_size_v)):
            for element in range(size):
                yield byte_offset(layout, layer, block, head, token, which, element), spec.item_bytes
            if spec.dtype == "nvfp4":
                for group in range(size // 16):
                    yield scale_offset(layout, layer, block, head, token, which, group), 1


def page_bytes_of(layout, spec):
    """Every (region, byte) that a group's pages consist of, said without strides."""
    step = spec.page_step if layout.layout.page_is_dense else None
    for i, _ in enumerate(spec.layers):
        for block in range(BLOCKS):
            if step is None:  # BHLNC: no padding, so the slots of a row are its bytes
                band = spec.page_bytes // spec.num_kv_heads
                starts = [
                    (block * spec.num_kv_heads + h) * len(layout.slots) * band + i * band
                    for h in range(spec.num_kv_heads)
                ]
                yield from ((0, start + b) for start in starts for b in range(band))
            elif layout.layout.block_outer:
                start = (block * len(layout.slots) + i) * step
                yield from ((0, start + b) for b in range(spec.page_bytes))
            else:
                yield from ((i, block * step + b) for b in range(spec.page_bytes))


def check_bijection(layout):
    """No two items share a bit, and together they fill exactly the group's pages."""
    for spec in layout.groups:
        bits = []
        for place, size in places(layout, spec):
            whole = range(8 * place.byte, 8 * (place.byte + size), 4)
            bits += [
                (place.region, bit)
                for bit in (whole if place.element is None else [8 * place.byte + 4 * place.element])
            ]
        assert len(set(bits)) == len(bits)
        assert set(bits) == {
            (region, 8 * byte + half) for region, byte in page_bytes_of(layout, spec) for half in (0, 4)
        }


@settings(max_examples=150, deadline=None)
@given(plain_layouts())
def test_byte_map_of_plain_dtypes_is_a_bijection(layout):
    check_bijection(layout)


@settings(max_examples=25, deadline=None)
@given(nvfp4_layouts())
def test_byte_map_of_nvfp4_is_a_bijection(layout):
    check_bijection(layout)


@pytest.mark.parametrize("layout", Layout)
def test_axes_lie_in_the_order_that_the_layout_is_named_by(layout):
    """Against a dense torch tensor of those axes: C is innermost, and nothing else is assumed."""
    layers = ("x", "y", "z")
    sizes = {"L": 3, "B": BLOCKS, "H": 2, "N": 5, "C": 4 + 3}
    bytes_of_items = 2 * torch.arange(math.prod(sizes.values())).view([sizes[axis] for axis in layout.value])
    logical = bytes_of_items.permute([layout.value.index(axis) for axis in "LBHNC"])
    descriptor = LayoutDescriptor(layout, (plain_spec(layers, 2, 4, 3, 5, "bfloat16"),))
    region_bytes = BLOCKS * descriptor.block_stride
    for i, block, head, token, content in itertools.product(*(range(sizes[axis]) for axis in "LBHNC")):
        which, element = ("K", content) if content < 4 else ("V", content - 4)
        place = byte_offset(descriptor, layers[i], block, head, token, which, element)
        assert place.region * region_bytes + place.byte == logical[i, block, head, token, content]


def region_of(layout, layer, blocks=BLOCKS, lead=0):
    """A region whose every byte is known, possibly in the middle of a larger storage."""
    size = blocks * layout.block_stride
    return (torch.arange(lead + size) * 37 % 251).to(torch.uint8)[lead:]


@settings(max_examples=150, deadline=None)
@given(plain_layouts(), st.sampled_from([0, 16]))
def test_view_holds_the_bytes_of_the_byte_map(layout, lead):
    for spec in layout.groups:
        for layer in spec.layers:
            region = region_of(layout, layer, lead=lead)
            view = page_view(region, layout, layer)
            assert view.shape == (BLOCKS, spec.num_kv_heads, spec.block_size, spec.content)
            assert tuple(s * view.element_size() for s in view.stride()) == layout.strides(layer)
            items = view.view(torch.uint8) if spec.item_bytes == 1 else view
            for block, head, token, which in itertools.product(
                range(BLOCKS), range(spec.num_kv_heads), range(spec.block_size), "KV"
            ):
                for element in range(spec.head_size_k if which == "K" else spec.head_size_v):
                    place = byte_offset(layout, layer, block, head, token, which, element)
                    content = element + (spec.head_size_k if which == "V" else 0)
                    got = items[block, head, token, content].reshape(1).view(torch.uint8)
                    assert torch.equal(got, region[place.byte : place.byte + spec.item_bytes])


@settings(max_examples=25, deadline=None)
@given(nvfp4_layouts())
def test_nvfp4_page_has_the_four_parts_in_order(layout):
    """[K data | K scale | V data | V scale], each head by head, token by token, as NVFP4.md says."""
    for spec in layout.groups:
        layer, heads, tokens, size = spec.layers[-1], spec.num_kv_heads, spec.block_size, spec.head_size_k
        region = region_of(layout, layer)
        page = page_view(region, layout, layer)[1].reshape(-1)
        data, scale = heads * tokens * size // 2, heads * tokens * size // 16
        k_data, k_scale, v_data, v_scale = page.split([data, scale, data, scale])
        for which, d, s in (("K", k_data, k_scale), ("V", v_data, v_scale)):
            d, s = d.view(heads, tokens, size // 2), s.view(heads, tokens, size // 16)
            for head, token in itertools.product(range(heads), range(tokens)):
                for element in range(size):
                    place = byte_offset(layout, layer, 1, head, token, which, element)
                    assert place.element == element % 8
                    assert region[place.byte] == d[head, token, element // 8 * 4]
                for group in range(size // 16):
                    t, g = token, group
                    if which == "V" and layout.scale_order is ScaleOrder.SWIZZLED:
                        quarter = size // 16 // 4
                        t, g = (t // 4) * 4 + g // quarter, (g % quarter) * 4 + t % 4
                    assert (
                        region[scale_offset(layout, layer, 1, head, token, which, group).byte]
                        == s[head, t, g]
                    )


@settings(max_examples=40, deadline=None)
@given(st.one_of(plain_layouts(), nvfp4_layouts()))
def test_a_block_is_one_interval_in_rows_and_one_a_slot_otherwise(layout):
    spec = max(layout.groups, key=lambda spec: len(spec.layers))  # fills every slot
    for block in (0, 2):
        touched = set()
        for layer in spec.layers:
            last = spec.shape[0] - 1, spec.shape[1] - 1
            for head, token in itertools.product({0, last[0]}, {0, last[1]}):
                place = byte_offset(layout, layer, block, head, token, "K", 0)
                touched.add((place.region, place.byte // layout.block_stride))
        assert {index for _, index in touched} == {block}
        pieces = 1 if layout.layout.block_outer else len(spec.layers)
        assert len({region for region, _ in touched}) == pieces
        assert layout.block_stride * pieces == layout.row_bytes


def test_rows_of_llama_8b_with_nvfp4_have_589824_bytes():
    layout = LayoutDescriptor(
        Layout.BLHNC, (nvfp4_spec([str(i) for i in range(32)], 8, 128, 16),), ScaleOrder.LINEAR
    )
    assert layout.row_bytes == 589_824
    assert layout.strides("7") == (589_824, 16 * 144, 144, 1)
    assert layout.slot_of("7").offset == 7 * 18_432


def test_groups_share_slots_and_the_shorter_group_leaves_the_last_free():
    groups = (
        plain_spec(["full.0", "full.1"], 2, 4, 4, 16, "bfloat16"),
        plain_spec(["sw.0", "sw.1", "sw.2"], 1, 4, 4, 32, "bfloat16"),
    )
    layout = LayoutDescriptor(Layout.BLHNC, groups)
    assert [slot.layers for slot in layout.slots] == [("full.0", "sw.0"), ("full.1", "sw.1"), ("sw.2",)]
    assert [slot.offset for slot in layout.slots] == [0, 512, 1024]
    assert layout.strides("full.1") == (1536, 256, 16, 2)
    assert layout.strides("sw.1") == (1536, 512, 16, 2)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"head": 2}, "head: expected at least 0 and less than 2, got 2"),
        ({"token": -1}, "token: expected at least 0 and less than 16, got -1"),
        ({"block": -1}, "block: expected at least 0, got -1"),
        ({"element": 4}, "element: expected at least 0 and less than 4, got 4"),
    ],
)
def test_index_out_of_range(index, message):
    layout = LayoutDescriptor(Layout.BLHNC, (plain_spec(["a"], 2, 4, 5, 16, "float16"),))
    with pytest.raises(IndexError, match=re.escape(message)):
        byte_offset(
            layout, **({"layer": "a", "block": 0, "head": 0, "token": 0, "element": 0} | index), which="K"
        )
    byte_offset(layout, "a", 0, 1, 15, "V", 4)


def test_wrong_names_are_refused():
    layout = LayoutDescriptor(Layout.BLHNC, (plain_spec(["a"], 2, 4, 4, 16, "float16"),))
    with pytest.raises(KeyError, match="expected one of \\['a'\\], got 'b'"):
        byte_offset(layout, "b", 0, 0, 0, "K", 0)
    with pytest.raises(ValueError, match="expected 'K' or 'V', got 'Q'"):
        byte_offset(layout, "a", 0, 0, 0, "Q", 0)
    with pytest.raises(ValueError, match="expected dtype nvfp4, got float16"):
        scale_offset(layout, "a", 0, 0, 0, "K", 0)


def test_view_of_a_region_that_is_no_pool():
    layout = LayoutDescriptor(Layout.BLHNC, (plain_spec(["a"], 2, 4, 4, 16, "float16"),))
    with pytest.raises(ValueError, match=r"expected a multiple of 512 bytes \(one block\), got 513"):
        page_view(torch.zeros(513, dtype=torch.uint8), layout, "a")
    for bad in (torch.zeros(512), torch.zeros(2, 512, dtype=torch.uint8), torch.zeros(1024).byte()[::2]):
        with pytest.raises(ValueError, match="expected a dense 1-D byte tensor"):
            page_view(bad, layout, "a")


@settings(max_examples=40, deadline=None)
@given(st.one_of(plain_layouts(), nvfp4_layouts()), st.data())
def test_allocation_check_takes_the_views_and_nothing_else(layout, data):
    layers = [name for spec in layout.groups for name in spec.layers]
    tensors = {name: allocation_of(page_view(region_of(layout, name), layout, name)) for name in layers}
    check_allocation(layout, tensors)
    name = data.draw(st.sampled_from(layers))
    good = tensors[name]
    kind = data.draw(st.sampled_from(["shape", "stride", "offset", "missing", "extra"]))
    if kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors["intruder"] = good
    elif kind == "offset":
        tensors[name] = good._replace(offset=good.offset + layout.page_step)
    elif kind == "shape":
        axis = data.draw(st.integers(1, 3))
        tensors[name] = good._replace(shape=tuple(s + (i == axis) for i, s in enumerate(good.shape)))
    else:
        axis = data.draw(st.sampled_from([i for i in range(4) if good.shape[i] > 1]))
        tensors[name] = good._replace(strides=tuple(s + 2 * (i == axis) for i, s in enumerate(good.strides)))
    with pytest.raises(AllocationError, match="expected"):
        check_allocation(layout, tensors)


def test_allocation_error_has_both_sides_and_strides_of_one_head_are_free():
    layout = LayoutDescriptor(Layout.BLHNC, (plain_spec(["a", "b"], 1, 4, 4, 16, "float16"),))
    good = Allocation((5, 1, 16, 8), (512, 256, 16, 2), 0)
    check_allocation(
        layout, {"a": good._replace(strides=(512, 12345, 16, 2)), "b": good._replace(offset=256)}
    )
    with pytest.raises(AllocationError) as caught:
        check_allocation(layout, {"a": good, "b": good})
    assert "b: expected shape (5, 1, 16, 8), strides (512, 256, 16, 2) bytes, offset 256" in str(caught.value)
    assert "got shape (5, 1, 16, 8), strides (512, 256, 16, 2) bytes, offset 0" in str(caught.value)
    with pytest.raises(AllocationError, match=re.escape("b: expected shape (5,")):
        check_allocation(layout, {"a": good, "b": good._replace(shape=(4, 1, 16, 8), offset=256)})


@settings(max_examples=40, deadline=None)
@given(st.one_of(plain_layouts(), nvfp4_layouts()), st.data())
def test_drawing_names_the_bytes_and_fits(layout, data):
    spec = data.draw(st.sampled_from(layout.groups))
    layer = data.draw(st.sampled_from(spec.layers))
    head = data.draw(st.integers(0, spec.num_kv_heads - 1))
    token = data.draw(st.integers(0, spec.block_size - 1))
    lines = draw(layout, layer, head, token).splitlines()
    assert max(map(len, lines)) <= 100
    assert layer in lines[1]
    table = [line for line in lines if re.match(r"[KV].* bytes ", line)]
    first = byte_offset(layout, layer, 0, head, token, "K", 0).byte
    assert re.search(rf"\b{first:,} \.\.", table[0])
    assert len(table) == (4 if spec.dtype == "nvfp4" else 2)
    row, zoom = (line for line in lines if line.startswith("|"))
    assert len(row) == len(zoom) == 66
    cell = math.floor(first * 64 / layout.block_stride)
    assert row[1 + cell] == "#"
    assert "V" in zoom


def test_drawing_of_an_nvfp4_row():
    layout = LayoutDescriptor(Layout.BLHNC, (nvfp4_spec("abcd", 2, 64, 16),), ScaleOrder.SWIZZLED)
    assert draw(layout, "b", 1, 5).splitlines() == [
        "BLHNC nvfp4 (swizzled scales): 4 page slots, 2 KV heads, 16 tokens in a block",
        "slot 1, head 1, token 5 of b",
        "",
        "row: one block, all layers (9,216 bytes). = this layer, # this token's K",
        "|" + "." * 16 + "====#==#========" + "." * 32 + "|",
        "",
        "of it, bytes 2,304 .. 4,607. K V this token's data, k v its scales",
        "|" + "." * 18 + "KK" + "." * 10 + "k" + "." * 19 + "VV" + "." * 10 + "vv" + "|",
        "",
        "K data   bytes         2,976 ..         3,007      32 bytes",
        "K scale  bytes         3,412 ..         3,415       4 bytes",
        "V data   bytes         4,128 ..         4,159      32 bytes",
        "V scale  bytes         4,560 ..         4,575      16 bytes (of 4 tokens, swizzled)",
    ]


def test_drawing_of_a_head_sliced_row_shows_each_heads_part():
    layout = LayoutDescriptor(Layout.BHLNC, (plain_spec("abcd", 4, 64, 64, 16, "float16"),))
    row = draw(layout, "b", 2, 15).splitlines()[4]
    assert row == "|" + "....====........" * 2 + "....===#........" + "....====........" + "|"
