"""Who accepts, who refuses, and why: every refusal names its party."""

import copy
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_xlayer.layout import (
    MODEL,
    BackendOffer,
    CacheSpec,
    ConnectorWish,
    Layout,
    LayoutDescriptor,
    NegotiationError,
    negotiate,
)
from vllm_xlayer.nvfp4 import ScaleOrder

ALL = frozenset(Layout)
NVFP4 = CacheSpec(("a", "b"), 2, 64, 64, 16, "nvfp4", 2 * 16 * 72)
BF16 = CacheSpec(("a", "b"), 2, 64, 64, 16, "bfloat16", 2 * 16 * 128 * 2)
FLASH = BackendOffer("FLASH_ATTN", {"bfloat16": ALL})
INFER = BackendOffer("FLASHINFER", {"bfloat16": ALL, "nvfp4": ALL}, scale_orders=(ScaleOrder.LINEAR,))
B200 = BackendOffer("TRTLLM", {"nvfp4": ALL}, scale_orders=(ScaleOrder.SWIZZLED, ScaleOrder.LINEAR))


def nvfp4(**changes):
    fields = {
        "layers": ("a", "b"),
        "num_kv_heads": 2,
        "head_size_k": 64,
        "head_size_v": 64,
        "block_size": 16,
        "dtype": "nvfp4",
        "page_bytes": 2 * 16 * 72,
    } | changes
    return CacheSpec(**fields)


def wish(*layouts, required=False):
    return ConnectorWish("XLayerConnector", layouts, required)


def refusals_of(decision, layout):
    return [(r.party, r.reason) for r in decision.refusals if r.layout is layout]


def test_rows_are_the_default_and_nobody_gets_head_sliced_rows_unasked():
    decision = negotiate([BF16], [FLASH])
    assert decision.descriptor.layout is Layout.BLHNC
    assert decision.accepted_by == (MODEL, "attention backend FLASH_ATTN")
    assert decision.refusals == ()
    only_bhlnc = BackendOffer("ODD", {"bfloat16": frozenset({Layout.BHLNC})})
    with pytest.raises(NegotiationError):
        negotiate([BF16], [only_bhlnc])
    assert negotiate([BF16], [only_bhlnc], wish(Layout.BHLNC)).descriptor.layout is Layout.BHLNC


def test_the_connectors_order_decides_among_what_is_accepted():
    decision = negotiate([BF16], [FLASH], wish(Layout.BHLNC, Layout.BLHNC))
    assert decision.descriptor.layout is Layout.BHLNC
    assert decision.accepted_by[-1] == "connector XLayerConnector"


@pytest.mark.parametrize(
    ("layout", "reason"),
    [
        (Layout.BHLNC, "layers would overwrite each other"),
        (Layout.BLNHC, "K and V of a head are not contiguous halves"),
        (Layout.LBNHC, "K and V of a head are not contiguous halves"),
    ],
)
def test_nvfp4_is_refused_where_its_page_is_not_dense_and_head_major(layout, reason):
    decision = negotiate([NVFP4], [INFER], wish(layout))
    assert decision.descriptor.layout is Layout.BLHNC
    ((party, said),) = refusals_of(decision, layout)
    assert party == MODEL and reason in said and "nvfp4" in said and layout.value in said
    with pytest.raises(NegotiationError) as caught:
        negotiate([NVFP4], [INFER], wish(layout, required=True))
    assert f"{layout.value} refused by model: a .. b (2 layers): nvfp4" in str(caught.value)
    (line,) = (line for line in str(caught.value).splitlines() if "refused by connector" in line)
    others, said = line.strip().split(" refused by ")
    assert said == f"connector XLayerConnector: requires {layout.value}"
    assert "BLHNC" in others.split(", ") and layout.value not in others.split(", ")
    with pytest.raises(ValueError, match=reason):
        LayoutDescriptor(layout, (NVFP4,), ScaleOrder.LINEAR)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (
            nvfp4(head_size_v=128, page_bytes=2 * 16 * 108),
            "nvfp4 needs K and V heads of one size, got head_size_k 64 and head_size_v 128",
        ),
        (nvfp4(head_size_k=72, head_size_v=72), "head_size_k: expected a multiple of 16 with nvfp4, got 72"),
        (nvfp4(block_size=8, page_bytes=8 * 144), "block_size: expected a multiple of 16 with nvfp4, got 8"),
        (
            nvfp4(page_bytes=2 * 16 * 128),
            "page_bytes: expected 2304 (2 heads x 16 tokens x 72 x 1 bytes), got 4096",
        ),
        (nvfp4(page_bytes_padded=2000), "page_bytes_padded: expected at least 2304, got 2000"),
        (nvfp4(page_bytes_padded=2305), "page_bytes_padded: expected a multiple of 16, got 2305"),
        (
            nvfp4(dtype="int4"),
            "dtype: expected one of bfloat16, float16, float32, fp8, fp8_e4m3, fp8_e5m2, nvfp4",
        ),
    ],
)
def test_impossible_specs_are_refused_by_the_model(spec, reason):
    everything = BackendOffer("ANY", {spec.dtype: ALL}, scale_orders=(ScaleOrder.LINEAR,))
    with pytest.raises(NegotiationError) as caught:
        negotiate([spec], [everything])
    refusals = caught.value.refusals
    assert {r.layout for r in refusals if reason in r.reason} == {
        Layout.BLHNC,
        Layout.BLNHC,
        Layout.LBHNC,
        Layout.LBNHC,
    }
    assert {r.party for r in refusals} == {MODEL}
    said = str(caught.value).splitlines()
    assert len([line for line in said if reason in line and line.startswith("  all refused by model: ")]) == 1


