"""Unquantised newest tokens in a real engine: nothing stale is ever read, whatever becomes of requests.

NEWEST_TOKENS_SECONDS=600 pytest tests/engine/test_newest_tokens.py is the long search.
"""

import os

import pytest
from hybrid_fixture import save_hybrid
from model_fixture import random_prompts, save_eagle, vllm_greedy
from newest_drafts import accepted, allow_drafts, draft_at_random
from newest_fixture import HAPPENS, MUTATIONS, live
from newest_oracles import PageOracle

pytestmark = pytest.mark.usefixtures("reference_platform")

PLACES, ROWS = 32, 3
"""Tokens of a row; rows, for four requests."""
SECONDS = float(os.environ.get("NEWEST_TOKENS_SECONDS", "5"))
"""How long requests come and go, for each kind of engine."""
NGRAM = dict(method="ngram", num_speculative_tokens=6, prompt_lookup_min=1, prompt_lookup_max=3)


EAGLE = dict(method="eagle", num_speculative_tokens=3)
"""The drafter has a layer of its own, with a KV cache and newest tokens."""
HYBRID = "lfm2"
"""A model with states beside attention, which take blocks, too."""
CHUNKS = "llama4"
"""A model with layers that attend in chunks of 64 tokens: vLLM makes a request of each chunk of a step."""


@pytest.fixture(
    scope="module",
    params=[None, NGRAM, EAGLE, HYBRID, CHUNKS],
    ids=["plain", "drafts", "drafter", "hybrid", "chunks"],
)
def llm(request, make_llm, tiny_llama, tmp_path_factory):
    """A cache of 21 blocks, of which three requests take most: they preempt each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_XLAYER_NEWEST_TOKENS", str(PLACES))
        allow_drafts(patch)
        model, blocks, speculation = tiny_llama, 21, request.param
        if speculation in (HYBRID, CHUNKS):
            name, speculation = speculation, None
            model, blocks = save_hybrid(name, tmp_path_factory.mktemp(name)), 63
        if speculation is EAGLE:
            speculation = EAGLE | {"model": str(save_eagle(tmp_path_factory.mktemp("eagle"), 0))}
        with patch.context() as while_made:
            while_made.setattr("vllm_xlayer.attention.newest.num_rows", lambda config: ROWS)
            engine = make_llm(
                model, kv_cache_dtype="nvfp4", num_gpu_blocks_override=blocks, max_num_seqs=4,
                max_num_batched_tokens=64, max_model_len=256, enable_prefix_caching=True,
                speculative_config=speculation,
            )  # fmt: skip
        draft_at_random(patch)
        yield engine


@pytest.fixture
def oracle(monkeypatch):
    return PageOracle(monkeypatch)


def test_no_row_has_another_content(llm, oracle):
    """Rows and blocks reused, prompts found in the cache, chunks, preempted and aborted requests, drafts."""
    accepted.clear()
    seed, counts = live(llm, oracle, SECONDS)
    print(counts, oracle.counts, accepted)
    assert not oracle.wrong, (seed, oracle.wrong[:5], len(oracle.wrong))
    assert oracle.counts["read"] > 5 * oracle.counts["attended"] > 0, oracle.counts
    assert min(counts[what] for what in HAPPENS) > 0, counts


@pytest.mark.parametrize("llm", [NGRAM, EAGLE], ids=["drafts", "drafter"], indirect=True)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_the_search_finds(llm, oracle, monkeypatch, mutation):
    """Each thing that keeps rows right, left out: the test above would fail, and not by luck."""
    mutation(monkeypatch)
    seed, _ = live(llm, oracle, seconds=0)
    assert oracle.wrong and seed == 0, "each life begins with what shows it"


def test_newest_tokens_change_answers_only_as_rounding_does(make_llm, tiny_llama, monkeypatch):
    """With as many as there are, decode is what it is without quantisation; off, it is what it was."""
    prompts = random_prompts([1, 15, 16, 40])
    exact = vllm_greedy(make_llm(tiny_llama), prompts, 24)
    off = vllm_greedy(make_llm(tiny_llama, kv_cache_dtype="nvfp4", max_num_seqs=4), prompts, 24)
    monkeypatch.setenv("VLLM_XLAYER_NEWEST_TOKENS", "128")
    on = vllm_greedy(make_llm(tiny_llama, kv_cache_dtype="nvfp4", max_num_seqs=4), prompts, 24)
    assert on == exact != off
