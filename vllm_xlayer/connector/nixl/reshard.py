"""Rows of one tensor-parallel size from those of another: which bytes of a peer's row are whose.

A rank's page holds its own KV heads. Cutting a peer's row in two would cut it by layers; so every layer's
part is moved by itself, head by head where they lie apart. All layers of a group lie at equal distances: one
`Move` is a part of the page, of all layers. Pure functions: tests hold them against the layout's byte map.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...layout import Layout, LayoutDescriptor
from ...layout.spec import CacheSpec
from ...nvfp4 import GROUP, ScaleOrder, swizzle, unswizzle


class CannotReshard(ValueError):
    """Rows of these layouts cannot be made from each other; says why."""


@dataclass(frozen=True)
class Move:
    """One part of the page of every layer of a group.

    Args:
        source, target: bytes from the start of the peer's row and of ours, of the first layer.
        size: bytes of one layer.
        layers: how many.
        source_step, target_step: bytes from one layer to the next.
        order: what V's block scales must be turned into; None where bytes stay as they are.
        tokens, scales: of those scales, [heads, tokens, scales].
    """

    source: int
    target: int
    size: int
    layers: int
    source_step: int
    target_step: int
    order: ScaleOrder | None = None
    tokens: int = 0
    scales: int = 0


def heads_of(rank: int, ranks: int, heads: int) -> range:
    """The KV heads of a rank; with more ranks than heads several have the same one."""
    first = rank * heads // ranks
    return range(first, max(first + 1, (rank + 1) * heads // ranks))


def moves_between(
    theirs: LayoutDescriptor, ours: LayoutDescriptor, their_heads: range, our_heads: range
) -> tuple[tuple[Move, ...], ...]:
    """By group, what of a peer's row goes where in ours. Empty where the rows are the same.

    Raises:
        CannotReshard: the layouts differ in more than heads and the order of V's scales.
    """
    if theirs.fingerprint == ours.fingerprint and their_heads == our_heads:
        return ()
    if (theirs.layout, ours.layout) != (Layout.BLHNC, Layout.BLHNC):
        raise CannotReshard(
            f"layout: expected {Layout.BLHNC.value} on both sides, got {ours.layout.value} here and "
            f"{theirs.layout.value} there"
        )
    shared = range(max(their_heads.start, our_heads.start), min(their_heads.stop, our_heads.stop))
    if not shared:
        raise CannotReshard(f"heads: expected some of {our_heads}, got {their_heads}")
    heads = (len(shared), shared.start - their_heads.start, shared.start - our_heads.start)
    return tuple(tuple(_group_moves(theirs, ours, i, *heads)) for i in range(len(ours.groups)))


def _group_moves(
    theirs: LayoutDescriptor,
    ours: LayoutDescriptor,
    group: int,
    heads: int,
    source_head: int,
    target_head: int,
) -> Iterator[Move]:
    """Of ``heads`` heads, from ``source_head`` on in their pages and ``target_head`` on in ours."""
    source_spec, target_spec = theirs.groups[group], ours.groups[group]
    if source_spec.layers != target_spec.layers or source_spec.dtype != target_spec.dtype:
        raise CannotReshard(
            f"group {group}: expected {target_spec.dtype} of {target_spec.label}, got {source_spec.dtype} of "
            f"{source_spec.label}"
        )
    source_part = target_part = 0
    for width, is_v_scale in _parts(target_spec):
        yield Move(
            source=source_part + source_head * width,
            target=target_part + target_head * width,
            size=heads * width,
            layers=len(target_spec.layers),
            source_step=theirs.page_step,
            target_step=ours.page_step,
            **_conversion(theirs, ours, target_spec) if is_v_scale else {},
        )
        source_part += source_spec.num_kv_heads * width
        target_part += target_spec.num_kv_heads * width


def _parts(spec: CacheSpec) -> Sequence[tuple[int, bool]]:
    """Bytes of one head in each part of a page, in order, and whether that is V's block scales."""
    if spec.dtype != "nvfp4":
        return [(spec.block_size * spec.content * spec.item_bytes, False)]
    data, scale = spec.block_size * spec.head_size_k // 2, spec.block_size * spec.head_size_k // GROUP
    return [(data, False), (scale, False), (data, False), (scale, True)]


def _conversion(theirs: LayoutDescriptor, ours: LayoutDescriptor, spec: CacheSpec) -> dict[str, Any]:
    if theirs.scale_order == ours.scale_order:
        return {}
    return {"order": ours.scale_order, "tokens": spec.block_size, "scales": spec.head_size_v // GROUP}


def scatter(rows: torch.Tensor, pool: torch.Tensor, blocks: torch.Tensor, moves: Sequence[Move]) -> None:
    """Writes a peer's rows into blocks of the pool; other bytes of these blocks stay as they are.

    Args:
        rows: uint8 [n, row bytes of the peer], dense.
        pool: uint8 [blocks, row bytes of ours].
        blocks: int64 [n].
        moves: of the group that the rows belong to.
    """
    for move in moves:
        piece = _view(rows, move.source, move.source_step, move)
        if move.order is not None:
            scales = piece.reshape(len(rows), -1, move.tokens, move.scales)
            convert = swizzle if move.order is ScaleOrder.SWIZZLED else unswizzle
            piece = convert(scales).view(piece.shape)
        _view(pool, move.target, move.target_step, move)[blocks] = piece


def _view(rows: torch.Tensor, offset: int, step: int, move: Move) -> torch.Tensor:
    """uint8 [rows, layers, size] of one part."""
    shape, strides = (len(rows), move.layers, move.size), (rows.stride(0), step, 1)
    return rows.as_strided(shape, strides, rows.storage_offset() + offset)