def test_other_dtypes_take_any_head_and_block_size():
    spec = CacheSpec(("a",), 3, 5, 7, 9, "float16", 3 * 9 * 12 * 2)
    decision = negotiate([spec], [BackendOffer("ANY", {"float16": ALL})])
    assert decision.descriptor.strides("a") == (648, 216, 24, 2)


def test_groups_need_one_page_size_and_unique_names():
    other = CacheSpec(("c",), 2, 64, 64, 32, "bfloat16", 2 * BF16.page_bytes)
    with pytest.raises(NegotiationError) as caught:
        negotiate([BF16, other], [FLASH])
    assert {r.party for r in caught.value.refusals} == {MODEL}
    assert "got 8192 bytes for a .. b (2 layers), 16384 bytes for c" in str(caught.value)
    padded = CacheSpec(("c",), 2, 64, 64, 16, "bfloat16", BF16.page_bytes, 16384)
    assert negotiate([padded, other.__class__(("d",), 2, 64, 64, 32, "bfloat16", 16384)], [FLASH])
    with pytest.raises(NegotiationError, match="expected each once, got a, b more than once"):
        negotiate([BF16, BF16], [FLASH])


def test_head_sliced_rows_need_one_shape_and_no_padding():
    wide = CacheSpec(("c",), 1, 64, 64, 32, "bfloat16", BF16.page_bytes)
    decision = negotiate([BF16, wide], [FLASH], wish(Layout.BHLNC))
    assert decision.descriptor.layout is Layout.BLHNC
    assert refusals_of(decision, Layout.BHLNC) == [
        (MODEL, "shape and dtype: expected one for all groups, as BHLNC interleaves layers, got several")
    ]
    padded = CacheSpec(("c",), 2, 64, 64, 16, "bfloat16", BF16.page_bytes, 16384)
    (said,) = refusals_of(negotiate([padded], [FLASH], wish(Layout.BHLNC)), Layout.BHLNC)
    assert said[0] == MODEL and "padded from 8192 to 16384 bytes" in said[1]


def test_a_backend_that_does_not_accept_is_named_with_its_reason():
    picky = BackendOffer(
        "PICKY",
        {"bfloat16": frozenset({Layout.LBHNC})},
        {("bfloat16", Layout.BLHNC): "its kernels take no block stride"},
    )
    decision = negotiate([BF16], [FLASH, picky], wish(Layout.BLHNC))
    assert decision.descriptor.layout is Layout.LBHNC
    party = "attention backend PICKY"
    assert refusals_of(decision, Layout.BLHNC) == [(party, "its kernels take no block stride")]
    assert refusals_of(decision, Layout.BLNHC) == [(party, "accepts bfloat16 only in LBHNC")]
    with pytest.raises(NegotiationError) as caught:
        negotiate([BF16], [picky], wish(Layout.BLHNC, required=True))
    assert "BLHNC refused by attention backend PICKY: its kernels take no block stride" in str(caught.value)
    with pytest.raises(
        NegotiationError, match=r"FLASH_ATTN: does not accept kv dtype nvfp4 \(accepts bfloat16\)"
    ):
        negotiate([NVFP4], [FLASH])
    assert negotiate([NVFP4], [INFER]).descriptor.scale_order is ScaleOrder.LINEAR


def test_a_layout_both_accepted_and_refused_is_refused():
    confused = BackendOffer("CONFUSED", {"bfloat16": ALL}, {("bfloat16", Layout.BLHNC): "bug 1"})
    assert negotiate([BF16], [confused]).descriptor.layout is Layout.BLNHC


