"""vLLM's cache specs, layouts and allocations, in the terms of ``layout``.

vLLM's engine core resolves one layout for the whole model before it plans the KV cache: the connector's wish
where every attention backend lists it, unless VLLM_KV_CACHE_LAYOUT names another. A wish that cannot be met
is dropped there with a warning. So XLayerConnector, which works with rows only, looks at what was resolved
and says who stood in the way.
"""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import KVCacheConfig

from ..layout import (
    MODEL,
    Allocation,
    BackendOffer,
    CacheSpec,
    ConnectorWish,
    Layout,
    NegotiationError,
    Refusal,
    RowDecision,
    RowDescriptor,
    RowGroup,
    allocation_of,
    negotiate,
)
from ..nvfp4 import KEY_ROTATION, OURS_FIRST, PACKED, ROTATED_KEYS, ScaleOrder
from .extension_points import CONNECTOR
from .plan import NO_CACHE, PLAN, refusals_of, row_bytes_of, row_groups

ROWS = (Layout.BLHNC, Layout.BLNHC)
"""What the connector takes. It asks for the first; the second comes from VLLM_KV_CACHE_LAYOUT only."""
LATENTS_COMPARED = ("CPU_MLA", "FLASH_ATTN_MLA", "FLASHMLA", "TRITON_MLA")
"""Backends of latent attention that answered from rows as from vLLM's own layout (docs/models.md)."""
LAYOUT_VARIABLE = "VLLM_KV_CACHE_LAYOUT"
_OLD_NAMES = {"NHD": "LBNHC", "HND": "LBHNC"}


def negotiate_rows(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> RowDecision:
    """The row that vLLM resolved and planned for a model served with XLayerConnector.

    Raises:
        NegotiationError: it is not a row, or this package cannot move it; names who refused, and why.
    """
    if not kv_cache_config.kv_cache_tensors:  # of whose layout nothing can be said
        raise NegotiationError([Refusal(ROWS[0], MODEL, NO_CACHE)])
    backends = backends_of(vllm_config)
    resolved = kv_cache_config.kv_cache_layout
    if resolved not in [layout.value for layout in ROWS]:
        raise NegotiationError(_who_refused(resolved, backends))
    layout = Layout[resolved]
    if refusals := [*refusals_of(layout, kv_cache_config), *_not_compared(layout, backends)]:
        raise NegotiationError(refusals)
    groups = row_groups(kv_cache_config)
    specs = _attention_specs(groups)
    nvfp4 = any(spec.dtype == "nvfp4" for spec in specs)
    accepted_by, refused = _negotiate_attention(layout, specs, backends)
    try:
        row = RowDescriptor(layout, row_bytes_of(kv_cache_config), groups, scale_order() if nvfp4 else None)
    except ValueError as error:
        raise NegotiationError([Refusal(layout, PLAN, str(error))]) from error
    return RowDecision(row, accepted_by, refused)


def _not_compared(layout: Layout, backends: Iterable[type[AttentionBackend]]) -> Iterator[Refusal]:
    """Backends of latent attention that might read rows as if pages lay one after another."""
    for backend in backends:
        if backend.is_mla() and backend.get_name() not in LATENTS_COMPARED:
            yield Refusal(
                layout, f"attention backend {backend.__name__}",
                "its answers from rows of latents (MLA) were not seen to equal those from vLLM's own layout; "
                f"they were with --attention-backend {' or '.join(LATENTS_COMPARED[1:])}",
            )  # fmt: skip


def _attention_specs(groups: Iterable[RowGroup]) -> list[CacheSpec]:
    contents = (page.content for group in groups for page in group.pages)
    return list(dict.fromkeys(content for content in contents if isinstance(content, CacheSpec)))


def _negotiate_attention(
    layout: Layout, specs: Sequence[CacheSpec], backends: Sequence[type[AttentionBackend]]
) -> tuple[tuple[str, ...], tuple[Refusal, ...]]:
    """(who accepted, what was refused), of the attention pages: only their backends care for the order.

    Pages of one size are agreed on together; how those of several sizes share a row is vLLM's plan.

    Raises:
        NegotiationError: somebody does not take the layout.
    """
    wish = ConnectorWish(CONNECTOR, (layout,), required=True)
    accepted_by, refused = dict.fromkeys((MODEL, wish.party)), dict[Refusal, None]()
    dtypes = {spec.dtype for spec in specs}
    offers = [offer_of(backend, dtypes) for backend in backends] or [_resolved_offer(layout, dtypes)]
    for size in dict.fromkeys(spec.page_step for spec in specs):
        alike = [spec for spec in specs if spec.page_step == size]
        decision = negotiate(alike, offers, wish)
        accepted_by = dict.fromkeys(decision.accepted_by)
        refused |= dict.fromkeys(decision.refusals)
    return tuple(accepted_by), tuple(refused)


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


def scale_order() -> ScaleOrder:
    """The order of V's scales that the kernels on this machine read: trtllm-gen on sm_100 swizzles them."""
    from vllm.platforms import current_platform

    sm_100 = current_platform.is_cuda() and current_platform.is_device_capability_family(100)
    return ScaleOrder.SWIZZLED if sm_100 else ScaleOrder.LINEAR


def nvfp4_pages() -> str | None:
    """How NVFP4 pages are kept here: ours rotate K and order bits, vLLM's own kernels (None) do not."""
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    if capability is not None and capability.major not in OURS_FIRST:
        return None
    return f"{KEY_ROTATION}, {PACKED}" if ROTATED_KEYS else PACKED
