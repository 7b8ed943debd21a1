"""What `benchmarks.steps` makes of a profile."""

import pytest

from benchmarks import markdown_steps, steps
from benchmarks.steps import Kernel

ATTENTION = "void xlayer::attention::decode_kernel<Config<128, 1, 4>, true>(Params)"


def profile(steps_: int, first: int = 3) -> list[Kernel]:
    """Of so many steps of 1,000 us: a product of 200 us, two layers of attention, one sampler. The first step
    has more kernels, as prompts do."""
    kernels = []
    for step in range(steps_):
        at = 1000.0 * step
        if step == 0:
            kernels += [Kernel("nvfp4_gather_kernel", at + i, 1.0) for i in range(first)]
        kernels += [Kernel("nvjet_sm90", at + 10, 200.0)]
        kernels += [Kernel(ATTENTION, at + 300 + 100 * i, 90.0) for i in range(2)]
        kernels += [Kernel("_gumbel_sample_kernel", at + 600, 20.0)]
    return kernels


def test_kinds_add_up():
    found = steps.by_kind([*profile(1), Kernel("void flash::prepare", 0, 4.0)])
    assert found == pytest.approx(
        {
            "decode attention": 180e-6,
            "FlashAttention": 4e-6,
            "cache dequantised": 3e-6,
            "matrix products": 200e-6,
            "other": 20e-6,
        }
    )
    assert list(found) == [kind for kind in [*steps.KINDS, "other"] if kind in found]


def test_a_step_is_cut_out_of_equal_ones():
    step, seconds = steps.one_step(profile(17)[::-1], 17)
    assert seconds == pytest.approx(1e-3)
    assert steps.by_kind(step) == pytest.approx(
        {"decode attention": 180e-6, "matrix products": 200e-6, "other": 20e-6}
    )


def test_no_kernel_of_each_step_is_an_error():
    with pytest.raises(ValueError, match="expected a kernel that ran 5 times"):
        steps.one_step(profile(4), 5)


def test_the_table_names_each_kind():
    one = steps.told(profile(1), 2e-3)
    cache = {"first token, cached": one, "decode step": one}
    versions = {"vllm": "0.33.0", "torch": "2.14.0"}
    results = dict(
        shape="llama-3.1-8b", cached=16384, requests=64, tokens=8192, caches={"nvfp4": cache}, hardware="GPU",
        versions=versions, date="today", commit="abcdef0",
    )  # fmt: skip
    text = markdown_steps.section(results)
    assert "| first token of 16,384, all cached | nvfp4 |" in text
    assert "| passes | 2.00 |" in text and "| GPU computes | 0.40 |" in text
    assert "| decode attention | 0.18 |" in text and "| other | 0.02 |" in text
