"""The CUDA kernels of nvfp4_paged_attention without a GPU, lane by lane, against float64 attention.

What the emulation shows and what it does not: tests/emulation/include/simt.h.
"""

from dataclasses import replace

import pytest
import torch
from reference.attention_batches import make_batch
from reference.attention_cases import HEAD_SIZES, SHARP, Case
from reference.attention_checks import check_batch, check_one_newest
from reference.emulated import emulated, why_not

from vllm_xlayer.nvfp4 import ScaleOrder

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

CPU = torch.device("cpu")
AROUND = (0, 1, 15, 16, 17, 63, 64, 65, 129)


def check(case: Case, **how) -> None:
    batch = emulated(make_batch(case, CPU), **how)
    check_batch(batch, *batch.run())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_head_sizes(head_size, dtype):
    check(Case(AROUND, head_size=head_size, dtype=dtype))


@pytest.mark.parametrize(("q_len", "group"), [(1, 4), (3, 4), (3, 8)])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rotated_keys(head_size, q_len, group):
    case = Case(AROUND, q_len, group=group, head_size=head_size, newest=32, rotated_keys=True)
    check(case)
    check(replace(case, dtype=torch.float16, outliers=True, newest=0, first_logit=14.0))
    check(replace(case, dtype=torch.float16, outliers=True, newest=0, first_logit=14.0, k_scale=0.25))


@pytest.mark.parametrize(("q_len", "group"), [(1, 1), (1, 16), (2, 3), (4, 4), (8, 1), (8, 16)], ids=str)
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_query_rows(head_size, q_len, group):
    """From one row of a head tile to several head tiles of a KV head."""
    check(Case((1, 9, 64, 130), q_len, group=group, head_size=head_size, kv_heads=1))


@pytest.mark.parametrize("kernel_q_len", [1, 3, 8])
@pytest.mark.parametrize(("group", "head_size"), [(1, 128), (4, 128), (16, 64), (8, 256), (3, 80)])
def test_uneven_queries(group, head_size, kernel_q_len):
    """From none to eight query tokens, whichever of the kernels runs."""
    case = Case(
        (1, 0, 130, 64, 9, 300, 5, 70), 8, (1, 2, 8, 0, 3, 1, 8, 4), kernel_q_len, kv_heads=2, group=group,
        head_size=head_size,
    )  # fmt: skip
    check(case, parts=5)
    check(replace(case, window=33, sinks=True, dtype=torch.float16), late_copies=False)


def test_uneven_queries_beside_all_else():
    case = Case((1, 700, 0, 300, 40), 8, (1, 4, 2, 0, 8), 2, soft_cap=5.0, sinks=True)
    check(replace(case, newest=64), parts=4)
    check(replace(case, split_units=2, block_size=48, order=ScaleOrder.SWIZZLED))
    check(replace(case, q_lens=(1, 2, 2, 0, 1), q_len=2, group=2), warps=16)


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128])
def test_pages(block_size):
    check(Case((block_size - 1, block_size + 1, 200), block_size=block_size))


@pytest.mark.parametrize("window", [1, 16, 17, 64, 100, 1000])
@pytest.mark.parametrize("q_len", [1, 4])
def test_window(window, q_len):
    check(Case((0, 3, 16, 65, 128, 300), q_len, window=window, sinks=True))
    check(Case((65, 300), q_len, window=window, head_size=64, block_size=64))


@pytest.mark.parametrize("head_size", [64, 128, 192, 256])
def test_swizzled_scales(head_size):
    check(Case((1, 63, 130), 2, head_size=head_size, order=ScaleOrder.SWIZZLED, block_size=32))


def test_soft_cap_sinks_and_global_scales():
    check(Case((1, 40, 0, 300), 3, soft_cap=5.0, sinks=True, k_scale=0.013, v_scale=20.0))


@pytest.mark.parametrize("q_size", [1e-4, 1e4])
def test_magnitudes(q_size):
    check(Case((1, 40, 200), q_size=q_size, all_scales=True))


@pytest.mark.parametrize("case", SHARP, ids=str)
def test_what_models_look_like(case):
    check(case)


