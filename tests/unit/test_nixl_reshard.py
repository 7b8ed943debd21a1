"""Rows between tensor-parallel sizes, held against the layout's byte map: every byte of them."""

import itertools

import pytest
import torch

from vllm_xlayer.connector.nixl.reshard import CannotReshard, heads_of, moves_between, scatter
from vllm_xlayer.layout import CacheSpec, Layout, LayoutDescriptor
from vllm_xlayer.layout.bytemap import byte_offset, scale_offset
from vllm_xlayer.nvfp4 import GROUP, ScaleOrder, page_bytes

TOKENS, LAYERS = 16, 2


def descriptor(heads, dtype="nvfp4", head_size=64, order=ScaleOrder.LINEAR, layout=Layout.BLHNC):
    size = (
        page_bytes(heads, TOKENS, head_size)
        if dtype == "nvfp4"
        else heads * TOKENS * 2 * head_size * (2 if dtype == "bfloat16" else 1)
    )
    names = tuple(f"layer {i}" for i in range(LAYERS))
    spec = CacheSpec(names, heads, head_size, head_size, TOKENS, dtype, size)
    return LayoutDescriptor(layout, (spec,), order if dtype == "nvfp4" else None)


def items(layout, head, dtype, head_size):
    """Byte of every item of one head in a row, in an order that has nothing to do with memory."""
    for layer, token, which in itertools.product(layout.groups[0].layers, range(TOKENS), "KV"):
        step = 8 if dtype == "nvfp4" else 1
        for element in range(0, head_size, step):
            first = byte_offset(layout, layer, 0, head, token, which, element).byte
            yield from range(first, first + {"bfloat16": 2, "fp8": 1, "nvfp4": 4}[dtype])
        if dtype == "nvfp4":
            for group in range(head_size // GROUP):
                yield scale_offset(layout, layer, 0, head, token, which, group).byte


@pytest.mark.parametrize(("heads", "theirs", "ours"), [(2, 1, 2), (2, 2, 1), (4, 2, 4), (4, 4, 1)])
@pytest.mark.parametrize(
    ("dtype", "their_order", "our_order"),
    [
        ("bfloat16", None, None),
        ("fp8", None, None),
        ("nvfp4", ScaleOrder.LINEAR, ScaleOrder.LINEAR),
        ("nvfp4", ScaleOrder.LINEAR, ScaleOrder.SWIZZLED),
        ("nvfp4", ScaleOrder.SWIZZLED, ScaleOrder.LINEAR),
    ],
)
def test_every_item_of_our_heads_arrives(heads, theirs, ours, dtype, their_order, our_order):
    head_size = 64
    their_layout = descriptor(heads // theirs, dtype, head_size, their_order)
    our_layout = descriptor(heads // ours, dtype, head_size, our_order)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(256, (theirs, 3, their_layout.row_bytes), dtype=torch.uint8, generator=generator)
    for our_rank in range(ours):
        mine = heads_of(our_rank, ours, heads)
        pool = torch.full((7, our_layout.row_bytes), 0xEE, dtype=torch.uint8)
        sources = [r for r in range(theirs) if set(heads_of(r, theirs, heads)) & set(mine)]
        for rank in sources:
            (moves,) = moves_between(their_layout, our_layout, heads_of(rank, theirs, heads), mine)
            scatter(rows[rank], pool, torch.tensor([5, 0, 2]), moves)
        for head in mine:
            rank = next(r for r in sources if head in heads_of(r, theirs, heads))
            there = list(items(their_layout, head - heads_of(rank, theirs, heads).start, dtype, head_size))
            here = list(items(our_layout, head - mine.start, dtype, head_size))
            for row, block in enumerate([5, 0, 2]):
                assert torch.equal(pool[block, here], rows[rank, row, there])
        assert (pool[[1, 3, 4, 6]] == 0xEE).all()
        all_of_ours = (items(our_layout, head - mine.start, dtype, head_size) for head in mine)
        every_byte = list(range(our_layout.row_bytes))
        assert sorted(itertools.chain.from_iterable(all_of_ours)) == every_byte, "the oracle is whole"


def test_a_row_is_never_cut_by_layers():
    """Half of a peer's row has twice our size and the same first bytes: what a cut by bytes would take."""
    theirs, ours = descriptor(2, "bfloat16"), descriptor(1, "bfloat16")
    row = torch.arange(theirs.row_bytes).remainder(251).to(torch.uint8)[None]
    for rank in (0, 1):
        pool = torch.zeros(1, ours.row_bytes, dtype=torch.uint8)
        (moves,) = moves_between(theirs, ours, range(2), range(rank, rank + 1))
        scatter(row, pool, torch.tensor([0]), moves)
        cut_by_bytes = row[:, rank * ours.row_bytes : (rank + 1) * ours.row_bytes]
        assert not torch.equal(pool, cut_by_bytes)
        assert moves[0].layers == LAYERS and moves[0].size * LAYERS == ours.row_bytes


def test_equal_rows_move_whole():
    assert moves_between(descriptor(2), descriptor(2), range(2), range(2)) == ()


def test_what_cannot_be_made_is_refused():
    with pytest.raises(CannotReshard, match="got BLHNC here and BLNHC there"):
        moves_between(
            descriptor(2, "bfloat16", layout=Layout.BLNHC), descriptor(1, "bfloat16"), range(2), range(1)
        )
    with pytest.raises(CannotReshard, match="expected bfloat16 of"):
        moves_between(descriptor(2), descriptor(1, "bfloat16"), range(2), range(1))
    with pytest.raises(CannotReshard, match="expected some of"):
        moves_between(descriptor(1), descriptor(1), range(1), range(1, 2))


def test_heads_of_ranks():
    assert [list(heads_of(r, 2, 8)) for r in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [list(heads_of(r, 8, 2)) for r in range(8)] == [[0]] * 4 + [[1]] * 4
