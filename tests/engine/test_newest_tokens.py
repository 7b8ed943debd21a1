"""Unquantised newest tokens in a real engine: nothing stale is ever read, whatever becomes of requests.

NEWEST_TOKENS_SECONDS=600 pytest tests/engine/test_newest_tokens.py is the long search.
"""

import os
import time

import pytest
from model_fixture import random_prompts, vllm_greedy
from newest_fixture import Life, PageOracle, accepted, allow_drafts, draft_at_random

pytestmark = pytest.mark.usefixtures("reference_platform")

PLACES, ROWS = 32, 3
"""Tokens of a row; rows, for four requests."""
SECONDS = float(os.environ.get("NEWEST_TOKENS_SECONDS", "5"))
"""How long requests come and go, for each kind of engine."""
NGRAM = dict(method="ngram", num_speculative_tokens=6, prompt_lookup_min=1, prompt_lookup_max=3)


@pytest.fixture(scope="module", params=[None, NGRAM], ids=["plain", "drafts"])
def llm(request, make_llm, tiny_llama):
    """A cache of 21 blocks, of which three requests take most: they preempt each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_XLAYER_NEWEST_TOKENS", str(PLACES))
        allow_drafts(patch)
        with patch.context() as while_made:
            while_made.setattr("vllm_xlayer.attention.newest.num_rows", lambda config: ROWS)
            engine = make_llm(
                tiny_llama, kv_cache_dtype="nvfp4", num_gpu_blocks_override=21, max_num_seqs=4,
                max_num_batched_tokens=64, max_model_len=256, enable_prefix_caching=True,
                speculative_config=request.param,
            )  # fmt: skip
        draft_at_random(patch)
        yield engine


@pytest.fixture
def oracle(monkeypatch):
    return PageOracle(monkeypatch)


HAPPENS = ("aborted", "preempted", "reset", "cached", "finished")
LEAST_LIVES, MOST_LIVES = 3, 60


def live(llm, oracle, seconds: float, seed: int = 0):
    """Lives one after the other until something is wrong, or the time is over and all has happened.

    Returns the last one's seed, and what all of them counted.
    """
    counts, end = None, time.monotonic() + seconds
    while not oracle.wrong and (
        time.monotonic() < end
        or seed < LEAST_LIVES
        or (seed < MOST_LIVES and min(counts[what] for what in HAPPENS) == 0)
    ):
        life = Life(llm, seed)
        life.begin()
        for _ in range(150):
            life.step()
            if oracle.wrong:
                break
        life.end()
        counts, seed = life.counts if counts is None else counts + life.counts, seed + 1
    return seed - 1, counts


def test_no_row_has_another_content(llm, oracle):
    """Rows and blocks reused, prompts found in the cache, chunks, preempted and aborted requests, drafts."""
    accepted.clear()
    seed, counts = live(llm, oracle, SECONDS)
    print(counts, oracle.counts, accepted)
    assert not oracle.wrong, (seed, oracle.wrong[:5], len(oracle.wrong))
    assert oracle.counts["read"] > 5 * oracle.counts["attended"] > 0, oracle.counts
    assert min(counts[what] for what in HAPPENS) > 0, counts


def no_reset_on_reuse(monkeypatch):
    _count_only(monkeypatch, lambda name, seen: name in seen)


def no_reset_on_resumption(monkeypatch):
    _count_only(monkeypatch, lambda name, seen: name not in seen)


def _count_only(monkeypatch, counts):
    """Starts are counted only of requests for which counts(name, names seen before) is true."""
    from vllm_xlayer.attention.newest_rows import NamedRows

    start, seen = NamedRows.start, set()

    def mutated(rows, names):
        for name in list(names):
            before = rows.starts.copy()
            start(rows, [name])
            if not counts(name, seen):
                rows.starts[:] = before
            seen.add(name)

    monkeypatch.setattr(NamedRows, "start", mutated)


def no_reset_after_a_prefix_hit(monkeypatch):
    """As if a request had itself written what was found in the cache."""

    def before(state, row, first):
        if state[row, 0] < 0:
            state[row, 0], state[row, 1] = 0, first

    _before_each_step(monkeypatch, before)


def no_reset_after_a_rejected_draft(monkeypatch):
    """As if rejected drafts had not been written over older tokens."""

    def before(state, row, first):
        state[row, 1] = min(int(state[row, 1]), first)

    _before_each_step(monkeypatch, before)


def _before_each_step(monkeypatch, change):
    """change(state, row, the request's first token of the step) for each request, before it is planned."""
    from vllm_xlayer.attention.newest import ops

    step = ops.newest_step

    def mutated(starts, lens, rows, slot_mapping, state, *others):
        for first, row in zip((lens - starts.diff()).tolist(), rows.tolist(), strict=True):
            if row >= 0:
                change(state, row, first)
        return step(starts, lens, rows, slot_mapping, state, *others)

    monkeypatch.setattr(ops, "newest_step", mutated)


@pytest.mark.parametrize("llm", [NGRAM], ids=["drafts"], indirect=True)
@pytest.mark.parametrize(
    "mutation",
    [
        no_reset_on_reuse,
        no_reset_on_resumption,
        no_reset_after_a_prefix_hit,
        no_reset_after_a_rejected_draft,
    ],
    ids=lambda mutation: mutation.__name__,
)
def test_the_search_finds(llm, oracle, monkeypatch, mutation):
    """Each thing that keeps rows right, left out: the test above would fail."""
    mutation(monkeypatch)
    live(llm, oracle, seconds=60)
    assert oracle.wrong


def test_newest_tokens_change_answers_only_as_rounding_does(make_llm, tiny_llama, monkeypatch):
    """With as many as there are, decode is what it is without quantisation; off, it is what it was."""
    prompts = random_prompts([1, 15, 16, 40])
    exact = vllm_greedy(make_llm(tiny_llama), prompts, 24)
    off = vllm_greedy(make_llm(tiny_llama, kv_cache_dtype="nvfp4", max_num_seqs=4), prompts, 24)
    monkeypatch.setenv("VLLM_XLAYER_NEWEST_TOKENS", "128")
    on = vllm_greedy(make_llm(tiny_llama, kv_cache_dtype="nvfp4", max_num_seqs=4), prompts, 24)
    assert on == exact != off