def test_scale_order_is_one_that_every_voter_reads():
    assert negotiate([NVFP4], [B200]).descriptor.scale_order is ScaleOrder.SWIZZLED
    assert negotiate([NVFP4], [B200, INFER]).descriptor.scale_order is ScaleOrder.LINEAR
    silent = BackendOffer("SILENT", {"nvfp4": ALL})
    assert negotiate([NVFP4], [silent, B200]).descriptor.scale_order is ScaleOrder.SWIZZLED
    with pytest.raises(NegotiationError, match="SILENT: names no order of nvfp4 scales"):
        negotiate([NVFP4], [silent])
    only_swizzled = BackendOffer("SWIZZLED", {"nvfp4": ALL}, scale_orders=(ScaleOrder.SWIZZLED,))
    with pytest.raises(NegotiationError, match="FLASHINFER: does not read SWIZZLED scales"):
        negotiate([NVFP4], [only_swizzled, INFER])
    assert negotiate([BF16], [INFER]).descriptor.scale_order is None


def test_swizzled_scales_need_head_sizes_that_are_multiples_of_64():
    spec = nvfp4(head_size_k=80, head_size_v=80, page_bytes=2 * 16 * 90)
    assert negotiate([spec], [B200]).descriptor.scale_order is ScaleOrder.LINEAR
    only_swizzled = BackendOffer("SWIZZLED", {"nvfp4": ALL}, scale_orders=(ScaleOrder.SWIZZLED,))
    with pytest.raises(
        NegotiationError, match=r"refused by model: swizzled scales .* multiple of 64, got 80"
    ):
        negotiate([spec], [only_swizzled])


def test_nothing_to_negotiate():
    with pytest.raises(ValueError, match="got 0 and 1"):
        negotiate([], [FLASH])
    with pytest.raises(ValueError, match="got 1 and 0"):
        negotiate([BF16], [])


layouts = st.frozensets(st.sampled_from(Layout))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([BF16, NVFP4]),
    st.lists(st.tuples(layouts, layouts, st.frozensets(st.sampled_from(ScaleOrder))), min_size=1, max_size=3),
    st.one_of(st.none(), st.tuples(st.permutations(list(Layout)), st.integers(0, 5), st.booleans())),
)
def test_what_is_chosen_is_accepted_by_all_and_what_is_refused_has_a_party(spec, offers, wished):
    backends = [
        BackendOffer(
            f"B{i}", {spec.dtype: accepted}, {(spec.dtype, bad): "no" for bad in refused}, tuple(orders)
        )
        for i, (accepted, refused, orders) in enumerate(offers)
    ]
    connector = wish(*wished[0][: wished[1]], required=wished[2]) if wished else None
    parties = {MODEL, "connector XLayerConnector", *(backend.party for backend in backends)}
    try:
        decision = negotiate([spec], backends, connector)
    except NegotiationError as error:
        refused = {refusal.layout for refusal in error.refusals}
        assert refused >= {Layout.BLHNC, Layout.BLNHC, Layout.LBHNC, Layout.LBNHC}
        said = error.refusals
    else:
        chosen = decision.descriptor.layout
        assert all(chosen in accepted - refused for accepted, refused, _ in offers)
        assert chosen not in {refusal.layout for refusal in decision.refusals}
        if connector and connector.required:
            assert chosen in connector.layouts
        if spec is NVFP4:
            assert chosen in (Layout.BLHNC, Layout.LBHNC)
            assert all(decision.descriptor.scale_order in orders for _, _, orders in offers if orders)
        said = decision.refusals
    assert all(refusal.party in parties and refusal.reason for refusal in said)


DESCRIPTORS = [
    LayoutDescriptor(Layout.BLHNC, (NVFP4,), ScaleOrder.SWIZZLED),
    LayoutDescriptor(Layout.LBHNC, (NVFP4, nvfp4(layers=("c",))), ScaleOrder.LINEAR),
    LayoutDescriptor(Layout.BHLNC, (BF16,)),
    LayoutDescriptor(Layout.BLNHC, (BF16, CacheSpec(("c",), 1, 64, 64, 32, "bfloat16", BF16.page_bytes))),
    LayoutDescriptor(Layout.BLHNC, (nvfp4(page_bytes_padded=4096),), ScaleOrder.LINEAR),
]


@pytest.mark.parametrize("descriptor", DESCRIPTORS, ids=lambda d: d.layout.value)
def test_descriptor_survives_json(descriptor):
    again = LayoutDescriptor.from_dict(json.loads(json.dumps(descriptor.to_dict())))
    assert again == descriptor
    assert again.fingerprint == descriptor.fingerprint


