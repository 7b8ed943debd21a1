"""vLLM's plan of a KV cache, a KVCacheConfig, read as rows: which layer's page lies where.

The plan says what will be allocated. Nothing is derived from the model: a row is as wide, and a page lies
where, the plan has it. What this package could not move safely is refused with the layer's name.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from vllm.model_executor.layers.mamba.mamba_utils import get_conv_state_layout
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    KVCacheTensor,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from ..layout import MODEL, CacheSpec, Layout, Opaque, Page, Refusal, RowGroup

NO_CACHE = "it has no layers with a KV cache, so there is nothing to keep: leave --kv-connector out"
PLAN = "the KV cache that vLLM planned"
"""The party that a plan's placements speak for."""
DENSE = (FullAttentionSpec, SlidingWindowSpec, ChunkedLocalAttentionSpec)
"""Specs of pages with K and V of every token and head. Not their subclasses: those hold other things."""
OPAQUE = (MambaSpec, MLAAttentionSpec)
"""Specs of pages that are moved without being understood."""


def row_bytes_of(kv_cache_config: KVCacheConfig) -> int:
    """Bytes from a block to the next: all layers lie in one allocation."""
    return kv_cache_config.kv_cache_tensors[0].size // kv_cache_config.num_blocks


def refusals_of(layout: Layout, plan: KVCacheConfig) -> Iterator[Refusal]:
    """Why a plan is no row that this package can move; nothing if it is."""
    placement = list(_strange_placement(layout, plan))
    yield from placement or _strange_pages(layout, plan)


def _strange_placement(layout: Layout, plan: KVCacheConfig) -> Iterator[Refusal]:
    """What of vLLM's plan is not one row a block."""
    if not plan.kv_cache_tensors or plan.num_blocks < 1:
        yield Refusal(layout, MODEL, NO_CACHE)
        return
    size = plan.kv_cache_tensors[0].size
    if size % plan.num_blocks:
        yield Refusal(layout, PLAN, f"expected whole rows of {plan.num_blocks} blocks, got {size} bytes")
    for tensor in plan.kv_cache_tensors:
        layer = tensor.layers[0]
        if tensor.host_resident or tensor.size != size:
            yield Refusal(layout, PLAN, f"{layer}: expected one allocation for all layers, got several")
        elif tensor.block_stride != size // plan.num_blocks:
            yield Refusal(
                layout, PLAN, f"{layer}: expected blocks {size // plan.num_blocks} bytes apart (one row), "
                f"got {tensor.block_stride}",
            )  # fmt: skip


def _strange_pages(layout: Layout, plan: KVCacheConfig) -> Iterator[Refusal]:
    """Layers whose pages this package cannot describe or must not move."""
    for tensor, group, spec in _runs(plan):
        layer, kind = tensor.layers[0], type(spec)
        if isinstance(spec, AttentionSpec) and kind in DENSE and spec.num_head_slots not in (
            None, spec.num_kv_heads
        ):  # fmt: skip
            yield Refusal(
                layout, f"the attention backend of {layer}",
                "K and V have head slots of their own in its pages, which XLayerConnector does not know; "
                "--attention-backend CUSTOM is this package's, for --kv-cache-dtype nvfp4",
            )  # fmt: skip
        elif kind not in (*DENSE, *OPAQUE):
            known = ", ".join(spec.__name__ for spec in (*DENSE, *OPAQUE))
            reason = f"pages of {kind.__name__} ({layer}) are not known: expected one of {known}"
            if kind is CrossAttentionSpec:
                reason += (
                    ". vLLM serves encoder-decoder models with no KV connector: leave --kv-connector out"
                )
            yield Refusal(layout, MODEL, reason)
        elif spec.page_size_bytes != tensor.layer_stride and not _keeps_one_spec_of_several(group, plan):
            yield Refusal(
                layout, PLAN, f"{layer}: expected pages {spec.page_size_bytes} bytes apart, got "
                f"{tensor.layer_stride}",
            )  # fmt: skip
        elif not group.kv_cache_spec.prefix_cacheable or not group.enable_kv_transfer:
            yield Refusal(
                layout, MODEL, f"{layer}: its group ({kind.__name__}) has no keys under which it could be "
                "found again, so a restored prompt would lack it",
            )  # fmt: skip


