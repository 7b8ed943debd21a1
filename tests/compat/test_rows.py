"""Rows: what vLLM resolves and allocates is what was negotiated, byte for byte, or somebody is named."""

import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.kv_cache_interface import (
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVQuantMode,
    MLAAttentionSpec,
    SlidingWindowSpec,
    SparseCacheRole,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from vllm_xlayer.attention.backend import NVFP4Backend
from vllm_xlayer.attention.cpu import CpuReferenceBackend
from vllm_xlayer.attention.cpu_mla import CpuMlaBackend
from vllm_xlayer.compat import rows
from vllm_xlayer.layout import (
    AllocationError,
    Layout,
    NegotiationError,
    check_allocation,
    page_view,
)
from vllm_xlayer.nvfp4 import ScaleOrder

NUM_BLOCKS = 5


class LayerMajorBackend(CpuReferenceBackend):
    @classmethod
    def supported_kv_cache_layouts(cls):
        return (KVCacheLayout.LBNHC,)


def spec_of(cls, dtype: str, **more):
    nvfp4 = dtype == "nvfp4"
    spec = cls(
        block_size=16, num_kv_heads=2, head_size=64,
        dtype=torch.uint8 if nvfp4 else getattr(torch, dtype),
        kv_quant_mode=KVQuantMode.NVFP4 if nvfp4 else KVQuantMode.NONE, **more,
    )  # fmt: skip
    return (NVFP4Backend if nvfp4 else CpuReferenceBackend).customize_spec(spec)


def one_group(dtype):
    return [KVCacheGroupSpec([f"layers.{i}" for i in range(3)], spec_of(FullAttentionSpec, dtype))]


def hybrid(dtype):
    window = spec_of(SlidingWindowSpec, dtype, sliding_window=32)
    return [
        KVCacheGroupSpec(["full.0", "full.1"], spec_of(FullAttentionSpec, dtype)),
        KVCacheGroupSpec(["window.0", "window.1"], window),
        KVCacheGroupSpec(["window.2"], window),
    ]


def config_with(*backends):
    """As much of a VllmConfig as is read, in a worker whose layers have these backends."""
    layers = {str(i): SimpleNamespace(get_attn_backend=lambda b=b: b) for i, b in enumerate(backends)}
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))


def planned(groups, layout: str):
    """vLLM's plan for a layout that it resolved."""
    from vllm.config import CacheConfig

    cache = CacheConfig(num_gpu_blocks_override=NUM_BLOCKS)
    cache.kv_cache_layout = layout
    config = SimpleNamespace(cache_config=cache, attention_config=SimpleNamespace(hisparse_config=None))
    moved = importlib.util.find_spec("vllm.v1.core.kv_cache_planning") is not None  # since 0.32 or 0.33
    planning = importlib.import_module(f"vllm.v1.core.{'kv_cache_planning' if moved else 'kv_cache_utils'}")
    plan = planning.get_kv_cache_config_from_groups(config, groups, 1 << 30)
    plan.kv_cache_layout = layout
    return plan


@pytest.mark.parametrize("in_a_worker", [True, False])
@pytest.mark.parametrize("layout", ["BLHNC", "BLNHC"])
@pytest.mark.parametrize("make_groups", [one_group, hybrid])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "nvfp4"])
def test_allocation_is_the_decision(make_groups, dtype, layout, in_a_worker):
    if dtype == "nvfp4" and layout == "BLNHC":
        pytest.skip("an NVFP4 page has heads outside tokens")
    groups = make_groups(dtype)
    plan = planned(groups, layout)
    backends = [LayerlessBackend] if in_a_worker else []
    descriptor = rows.negotiate_rows(config_with(*backends), plan).descriptor
    assert descriptor.layout is Layout[layout]
    caches = allocate_kv_cache(plan, torch.device("cpu"), KVCacheLayout[layout])
    check_allocation(descriptor, rows.allocations(caches))
    pool = next(iter(caches.values()))
    pool = torch.empty(0, dtype=torch.uint8).set_(pool.untyped_storage())
    assert pool.numel() == NUM_BLOCKS * descriptor.row_bytes
    for name, cache in caches.items():
        view = page_view(pool, descriptor.uniform, name)
        assert (view.data_ptr(), view.shape) == (cache.data_ptr(), cache.shape)
        assert view.stride() == cache.stride()


