"""vLLM's cache specs, layouts and allocations, in the terms of ``layout``.

vLLM's engine core resolves one layout for the whole model before it plans the KV cache: the connector's wish
where every attention backend lists it, unless VLLM_KV_CACHE_LAYOUT names another. A wish that cannot be met
is dropped there with a warning. So XLayerConnector, which works with rows only, looks at what was resolved
and says who stood in the way.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import cast

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from ..layout import (
    MODEL,
    Allocation,
    BackendOffer,
    CacheSpec,
    ConnectorWish,
    Decision,
    Layout,
    NegotiationError,
    Refusal,
    allocation_of,
    negotiate,
)
from ..nvfp4 import ScaleOrder
from .extension_points import CONNECTOR

ROWS = (Layout.BLHNC, Layout.BLNHC)
"""What the connector takes. It asks for the first; the second comes from VLLM_KV_CACHE_LAYOUT only."""
LAYOUT_VARIABLE = "VLLM_KV_CACHE_LAYOUT"
_OLD_NAMES = {"NHD": "LBNHC", "HND": "LBHNC"}


def negotiate_rows(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> Decision:
    """The layout in rows that vLLM resolved for a model served with XLayerConnector.

    Raises:
        NegotiationError: it is not in rows, or this package cannot move them; names who refused, and why.
    """
    backends = backends_of(vllm_config)
    resolved = kv_cache_config.kv_cache_layout
    if resolved not in [layout.value for layout in ROWS]:
        raise NegotiationError(_who_refused(resolved, backends))
    groups = groups_with_own_pages(kv_cache_config)
    if refusals := list(_strange_pages(Layout[resolved], groups)):
        raise NegotiationError(refusals)
    specs = [group_spec(group) for group in groups]
    dtypes = {spec.dtype for spec in specs}
    offers = [offer_of(backend, dtypes) for backend in backends]
    wish = ConnectorWish(CONNECTOR, (Layout[resolved],), required=True)
    return negotiate(specs, offers or [_resolved_offer(Layout[resolved], dtypes)], wish)


def groups_with_own_pages(kv_cache_config: KVCacheConfig) -> list[KVCacheGroupSpec]:
    """The groups without layers that reuse another layer's pages (the runners add those to the groups)."""
    own = {name for tensor in kv_cache_config.kv_cache_tensors for name in tensor.layers}
    return [
        replace(group, layer_names=[name for name in group.layer_names if name in own])
        for group in kv_cache_config.kv_cache_groups
    ]


def allocations(kv_caches: Mapping[str, torch.Tensor]) -> dict[str, Allocation]:
    """What the engine allocated for each layer, as `layout.check_allocation` compares it."""
    return {name: allocation_of(tensor) for name, tensor in kv_caches.items()}


def backends_of(vllm_config: VllmConfig) -> list[type[AttentionBackend]]:
    """The attention backends of this process's layers, each once; none in a process without layers."""
    layers = vllm_config.compilation_config.static_forward_context.values()
    found = (layer.get_attn_backend() for layer in layers if hasattr(layer, "get_attn_backend"))
    return list(dict.fromkeys(found))


def offer_of(backend: type[AttentionBackend], dtypes: Iterable[str]) -> BackendOffer:
    """What a backend's kernels read, in this package's terms.

    Args:
        dtypes: KV dtypes of `CacheSpec`.
    """
    listed = backend.supported_kv_cache_layouts()
    known = frozenset(Layout)
    accepted = (
        known if listed is None else known & {Layout[x.name] for x in listed if x.name in Layout.__members__}
    )
    refuses = {}
    if "nvfp4" in dtypes and scale_order() is ScaleOrder.SWIZZLED:
        untried = (
            "rows of NVFP4 pages have not been tried with upstream's kernels for compute capability 10.x"
        )
        refuses = {("nvfp4", layout): untried for layout in ROWS}
    return BackendOffer(backend.__name__, dict.fromkeys(dtypes, accepted), refuses, (scale_order(),))


def _resolved_offer(layout: Layout, dtypes: Iterable[str]) -> BackendOffer:
    """For a process without layers: the backends, in another process, have accepted what was resolved."""
    return BackendOffer("of the workers", dict.fromkeys(dtypes, frozenset({layout})), {}, (scale_order(),))


def _who_refused(resolved: str | None, backends: Sequence[type[AttentionBackend]]) -> list[Refusal]:
    """Why the layout that vLLM resolved is not in rows."""
    asked = os.environ.get(LAYOUT_VARIABLE)
    if asked is not None and _OLD_NAMES.get(asked, asked) == resolved:
        reason = f"it is {asked}, and goes before every connector: unset it, or set it to {ROWS[0].value}"
        return [Refusal(ROWS[0], f"the environment variable {LAYOUT_VARIABLE}", reason)]
    refusals = []
    for backend in backends:
        listed = backend.supported_kv_cache_layouts()
        if listed is not None and ROWS[0].value not in (names := [layout.name for layout in listed]):
            party = f"attention backend {backend.__name__}"
            refusals.append(Refusal(ROWS[0], party, f"its kernels read {', '.join(names)} only"))
    if refusals:
        return refusals
    reason = (
        f"it resolved {resolved}, though no attention backend of this process is against rows: another "
        f"connector may have asked for it. {LAYOUT_VARIABLE}={ROWS[0].value} goes before every connector"
    )
    return [Refusal(ROWS[0], "vLLM", reason)]


def _strange_pages(layout: Layout, groups: Iterable[KVCacheGroupSpec]) -> Iterator[Refusal]:
    """Groups whose pages this package cannot describe."""
    for group in groups:
        spec, layer = group.kv_cache_spec, group.layer_names[0]
        if not _is_plain(spec):
            kind = type(spec).__name__
            yield Refusal(
                layout, MODEL, f"rows hold pages of full or sliding-window attention, got {kind} ({layer})"
            )
        elif cast(AttentionSpec, spec).num_head_slots not in (None, cast(AttentionSpec, spec).num_kv_heads):
            yield Refusal(
                layout, f"the attention backend of {layer}",
                "K and V have head slots of their own in its pages, which XLayerConnector does not know; "
                "--attention-backend CUSTOM is this package's, for --kv-cache-dtype nvfp4",
            )  # fmt: skip


def _is_plain(spec: KVCacheSpec) -> bool:
    return isinstance(spec, FullAttentionSpec | SlidingWindowSpec) and not isinstance(spec, MLAAttentionSpec)


def group_spec(group: KVCacheGroupSpec) -> CacheSpec:
    """vLLM's spec of one group of attention layers, in this package's terms."""
    assert isinstance(group.kv_cache_spec, AttentionSpec)
    return cache_spec(group.layer_names, group.kv_cache_spec)


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


def scale_order() -> ScaleOrder:
    """The order of V's scales that the kernels on this machine read: trtllm-gen on sm_100 swizzles them."""
    from vllm.platforms import current_platform

    sm_100 = current_platform.is_cuda() and current_platform.is_device_capability_family(100)
    return ScaleOrder.SWIZZLED if sm_100 else ScaleOrder.LINEAR
