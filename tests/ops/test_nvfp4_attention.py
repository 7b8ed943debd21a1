"""nvfp4_paged_attention against float64 attention on the dequantised pages."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import attention_ref as ref
from reference import nvfp4_ref
from reference.attention_batches import make_batch
from reference.attention_cases import HEAD_SIZES, SHARP, Case
from reference.attention_checks import check_batch, check_case, check_one_newest
from reference.pools import make_pool

from vllm_xlayer import ops
from vllm_xlayer.nvfp4 import ScaleOrder

LINEAR, SWIZZLED = ScaleOrder
AROUND_PAGES_AND_UNITS = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 0)
DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize(("is_v", "swizzled"), [(False, False), (True, False), (True, True)])
def test_the_references_decode_is_the_byte_wise_one(is_v, swizzled):
    rng = np.random.default_rng(0)
    heads, block_size, head_size = 3, 16, 64
    page = rng.integers(0, 256, heads * block_size * head_size * 9 // 8, dtype=np.uint8)
    got = ref.dequantise_pages(page[None], heads, block_size, head_size, is_v, swizzled)
    for n in range(block_size):
        nibbles, scale = nvfp4_ref.read_token(page, heads, block_size, head_size, is_v, n, swizzled)
        exact = nvfp4_ref.dequantise(nibbles.reshape(-1, 16), scale.reshape(-1))
        assert np.array_equal(got[0, n], exact.reshape(heads, head_size), equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_head_sizes_and_groups(device, head_size, group, dtype):
    check_case(Case(AROUND_PAGES_AND_UNITS, head_size=head_size, group=group, dtype=dtype), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_a_newest_token_is_exact_whatever_the_global_scale(device, head_size, dtype):
    """All bits of it, where it is the only token."""
    for v_scale in (2.9, 0.0113):
        case = Case((1,), group=9, head_size=head_size, dtype=dtype, v_scale=v_scale, newest=16)
        check_one_newest(make_batch(case, device))


@pytest.mark.parametrize("newest", [0, 64])
@pytest.mark.parametrize(("q_len", "group"), [(1, 1), (1, 16), (3, 4)])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_rotated_keys(device, head_size, q_len, group, newest):
    """Pages and newest tokens hold rotated K; queries are those of K as it was."""
    for dtype in DTYPES:
        case = Case(
            AROUND_PAGES_AND_UNITS, q_len, group=group, head_size=head_size, newest=newest, dtype=dtype,
            rotated_keys=True,
        )  # fmt: skip
        check_case(case, device)
        check_case(replace(case, outliers=True, first_logit=14.0, k_scale=0.25), device)


@pytest.mark.parametrize("q_len", [1, 2, 4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_query_tokens_see_up_to_themselves(device, head_size, block_size, q_len):
    """Also requests that are shorter than q_len: their first queries do not exist."""
    lengths = (*range(q_len + 2), *(block_size * i + d for i in (1, 4) for d in (-1, 0, 1)), 130)
    for group, dtype in ((1, torch.float16), (4, torch.bfloat16), (16, torch.bfloat16)):
        check_case(
            Case(lengths, q_len, group=group, head_size=head_size, block_size=block_size, dtype=dtype), device
        )


@pytest.mark.parametrize("kernel_q_len", [1, 2, 4, 8])
@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("head_size", [64, 80, 128, 256])
def test_uneven_queries(device, head_size, group, kernel_q_len):
    """From none to eight query tokens a request in one launch, whatever the kernel is chosen for."""
    case = Case(
        (1, 0, 130, 64, 9, 3000, 5, 70, 8), 8, (1, 2, 8, 0, 3, 1, 8, 4, 8), kernel_q_len, group=group,
        head_size=head_size,
    )  # fmt: skip
    check_case(case, device)
    check_case(replace(case, window=33, sinks=True, dtype=torch.float16), device)
    check_case(replace(case, newest=64, split_units=2), device)


@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 63, 64, 65, 128, 1000])
def test_window(device, window, q_len):
    """Blocks before the window are poisoned, and so are the tokens before it in its first block."""
    lengths = (0, 1, 3, 15, 16, 17, 64, 65, 66, 68, 127, 128, 129, 200, 1000)
    check_case(Case(lengths, q_len, window=window), device)
    check_case(Case(lengths, q_len, window=window, block_size=64, head_size=64, sinks=True), device)


@pytest.mark.parametrize("soft_cap", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("q_len", [1, 3])
@pytest.mark.parametrize("head_size", [64, 112, 128])
def test_soft_cap_and_sinks(device, soft_cap, sinks, q_len, head_size):
    lengths = (1, 40, 0, 300)
    check_case(Case(lengths, q_len, soft_cap=soft_cap, sinks=sinks, head_size=head_size), device)


@pytest.mark.parametrize("block_size", [16, 32, 64])
@pytest.mark.parametrize("head_size", [64, 128, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swizzled_scales(device, head_size, block_size, dtype):
    lengths = (1, 63, 65, 130)
    check_case(
        Case(lengths, 2, head_size=head_size, block_size=block_size, order=SWIZZLED, dtype=dtype), device
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("k_scale", "v_scale"), [(0.013, 1.0), (1.0, 0.3), (7.0, 0.02), (0.5, 20.0)])
def test_global_scales(device, k_scale, v_scale, dtype):
    check_case(Case((1, 40, 300), 2, k_scale=k_scale, v_scale=v_scale, dtype=dtype, sinks=True), device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_block_scales_of_the_whole_range(device, head_size, dtype):
    check_case(Case((1, 17, 300), 2, head_size=head_size, all_scales=True, dtype=dtype), device)


@pytest.mark.parametrize("q_size", [1e-4, 1e-2, 1e2, 1e4])
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_query_magnitudes(device, head_size, q_size):
    check_case(Case((1, 40, 300), 2, head_size=head_size, q_size=q_size), device)


@pytest.mark.parametrize("case", SHARP, ids=str)
def test_what_models_look_like(device, case):
    check_case(case, device)


def test_a_first_token_that_has_nearly_all_of_the_mass():
    """That the cases are what they say: the share of the first token, by float64."""
    batch = make_batch(SHARP[0], torch.device("cpu"))
    c, (k_pool, v_pool) = batch.case, batch.dequantised()
    tokens = torch.arange(c.lengths[0])
    blocks = batch.block_table[0, tokens // c.block_size].long()
    k, v = k_pool[blocks, tokens % c.block_size], v_pool[blocks, tokens % c.block_size]
    first = torch.zeros_like(v)
    first[0] = 1.0
    share, _ = ref.attention(batch.q[: c.q_len], k, first, ref.Softmax(c.softmax_scale))
    assert (v[0] == 0).all() and 0.9995 < share.mean() < 0.99999


def test_query_magnitudes_differ_between_rows(device):
    """The heads and tokens of one KV head, with queries from 1e-4 to 1e4."""
    batch = make_batch(Case((40, 300), 4, group=8), device)
    sizes = torch.logspace(-4, 4, 16, device=device)
    sizes = torch.stack([sizes.roll(t) for t in range(8)]).unsqueeze(-1)
    q = (batch.q * sizes).to(batch.q.dtype)
    batch = replace(batch, q=q)
    check_batch(batch, *batch.run())


@pytest.mark.parametrize("lengths", [(1000,), (5000, 1), (1, 5000, 0, 1000, 333)], ids=str)
@pytest.mark.parametrize(("head_size", "q_len"), [(64, 1), (128, 1), (128, 4), (256, 1)])
def test_long_contexts(device, lengths, head_size, q_len):
    check_case(Case(lengths, q_len, head_size=head_size), device)
    check_case(Case(lengths, q_len, head_size=head_size, window=700, sinks=True, soft_cap=20.0), device)


@pytest.mark.parametrize("split_units", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("q_len", [1, 5])
def test_fixed_split(device, split_units, q_len):
    lengths = (0, 1, 64, 65, 128, 129, 192, 500, 1000)
    check_case(Case(lengths, q_len, split_units=split_units, sinks=True), device)
    check_case(Case(lengths, q_len, split_units=split_units, window=200, group=16), device)


def test_an_empty_batch(device):
    check_case(Case(()), device)
    check_case(Case((0, 0, 0)), device)


def test_without_lse(device):
    batch = make_batch(Case((40, 300)), device)
    with_lse, _ = batch.run()
    out = torch.full_like(batch.q, torch.nan)
    batch.launch(batch.workspace(), out, None)
    assert torch.equal(out.cpu(), with_lse)


@pytest.mark.parametrize("q_len", [1, 4])
@pytest.mark.parametrize("is_v", [False, True])
@pytest.mark.parametrize("token", [0, 17, 64, 199])
def test_a_nan_in_the_cache_shows_in_its_head_only(device, is_v, token, q_len):
    """Request 1 of three has it, in KV head 1; of V only its group of 16 dimensions."""
    batch = make_batch(Case((70, 200 + q_len - 1, 70), q_len, kv_heads=3), device)
    pool, n = batch.pool, batch.case.block_size
    block = int(batch.block_table[1, token // n])
    at = nvfp4_ref.scale_byte(3, n, pool.head_size, is_v, 1, token % n, 2)
    own_block = int((batch.block_table == block).sum()) == 1
    pool.raw[block, pool.layer * pool.page_bytes + at] = 0x7F
    out, lse = batch.run()
    check_batch(batch, out, lse)
    heads = range(4, 8)
    nan = out.isnan().any(-1)[q_len : 2 * q_len]
    assert nan[:, heads].all() and not nan[:, :4].any() and not nan[:, 8:].any()
    if own_block:
        assert not out[:q_len].isnan().any() and not out[2 * q_len :].isnan().any()


@pytest.mark.parametrize("is_v", [False, True])
def test_a_nan_or_infinity_among_newest_tokens(device, is_v):
    """A NaN shows in its head only; what is beyond a half's range becomes its largest, and no NaN."""
    batch = make_batch(Case((70, 200), kv_heads=3, newest=64), device)
    assert int(batch.newest_from[1]) <= 192
    newest = batch.newest.clone()
    newest[int(batch.newest_rows[1]), int(is_v), 1, 199 % 64, 5] = torch.nan
    newest[int(batch.newest_rows[1]), int(is_v), 2, 199 % 64, 5] = 1e30
    out, _ = replace(batch, newest=newest).run()
    nan = out.isnan().any(-1)
    assert nan[1, 4:8].all() and not nan[0].any() and not nan[1, :4].any()
    if device.type == "cuda":  # the CPU's op has no halves
        assert not nan[1, 8:].any() and out[1, 8:].isfinite().all()


