"""gather_nvfp4 of own tokens, newest ones and pages in one batch: the CPU op, the CUDA kernel's code on a
CPU, lane by lane, and the CUDA op."""

import pytest
import torch
from reference import emulated
from reference.gather_cases import Case, make

from vllm_xlayer import ops
from vllm_xlayer.nvfp4 import ScaleOrder

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
WHY_NOT = emulated.why_not()


@pytest.fixture(
    params=[
        "cpu",
        pytest.param("emulated", marks=pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def runner(request):
    """The op, or the kernel that is called like it; and where its tensors are."""
    gather = emulated.gather_nvfp4 if request.param == "emulated" else ops.gather_nvfp4
    return gather, torch.device("cuda", 0) if request.param == "cuda" else torch.device("cpu")


@pytest.fixture
def check(runner):
    """Runs a case, and looks at what came out."""
    gather, device = runner

    def run(case: Case, *sources: str) -> None:
        made = make(case, device)
        assert set(made.sources) == set(sources)
        made.check(gather)

    return run


ALL = ("own", "newest", "page")


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize("head_size", [64, 80, 96, 128, 192, 256])
def test_three_sources_in_one_batch(check, head_size, dtype):
    check(Case(head_size=head_size, dtype=dtype), *ALL)


@pytest.mark.parametrize("block_size", [64, 784, 7424])
def test_large_pages(check, block_size):
    check(Case(block_size=block_size, head_size=64), *ALL)


@pytest.mark.parametrize("heads", [1, 2, 3, 8])
@pytest.mark.parametrize("head_size", [80, 128])
def test_heads(check, heads, head_size):
    """A warp's lanes are more than a token's chunks, or have several each."""
    check(Case(heads=heads, head_size=head_size), *ALL)


@pytest.mark.parametrize("source_dtype", [BF16, F16], ids=str)
def test_float32_from_16_bits(check, source_dtype):
    """As the CPU platform asks: pages are not rounded to 16 bits."""
    check(Case(dtype=F32, source_dtype=source_dtype, head_size=64), *ALL)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("pad", [0, 3, 4])
def test_rows_of_key_and_value_anywhere(check, pad, dtype):
    check(Case(pad=pad, dtype=dtype, head_size=64), *ALL)


def test_keys_that_are_not_rotated(check):
    check(Case(rotated=False), *ALL)


def test_swizzled_scales(check):
    check(Case(order=ScaleOrder.SWIZZLED), *ALL)


def test_a_layer_that_shares_the_kv_of_another(check):
    """No own tokens are at hand: they are in pages, the newest before them in rows."""
    check(Case(has_own=False), "newest", "page")


def test_no_newest_tokens(check):
    check(Case(has_newest=False), "own", "page")


def test_own_tokens_known_but_not_at_hand(check):
    check(Case(has_own=False, has_newest=False), "page")


@pytest.mark.parametrize("places", [16, 64, 256])
def test_rows_of_other_lengths(check, places):
    check(Case(places=places, head_size=64), *ALL)


def test_bits_of_what_is_not_quantised(runner):
    """Infinities, and NaNs of any bits, come out as they were: own K and V, and V of newest tokens."""
    gather, device = runner
    made = make(Case(head_size=64), device)
    given = made.arguments
    special = torch.tensor([0x7F80, -0x0080, 0x7FC1, -0x0001, 0x7F81, 1], dtype=torch.int16).view(BF16)
    key, value, newest = given["key"], given["value"], given["newest"]
    begin = int(given["query_starts"][0])
    key[begin, 0, :6] = value[begin, 1, 58:] = special.to(device)
    newest[1, 1, 0, 96 % 32, :6] = special.to(device)  # token 96 of the first request
    gather(**given)
    bits = [given[name].cpu().view(torch.int16) for name in ("k_out", "v_out")]
    expected = special.view(torch.int16)
    assert torch.equal(bits[0][100, 0, :6], expected) and torch.equal(bits[1][100, 1, 58:], expected)
    assert torch.equal(bits[1][96, 0, :6], expected)


def test_many_requests(check):
    check(Case(requests=Case.requests * 12, heads=1, head_size=64), *ALL)
