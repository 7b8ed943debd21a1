"""One row of any model: which byte of a block belongs to which layer, of every KV cache group.

A block belongs to one group at a time. Each group lays its pages from byte 0 of the row on, so the pages of
different groups overlap, and a group that needs less than the widest leaves the row's end unused. What an
attention page holds is known element by element; a page that this package has no kernel for is opaque: so
many bytes, and facts that say whose they are. It is moved all the same.

Nothing is derived here: offsets are those of the engine's allocation, and checked.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from vllm_xlayer.layout.descriptor import LayoutDescriptor
from vllm_xlayer.layout.negotiation import Refusal
from vllm_xlayer.layout.spec import CacheSpec, Layout, model_problems
from vllm_xlayer.nvfp4 import ScaleOrder

FORMAT_VERSION = 2
"""Of the dict form of rows that a LayoutDescriptor, version 1, cannot say."""

ALIGN = 16
"""Bytes: what NVFP4 kernels and the copy kernel read at a time."""


@dataclass(frozen=True)
class Opaque:
    """A page of which only the engine knows what its bytes mean.

    Args:
        kind: what vLLM calls it, e.g. "MambaSpec".
        page_bytes: without padding.
        align: bytes; every page must start at a multiple of it.
        facts: (name, value) of everything that must be equal before one engine may use another's bytes.
    """

    kind: str
    page_bytes: int
    align: int
    facts: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Page:
    """One layer's part of a row.

    Args:
        offset: bytes from the start of the row.
        content: of an attention layer the spec that it shares with its like; its ``layers`` name them.
    """

    layer: str
    offset: int
    content: CacheSpec | Opaque

    @property
    def end(self) -> int:
        """The byte after the page's last; padding is not the page's."""
        return self.offset + self.content.page_bytes


@dataclass(frozen=True)
class RowGroup:
    """The pages of one KV cache group, in order of their offsets.

    Args:
        block_size: tokens in a block.
    """

    block_size: int
    pages: tuple[Page, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(page.layer for page in self.pages)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What its pages are: a KV dtype, or what an opaque page is called; each once."""
        contents = (page.content for page in self.pages)
        return tuple(dict.fromkeys(c.kind if isinstance(c, Opaque) else c.dtype for c in contents))