def _runs(plan: KVCacheConfig) -> Iterator[tuple[KVCacheTensor, KVCacheGroupSpec, KVCacheSpec]]:
    """Every placement of like layers, with their group and their spec."""
    group_of = {name: group for group in plan.kv_cache_groups for name in group.layer_names}
    for tensor in plan.kv_cache_tensors:
        group = group_of[tensor.layers[0]]
        yield tensor, group, _layer_spec(group, tensor.layers[0])


def _keeps_one_spec_of_several(group: KVCacheGroupSpec, plan: KVCacheConfig) -> bool:
    """Whether it is a group of the scheduler's copy of a plan, in which layers of several specs have one."""
    runs = sum(owner is group for _, owner, _ in _runs(plan))
    return runs > 1 and not isinstance(group.kv_cache_spec, UniformTypeKVCacheSpecs)


def _layer_spec(group: KVCacheGroupSpec, layer: str) -> KVCacheSpec:
    spec = group.kv_cache_spec
    return spec.kv_cache_specs[layer] if isinstance(spec, UniformTypeKVCacheSpecs) else spec


def row_groups(plan: KVCacheConfig) -> tuple[RowGroup, ...]:
    """Every group's pages where the plan puts them; layers that reuse another layer's page have none."""
    return tuple(_row_group(group, plan) for group in plan.kv_cache_groups)


def _row_group(group: KVCacheGroupSpec, plan: KVCacheConfig) -> RowGroup:
    pages = []
    for tensor, owner, spec in _runs(plan):
        if owner is not group:
            continue
        # The scheduler's copy of a plan keeps one spec for layers that have several.
        known = spec.page_size_bytes == tensor.layer_stride
        content = _content(tensor, spec) if known else Opaque("other layers", tensor.layer_stride, 1, ())
        pages += [
            Page(layer, tensor.offset + i * tensor.layer_stride, content)
            for i, layer in enumerate(tensor.layers)
        ]
    return RowGroup(group.kv_cache_spec.block_size, tuple(sorted(pages, key=lambda page: page.offset)))


def _content(tensor: KVCacheTensor, spec: KVCacheSpec) -> CacheSpec | Opaque:
    if isinstance(spec, MLAAttentionSpec):
        return _latents(spec)
    if isinstance(spec, AttentionSpec):
        return cache_spec(tensor.layers, spec)
    assert isinstance(spec, MambaSpec)
    return _states(spec)


def _latents(spec: MLAAttentionSpec) -> Opaque:
    """Of latent attention: what all heads of a token share, or an index over it."""
    facts = {
        "tokens": str(spec.block_size),
        "head_size": str(spec.head_size),
        "dtype": str(spec.dtype).removeprefix("torch."),
        "cache_dtype": str(spec.cache_dtype_str),
        "quant_mode": spec.kv_quant_mode.name,
        "tokens_per_state": str(spec.tokens_per_state),
        "cache_role": spec.cache_role.value,
        "model_version": str(spec.model_version),
    }
    return Opaque(
        "MLAAttentionSpec", spec.unpadded_page_size_bytes, spec.dtype.itemsize, tuple(facts.items())
    )


def _states(spec: MambaSpec) -> Opaque:
    facts = {
        "mamba_type": spec.mamba_type.name,
        "shapes": str([list(shape) for shape in spec.shapes]),
        "dtypes": str([str(dtype).removeprefix("torch.") for dtype in spec.dtypes]),
        "conv_state_layout": get_conv_state_layout(),
        "cache_mode": spec.mamba_cache_mode,
        "num_speculative_blocks": str(spec.num_speculative_blocks),
        "tp_replicated": str(spec.tp_replicated),
    }
    align = math.lcm(*(dtype.itemsize for dtype in spec.dtypes))
    return Opaque("MambaSpec", spec.state_content_size_bytes, align, tuple(facts.items()))


def cache_spec(layers: Iterable[str], spec: AttentionSpec) -> CacheSpec:
    """vLLM's spec of one group, in this package's terms."""
    dtype = "nvfp4" if spec.kv_quant_mode.is_nvfp4 else str(spec.dtype).removeprefix("torch.")
    if spec.dtype == torch.uint8 and dtype != "nvfp4":
        dtype = "fp8"
    return CacheSpec(
        layers=tuple(layers),
        num_kv_heads=spec.num_kv_heads,
        head_size_k=spec.head_size,
        head_size_v=spec.head_size_v,
        block_size=spec.block_size,
        dtype=dtype,
        page_bytes=spec.unpadded_page_size_bytes,
        page_bytes_padded=spec.page_size_padded,
    )
