"""Statistics of K and V: each against loops and torch's own functions, and the choice of global scales."""

import math

import pytest
import torch

from vllm_xlayer.nvfp4 import ScaleChoice, count_groups, decode, encode, rotate
from vllm_xlayer.quality.statistics import Sums, best_exponent, combine, squared_error

HEADS, HEAD_SIZE = 2, 32
BEST = ScaleChoice.BEST_OF_9


def tokens(count, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, HEADS, HEAD_SIZE, generator=generator)


def result_of(*parts, global_scale=1.0):
    sums = Sums(global_scale, BEST)
    for part in parts:
        sums.add(part)
    return sums.result()


def test_moments_are_torchs():
    x = tokens(100) + 3 * torch.randn(HEADS, HEAD_SIZE, generator=torch.Generator().manual_seed(5))
    found = combine([result_of(x[:30], x[30:])])
    assert found["largest"] == float(x.abs().max())
    assert found["std"] == pytest.approx(float(x.double().std(correction=0)))
    share = x.double().mean(0).square().mean() / x.double().square().mean()
    assert 0.5 < share < 1 and found["mean_share"] == pytest.approx(float(share))


def test_ranks_add_up_to_the_whole():
    x = tokens(64) + 1
    whole, halves = combine([result_of(x)]), combine([result_of(x[:, :1]), result_of(x[:, 1:])])
    for name, value in whole.items():
        assert halves[name] == pytest.approx(value), name


def test_error_is_that_of_the_round_trip():
    x = tokens(50)
    expected = (decode(*encode(x)) - x).norm() / x.norm()
    found = combine([result_of(x)])
    assert found["rmse"] == pytest.approx(float(expected), rel=1e-5) and 0.07 < found["rmse"] < 0.09


def test_groups_are_counted_as_in_a_loop():
    x = tokens(30)
    x[3, 0, 5] = 6000.0
    x[4, 1, 20] = -2689.0
    x[5, 0] *= 1e-3
    x[6] = 0
    saturated = underflowed = 0
    for group in x.reshape(-1, 16).tolist():
        largest = max(map(abs, group))
        saturated += largest > 2688
        underflowed += 0 < largest < 6 / 64
    assert count_groups(x, 1.0) == (saturated, underflowed) == (2, 2)
    assert count_groups(x * 4, 4.0) == (2, 2)
    found = combine([result_of(x)])
    assert (found["groups"], found["saturated"], found["underflowed"]) == (30 * 4, 2, 2)


def test_what_is_counted_is_what_the_format_cannot_hold():
    """Around both limits: saturated groups lose their largest value, subnormal ones have coarse scales."""
    just, over = torch.full((1, 16), 2688.0), torch.full((1, 16), 3000.0)
    assert torch.equal(decode(*encode(just)), just) and count_groups(just, 1.0).saturated == 0
    assert decode(*encode(over)).max() == 2688 and count_groups(over, 1.0).saturated == 1
    normal = tokens(2000, 0.2)
    small = tokens(2000, 0.002)
    error = {s: squared_error(x, 1.0, BEST) / float(x.square().sum()) for s, x in ((1, normal), (0, small))}
    assert count_groups(normal, 1.0).underflowed == 0 and error[1] < 0.083**2
    assert count_groups(small, 1.0).underflowed == 2000 * HEADS * HEAD_SIZE // 16 and error[0] > 0.2**2


@pytest.mark.parametrize("std", [0.002, 0.05, 1.0, 30.0])
def test_chosen_scale_keeps_small_and_large_values(std):
    x = tokens(300, std)
    found = combine([result_of(x)])
    assert found["best_rmse"] < 0.083
    room = 2688 * 2.0 ** found["best_exponent"] / found["largest"]
    assert room > 64, "for values larger than those seen"


def test_few_huge_values_do_not_decide():
    """A sink of 40,000 is kept where all others stand it. Of errors that hardly differ, the largest scale."""
    x = tokens(600, 0.5)
    x[0, 0, 0] = 40_000.0
    found = combine([result_of(x)])
    assert 2688 * 2.0 ** found["best_exponent"] >= 40_000
    errors = {0: 1.0, 1: 0.5, 2: 0.502, 3: 0.504, 4: 0.6}
    assert best_exponent(errors) == 3


def test_nothing_seen_is_no_division_by_zero():
    found = combine([result_of(torch.zeros(4, HEADS, HEAD_SIZE))])
    assert found["rmse"] == 0 and found["mean_share"] == 0 and not math.isnan(found["std"])


def test_what_fits_is_judged_of_keys_as_they_are_kept():
    """Moments are those of K itself; saturation and errors those of what pages hold."""
    x = tokens(50)
    x[3, 0, 5] = 6000.0  # rotated, 1,500 in all of its block
    plain, kept = (combine([_sums(x, rotated).result()]) for rotated in (False, True))
    assert (plain["saturated"], kept["saturated"]) == (1, 0)
    for name in ("largest", "std", "mean_share", "groups"):
        assert plain[name] == kept[name], name
    expected = rotate(x)
    error = (decode(*encode(expected)) - expected).norm() / expected.norm()
    assert kept["rmse"] == pytest.approx(float(error), rel=1e-5)


def _sums(x, rotated):
    sums = Sums(1.0, BEST, rotated)
    sums.add(x)
    return sums
