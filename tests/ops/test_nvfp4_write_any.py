"""reshape_and_cache_nvfp4 on whatever hypothesis comes up with."""

import pytest
import torch
from reference import nvfp4_ref as ref
from reference.groups import write_groups

from vllm_xlayer.nvfp4 import ScaleChoice

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

any_float32 = st.floats(width=32, allow_nan=True, allow_infinity=True, allow_subnormal=True)
near_each_other = st.floats(min_value=-8, max_value=8, width=32)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(any_float32, min_size=16, max_size=16)
    | st.lists(near_each_other, min_size=16, max_size=16)
)
def test_any_float32_group(device, values):
    groups = torch.tensor([values], dtype=torch.float32)
    nibbles, scale = write_groups(device, groups, ScaleChoice.AMAX_6)
    expected_nibbles, expected_scale = ref.encode_amax_6(groups.numpy())
    assert scale.tolist() == expected_scale.tolist()
    assert nibbles.tolist() == expected_nibbles.tolist()
