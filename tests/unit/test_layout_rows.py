"""A row of several groups: what it holds, what it leaves unused, and what is no row."""

import re
from dataclasses import replace

import pytest

from vllm_xlayer.layout import (
    CacheSpec,
    Layout,
    LayoutDescriptor,
    Opaque,
    Page,
    RowDecision,
    RowDescriptor,
    RowGroup,
    draw_row,
    row_line,
)
from vllm_xlayer.nvfp4 import ScaleOrder

PAGE = 2 * 16 * 72
FULL = CacheSpec(("a", "b"), 2, 64, 64, 16, "nvfp4", PAGE)
STATE = Opaque("MambaSpec", 512, 4, (("dtypes", "['float32']"),))


def attention(*offsets):
    return RowGroup(16, tuple(map(Page, FULL.layers, offsets, [FULL] * 2)))


def states(*offsets, content=STATE):
    return RowGroup(16, tuple(Page(f"s{i}", offset, content) for i, offset in enumerate(offsets)))


def row(*groups, row_bytes=2 * PAGE, order=ScaleOrder.LINEAR):
    return RowDescriptor(Layout.BLHNC, row_bytes, groups, order)


def test_groups_lie_over_each_other():
    made = row(attention(0, PAGE), states(0, PAGE))
    assert [made.used_bytes(i) for i in range(2)] == [2 * PAGE, PAGE + 512]
    assert list(made.gaps(0)) == [] and list(made.gaps(1)) == [(512, PAGE), (PAGE + 512, 2 * PAGE)]
    assert made.attention == (FULL,) and made.has_opaque and made.page_of("s1").end == PAGE + 512


def test_used_bytes_are_whole_units_of_what_copies_read():
    odd = replace(STATE, page_bytes=500)
    assert row(states(0, content=odd), order=None).used_bytes(0) == 512
    assert row(states(0, content=odd), order=None, row_bytes=504).used_bytes(0) == 504


def test_strides_of_attention_are_those_of_its_own_layout_but_for_the_blocks():
    made = row(attention(0, PAGE), states(0), row_bytes=3 * PAGE)
    alone = LayoutDescriptor(Layout.BLHNC, (FULL,), ScaleOrder.LINEAR).strides("a")
    assert made.strides("b") == (3 * PAGE, *alone[1:])


def test_one_kind_of_pages_is_said_as_ever():
    made = row(attention(0, PAGE))
    same = LayoutDescriptor(Layout.BLHNC, (FULL,), ScaleOrder.LINEAR)
    assert made.uniform == same and made.to_dict() == same.to_dict() and made.fingerprint == same.fingerprint


@pytest.mark.parametrize(
    "other",
    [
        row(attention(0, PAGE), row_bytes=3 * PAGE),
        row(attention(0, 2 * PAGE), row_bytes=3 * PAGE),
        row(attention(0, PAGE), states(0)),
        row(attention(0, PAGE), states(4)),
        row(attention(0, PAGE), states(0, content=replace(STATE, facts=(("dtypes", "['bfloat16']"),)))),
        row(attention(0, PAGE), states(0, content=replace(STATE, kind="other"))),
        row(attention(0, PAGE), replace(states(0), block_size=32)),
        row(attention(0, PAGE), states(0), order=ScaleOrder.SWIZZLED),
    ],
)
def test_what_one_kind_of_pages_cannot_say_has_a_fingerprint_of_its_own(other):
    base = [row(attention(0, PAGE)), row(attention(0, PAGE), states(0, PAGE))]
    assert other.uniform is None and other.to_dict()["version"] == 2
    assert other.fingerprint not in [made.fingerprint for made in base] and len(other.fingerprint) == 32


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda: row(attention(0, 2 * PAGE)), "group 0: b: expected a page inside the row's 4608 bytes"),
        (lambda: row(attention(0, PAGE - 16)), "group 0: b: expected a page after that of a, which ends at"),
        (lambda: row(attention(0, PAGE + 8), row_bytes=3 * PAGE), "b: expected pages at multiples of 16"),
        (lambda: row(attention(0, PAGE), states(2)), "group 1: s0: expected pages at multiples of 4 bytes"),
        (lambda: row(attention(0, PAGE), row_bytes=2 * PAGE + 4), "row: expected a multiple of 16 bytes"),
        (lambda: row(attention(0, PAGE), attention(0, PAGE)), "expected every layer once, got a, b more"),
        (lambda: row(attention(0, PAGE), order=None), "scale_order: expected one of LINEAR, SWIZZLED"),
        (lambda: row(attention(0, PAGE), RowGroup(16, ())), "group 1: expected at least one page, got none"),
        (
            lambda: RowDescriptor(Layout.LBHNC, 2 * PAGE, (attention(0, PAGE),), ScaleOrder.LINEAR),
            "expected a layout in which a block is one piece and a page dense",
        ),
        (
            lambda: RowDescriptor(Layout.BLNHC, 2 * PAGE, (attention(0, PAGE),), ScaleOrder.LINEAR),
            "a .. b (2 layers): nvfp4 pages hold",
        ),
    ],
)  # fmt: skip
def test_what_is_no_row_names_the_layer(make, problem):
    with pytest.raises(ValueError, match=re.escape(problem)):
        make()


def test_a_line_for_the_log():
    line = row_line(RowDecision(row(attention(0, PAGE), states(0)), ("model", "connector X"), ()))
    assert line.startswith(
        "KV layout BLHNC nvfp4+MambaSpec: 3 layers in 2 groups (2 x nvfp4 (16 tokens), 1 x MambaSpec "
        "(16 tokens)), row 4,608 bytes, fingerprint "
    )
    assert line.endswith("; accepted by model, connector X")


def test_drawing_shows_every_groups_pages_and_the_unused_end():
    made = row(attention(0, PAGE), states(0, PAGE), row_bytes=4 * PAGE)
    lines = draw_row(made).splitlines()
    assert lines[0].startswith(f"one row, {4 * PAGE:,} bytes")
    pages, few = lines[4], lines[9]
    assert pages == f"|{'=' * 16}{'-' * 16}{'.' * 32}|"
    assert few == f"|{'=' * 4}{'.' * 12}{'-' * 4}{'.' * 44}|"  # 512 of 2304 bytes
    assert lines[8] == (
        f"group 1: 2 pages of MambaSpec, 16 tokens a block; {PAGE + 512:,} bytes used, "
        f"{3 * PAGE - 512:,} unused"
    )
    assert lines[-1].split() == ["bytes", f"{PAGE:,}", "..", f"{PAGE + 511:,}", "s1"]


def test_drawing_of_many_pages_and_long_names_fits():
    spec = replace(FULL, layers=tuple(f"model.layers.{i}.{'x' * 100}" for i in range(80)))
    group = RowGroup(16, tuple(Page(name, i * PAGE, spec) for i, name in enumerate(spec.layers)))
    text = draw_row(row(group, row_bytes=80 * PAGE))
    assert all(len(line) <= 100 for line in text.splitlines()) and f"|{'=' * 64}|" in text
