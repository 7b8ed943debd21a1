"""The gather's kernel without a GPU: the same bits as the CPU op, that has its own tests."""

import math

import pytest
import torch
from reference import emulated
from reference.gather_cases import Case, make
from reference.pools import make_pool, scalar

from vllm_xlayer import ops
from vllm_xlayer.nvfp4 import ScaleOrder

pytestmark = pytest.mark.skipif(emulated.why_not() is not None, reason=str(emulated.why_not()))

CPU = torch.device("cpu")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
LINEAR, SWIZZLED = ScaleOrder


def bits(x: torch.Tensor) -> torch.Tensor:
    """As integers, zeros with their sign, and one number for every NaN."""
    return torch.where(x.isnan(), -1, x.view(torch.int32 if x.dtype == F32 else torch.int16).int())


def check(arguments: dict, **how) -> None:
    """Both into outputs that are alike before."""
    arguments = dict(arguments)
    outs = [arguments.pop(name) for name in ("k_out", "v_out")]
    expected, got = ([out.clone() for out in outs] for _ in range(2))
    ops.gather_nvfp4(**arguments, k_out=expected[0], v_out=expected[1])
    emulated.gather_nvfp4(**arguments, k_out=got[0], v_out=got[1], **how)
    for name, e, g in zip("KV", expected, got, strict=True):
        wrong = (bits(e) != bits(g)).flatten(1).any(1).nonzero().flatten()
        assert len(wrong) == 0, f"{name} of tokens {wrong.tolist()[:10]}"


@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "plain"])
@pytest.mark.parametrize("head_size", range(16, 257, 16))
def test_head_sizes(head_size, rotated):
    """With one of the dtypes each, and so many heads that a token has few threads, or half of a block's."""
    i = head_size // 16
    heads, dtype = (1, 2, 3, 5, 8)[i % 5], (BF16, F16, F32)[i % 3]
    source = (BF16, F16, F32)[i % 2] if dtype == F32 else dtype
    order = SWIZZLED if head_size % 64 == 0 else LINEAR
    case = Case(
        head_size=head_size, heads=heads, dtype=dtype, source_dtype=source, rotated=rotated, order=order
    )
    check(make(case, CPU).arguments)


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("order", list(ScaleOrder))
@pytest.mark.parametrize("head_size", [64, 128, 192, 256])
def test_scale_orders(head_size, order, dtype):
    check(make(Case(head_size=head_size, order=order, dtype=dtype, heads=3), CPU).arguments)


@pytest.mark.parametrize("forwards", [True, False], ids=["forwards", "backwards"])
@pytest.mark.parametrize("each", [0, 1, 2, 8])
@pytest.mark.parametrize(("heads", "head_size"), [(1, 64), (8, 128), (3, 80)])
def test_tokens_of_a_thread(heads, head_size, each, forwards):
    """Their sources change from one to the next; the last block has fewer than it could."""
    check(make(Case(heads=heads, head_size=head_size), CPU).arguments, each=each, forwards=forwards)


@pytest.mark.parametrize(("heads", "head_size"), [(32, 128), (33, 128), (40, 128), (20, 256), (51, 80)])
def test_tokens_with_more_shares_than_a_block_has_threads(heads, head_size):
    case = Case(requests=Case.requests[:1], heads=heads, head_size=head_size)
    check(make(case, CPU).arguments)


@pytest.mark.parametrize("block_size", [16, 784, 7424])
@pytest.mark.parametrize("pad", [0, 3, 4])
@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "plain"])
def test_pages_and_rows_anywhere(block_size, pad, rotated):
    check(make(Case(block_size=block_size, pad=pad, rotated=rotated, head_size=96), CPU).arguments)


@pytest.mark.parametrize("heads", [1, 2, 8])
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("rotated", [True, False], ids=["rotated", "plain"])
def test_heads_and_head_sizes(heads, head_size, rotated):
    """In bfloat16, where lanes exchange what they store, or not."""
    check(make(Case(heads=heads, head_size=head_size, rotated=rotated), CPU).arguments, each=0)


