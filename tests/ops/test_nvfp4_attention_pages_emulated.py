"""The decode kernel with a warp a KV head and whole pages a copy, without a GPU, against float64 attention.

The cases are those of test_nvfp4_attention_emulated.py that this kernel takes: heads of 128, pages of 16
tokens, 4 or 8 KV heads, head tiles of 8 rows.
"""

from dataclasses import replace

import pytest
import torch
from reference.attention_cases import SHARP, Case, check_batch, make_batch
from reference.emulated import emulated, why_not

from vllm_xlayer.nvfp4 import ScaleOrder

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

CPU = torch.device("cpu")
AROUND = (0, 1, 15, 16, 17, 31, 32, 33, 80, 129)
"""Of a page, and of the ring's stages."""


def check(case: Case, **how) -> None:
    kv_heads = case.kv_heads if case.kv_heads == 8 else 4
    batch = emulated(make_batch(replace(case, kv_heads=kv_heads), CPU), warps=1, **how)
    check_batch(batch, *batch.run())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 8])
def test_lengths(kv_heads, dtype):
    check(Case(AROUND, kv_heads=kv_heads, dtype=dtype))


@pytest.mark.parametrize(("q_len", "group"), [(1, 1), (1, 8), (2, 3), (8, 1)], ids=str)
def test_query_rows(q_len, group):
    check(Case((1, 9, 64, 130), q_len, group=group))


@pytest.mark.parametrize(("q_len", "group"), [(1, 4), (2, 4)])
def test_rotated_keys(q_len, group):
    case = Case(AROUND, q_len, group=group, newest=32, rotated_keys=True)
    check(case)
    check(replace(case, dtype=torch.float16, outliers=True, newest=0, first_logit=14.0, k_scale=0.25))


@pytest.mark.parametrize("usual", [1, 2])
def test_uneven_queries(usual):
    """Some requests have two and four head tiles: a line each."""
    case = Case((1, 0, 130, 64, 9, 300, 5, 70), 8, (1, 2, 8, 0, 3, 1, 8, 4), usual)
    check(case, parts=5)
    check(replace(case, window=33, sinks=True, dtype=torch.float16), late_copies=False)
    check(replace(case, newest=64), parts=9)


@pytest.mark.parametrize("window", [1, 16, 17, 64, 100, 1000])
@pytest.mark.parametrize("q_len", [1, 2])
def test_window(window, q_len):
    check(Case((0, 3, 16, 65, 128, 300), q_len, window=window, sinks=True))


def test_swizzled_scales():
    check(Case((1, 63, 130), 2, order=ScaleOrder.SWIZZLED))


def test_soft_cap_sinks_and_global_scales():
    check(Case((1, 40, 0, 300), 2, soft_cap=5.0, sinks=True, k_scale=0.013, v_scale=20.0))
    check(Case((1, 40, 0, 300), 2, soft_cap=5.0, sinks=True, k_scale=0.013, v_scale=20.0, newest=64))


@pytest.mark.parametrize("q_size", [1e-4, 1e4])
def test_magnitudes(q_size):
    check(Case((1, 40, 200), q_size=q_size, all_scales=True))


@pytest.mark.parametrize("newest", [0, 64])
@pytest.mark.parametrize("case", [c for c in SHARP if c.head_size == 128 and c.q_len <= 2], ids=str)
def test_what_models_look_like(case, newest):
    check(replace(case, newest=newest))


@pytest.mark.parametrize("places", [16, 64, 128])
def test_newest_tokens(places):
    check(Case((*AROUND, 300), newest=places, seed=places), parts=5)
    check(Case((*AROUND, 300), 2, newest=places, window=40, dtype=torch.float16))


@pytest.mark.parametrize("parts", [2, 5, 11, 17, 40])
def test_parts_end_beside_newest_tokens(parts):
    """Before, among and after what newest tokens add to a line, of which nothing is attended to."""
    case = Case((700, 40, 64, 0, 1000, 130), newest=64, group=1)
    check(case, parts=parts)
    check(replace(case, newest=256, q_len=2, window=300), parts=parts, late_copies=False)


@pytest.mark.parametrize("late_copies", [True, False], ids=["late copies", "early copies"])
@pytest.mark.parametrize("parts", [1, 2, 7, 40])
def test_ring_and_schedule(parts, late_copies):
    """Around the ring many times, over many runs, cut at many places."""
    case = Case((700, 1, 0, 1500, 33, 90), sinks=True)
    check(case, parts=parts, late_copies=late_copies)
    check(replace(case, kv_heads=8, lengths=(130, 300)), parts=parts, late_copies=late_copies)


def test_the_same_bits_each_time():
    """Whoever comes last merges, in the order of the parts."""
    batch = make_batch(Case((700, 40, 1000), kv_heads=4, newest=32), CPU)
    runs = [emulated(batch, warps=1, parts=23, late_copies=late).run() for late in (True, False)]
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