@dataclass(frozen=True)
class RowDescriptor:
    """Everything that says which byte of a row means what.

    Args:
        layout: the physical order; one in which a block is one piece and a page dense.
        row_bytes: from a block to the next, in the pool.
        scale_order: how V's block scales are stored; None exactly where no page is nvfp4.

    Raises:
        ValueError: such pages do not make a row; every problem names its layer.
    """

    layout: Layout
    row_bytes: int
    groups: tuple[RowGroup, ...]
    scale_order: ScaleOrder | None = None

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ValueError(f"these are no rows in {self.layout.value}: " + "; ".join(problems))

    @property
    def attention(self) -> tuple[CacheSpec, ...]:
        """What attention layers share, each once, in order."""
        contents = (page.content for group in self.groups for page in group.pages)
        return tuple(dict.fromkeys(content for content in contents if isinstance(content, CacheSpec)))

    @property
    def has_opaque(self) -> bool:
        """Whether a group has pages of which only the engine knows what they mean."""
        return any(isinstance(page.content, Opaque) for group in self.groups for page in group.pages)

    def used_bytes(self, group: int) -> int:
        """Bytes from the start of a row that can be a group's: to its last page's end, in whole ALIGNs."""
        end = max(page.end for page in self.groups[group].pages)
        return min(self.row_bytes, -(-end // ALIGN) * ALIGN)

    def gaps(self, group: int) -> Iterator[tuple[int, int]]:
        """(first byte, byte after the last) of what no page of a group covers: another owner left it."""
        at = 0
        for page in self.groups[group].pages:
            if page.offset > at:
                yield at, page.offset
            at = page.end
        if at < self.row_bytes:
            yield at, self.row_bytes

    def page_of(self, layer: str) -> Page:
        """Raises KeyError for a layer that has no page."""
        return self._page_of[layer]

    def strides(self, layer: str) -> tuple[int, int, int, int]:
        """Bytes between neighbours along B, H, N and C in an attention layer's (B, H, N, C) view."""
        spec = self.page_of(layer).content
        assert isinstance(spec, CacheSpec)
        _, *inside = LayoutDescriptor(self.layout, (spec,), self._order_of(spec)).strides(spec.layers[0])
        return (self.row_bytes, inside[0], inside[1], inside[2])

    @cached_property
    def uniform(self) -> LayoutDescriptor | None:
        """The same as one kind of page slots that all groups share; None where there is no such thing."""
        specs = []
        for group in self.groups:
            content = group.pages[0].content
            if not isinstance(content, CacheSpec) or content.layers != group.layers:
                return None
            specs.append(content)
        try:
            same = LayoutDescriptor(self.layout, tuple(specs), self.scale_order)
        except ValueError:
            return None
        pages = (page for group in self.groups for page in group.pages)
        fits = all(same.slot_of(page.layer).offset == page.offset for page in pages)
        return same if fits and same.row_bytes == self.row_bytes else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; of version 1 where that can say it, so that what it names stays valid."""
        if self.uniform is not None:
            return self.uniform.to_dict()
        return {
            "version": FORMAT_VERSION,
            "layout": self.layout.value,
            "scale_order": None if self.scale_order is None else self.scale_order.name,
            "row_bytes": self.row_bytes,
            "groups": [
                {
                    "block_size": group.block_size,
                    "used_bytes": self.used_bytes(i),
                    "pages": [
                        {"layer": p.layer, "offset": p.offset, **_content_dict(p.content)}
                        for p in group.pages
                    ],
                }
                for i, group in enumerate(self.groups)
            ],
        }

    @cached_property
    def fingerprint(self) -> str:
        """32 hex digits, equal exactly where ``to_dict`` is: bytes of one can be used as the other's."""
        if self.uniform is not None:
            return self.uniform.fingerprint
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @cached_property
    def _page_of(self) -> dict[str, Page]:
        return {page.layer: page for group in self.groups for page in group.pages}

    def _order_of(self, spec: CacheSpec) -> ScaleOrder | None:
        return self.scale_order if spec.dtype == "nvfp4" else None

    def _problems(self) -> Iterator[str]:
        if not (self.layout.block_outer and self.layout.page_is_dense):
            yield "expected a layout in which a block is one piece and a page dense"
            return
        names = [page.layer for group in self.groups for page in group.pages]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            yield f"expected every layer once, got {', '.join(twice)} more than once"
        for spec in self.attention:
            yield from model_problems(self.layout, (spec,))
        if any(spec.dtype == "nvfp4" for spec in self.attention):
            if self.scale_order is None:
                yield "scale_order: expected one of " + ", ".join(ScaleOrder.__members__) + ", got None"
            if self.row_bytes % ALIGN:
                yield f"row: expected a multiple of {ALIGN} bytes with nvfp4, got {self.row_bytes}"
        for i, group in enumerate(self.groups):
            yield from (f"group {i}: {problem}" for problem in self._group_problems(group))

    def _group_problems(self, group: RowGroup) -> Iterator[str]:
        if not group.pages:
            yield "expected at least one page, got none"
            return
        for page in group.pages:
            if page.offset < 0 or page.end > self.row_bytes:
                yield (
                    f"{page.layer}: expected a page inside the row's {self.row_bytes} bytes, got bytes "
                    f"{page.offset} to {page.end}"
                )
            align = _align_of(page.content)
            if page.offset % align or self.row_bytes % align:
                yield (
                    f"{page.layer}: expected pages at multiples of {align} bytes, got offset {page.offset} "
                    f"in rows of {self.row_bytes}"
                )
        for before, page in pairwise(group.pages):
            if page.offset < before.end:
                yield (
                    f"{page.layer}: expected a page after that of {before.layer}, which ends at "
                    f"{before.end}, got one at {page.offset}"
                )


@dataclass(frozen=True)
class RowDecision:
    """A row that model, attention backends and connector agreed to, and what was refused by whom."""

    descriptor: RowDescriptor
    accepted_by: tuple[str, ...]
    refusals: tuple[Refusal, ...]


def _align_of(content: CacheSpec | Opaque) -> int:
    if isinstance(content, Opaque):
        return content.align
    return ALIGN if content.dense_page else content.item_bytes


def _content_dict(content: CacheSpec | Opaque) -> dict[str, Any]:
    values = asdict(content)
    values.pop("layers", None)  # the pages name them
    if isinstance(content, Opaque):
        values["facts"] = dict(content.facts)
    return values
