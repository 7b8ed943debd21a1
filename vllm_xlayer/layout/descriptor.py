"""One agreed layout in bytes: what a connector and a transfer handshake get.

A *region* is one allocation. Block-outer layouts have one region, the pool, of ``num_blocks`` rows;
layer-outer layouts have one region a page slot, of ``num_blocks`` pages. Nothing here depends on the
number of blocks, so two engines with different amounts of memory can compare their layouts.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

from vllm_xlayer.layout.spec import CacheSpec, Layout, model_problems
from vllm_xlayer.nvfp4 import ScaleOrder

FORMAT_VERSION = 1
"""Of the dict form. Raise it when the meaning of a key changes."""


@dataclass(frozen=True)
class Slot:
    """Where one page of a block lies: one layer of each group at most, as groups have own block tables."""

    region: int
    offset: int
    """Bytes from the start of the row (of the page, in layer-outer layouts)."""
    layers: tuple[str, ...]


@dataclass(frozen=True)
class LayoutDescriptor:
    """Everything that says which byte of a block means what.

    Args:
        layout: the physical order.
        groups: the model's KV cache groups. All groups take pages from the same slots.
        scale_order: how V's block scales are stored; None exactly where no group is nvfp4.

    Raises:
        ValueError: such groups cannot be laid out so, with every reason.
    """

    layout: Layout
    groups: tuple[CacheSpec, ...]
    scale_order: ScaleOrder | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(self.groups))
        if not self.groups:
            raise ValueError("groups: expected at least one KV cache group, got none")
        problems = list(model_problems(self.layout, self.groups))
        has_scales = any(spec.dtype == "nvfp4" for spec in self.groups)
        if has_scales != isinstance(self.scale_order, ScaleOrder):
            expected = "one of " + ", ".join(ScaleOrder.__members__) if has_scales else "None"
            problems.append(f"scale_order: expected {expected}, got {self.scale_order!r}")
        elif self.scale_order is not None:
            found = (spec.scale_order_problem(self.scale_order) for spec in self.groups)
            problems += [problem for problem in found if problem]
        if problems:
            raise ValueError(f"{self.layout.value} is impossible: " + "; ".join(problems))

    @cached_property
    def slots(self) -> tuple[Slot, ...]:
        """Page slots of a block, in order. Slot i holds the i-th layer of every group that has one."""
        # Where layers are inside heads, slots are one head's part of a page apart.
        step = self.page_step if self.layout.page_is_dense else self.page_step // self.groups[0].num_kv_heads
        slots = []
        for i in range(max(len(spec.layers) for spec in self.groups)):
            layers = tuple(spec.layers[i] for spec in self.groups if i < len(spec.layers))
            region, offset = (0, i * step) if self.layout.block_outer else (i, 0)
            slots.append(Slot(region, offset, layers))
        return tuple(slots)

    @cached_property
    def _slot_of(self) -> dict[str, Slot]:
        return {name: slot for slot in self.slots for name in slot.layers}

    @cached_property
    def _spec_of(self) -> dict[str, CacheSpec]:
        return {name: spec for spec in self.groups for name in spec.layers}

    def slot_of(self, layer: str) -> Slot:
        """The page slot of a layer. Raises KeyError for a name that is in no group."""
        if layer not in self._slot_of:
            raise KeyError(f"layer: expected one of {list(self._slot_of)}, got {layer!r}")
        return self._slot_of[layer]

    def spec_of(self, layer: str) -> CacheSpec:
        """The group of a layer. Raises KeyError for a name that is in no group."""
        self.slot_of(layer)
        return self._spec_of[layer]

    @property
    def page_step(self) -> int:
        """Bytes a page takes, padding included: the same for every group."""
        return self.groups[0].page_step

    @property
    def row_bytes(self) -> int:
        """Bytes of one block in all its slots: what moves when a block moves."""
        return len(self.slots) * self.page_step

    @property
    def block_stride(self) -> int:
        """Bytes from a block to the next within a region."""
        return self.row_bytes if self.layout.block_outer else self.page_step

    def strides(self, layer: str) -> tuple[int, int, int, int]:
        """Bytes between neighbours along B, H, N and C, in a layer's (B, H, N, C) view."""
        spec = self.spec_of(layer)
        heads, tokens, content = spec.shape
        unit = content * spec.item_bytes
        if not self.layout.head_major:
            return (self.block_stride, unit, heads * unit, spec.item_bytes)
        layers_inside = 1 if self.layout.page_is_dense else len(self.slots)
        return (self.block_stride, layers_inside * tokens * unit, unit, spec.item_bytes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON. Offsets and strides are written out, so that a reader can check its own."""
        return {
            "version": FORMAT_VERSION,
            "layout": self.layout.value,
            "scale_order": None if self.scale_order is None else self.scale_order.name,
            "row_bytes": self.row_bytes,
            "groups": [
                {**asdict(spec), "layers": list(spec.layers), "strides": list(self.strides(spec.layers[0]))}
                for spec in self.groups
            ],
            "slots": [
                {"region": slot.region, "offset": slot.offset, "layers": list(slot.layers)}
                for slot in self.slots
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "LayoutDescriptor":
        """Reads what ``to_dict`` wrote.

        Raises:
            ValueError: a key is missing or unknown, a value is impossible, or the offsets and strides
                given are not those that this version derives from the rest.
        """
        version = data.get("version") if isinstance(data, Mapping) else None
        if version != FORMAT_VERSION:
            raise ValueError(f"version: expected {FORMAT_VERSION}, got {version!r}")
        names = [field.name for field in fields(CacheSpec)]
        try:
            order = data["scale_order"]
            groups = tuple(CacheSpec(**{name: group[name] for name in names}) for group in data["groups"])
            descriptor = cls(Layout[data["layout"]], groups, None if order is None else ScaleOrder[order])
        except (KeyError, TypeError) as error:
            raise ValueError(f"expected a layout descriptor, got one with {error!r}") from error
        derived = descriptor.to_dict()
        for key in sorted({*derived, *map(str, data)}):
            # As text, since True == 1 == 1.0 otherwise.
            expected, got = (json.dumps(d.get(key), sort_keys=True, default=repr) for d in (derived, data))
            if key not in derived or expected != got:
                raise ValueError(f"{key}: expected {expected}, got {got}")
        return descriptor

    @property
    def fingerprint(self) -> str:
        """32 hex digits, equal exactly where ``to_dict`` is: bytes of one can be used as the other's."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]
