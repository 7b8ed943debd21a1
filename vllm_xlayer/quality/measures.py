"""How far a run with one KV cache is from the run with 16-bit KV: pure numpy on what the engines wrote.

A run's log-probabilities are float64 [windows W, positions P]: of the text's own token; and of the K most
probable tokens, [W, P, K], with their ids. Windows are independent, tokens of a window are not: every
interval is over windows.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ids = NDArray[np.int64]

TINY = 1e-7
"""A rest of probability below this is rounding of the log-probabilities, which are float32."""


class Estimate(NamedTuple):
    """A mean over windows and its 95 % interval; low and high are NaN with fewer than two windows."""

    mean: float
    low: float
    high: float

    def map(self, function) -> "Estimate":
        """The estimate of an increasing function of the quantity."""
        return Estimate(*(float(function(x)) for x in self))


@dataclass(frozen=True)
class Run:
    """What a model thought of the text, token by token, with one KV cache and one way of reading the text."""

    text: Array
    """[W, P] log-probability of the text's token."""
    top_ids: Ids
    """[W, P, K], most probable first."""
    top: Array
    """[W, P, K] their log-probabilities."""


def estimate(values: Array) -> Estimate:
    """Mean over windows of values [W], with the normal distribution's interval."""
    mean = float(values.mean())
    if len(values) < 2:
        return Estimate(mean, float("nan"), float("nan"))
    half = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5
    return Estimate(mean, mean - half, mean + half)


def perplexity(run: Run) -> float:
    return float(np.exp(-run.text.mean()))


def perplexity_change(run: Run, reference: Run, positions: slice = slice(None)) -> Estimate:
    """Relative change of perplexity: 0.05 is 5 % more. The interval is of the windows' differences."""
    loss = (reference.text - run.text)[:, positions].mean(1)
    return estimate(loss).map(np.expm1)


def divergence(run: Run, reference: Run) -> Estimate:
    """KL(reference || run) in nats a token, from what both say of the tokens that both have among their K
    most probable; all others count as one. So it is a lower bound, and close where these have nearly all of
    the probability."""
    values = np.empty(run.text.shape)
    for window in range(len(values)):  # one at a time: a comparison takes P * K * K bytes
        same = reference.top_ids[window, :, :, None] == run.top_ids[window, :, None, :]
        common = same.any(2)
        p = np.where(common, reference.top[window], -np.inf)
        q = np.where(common, np.where(same, run.top[window, :, None, :], -np.inf).max(2), 0.0)
        terms = np.where(common, np.exp(p) * (np.where(common, p, 0.0) - q), 0.0).sum(1)
        rest_p = 1 - np.exp(p).sum(1)
        rest_q = 1 - np.where(common, np.exp(q), 0.0).sum(1)
        rest = np.maximum(rest_p, TINY) * np.log(np.maximum(rest_p, TINY) / np.maximum(rest_q, TINY))
        values[window] = terms + np.where(rest_p > TINY, rest, 0.0)
    return estimate(values.mean(1))


def same_first(run: Run, reference: Run) -> Estimate:
    """Share of positions at which both find the same token the most probable."""
    return estimate((run.top_ids[..., 0] == reference.top_ids[..., 0]).mean(1))


def same_answer(answers: Ids, reference: Ids) -> Estimate:
    """Tokens of greedy answers [W, G] before the first that differs."""
    differs = answers != reference
    first = np.where(differs.any(1), differs.argmax(1), differs.shape[1])
    return estimate(first.astype(np.float64))


def spans(first: int, length: int, count: int = 4) -> list[tuple[int, int]]:
    """Up to ``count`` nearly equal spans of the positions first .. length - 1."""
    bounds = np.linspace(first, length, min(count, length - first) + 1).round().astype(int).tolist()
    return list(pairwise(bounds))