def test_a_nan_query_stays_in_its_row(device):
    batch = make_batch(Case((70, 200), 4, group=8), device)
    q = batch.q.clone()
    q[5, 3, 7] = torch.nan
    q[2, 11, 100] = torch.inf
    batch = replace(batch, q=q)
    out, lse = batch.run()
    bad = torch.zeros(out.shape[:2], dtype=torch.bool)
    bad[5, 3] = bad[2, 11] = True
    assert torch.equal(out.isnan().any(-1), bad) and torch.equal(lse.T.isnan(), bad)
    check_batch(batch, out, lse)


@pytest.mark.parametrize("split_units", [0, 2])
def test_the_same_batch_gives_the_same_bits(device, split_units):
    batch = make_batch(Case((1000, 3, 0, 500, 70), 2, split_units=split_units), device)
    workspace = batch.workspace()
    first, second, third = batch.run(), batch.run(workspace), batch.run(workspace)
    for other in (second, third):
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


@pytest.mark.parametrize("split_units", [1, 2, 5])
@pytest.mark.parametrize("window", [0, 150])
def test_with_a_fixed_split_a_request_has_the_same_bits_in_any_batch(device, split_units, window):
    batch = make_batch(Case((1000, 3, 0, 500, 70), 2, split_units=split_units, window=window), device)
    out, lse = batch.run()
    for requests in ([0], [3], [4, 1], [2, 3, 0]):
        part, part_lse = batch.only(requests).run()
        rows = torch.tensor([2 * r + i for r in requests for i in range(2)])
        assert torch.equal(part, out[rows]) and torch.equal(part_lse, lse[:, rows])


