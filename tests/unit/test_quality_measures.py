"""Each measure of the quality command against a computation of another kind, on whole distributions."""

import math
import random
import statistics

import numpy as np
import pytest
import torch

from vllm_xlayer.quality import measures
from vllm_xlayer.quality.measures import Run

WINDOWS, POSITIONS, VOCABULARY, TOP = 6, 12, 40, 8


@pytest.fixture
def logits():
    """(reference, other): float64 [W, P, vocabulary], close to each other."""
    generator = torch.Generator().manual_seed(0)
    shape = (WINDOWS, POSITIONS, VOCABULARY)
    reference = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return reference, reference + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def text():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCABULARY, (WINDOWS, POSITIONS), generator=generator)


def run_of(logits, text, top=TOP):
    logprobs = logits.log_softmax(-1)
    best = logprobs.topk(top, -1)
    return Run(
        logprobs.gather(-1, text[..., None])[..., 0].numpy(), best.indices.numpy(), best.values.numpy()
    )


def test_perplexity_is_that_of_cross_entropy(logits, text):
    loss = torch.nn.functional.cross_entropy(logits[0].flatten(0, 1), text.flatten())
    assert measures.perplexity(run_of(logits[0], text)) == pytest.approx(math.exp(loss))


def test_change_and_interval_are_paired_over_windows(logits, text):
    losses = [
        torch.nn.functional.cross_entropy(x.mT, text, reduction="none").mean(1).tolist() for x in logits
    ]
    differences = [other - one for one, other in zip(*losses, strict=True)]
    half = statistics.NormalDist().inv_cdf(0.975) * statistics.stdev(differences) / math.sqrt(WINDOWS)
    mean = statistics.fmean(differences)
    found = measures.perplexity_change(run_of(logits[1], text), run_of(logits[0], text))
    assert found == pytest.approx([math.exp(x) - 1 for x in (mean, mean - half, mean + half)], rel=1e-4)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = [
        low <= 2.0 <= high for _, low, high in (measures.estimate(rng.normal(2, 3, 40)) for _ in range(2000))
    ]
    assert 0.92 < sum(held) / len(held) < 0.96


def test_one_window_has_no_interval():
    assert all(math.isnan(x) for x in measures.estimate(np.ones(1))[1:])


def test_change_by_position_sees_only_those_positions(logits, text):
    reference = run_of(logits[0], text)
    worse = reference.text.copy()
    worse[:, 3:5] -= 0.1
    run = Run(worse, reference.top_ids, reference.top)
    assert measures.perplexity_change(run, reference, slice(0, 3)).mean == 0
    assert measures.perplexity_change(run, reference, slice(3, 5)).mean == pytest.approx(math.exp(0.1) - 1)


def test_divergence_of_whole_distributions_is_torchs(logits, text):
    runs = [run_of(x, text, top=VOCABULARY) for x in logits]
    a, b = (x.log_softmax(-1).flatten(0, 1) for x in logits)
    expected = torch.nn.functional.kl_div(b, a, reduction="batchmean", log_target=True)
    assert measures.divergence(runs[1], runs[0]).mean == pytest.approx(float(expected), rel=1e-6)


def test_divergence_of_the_top_is_that_of_the_lumped_distributions(logits, text):
    runs = [run_of(x, text) for x in logits]
    values = []
    for w in range(WINDOWS):
        for i in range(POSITIONS):
            p, q = (x[w, i].softmax(-1).tolist() for x in logits)
            both = set(runs[0].top_ids[w, i].tolist()) & set(runs[1].top_ids[w, i].tolist())
            parts = [(p[t], q[t]) for t in both]
            parts.append((1 - sum(x for x, _ in parts), 1 - sum(y for _, y in parts)))
            values.append(sum(x * math.log(x / y) for x, y in parts))
    found = measures.divergence(runs[1], runs[0]).mean
    assert found == pytest.approx(statistics.fmean(values), rel=1e-6)
    assert 0 < found < measures.divergence(*[run_of(x, text, VOCABULARY) for x in reversed(logits)]).mean


def test_divergence_from_itself_is_zero(logits, text):
    run = run_of(logits[0], text)
    assert measures.divergence(run, run).mean == pytest.approx(0, abs=1e-12)


def test_same_first_counts_equal_argmaxes(logits, text):
    equal = (logits[0].argmax(-1) == logits[1].argmax(-1)).double().mean()
    found = measures.same_first(run_of(logits[1], text), run_of(logits[0], text))
    assert 0 < found.mean < 1 and found.mean == pytest.approx(float(equal))


def test_same_answer_counts_up_to_the_first_difference():
    rng = random.Random(0)
    ours = [[rng.randrange(3) for _ in range(5)] for _ in range(50)] + [[1] * 5]
    theirs = [[rng.randrange(3) for _ in range(5)] for _ in range(50)] + [[1] * 5]
    lengths = [next((i for i in range(5) if a[i] != b[i]), 5) for a, b in zip(ours, theirs, strict=True)]
    assert measures.same_answer(np.array(ours), np.array(theirs)).mean == statistics.fmean(lengths)


def test_spans_cover_every_position_once():
    assert measures.spans(1024, 2048) == [(1024, 1280), (1280, 1536), (1536, 1792), (1792, 2048)]
    assert measures.spans(10, 12) == [(10, 11), (11, 12)]
    assert measures.spans(7, 30)[0][0] == 7 and measures.spans(7, 30)[-1][1] == 30