class LayerlessBackend(CpuReferenceBackend):
    """Reads every layout, as most of vLLM's backends on a GPU."""

    @classmethod
    def supported_kv_cache_layouts(cls):
        return None


def test_an_allocation_that_is_not_in_rows_is_seen():
    groups = one_group("bfloat16")
    descriptor = rows.negotiate_rows(config_with(), planned(groups, "BLHNC")).descriptor
    caches = allocate_kv_cache(planned(groups, "LBHNC"), torch.device("cpu"), KVCacheLayout.LBHNC)
    with pytest.raises(AllocationError, match=r"layers\.1: expected"):
        check_allocation(descriptor, rows.allocations(caches))


@pytest.mark.parametrize(("left_over", "resolved"), [("HND", "LBHNC"), ("NHD", "LBNHC"), ("LBHNC", "LBHNC")])
def test_a_left_over_variable_is_named(monkeypatch, left_over, resolved):
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", left_over)
    said = rf"VLLM_KV_CACHE_LAYOUT: it is {left_over}, .*unset it, or set it to BLHNC"
    with pytest.raises(NegotiationError, match=said):
        rows.negotiate_rows(config_with(CpuReferenceBackend), planned(one_group("bfloat16"), resolved))


def test_the_backend_that_refused_is_named(monkeypatch):
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    config = config_with(CpuReferenceBackend, LayerMajorBackend, LayerMajorBackend)
    with pytest.raises(NegotiationError) as raised:
        rows.negotiate_rows(config, planned(one_group("bfloat16"), "LBNHC"))
    (refusal,) = raised.value.refusals
    assert refusal.party == "attention backend LayerMajorBackend"
    assert "its kernels read LBNHC only" in refusal.reason


def test_another_connectors_wish_is_suspected(monkeypatch):
    monkeypatch.delenv("VLLM_KV_CACHE_LAYOUT", raising=False)
    with pytest.raises(NegotiationError, match=r"it resolved LBHNC.*another connector.*=BLHNC"):
        rows.negotiate_rows(config_with(CpuReferenceBackend), planned(one_group("bfloat16"), "LBHNC"))


LATENTS = [
    KVCacheGroupSpec(
        ["a", "b"], MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    )
]


def test_latents_are_opaque_pages():
    """And what is said of them tells one engine's from another's."""
    row = rows.negotiate_rows(config_with(CpuMlaBackend), planned(LATENTS, "BLHNC")).descriptor
    (group,) = row.groups
    assert group.kinds == ("MLAAttentionSpec",) and row.has_opaque
    assert [(page.offset, page.content.page_bytes) for page in group.pages] == [(0, 18432), (18432, 18432)]
    for change in (dict(cache_dtype_str="fp8_ds_mla"), dict(cache_role=SparseCacheRole.INDEXER)):
        spec = replace(LATENTS[0].kv_cache_spec, **change)
        plan = planned([KVCacheGroupSpec(["a", "b"], spec)], "BLHNC")
        other = rows.negotiate_rows(config_with(CpuMlaBackend), plan).descriptor
        assert other.row_bytes == row.row_bytes and other.fingerprint != row.fingerprint


def test_latents_of_kernels_that_were_not_compared_are_refused():
    class Untried(CpuMlaBackend):
        @staticmethod
        def get_name():
            return "CUTLASS_MLA"

    with pytest.raises(
        NegotiationError,
        match=r"attention backend Untried: .* with --attention-backend FLASH_ATTN_MLA or FLASHMLA or TRITON",
    ):
        rows.negotiate_rows(config_with(Untried), planned(LATENTS, "BLHNC"))


