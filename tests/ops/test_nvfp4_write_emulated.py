"""The writer's kernel, and the codec's form for the GPU, without a GPU: the same bits as the CPU's form.

The CPU's form is checked against the independent reference in test_nvfp4_write.py; here the torch codec,
which shares no code with either, stands in for it where that is faster. rcp.approx is emulated with errors.
"""

import numpy as np
import pytest
import torch
from reference import emulated
from reference import nvfp4_ref as ref
from reference.pools import make_pool, scalar, strided_rows

from vllm_xlayer import nvfp4, ops
from vllm_xlayer.nvfp4 import ScaleChoice, ScaleOrder

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

CPU = torch.device("cpu")


def check_encode(groups: torch.Tensor, choice: ScaleChoice, global_scale: float = 1.0) -> None:
    inverse = float(np.float32(1.0) / np.float32(global_scale))
    data, scale = emulated.encode(groups, inverse, choice)
    expected_data, expected_scale = nvfp4.encode(groups, global_scale, choice)
    differ = (data != nvfp4.pack(expected_data)).any(-1) | (scale != expected_scale.flatten())
    wrong = differ.nonzero().flatten()
    assert wrong.numel() == 0, f"{wrong.numel()} groups differ, the first is {groups[wrong[0]].tolist()}"


@pytest.mark.parametrize("choice", list(ScaleChoice))
def test_random_groups(choice):
    """Magnitudes from e4m3's subnormal scales to saturation; float32, and bf16, which has more ties."""
    generator = torch.Generator().manual_seed(13)
    groups = torch.randn(1 << 18, 16, generator=generator)
    groups *= torch.logspace(-4, 4, 1 << 18, base=10).unsqueeze(1)
    check_encode(groups, choice)
    check_encode(groups.bfloat16().float(), choice)
    check_encode(groups, choice, -0.37)


def test_random_groups_are_nearest_under_a_best_scale():
    generator = torch.Generator().manual_seed(17)
    groups = torch.randn(1 << 14, 16, generator=generator) * torch.logspace(-3, 3, 1 << 14).unsqueeze(1)
    data, scale = (part.numpy() for part in emulated.encode(groups, 1.0, ScaleChoice.BEST_OF_9))
    nibbles = ref.unpacked(data)
    assert np.array_equal(nibbles, ref.quantise(groups.numpy(), scale))
    errors = [ref.errors(groups.numpy(), c) for c in ref.candidate_scales(groups.numpy(), 2)]
    # 16 squares added in float32, as in test_nvfp4_write.py.
    assert (ref.errors(groups.numpy(), scale) <= np.min(errors, 0) * (1 + 32 * 2.0**-24)).all()


def neighbours(x: np.ndarray, steps: int) -> np.ndarray:
    """float32 [..., 2 * steps + 1]: x > 0 and the floats around it."""
    bits = x.astype(np.float32).view(np.int32)[..., None] + np.arange(-steps, steps + 1, dtype=np.int32)
    return bits.view(np.float32)


def test_every_data_midpoint_of_every_scale_and_the_floats_around_it():
    """Division, its correction, and rounding to e2m1: where they could go wrong they are all tried."""
    scales = ref.E4M3_POSITIVE[1:]
    boundaries = np.concatenate(((ref.E2M1[1:] + ref.E2M1[:-1]) / 2, ref.E2M1[1:]))
    elements = neighbours(np.outer(scales, boundaries), 30).reshape(len(scales), -1)
    elements = np.pad(elements, ((0, 0), (0, -elements.shape[1] % 15))).reshape(len(scales), -1, 15)
    largest = np.broadcast_to(6 * scales[:, None, None], (*elements.shape[:2], 1))
    groups = np.concatenate((largest, elements), -1).astype(np.float32).reshape(-1, 16)
    data, scale = (
        part.numpy() for part in emulated.encode(torch.from_numpy(groups), 1.0, ScaleChoice.AMAX_6)
    )
    # The largest may be one a few steps above 6 * scale, which is still that scale's.
    assert np.array_equal(ref.E4M3[scale], np.repeat(scales, elements.shape[1]))
    nibbles = ref.unpacked(data)
    assert np.array_equal(nibbles, ref.quantise(groups, scale))
    for choice in (ScaleChoice.FOUR_OVER_SIX, ScaleChoice.BEST_OF_9):
        check_encode(torch.from_numpy(groups), choice)


