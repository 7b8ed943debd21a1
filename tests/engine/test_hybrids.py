"""Models with states beside attention on the CPU reference platform: logprobs against transformers'."""

import pytest
from hybrid_fixture import (
    CONFIGS,
    PROMPTS,
    answers,
    answers_and_hits,
    cached_blocks,
    check_against_transformers,
    corrupt_group,
    fill_memory,
    groups,
    save_hybrid,
)
from model_fixture import random_prompts

NUM_TOKENS = 12
TOLERANCES = {"lfm2": 5e-4, "qwen3_next": None, "nemotron_h": 5e-4}
"""Of float32 sums in another order. vLLM's gated delta net runs on a CPU in bfloat16 only."""
POWER = 5e-3
"""Least change of a logprob by a wrong page or state; without one, the same hit gives the same logprobs."""
MODELS = [("lfm2", "LBHNC"), ("lfm2", "BLHNC"), ("qwen3_next", "BLHNC"), ("nemotron_h", "BLHNC")]
"""With layouts: vLLM's own, and rows."""


class Served:
    """A model and its engine."""

    def __init__(self, make_llm, folder, name, layout="LBHNC", **settings):
        self.folder, self.atol = save_hybrid(name, folder), TOLERANCES[name]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
            defaults = dict(dtype=CONFIGS[name]["dtype"], max_num_seqs=4, kv_cache_memory_bytes=8 << 20)
            self.llm = make_llm(folder, **(defaults | settings))
        cache_config = self.llm.llm_engine.vllm_config.cache_config
        assert cache_config.mamba_cache_mode == "align"
        self.block = cache_config.block_size
        fill_memory(self.llm, 0xFF)

    def check(self, prompts, found):
        check_against_transformers(self.folder, prompts, [answer[:2] for answer in found], self.atol)


@pytest.fixture(scope="module", params=MODELS, ids="-".join)
def served(make_llm, tmp_path_factory, request):
    """Chunks of 64 tokens, so that prompts are cut and share their steps with decodes."""
    return Served(make_llm, tmp_path_factory.mktemp("hybrid"), *request.param, max_num_batched_tokens=64)


def test_chunks_and_mixed_batches(served):
    served.check(PROMPTS, answers(served.llm, PROMPTS, NUM_TOKENS))


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_hits(served, beyond):
    """A repeated prompt, and one that goes on at its end.

    vLLM keeps the state at the last block boundary of a prompt, so one of whole blocks has no hit itself.
    """
    length = 2 * served.block + beyond
    (prompt,) = random_prompts([length], seed=length)
    answers(served.llm, [prompt], 1)
    longer = prompt + random_prompts([20], seed=99)[0]
    found = answers_and_hits(served.llm, [prompt, longer], NUM_TOKENS)
    if beyond:
        assert [answer[2] for answer in found] == [length // served.block * served.block] * 2
    served.check([prompt, longer], found)


def test_each_groups_blocks_matter(served):
    """The power check: what the tests above compare must notice a wrong page or state of any group."""
    for group in range(len(groups(served.llm))):
        length = 2 * served.block + 6
        (prompt,) = random_prompts([length], seed=200 + group)
        served.llm.reset_prefix_cache()
        assert not list(cached_blocks(served.llm, group))
        answers(served.llm, [prompt], 1)
        ((_, clean, hit),) = answers_and_hits(served.llm, [prompt], 4)
        assert hit == 2 * served.block
        assert corrupt_group(served.llm, group)
        ((_, wrong, hit),) = answers_and_hits(served.llm, [prompt], 4)
        assert hit == 2 * served.block
        assert max(abs(a - b) for a, b in zip(clean, wrong, strict=True)) > POWER, group
    served.llm.reset_prefix_cache()


def test_preemption_in_a_tiny_cache(make_llm, tmp_path, preempted):
    prompts = random_prompts([60, 61, 62, 63])
    served = Served(make_llm, tmp_path, "lfm2", num_gpu_blocks_override=34, max_model_len=128)
    served.check(prompts, answers(served.llm, prompts, 40))
    assert preempted


def test_parts_of_blocks_with_a_match_unit(make_llm, tmp_path):
    """Without a connector, in vLLM's own layout: pages whose first layer has a state are copied in full."""
    served = Served(
        make_llm, tmp_path, "lfm2", block_size=64, prefix_match_unit=16, max_num_batched_tokens=512
    )
    lengths = [17, 40, 65, 129, 150]
    prompts = random_prompts(lengths, seed=11)
    answers(served.llm, prompts, 1)
    found = answers_and_hits(served.llm, prompts, NUM_TOKENS)
    assert [answer[2] for answer in found] == [(length - 1) // 16 * 16 for length in lengths]
    served.check(prompts, found)
