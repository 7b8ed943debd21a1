"""Rows of every family of models, planned by vLLM itself, equal tables made by hand; nonsense is refused."""

import importlib
import importlib.util
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from test_rows import LayerlessBackend, config_with, hybrid, one_group, spec_of
from vllm.config import CacheConfig
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum
from vllm.v1.kv_cache_interface import (
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVQuantMode,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.kv_cache_layout import KVCacheLayout
from vllm.v1.worker.utils import allocate_kv_cache

from vllm_xlayer.attention.backend import NVFP4Backend
from vllm_xlayer.attention.cpu import CpuReferenceBackend
from vllm_xlayer.compat import plan as module
from vllm_xlayer.compat import rows
from vllm_xlayer.layout import AllocationError, NegotiationError, check_allocation

NUM_BLOCKS = 3
RECORDED = {
    ("one_group", "bfloat16", "BLHNC"): "b6a6f3b59dbee7c0f2e87fbc77417ea5",
    ("one_group", "bfloat16", "BLNHC"): "4ec7c475348aa97af2b3fd7ece492a3e",
    ("hybrid", "bfloat16", "BLHNC"): "71d349ec0e4f5cd368e9b608658598b5",
    ("hybrid", "bfloat16", "BLNHC"): "6d6390f46e7653d3353e54167165fc43",
    ("one_group", "float32", "BLHNC"): "5d5aa40c0adee65b56663ecbbd31626a",
    ("one_group", "float32", "BLNHC"): "86be2e4c14da0347e89780f266c38284",
    ("hybrid", "float32", "BLHNC"): "c00f9d20aa5e395e432e24cf2ab8262b",
    ("hybrid", "float32", "BLNHC"): "f4393c441a1eb364c0b2a8f8fd751857",
    ("one_group", "nvfp4", "BLHNC"): "983d77372b0e55066665e090caf488eb",
    ("hybrid", "nvfp4", "BLHNC"): "1a32801df257b69709361a54a07388a4",
    ("padded", "bfloat16", "BLHNC"): "bb71b8d0fd5cf0273ba56b40c6b23f0d",
}
"""Fingerprints as the first version of the descriptor, with pages of one size only, gave them."""


def padded(dtype):
    spec = replace(spec_of(FullAttentionSpec, dtype), page_size_padded=8192 + 256)
    return [KVCacheGroupSpec(["a", "b"], spec)]


def planning(name):
    """A planning function of vLLM's; 0.33 has them in a module of their own."""
    new = "vllm.v1.core.kv_cache_planning"
    found = importlib.import_module(new) if importlib.util.find_spec(new) else None
    return getattr(found, name, None) or getattr(importlib.import_module("vllm.v1.core.kv_cache_utils"), name)


def vllm_config(layout="BLHNC"):
    """As much of a VllmConfig as vLLM's planning reads."""
    cache = CacheConfig(num_gpu_blocks_override=NUM_BLOCKS)
    cache.kv_cache_layout = layout
    return SimpleNamespace(
        cache_config=cache,
        attention_config=SimpleNamespace(hisparse_config=None),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
        speculative_config=None,
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        model_config=SimpleNamespace(max_model_len=8192),
        kv_transfer_config=None,
    )


def plan_of(groups, layout="BLHNC"):
    found = planning("get_kv_cache_config_from_groups")(vllm_config(layout), groups, 1 << 40)
    found.kv_cache_layout = layout
    return found


def plan_of_layers(specs, layout="BLHNC"):
    return plan_of(planning("get_kv_cache_groups")(vllm_config(layout), specs), layout)


def attention(block, heads, size, dtype="nvfp4", cls=FullAttentionSpec, **more):
    nvfp4 = dtype == "nvfp4"
    spec = cls(
        block_size=block, num_kv_heads=heads, head_size=size,
        dtype=torch.uint8 if nvfp4 else getattr(torch, dtype),
        kv_quant_mode=KVQuantMode.NVFP4 if nvfp4 else KVQuantMode.NONE, **more,
    )  # fmt: skip
    return (NVFP4Backend if nvfp4 else CpuReferenceBackend).customize_spec(spec)


def states(block, page, *parts, kind="GDN_ATTN"):
    """parts: (shape, dtype) of each state of a layer. page: bytes to which vLLM pads them."""
    return MambaSpec(
        block_size=block, shapes=tuple(shape for shape, _ in parts),
        dtypes=tuple(getattr(torch, dtype) for _, dtype in parts), page_size_padded=page,
        mamba_type=MambaAttentionBackendEnum[kind], mamba_cache_mode="align",
    )  # fmt: skip


def pattern(**kinds):
    """A model's layers in order: pattern(full=(spec, [3, 7])) -> {"layers.3.full": spec, ...}."""
    found = [(i, f"layers.{i}.{kind}", spec) for kind, (spec, at) in kinds.items() for i in at]
    return {name: spec for _, name, spec in sorted(found, key=lambda entry: entry[0])}


def table(descriptor):
    """What a row is: its bytes, and of each group (block size, layers, kind, step, used bytes)."""
    groups = []
    for i, group in enumerate(descriptor.groups):
        steps = {b.offset - a.offset for a, b in zip(group.pages, group.pages[1:], strict=False)}
        groups.append((group.block_size, len(group.pages), group.kinds, steps, descriptor.used_bytes(i)))
    return descriptor.row_bytes, groups


def qwen3_next(block, dtype, mtp=False):
    """48 layers, 3 of 4 gated delta net; bfloat16 states: conv 8192 x 3, ssm 32 x 128 x 128."""
    full = attention(block, 2, 256, dtype)
    page = full.page_size_bytes
    gdn = states(block, page, ((3, 8192), "bfloat16"), ((32, 128, 128), "bfloat16"))
    at = [i for i in range(48) if i % 4 == 3]
    extra = [48] if mtp else []
    return pattern(full=(full, at + extra), gdn=(gdn, [i for i in range(48) if i % 4 != 3]))


GDN_STATES = 3 * 8192 * 2 + 32 * 128 * 128 * 2
PAGES = {"nvfp4": 2 * 1920 * 288, "bfloat16": 2 * 576 * 1024}


@pytest.mark.parametrize(("block", "dtype"), [(1920, "nvfp4"), (576, "bfloat16")])
def test_qwen3_next(block, dtype):
    page = PAGES[dtype]
    descriptor = described(plan_of_layers(qwen3_next(block, dtype)))
    row, groups = table(descriptor)
    assert row == 12 * page and len(groups) == 4
    states_used = 11 * page + GDN_STATES
    assert sorted(groups, key=str) == sorted(
        [(block, 12, (dtype,), {page}, 12 * page), *[(block, 12, ("MambaSpec",), {page}, states_used)] * 3],
        key=str,
    )
    state_page = descriptor.page_of("layers.0.gdn")
    assert state_page.content.page_bytes == GDN_STATES and state_page.content.align == 2


def test_one_more_attention_layer_leaves_the_end_of_a_states_row_unused():
    """As a Qwen3-Next with a draft layer: 13 attention layers, 36 with states."""
    page = PAGES["nvfp4"]
    row, groups = table(described(plan_of_layers(qwen3_next(1920, "nvfp4", mtp=True))))
    widest = max(layers for _, layers, *_ in groups)
    assert row == widest * page and sum(layers for _, layers, *_ in groups) == 49
    for _, layers, (kind,), _, used in groups:
        end = page if kind == "nvfp4" else GDN_STATES
        assert used == (layers - 1) * page + end <= row


def test_lfm2():
    """16 layers: 6 of attention, 10 short convolutions of 2 x 2048, smaller than the page of 16 tokens."""
    full = attention(16, 8, 64)
    page = 8 * 16 * 72
    conv = states(16, page, ((2, 2048), "bfloat16"), kind="SHORT_CONV")
    at = [2, 5, 8, 10, 12, 14]
    layers = pattern(full=(full, at), conv=(conv, [i for i in range(16) if i not in at]))
    descriptor = described(plan_of_layers(layers))
    conv_groups = [(16, 5, ("MambaSpec",), {page}, 4 * page + 8192)] * 2
    row, groups = table(descriptor)
    assert row == 6 * page
    assert sorted(groups, key=str) == sorted([*conv_groups, (16, 6, ("nvfp4",), {page}, 6 * page)], key=str)
    conv_group = next(i for i, group in enumerate(descriptor.groups) if group.kinds == ("MambaSpec",))
    gaps = list(descriptor.gaps(conv_group))
    assert gaps[0] == (8192, page) and gaps[-1] == (4 * page + 8192, 6 * page) and len(gaps) == 5


def test_nemotron():
    """29 layers with pages: 6 of attention, 23 of Mamba2 in float32, in groups that need not be equal."""
    full = attention(7424, 2, 128)
    page = 2 * 7424 * 144
    mamba = states(7424, page, ((3, 6144), "bfloat16"), ((64, 64, 128), "float32"), kind="MAMBA2")
    layers = pattern(full=(full, [5, 10, 15, 20, 25, 28]), mamba=(mamba, [
        i for i in range(29) if i not in (5, 10, 15, 20, 25, 28)]))  # fmt: skip
    descriptor = described(plan_of_layers(layers))
    row, groups = table(descriptor)
    assert row == 6 * page
    assert sorted(layers for _, layers, (kind,), *_ in groups if kind == "MambaSpec") == [5, 6, 6, 6]
    assert [layers for _, layers, (kind,), *_ in groups if kind == "nvfp4"] == [6]
    assert descriptor.page_of("layers.0.mamba").content.align == 4


def test_gpt_oss():
    window = attention(16, 8, 64, cls=SlidingWindowSpec, sliding_window=128)
    layers = pattern(full=(attention(16, 8, 64), range(1, 24, 2)), window=(window, range(0, 24, 2)))
    descriptor = described(plan_of_layers(layers))
    page = 8 * 16 * 72
    assert table(descriptor) == (12 * page, [(16, 12, ("nvfp4",), {page}, 12 * page)] * 2)
    assert descriptor.uniform is not None and descriptor.to_dict()["version"] == 1


def test_gpt_oss_with_a_draft_of_other_pages():
    """Two sizes of pages in one row: as an EAGLE draft layer makes them."""
    window = attention(16, 8, 64, cls=SlidingWindowSpec, sliding_window=128)
    layers = pattern(
        full=(attention(16, 8, 64), range(1, 24, 2)),
        window=(window, range(0, 24, 2)),
        draft=(attention(16, 8, 128, "bfloat16"), [24]),
    )
    descriptor = described(plan_of_layers(layers))
    small, large = 8 * 16 * 72, 8 * 16 * 512
    assert sorted({size for group in descriptor.groups for size in sizes(group)}) == [small, large]
    assert descriptor.uniform is None and descriptor.to_dict()["version"] == 2
    assert descriptor.scale_order is not None


def sizes(group):
    return [page.content.page_bytes for page in group.pages]


def test_gemma_4():
    """60 layers, 10 of them global with half a page: rows hold 5 pages of windows, or 10 of the others."""
    window = attention(16, 16, 256, "bfloat16", cls=SlidingWindowSpec, sliding_window=1024)
    page = window.page_size_bytes
    full = attention(16, 4, 512, "bfloat16")
    assert 2 * full.page_size_bytes == page
    at = range(5, 60, 6)
    layers = pattern(full=(full, at), window=(window, [i for i in range(60) if i not in at]))
    descriptor = described(plan_of_layers(layers))
    row, groups = table(descriptor)
    assert row == 5 * page and len(groups) == 11
    assert [(n, steps, used) for _, n, _, steps, used in groups].count((5, {page}, 5 * page)) == 10
    assert (10, {page // 2}, 5 * page) in [(n, steps, used) for _, n, _, steps, used in groups]


def described(plan):
    """The descriptor, after everything that it says was compared with vLLM's allocation."""
    descriptor = rows.negotiate_rows(config_with(LayerlessBackend), plan).descriptor
    caches = allocate_kv_cache(plan, torch.device("meta"), KVCacheLayout[plan.kv_cache_layout])
    check_allocation(descriptor, rows.allocations(caches))
    return descriptor


@pytest.mark.parametrize(("make", "dtype", "layout"), RECORDED)
def test_models_of_the_first_version_keep_their_fingerprints(make, dtype, layout):
    groups = {"one_group": one_group, "hybrid": hybrid, "padded": padded}[make](dtype)
    descriptor = rows.negotiate_rows(config_with(), plan_of(groups, layout)).descriptor
    assert descriptor.fingerprint == RECORDED[make, dtype, layout]


@pytest.mark.parametrize(
    "change",
    [
        dict(shapes=((3, 4096), (32, 128, 128)), page_size_padded=PAGES["nvfp4"]),
        dict(dtypes=(torch.bfloat16, torch.float16)),
        dict(mamba_type=MambaAttentionBackendEnum.MAMBA2),
        dict(num_speculative_blocks=1),
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_states_bytes_mean_is_in_the_fingerprint(change):
    layers = qwen3_next(1920, "nvfp4")
    other = {name: replace(s, **change) if isinstance(s, MambaSpec) else s for name, s in layers.items()}
    first, second = (
        rows.negotiate_rows(config_with(), plan_of_layers(x)).descriptor for x in (layers, other)
    )
    assert first.row_bytes == second.row_bytes and first.fingerprint != second.fingerprint


def test_the_order_inside_a_convolutions_state_is_in_the_fingerprint(monkeypatch):
    plan = plan_of_layers(qwen3_next(1920, "nvfp4"))
    digests = set()
    for order in ("SD", "DS"):
        monkeypatch.setattr(module, "get_conv_state_layout", lambda order=order: order)
        digests.add(rows.negotiate_rows(config_with(), plan).descriptor.fingerprint)
    assert len(digests) == 2


def small_plan():
    full, page = attention(16, 2, 64), 2 * 16 * 72
    conv = states(16, page, ((2, 64), "float32"), kind="SHORT_CONV")
    return plan_of_layers(pattern(full=(full, [1, 3]), conv=(conv, [0, 2])))


def set_tensor(index, **changes):
    def change(plan):
        plan.kv_cache_tensors[index] = replace(plan.kv_cache_tensors[index], **changes)

    return change


def test_a_plan_that_is_a_row():
    assert described(small_plan()).row_bytes == 2 * 2304


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_tensor(0, offset=2304), r"layers\.\d\.\w+: expected a page inside the row's 4608 bytes"),
        (set_tensor(0, layer_stride=2000), r"layers\.\d\.\w+: expected pages 2304 bytes apart, got 2000"),
        (set_tensor(0, block_stride=2304), r"layers\.\d\.\w+: expected blocks 4608 bytes apart .* got 2304"),
        (set_tensor(1, size=1), r"layers\.\d\.\w+: expected one allocation for all layers"),
        (set_tensor(1, host_resident=True), r"layers\.\d\.\w+: expected one allocation for all layers"),
    ],
    ids=["past the end", "overlap", "stride", "size", "host"],
)
def test_plans_that_are_no_rows_name_the_layer(change, message):
    plan = small_plan()
    change(plan)
    with pytest.raises(NegotiationError, match=message):
        rows.negotiate_rows(config_with(), plan)


def test_a_row_that_is_not_whole_is_refused():
    plan = small_plan()
    for i in range(len(plan.kv_cache_tensors)):
        set_tensor(i, size=4608 * NUM_BLOCKS + 1)(plan)
    with pytest.raises(NegotiationError, match="expected whole rows of 3 blocks, got 13825 bytes"):
        rows.negotiate_rows(config_with(), plan)


def test_nvfp4_rows_are_multiples_of_16_bytes():
    plan = small_plan()
    for i in range(len(plan.kv_cache_tensors)):
        set_tensor(i, size=4612 * NUM_BLOCKS, block_stride=4612)(plan)
    with pytest.raises(NegotiationError, match="row: expected a multiple of 16 bytes with nvfp4, got 4612"):
        rows.negotiate_rows(config_with(), plan)


def test_states_that_lie_elsewhere_are_seen():
    plan = small_plan()
    descriptor = rows.negotiate_rows(config_with(), plan).descriptor
    caches = rows.allocations(allocate_kv_cache(plan, torch.device("meta"), KVCacheLayout.BLHNC))
    state = next(name for name in caches if name.endswith("conv"))
    wrong = caches[state]._replace(offset=caches[state].offset + 4)
    with pytest.raises(AllocationError, match=rf"{state}: expected shape \(3,\), strides \(4608,\) bytes"):
        check_allocation(descriptor, caches | {state: wrong})
    stride = caches[state]._replace(strides=(2304, *caches[state].strides[1:]))
    with pytest.raises(AllocationError, match=state):
        check_allocation(descriptor, caches | {state: stride})


def test_the_schedulers_copy_of_a_plan_describes_the_same_offsets():
    """It keeps one spec for the layers of a group that have several."""
    layers = pattern(a=(attention(16, 8, 64, "bfloat16"), [0, 1]), b=(attention(16, 8, 128, "bfloat16"), [2]))
    plan = plan_of_layers(layers)
    (worker,) = rows.negotiate_rows(config_with(), plan).descriptor.groups
    scheduler_plan = planning("generate_scheduler_kv_cache_config")([plan])
    scheduler_plan.kv_cache_layout = "BLHNC"
    (scheduler,) = rows.negotiate_rows(config_with(), scheduler_plan).descriptor.groups
    assert [(p.layer, p.offset, p.end) for p in scheduler.pages] == [
        (p.layer, p.offset, p.end) for p in worker.pages
    ]


def test_kinds_of_pages_that_nobody_looked_at_are_refused():
    spec = CrossAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    with pytest.raises(NegotiationError, match=r"model: pages of CrossAttentionSpec \(a\) are not known"):
        rows.negotiate_rows(config_with(), plan_of([KVCacheGroupSpec(["a"], spec)]))


@pytest.mark.parametrize(("heads", "size"), [(2, 256), (8, 64), (2, 128)])
def test_vllm_counts_an_nvfp4_page_as_it_is(heads, size):
    """It sizes the blocks of hybrids with one token's page: 9 bytes for 8 elements of K and V together."""
    assert attention(1, heads, size).page_size_bytes == heads * size * 9 // 8