def test_one_workspace_serves_smaller_batches(device):
    """More requests and query tokens than the batch has, and one batch after another."""
    large = make_batch(Case((300, 70, 0, 1000), 4), device)
    workspace = large.workspace(max_requests=50)
    for case in (large.case, Case((1000, 3)), Case((5,) * 50, 3), Case((), 2)):
        batch = make_batch(case, device)
        check_batch(batch, *batch.run(workspace))


def test_reading_with_the_wrong_order_is_wrong(device):
    batch = make_batch(Case((100,), order=SWIZZLED), device)
    out, lse = replace(batch, case=replace(batch.case, order=LINEAR)).run()
    with pytest.raises(AssertionError, match="error"):
        check_batch(batch, out, lse)


def test_layer_major_caches(device):
    """A cache of its own gives the bits of the same pages inside cross-layer rows."""
    batch = make_batch(Case((200, 33), 2), device)
    pool = batch.pool
    dense = make_pool(device, len(pool.raw), pool.heads, pool.block_size, pool.head_size, 1, 0)
    dense.cache.copy_(pool.cache)
    for a, b in zip(batch.run(), replace(batch, pool=dense).run(), strict=True):
        assert torch.equal(a, b)


def test_workspace_limits():
    shape = {"num_q_heads": 8, "num_kv_heads": 2, "head_size": 128, "max_requests": 4}
    cpu = torch.device("cpu")
    with pytest.raises(ValueError, match="max_tokens: expected a positive number with split_units, got 0"):
        ops.AttentionWorkspace.create(cpu, **shape, split_units=2)
    with pytest.raises(ValueError, match="1 to 8 query tokens, got 4 and 9"):
        ops.AttentionWorkspace.create(cpu, **shape, max_q_len=9)
    with pytest.raises(ValueError, match=r"q_len: expected 1 to 2 \(max_q_len\), got 3"):
        ops.AttentionWorkspace.create(cpu, **shape, max_q_len=2).parts_for(3)