def test_every_scale_boundary_of_every_divisor():
    """Largest elements around divisor times each e4m3 midpoint and each e4m3 value."""
    boundaries = np.concatenate(((ref.E4M3_POSITIVE[1:] + ref.E4M3_POSITIVE[:-1]) / 2, ref.E4M3_POSITIVE[1:]))
    largest = neighbours(np.outer(ref.DIVISORS[2], boundaries), 30).reshape(-1, 1)
    fractions = np.linspace(-1, 0.9, 15, dtype=np.float32)
    groups = np.concatenate((largest, largest * fractions), 1)
    _, scale = emulated.encode(torch.from_numpy(groups), 1.0, ScaleChoice.AMAX_6)
    assert np.array_equal(scale.numpy(), ref.encode_amax_6(groups)[1])
    for choice in (ScaleChoice.FOUR_OVER_SIX, ScaleChoice.BEST_OF_9):
        check_encode(torch.from_numpy(groups), choice)


@pytest.mark.parametrize("choice", list(ScaleChoice))
def test_extremes(choice):
    generator = torch.Generator().manual_seed(19)
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 14, 16), generator=generator)
    check_encode(bits.to(torch.int32).view(torch.float32), choice)  # any exponent, NaN here and there
    small = torch.randn(1 << 12, 16, generator=generator) * torch.logspace(-44, -1, 1 << 12).unsqueeze(1)
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-45, 2688.0, 0.00585938])
    groups = special[torch.randint(len(special), (1 << 12, 16), generator=generator)]
    without_nan = special[torch.randint(4, (256, 16), generator=generator)]
    check_encode(torch.cat((small, groups, without_nan, torch.zeros(1, 16))), choice)


@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("head_size", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("wide", [True, False], ids=["wide", "narrow"])
@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("rotated", [False, True], ids=["K as it is", "K rotated"])
def test_kernel_writes_every_byte_as_the_cpu_does(lanes, head_size, wide, heads, rotated):
    """Skipped slots, tokens past the slot mapping, cross-layer pages, NaN and Inf, both scale orders; and the
    newest tokens' memory."""
    generator = torch.Generator().manual_seed(head_size)
    order = ScaleOrder(head_size % 64 == 0 and heads != 3)
    tokens, padding, pad = 13, 3, 16 if wide else 3
    x = torch.randn(2, tokens + padding, heads, head_size, generator=generator) * 3
    x[:, tokens:] = torch.nan
    x[0, 4, 0, 7], x[1, 5, 0, 3], x[1, 6] = torch.nan, torch.inf, 0.0
    key, value = (strided_rows(part.bfloat16(), pad) for part in x)
    slots = torch.randperm(5 * 32, generator=generator)[:tokens]
    slots[[2, 7]] = -1
    scales = scalar(0.37, CPU), scalar(1.9, CPU)
    expected, pool = (make_pool(CPU, heads=heads, head_size=head_size, block_size=32) for _ in range(2))
    expected_newest, newest = (torch.full((3, 2, heads, 16, head_size), -7.0).bfloat16() for _ in range(2))
    places = torch.randperm(3 * 16, generator=generator)[:tokens]
    places[[2, 3, 7]] = -1
    how = dict(rotated_keys=rotated, newest_slots=places)
    ops.reshape_and_cache_nvfp4(
        key, value, expected.cache, slots, *scales, order, ScaleChoice.BEST_OF_9, expected_newest, **how
    )
    emulated.write(pool, key, value, slots, *scales, order, lanes, wide, newest=newest, **how)
    assert torch.equal(pool.raw, expected.raw)
    assert torch.equal(newest.nan_to_num(9.0), expected_newest.nan_to_num(9.0))