@pytest.mark.parametrize("places", [16, 64, 128])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_newest_tokens(head_size, places):
    """Tiles of unquantised tokens, of none to all of a request's; everything that is not read is NaN."""
    check(Case((*AROUND, 300), head_size=head_size, newest=places, seed=places), parts=5)
    check(Case((*AROUND, 300), 2, head_size=head_size, newest=places, window=40, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_size", [64, 112, 128, 256])
def test_a_newest_token_is_exact_whatever_the_global_scale(head_size, dtype):
    """All bits of it, where it is the only token."""
    for v_scale in (2.9, 0.0113):
        case = Case((1,), group=9, head_size=head_size, dtype=dtype, v_scale=v_scale, newest=16)
        check_one_newest(emulated(make_batch(case, CPU)))


@pytest.mark.parametrize(("q_len", "group"), [(1, 16), (4, 4), (8, 16)], ids=str)
def test_newest_tokens_of_many_rows(q_len, group):
    for head_size in (64, 128, 256):
        check(Case((1, 64, 130), q_len, group=group, head_size=head_size, kv_heads=1, newest=32))


@pytest.mark.parametrize("parts", [2, 5, 11, 17, 23, 40])
def test_parts_end_beside_newest_tokens(parts):
    """Before, among and after what newest tokens add to a line, of which nothing is attended to."""
    case = Case((700, 40, 64, 0, 1000, 130), newest=64, group=1)
    check(case, parts=parts)
    check(replace(case, newest=256, q_len=2, window=300), parts=parts, late_copies=False)


def test_newest_tokens_beside_all_else():
    check(Case((1, 40, 0, 300), 3, soft_cap=5.0, sinks=True, k_scale=0.013, v_scale=20.0, newest=64))
    check(Case((17, 700), newest=48, block_size=48, split_units=2, order=ScaleOrder.SWIZZLED))
    check(Case((40, 700, 1300), newest=64, sinks=True), warps=16)
    check(Case((40, 200), q_size=1e4, all_scales=True, newest=64))


@pytest.mark.parametrize("case", SHARP, ids=str)
def test_newest_tokens_of_what_models_look_like(case):
    check(replace(case, newest=64))


@pytest.mark.parametrize("head_size", [64, 128])
def test_sixteen_warps(head_size):
    """Thread blocks that small batches get: units of 256 tokens."""
    around = (0, 1, 16, 255, 256, 257, 700)
    check(Case(around, head_size=head_size, sinks=True), warps=16)
    check(Case((0, 3, 200, 1000), 2, window=100, head_size=head_size, block_size=64), warps=16, parts=7)
    check(Case((300, 1300), 1, group=8, head_size=head_size, block_size=48), warps=16, late_copies=False)


@pytest.mark.parametrize(("q_len", "group"), [(1, 16), (4, 4), (5, 4)], ids=str)
def test_sixteen_warps_of_many_rows(q_len, group):
    case = Case((0, 3, 16, 257, 700), q_len, group=group, kv_heads=1, sinks=True, rotated_keys=True)
    check(case, warps=16)
    check(replace(case, newest=64, dtype=torch.float16), warps=16, parts=7, late_copies=False)
    check(replace(case, window=100, block_size=64), warps=16, parts=3)


@pytest.mark.parametrize("head_size", [64, 128, 256])
@pytest.mark.parametrize(("q_len", "group"), [(1, 2), (4, 4)], ids=str)
def test_four_teams_of_a_thread_block(head_size, q_len, group):
    """Teams take parts of their own, merge their results, and wait for their own warps only: some have more
    runs than others, and some none."""
    case = Case(
        (0, 3, 16, 257, 700, 1300), q_len, group=group, head_size=head_size, sinks=True, rotated_keys=True
    )
    check(case, teams=4, parts=8)
    check(case, teams=4, parts=3, late_copies=False)
    check(replace(case, newest=64, dtype=torch.float16), teams=4, parts=7, late_copies=False)
    check(replace(case, window=100, block_size=64), teams=4, parts=12)


@pytest.mark.parametrize("parts", [3, 7, 8, 15, 16])
@pytest.mark.parametrize("length", [513, 1024])
def test_equal_lengths(length, parts):
    """Parts become whole lines, or a line whole parts, where that is about as even."""
    check(Case((length,) * 4, kv_heads=2, group=2), parts=parts)


@pytest.mark.parametrize("late_copies", [True, False], ids=["late copies", "early copies"])
@pytest.mark.parametrize("parts", [1, 2, 7, 40])
def test_ring_and_schedule(parts, late_copies):
    """Long runs that go around the ring of stages, cut at many places. A copy may happen as late as it is
    waited for, or as early as it is asked for."""
    check(Case((1000, 1, 2500), kv_heads=2), parts=parts, late_copies=late_copies)


@pytest.mark.parametrize("newest", [0, 64])
@pytest.mark.parametrize("split_units", [1, 3, 1000])
def test_fixed_split(split_units, newest):
    """The same bits alone, in a batch, and with any number of thread blocks."""
    case = Case((300, 65, 0, 500), split_units=split_units, sinks=True, newest=newest)
    batch = make_batch(case, CPU)
    out, lse = emulated(batch, parts=5).run()
    check_batch(batch, out, lse)
    alone, alone_lse = emulated(batch.only([3]), parts=2).run()
    assert torch.equal(alone, out[3:]) and torch.equal(alone_lse, lse[:, 3:])


def test_a_nan_stays_where_it_is():
    """In V: its 16 dimensions of the heads that see it. In a query: its row."""
    batch = make_batch(Case((40, 100)), CPU)
    pool = batch.pool
    page = pool.raw[int(batch.block_table[1, 2]), pool.layer * pool.page_bytes :]
    page[pool.page_bytes - 3] = 0x7F  # one of the last token's scales of V, head 1
    q = batch.q.clone()
    q[0, 5, 7] = torch.nan
    q[1, 2, 0] = torch.inf
    batch = replace(batch, q=q)
    ran = emulated(batch)
    check_batch(ran, *ran.run())


def test_lengths_beyond_a_block_of_threads():
    """The schedule's prefix sum goes on over more requests than it has threads."""
    lengths = tuple(1 + i % 3 for i in range(300))
    check(Case(lengths, head_size=64, group=1, kv_heads=1), parts=9)