def test_pages_that_cannot_be_described_are_refused():
    spec = CrossAttentionSpec(block_size=16, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)
    groups = [KVCacheGroupSpec(["a"], spec)]
    with pytest.raises(
        NegotiationError,
        match=r"model: pages of CrossAttentionSpec \(a\) are not known.*with no KV connector",
    ):
        rows.negotiate_rows(config_with(), planned(groups, "BLHNC"))


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
def test_a_model_without_a_kv_cache_is_told_so(layout):
    """An encoder's, say; of its layout nothing can be said."""
    plan = KVCacheConfig(num_blocks=1, kv_cache_tensors=[], kv_cache_groups=[], kv_cache_layout=layout)
    with pytest.raises(NegotiationError, match=r"it has no layers with a KV cache.*leave --kv-conn"):
        rows.negotiate_rows(config_with(), plan)


def test_nvfp4_pages_of_another_backend_are_refused():
    """FlashInfer keeps K and V in head slots of their own: the same bytes, but nobody has compared them."""
    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=64, dtype=torch.uint8, kv_quant_mode=KVQuantMode.NVFP4,
        num_head_slots=4, state_content_bytes=36,
    )  # fmt: skip
    with pytest.raises(NegotiationError, match=r"attention backend of a: .*--attention-backend CUSTOM"):
        rows.negotiate_rows(config_with(), planned([KVCacheGroupSpec(["a"], spec)], "BLHNC"))


def test_layers_that_share_pages_are_left_out():
    plan = planned(one_group("bfloat16"), "BLHNC")
    plan.kv_cache_groups[0].layer_names.append("shares.0")
    (group,) = rows.negotiate_rows(config_with(), plan).descriptor.groups
    assert list(group.layers) == ["layers.0", "layers.1", "layers.2"]


def test_swizzled_pages_are_not_laid_in_rows(monkeypatch):
    """vLLM's NVFP4 kernels for sm_100 were never tried with rows: nothing may assume that they work."""
    assert rows.offer_of(NVFP4Backend, ["nvfp4"]).problem(Layout.BLHNC, "nvfp4") is None
    monkeypatch.setattr(rows, "scale_order", lambda: ScaleOrder.SWIZZLED)
    offer = rows.offer_of(NVFP4Backend, ["nvfp4"])
    assert "not been tried" in offer.problem(Layout.BLHNC, "nvfp4")
    assert offer.scale_orders == (ScaleOrder.SWIZZLED,)


def test_vllm_resolves_our_wish_where_our_backends_are():
    from vllm.v1.attention.backends.utils import get_supported_kv_cache_layouts

    for backend in (NVFP4Backend, CpuReferenceBackend):
        found = get_supported_kv_cache_layouts([backend, LayerlessBackend])
        assert [layout.name for layout in found] == ["LBHNC", "BLHNC"]


@pytest.mark.parametrize(("kv_heads", "copies"), [(None, 2), (1, 1), (2, 1)])
def test_only_of_latents_vllm_says_that_ranks_have_equal_rows(kv_heads, copies):
    """XLayerConnector keeps one row for all ranks where it does; not of a draft's heads beside latents."""
    try:
        from vllm.v1.core.kv_cache_planning import kv_cache_groups_tp_replicas
    except ImportError:  # vLLM 0.31
        from vllm.v1.core.kv_cache_utils import kv_cache_groups_tp_replicas

    latents = MLAAttentionSpec(
        block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16, max_tp_shards=1
    )
    groups = [KVCacheGroupSpec(["layers.0"], latents)]
    if kv_heads is not None:
        heads = FullAttentionSpec(block_size=16, num_kv_heads=kv_heads, head_size=64, dtype=torch.bfloat16)
        groups.append(KVCacheGroupSpec(["draft.0"], heads))
    assert kv_cache_groups_tp_replicas(groups, 2) == copies