@pytest.mark.parametrize("heads", range(1, 10))
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 192, 256])
def test_a_store_instruction_writes_whole_lines(heads, head_size):
    """128 bytes of K or V where heads are 256, or two are; elsewhere sectors of 32. And all of a token."""
    plan, stores = emulated.gather_plan(heads, head_size, 100), emulated.gather_stores(heads, head_size, 100)
    tokens = torch.arange(plan["slots"])[:, None] * plan["each"] * heads * head_size
    expected = tokens + torch.arange(0, heads * head_size, 8)
    assert torch.equal(stores[stores >= 0].sort().values, expected.flatten())
    whole = 64 if head_size in (128, 256) or (head_size == 64 and heads % 2 == 0) else 16
    for instruction in stores.unflatten(1, (-1, 32)).permute(0, 1, 3, 2).flatten(0, 2):
        chunks = instruction[instruction >= 0]
        _, counts = (chunks // whole).unique(return_counts=True)
        assert (counts == whole // 8).all()


@pytest.mark.parametrize("head_size", [64, 128])
def test_rows_of_the_output_anywhere(head_size):
    """The strides of K and V differ, and from what a dense output has."""
    made = make(Case(head_size=head_size), CPU)
    tokens, heads, size = made.arguments["k_out"].shape
    k = torch.full((tokens, heads + 1, size + 8), 7.0, dtype=BF16)
    v = torch.full((heads + 2, tokens, size + 16), 7.0, dtype=BF16).transpose(0, 1)
    for name, out in (("k_out", k), ("v_out", v)):
        made.arguments[name] = out[:, 1 : heads + 1, 8 : size + 8]
    check(made.arguments)


USUAL = [1.0, 0.37, -2.5, 1 + 2**-11, 2**-24, 1.01e-27, 0.99e27]
UNUSUAL = [0.99e-27, -1e-38, 1e-44, 1.01e27, 1e36, -3e38, 0.0, -0.0, torch.inf, torch.nan]


@pytest.mark.parametrize("head_size", [16, 32])
@pytest.mark.parametrize(
    ("k_scale", "v_scale"),
    [*((x, x) for x in USUAL + UNUSUAL), (0.37, 1e36), (1e-38, 0.37)],
)
def test_every_scale_byte_under_any_global_scale(k_scale, v_scale, head_size):
    """Powers of two are multiplied in early; not where that changes what is rounded, or overflows."""
    generator = torch.Generator().manual_seed(3)
    pool = make_pool(CPU, blocks=4, heads=1, block_size=256, head_size=head_size, layers=1, layer=0)
    pool.raw.copy_(torch.randint(256, pool.raw.shape, generator=generator, dtype=torch.uint8))
    data, scales = 256 * head_size // 2, 256 * head_size // 16
    for page in pool.raw:
        for begin in (data, 2 * data + scales):
            # Each byte for a whole token, so that no other's NaN hides it.
            page[begin : begin + scales] = torch.arange(256, dtype=torch.uint8).repeat_interleave(
                scales // 256
            )
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([[2, 0, 3, 1]], [0], [0, 1024])]
    for rotated in (True, False):
        for dtype in (BF16, F16, F32):
            out = torch.full((2, 1024, 1, head_size), 7.0, dtype=dtype)
            check(
                dict(
                    kv_cache=pool.cache, block_table=ints[0], seq_starts=ints[1], cu_seqlens=ints[2],
                    k_scale=scalar(k_scale, CPU), v_scale=scalar(v_scale, CPU), k_out=out[0], v_out=out[1],
                    rotated_keys=rotated,
                )
            )  # fmt: skip


def test_how_the_work_is_cut():
    for heads in range(1, 130):
        for head_size in range(16, 257, 16):
            for tokens in (1, 100, 4096, 16400, 65536, 2**31):
                plan = emulated.gather_plan(heads, head_size, tokens)
                block = 32 if head_size % 32 == 0 else 16
                assert plan["shares"] * block == 2 * heads * head_size
                assert plan["rounds"] * plan["lanes"] >= plan["shares"] and plan["lanes"] % 2 == 0
                assert plan["slots"] * plan["lanes"] <= plan["threads"] <= 256 and plan["threads"] % 32 == 0
                assert 1 <= plan["slots"] <= 32 and 1 <= plan["each"] <= 8  # GATHER_PLACES is made for these
    assert emulated.gather_plan(8, 128, 16400) | {"rounds": 1, "lanes": 64, "slots": 4} == (
        emulated.gather_plan(8, 128, 16400)
    )


def test_waves_of_thread_blocks_are_full():
    """As many tokens a block as take the least time, if a wave of blocks takes what its tokens do, and half
    of one more."""

    def waves(each: int) -> int:
        return math.ceil(tokens / (4 * each) / at_once)

    for at_once in (1, 3, 660):
        for tokens in (1, 4, 2640, 2641, 16400, 40000, 65536, 10**6):
            each = emulated.gather_plan(8, 128, tokens, at_once)["each"]
            assert waves(each) * (each + 0.5) == min(waves(n) * (n + 0.5) for n in range(1, 9))
    chosen = [emulated.gather_plan(8, 128, n)["each"] for n in (2640, 16400, 65536)]
    assert chosen == [
        1,
        7,
        5,
    ]  # 1, 1 and 5 waves; with 8 tokens it would be 4 of 8, the last one nearly empty