def leaves(data, path=()):
    """Paths of all scalars of nested dicts and lists."""
    if isinstance(data, dict | list):
        for key in data if isinstance(data, dict) else range(len(data)):
            yield from leaves(data[key], (*path, key))
    else:
        yield path


@pytest.mark.parametrize("descriptor", DESCRIPTORS, ids=lambda d: d.layout.value)
def test_a_descriptor_with_one_changed_value_is_refused_or_has_another_fingerprint(descriptor):
    for path in leaves(descriptor.to_dict()):
        for value in (None, True, 1.0, 0, 7, 16, 4096, "x", "BLHNC", "LINEAR", [], {}):
            data = copy.deepcopy(descriptor.to_dict())
            inner = data
            for key in path[:-1]:
                inner = inner[key]
            if json.dumps(inner[path[-1]]) == json.dumps(value):
                continue
            inner[path[-1]] = value
            try:
                changed = LayoutDescriptor.from_dict(data)
            except ValueError as error:
                assert "expected" in str(error)
            else:
                assert changed.fingerprint != descriptor.fingerprint


def test_every_field_changes_the_fingerprint():
    base = LayoutDescriptor(Layout.BLHNC, (NVFP4,), ScaleOrder.LINEAR)
    variants = [
        base,
        LayoutDescriptor(Layout.LBHNC, (NVFP4,), ScaleOrder.LINEAR),
        LayoutDescriptor(Layout.BLHNC, (NVFP4,), ScaleOrder.SWIZZLED),
        LayoutDescriptor(Layout.BLHNC, (NVFP4, nvfp4(layers=("c", "d"))), ScaleOrder.LINEAR),
        *(
            LayoutDescriptor(Layout.BLHNC, (spec,), ScaleOrder.LINEAR)
            for spec in (
                nvfp4(layers=("a", "c")),
                nvfp4(layers=("b", "a")),
                nvfp4(num_kv_heads=1, block_size=32),
                nvfp4(num_kv_heads=4, page_bytes=4 * 16 * 72),
                nvfp4(head_size_k=32, head_size_v=32, block_size=32),
                nvfp4(page_bytes_padded=4096),
            )
        ),
        LayoutDescriptor(Layout.BLHNC, (BF16,)),
        LayoutDescriptor(Layout.BLHNC, (CacheSpec(("a", "b"), 2, 64, 64, 16, "float16", BF16.page_bytes),)),
        LayoutDescriptor(Layout.BLHNC, (CacheSpec(("a", "b"), 2, 48, 80, 16, "bfloat16", BF16.page_bytes),)),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)
    assert re.fullmatch("[0-9a-f]{32}", base.fingerprint)


def test_fingerprint_is_the_same_in_every_process_and_release():
    """A stored value: other hosts and disks compare with it. Change FORMAT_VERSION if it must change."""
    assert (
        LayoutDescriptor(Layout.BLHNC, (NVFP4,), ScaleOrder.LINEAR).fingerprint
        == "2cd3adfaa300f7b32e969978d181ef50"
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([*DESCRIPTORS[0].to_dict(), "unknown"]), json_values)
def test_from_dict_refuses_rubbish_with_a_value_error(key, value):
    data = DESCRIPTORS[0].to_dict() | {key: value}
    if json.dumps(data) != json.dumps(DESCRIPTORS[0].to_dict()):
        with pytest.raises(ValueError, match="expected"):
            LayoutDescriptor.from_dict(data)
    with pytest.raises(ValueError, match="version: expected 1"):
        LayoutDescriptor.from_dict(value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ()}, "layers: expected one or more layer names, got ()"),
        ({"layers": "abc"}, "layers: expected one or more layer names, got 'abc'"),
        ({"num_kv_heads": 0}, "num_kv_heads: expected a positive integer, got 0"),
        ({"block_size": 16.0}, "block_size: expected a positive integer, got 16.0"),
        ({"head_size_k": True}, "head_size_k: expected a positive integer, got True"),
        ({"page_bytes_padded": -1}, "page_bytes_padded: expected a positive integer, got -1"),
    ],
)
def test_malformed_specs_cannot_be_made(change, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        nvfp4(**change)


def test_scale_order_belongs_to_nvfp4():
    with pytest.raises(ValueError, match="scale_order: expected one of LINEAR, SWIZZLED, got None"):
        LayoutDescriptor(Layout.BLHNC, (NVFP4,))
    with pytest.raises(ValueError, match="scale_order: expected None, got"):
        LayoutDescriptor(Layout.BLHNC, (BF16,), ScaleOrder.LINEAR)
