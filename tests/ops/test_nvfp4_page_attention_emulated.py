"""The CUDA kernel with a warp a KV head (page_decode.cuh) without a GPU, lane by lane.

Against float64 attention. What the emulation shows and what it does not: tests/emulation/include/simt.h.
"""

from dataclasses import replace

import pytest
import torch
from reference.attention_cases import SHARP, Case, check_batch, make_batch
from reference.emulated import emulated, schedule_of, why_not

from vllm_xlayer.nvfp4 import ScaleOrder

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

CPU = torch.device("cpu")
AROUND = (0, 1, 15, 16, 17, 63, 64, 65, 129)


def check(case: Case, **how) -> None:
    case = case if case.kv_heads in (4, 8) else replace(case, kv_heads=4)
    batch = emulated(make_batch(case, CPU), whole_pages=True, **how)
    check_batch(batch, *batch.run())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 8])
def test_heads(kv_heads, dtype):
    check(Case(AROUND, kv_heads=kv_heads, dtype=dtype))


@pytest.mark.parametrize(("q_len", "group"), [(1, 1), (1, 7), (1, 8), (2, 4), (4, 2), (8, 1)], ids=str)
def test_query_rows(q_len, group):
    check(Case((1, 9, 64, 130), q_len, group=group))


@pytest.mark.parametrize("usual", [1, 3])
@pytest.mark.parametrize("group", [1, 2])
def test_uneven_queries(group, usual):
    """Requests with more rows than a tile has, beside some without query tokens."""
    case = Case((1, 0, 130, 64, 9, 300, 5, 70), 8, (1, 2, 8, 0, 3, 1, 8, 4), usual, group=group)
    check(case, parts=5)
    check(replace(case, window=33, sinks=True, dtype=torch.float16, newest=32), late_copies=False)


@pytest.mark.parametrize("window", [1, 16, 17, 64, 100, 1000])
@pytest.mark.parametrize("q_len", [1, 4])
def test_window(window, q_len):
    check(Case((0, 3, 16, 65, 128, 300), q_len, group=2, window=window, sinks=True))
    check(Case((65, 300), q_len, group=2, window=window, newest=64, order=ScaleOrder.SWIZZLED))


def test_soft_cap_sinks_and_global_scales():
    check(Case((1, 40, 0, 300), 2, soft_cap=5.0, sinks=True, k_scale=0.013, v_scale=20.0))
    check(Case((1, 40, 0, 300), 2, soft_cap=5.0, sinks=True, k_scale=0.013, v_scale=20.0, newest=64))


@pytest.mark.parametrize("q_len", [1, 2])
def test_rotated_keys_and_swizzled_scales(q_len):
    case = Case(AROUND, q_len, newest=32, rotated_keys=True, order=ScaleOrder.SWIZZLED)
    check(case)
    check(replace(case, dtype=torch.float16, outliers=True, newest=0, first_logit=14.0))


@pytest.mark.parametrize("case", [c for c in SHARP if c.head_size == 128], ids=str)
def test_what_models_look_like(case):
    case = replace(case, group=2)
    check(case)
    check(replace(case, newest=64))


@pytest.mark.parametrize("places", [16, 64, 128])
@pytest.mark.parametrize("kv_heads", [4, 8])
def test_newest_tokens(kv_heads, places):
    """Tiles of unquantised tokens, of none to all of a request's; everything that is not read is NaN."""
    check(Case((*AROUND, 300), kv_heads=kv_heads, newest=places, seed=places), parts=5)


@pytest.mark.parametrize("late_copies", [True, False], ids=["late copies", "early copies"])
@pytest.mark.parametrize("newest", [0, 64])
@pytest.mark.parametrize("parts", [1, 2, 7, 40])
def test_ring_and_schedule(parts, newest, late_copies):
    """Long runs that go around the ring of stages, cut at many places. A copy may happen as late as it is
    waited for, or as early as it is asked for."""
    check(Case((1000, 1, 0, 2500, 40), newest=newest), parts=parts, late_copies=late_copies)


@pytest.mark.parametrize("newest", [0, 64])
@pytest.mark.parametrize("length", [40, 513, 1024])
def test_equal_lengths(length, newest):
    """Parts become whole requests, or a request whole parts."""
    check(Case((length,) * 4, group=2, newest=newest), parts=7)


RUN, NEWEST, LEAST = 2, 4, 32
"""What the schedule takes a run and a tile of newest tokens for, and what a part has at least, in pages."""


def line_of(length: int, newest_from: int) -> list[int]:
    """Where the tiles of a request begin on its line, and its end."""
    begins, at = [], RUN
    for tile in range(-(-length // 16)):
        begins.append(at)
        at += NEWEST if 16 * tile >= newest_from else 1
    return [*begins, at]


@pytest.mark.parametrize("newest", [0, 64])
@pytest.mark.parametrize(
    "lengths",
    [(5000, 17, 0, 900, 16), (1024,) * 64, (8192,) * 64, (20,) * 40],
    ids=["ragged", "1k", "8k", "short"],
)
def test_schedule(lengths, newest):
    """Requests follow each other, and every part from a request's first tile to its last has one."""
    starts = [-(-max(0, n - newest) // 16) * 16 for n in lengths] if newest else [1 << 30] * len(lengths)
    made = schedule_of(list(lengths), 8, 264, 16, starts if newest else None, whole_pages=True)
    lines = [line_of(n, first) if n else [0] for n, first in zip(lengths, starts, strict=True)]
    longest = max(line[-1] for line in lines)
    pieces = -(-longest // made.chunk)
    equal = len(set(lengths)) == 1 and longest > made.chunk and pieces * len(lengths) <= 264
    begins = [0]
    for line in lines:
        begins.append(begins[-1] + (pieces * made.chunk if equal else line[-1]))
    assert made.begins == begins and made.total == begins[-1]
    assert made.parts == -(-made.total // made.chunk) <= 264
    for begin, line in zip(begins, lines, strict=False):
        parts = [(begin + at) // made.chunk for at in line[:-1]]
        assert sorted(set(parts)) == list(range(parts[0], parts[-1] + 1)) if parts else True
    if len(set(lengths)) == 1 and made.chunk > longest:
        assert made.chunk % longest == 0
    assert made.chunk >= min(LEAST, longest)
