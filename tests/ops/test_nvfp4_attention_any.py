"""nvfp4_paged_attention on whatever batches hypothesis comes up with."""

import pytest
import torch
from reference.attention_cases import HEAD_SIZES, Case
from reference.attention_checks import check_case

from vllm_xlayer.nvfp4 import ScaleOrder

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

near_an_edge = st.builds(
    lambda unit, count, d: max(0, unit * count + d),
    st.sampled_from([16, 32, 64, 128]),
    st.integers(0, 12),
    st.integers(-2, 2),
)
lengths = st.integers(0, 12) | near_an_edge | st.integers(0, 900)


@st.composite
def cases(draw) -> Case:
    head_size = draw(st.sampled_from(HEAD_SIZES))
    orders = list(ScaleOrder) if head_size % 64 == 0 else [ScaleOrder.LINEAR]
    return Case(
        tuple(draw(st.lists(lengths, max_size=6))),
        q_len=draw(st.integers(1, 8)),
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 16)),
        head_size=head_size,
        block_size=draw(st.sampled_from([16, 32, 48, 64])),
        window=draw(st.just(0) | st.integers(1, 20) | near_an_edge),
        soft_cap=draw(st.sampled_from([0.0, 0.5, 50.0])),
        sinks=draw(st.booleans()),
        order=draw(st.sampled_from(orders)),
        dtype=draw(st.sampled_from([torch.bfloat16, torch.float16])),
        k_scale=draw(st.sampled_from([1.0, 0.37])),
        v_scale=draw(st.sampled_from([1.0, 2.9])),
        all_scales=draw(st.booleans()),
        newest=draw(st.sampled_from([0, 16, 32, 48, 128])),
        split_units=draw(st.just(0) | st.integers(1, 5)),
        seed=draw(st.integers(0, 2**31)),
    )


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_any_batch(device, case):
    check_case(case, device)
