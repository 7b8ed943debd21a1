"""Drafts for tests of unquantised newest tokens on the CPU platform: made, and accepted, at random."""

import random
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from unittest.mock import patch

import torch
from model_fixture import VOCAB


def allow_drafts(monkeypatch) -> None:
    """Lets the CPU reference platform speculate: it refuses, as vLLM's sampler for it is compiled."""
    from vllm_xlayer.platform import reference

    monkeypatch.setattr(reference, "_refusal", lambda config: None)
    if not hasattr(torch.ops._C, "rejection_greedy_sample_kernel_impl"):
        schema = (
            "rejection_greedy_sample_kernel_impl(Tensor(a!) out, Tensor ends, Tensor drafts, Tensor best, "
            "Tensor bonus, Tensor? is_greedy, SymInt most) -> ()"
        )
        _LIBRARY.define(schema)
        _LIBRARY.impl("rejection_greedy_sample_kernel_impl", _accept, "CompositeExplicitAutograd")


def draft_at_random(monkeypatch) -> None:
    """Drafts are made at random from now on, and accepted at random.

    What an answer is does not matter here, and what the tiny model says can hardly be guessed. Once an engine
    was made: vLLM does not start where numba was imported before it.
    """
    from vllm.v1.spec_decode.ngram_proposer import NgramProposer

    monkeypatch.setattr(NgramProposer, "batch_propose", _draft)
    torch.set_num_threads(1)  # the compiled search for n-grams has set the machine's


RANDOM = random.Random(0)
_LIBRARY = torch.library.Library("_C", "FRAGMENT")
accepted: Counter[bool] = Counter()
"""Drafts that were accepted, and rejected."""


@contextmanager
def all_wrong_every_other_step() -> Iterator[None]:
    """Of a request that runs alone: in turn as many drafts as there may be, and none; all are rejected.

    Drafters draft in each step. Without `draft_at_random` drafts are what they are.
    """
    here, turns = sys.modules[__name__], cycle((True, False))
    with (
        patch.object(here, "_how_many", lambda most: most if next(turns) else 0),
        patch.object(here, "_is_right", lambda: False),
    ):
        yield


def _how_many(most: int) -> int:
    return RANDOM.randint(0, most)


def _is_right() -> bool:
    return RANDOM.random() < 2 / 3


def _draft(proposer, num_requests, valid, num_tokens, tokens, k) -> list[list[int]]:
    """Of each request that wants some, up to k drafts."""
    room = {i: min(k, proposer.max_model_len - 1 - int(num_tokens[i])) for i in valid}
    counts = [_how_many(max(0, room.get(i, 0))) for i in range(num_requests)]
    return [[RANDOM.randrange(1, VOCAB) for _ in range(count)] for count in counts]


def _accept(out, ends, drafts, best, bonus, is_greedy, most) -> None:
    """Drafts up to one at random, and then what the model says: out [requests, most + 1]."""
    start = 0
    for row, end in enumerate(ends.tolist()):
        took = 0
        while start + took < end and _is_right():
            out[row, took] = drafts[start + took]
            took += 1
        out[row, took] = bonus[row] if start + took == end else best[start + took]
        accepted[True] += took
        accepted[False] += end - start - took
        start = end
