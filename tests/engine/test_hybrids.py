"""Models with states beside attention on the CPU reference platform: logprobs against transformers'."""

import pytest
from hybrid_fixture import (
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
BLOCK = 16
ATOL = 2e-3
"""Sums of float32 in another order; a wrong state moves logprobs by 0.1 and more (see the power check)."""

LAYOUTS = ["LBHNC", "BLHNC"]
"""Vanilla vLLM's, and rows."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hybrid("lfm2", tmp_path_factory.mktemp("lfm2"))


@pytest.fixture(scope="module", params=LAYOUTS)
def llm(make_llm, folder, request):
    """Chunks of 64 tokens, so that prompts are cut and share their steps with decodes; memory is 0xFF."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_KV_CACHE_LAYOUT", request.param)
        llm = make_llm(folder, max_num_batched_tokens=64, max_num_seqs=4, kv_cache_memory_bytes=8 << 20)
    assert llm.llm_engine.vllm_config.cache_config.mamba_cache_mode == "align"
    assert len(groups(llm)) == 3
    fill_memory(llm, 0xFF)
    return llm


def test_chunks_and_mixed_batches(llm, folder):
    check_against_transformers(folder, PROMPTS, answers(llm, PROMPTS, NUM_TOKENS), ATOL)


@pytest.mark.parametrize("length", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 1])
def test_hits(llm, folder, length):
    """A repeated prompt, and one that goes on at its end.

    vLLM keeps the state at the last block boundary of a prompt, so one of whole blocks has no hit itself.
    """
    (prompt,) = random_prompts([length], seed=length)
    answers(llm, [prompt], 1)
    longer = prompt + random_prompts([20], seed=99)[0]
    found = answers_and_hits(llm, [prompt, longer], NUM_TOKENS)
    if length % BLOCK and length > BLOCK:
        assert [answer[2] for answer in found] == [length // BLOCK * BLOCK] * 2
    check_against_transformers(folder, [prompt, longer], [answer[:2] for answer in found], ATOL)


def test_each_groups_blocks_matter(llm):
    """The power check: what the tests above compare must notice a wrong page or state of any group."""
    for group in range(len(groups(llm))):
        (prompt,) = random_prompts([70], seed=200 + group)
        llm.reset_prefix_cache()
        assert not list(cached_blocks(llm, group))
        answers(llm, [prompt], 1)
        ((_, clean, hit),) = answers_and_hits(llm, [prompt], 4)
        assert hit == 64
        assert corrupt_group(llm, group)
        ((_, wrong, hit),) = answers_and_hits(llm, [prompt], 4)
        assert hit == 64
        assert max(abs(a - b) for a, b in zip(clean, wrong, strict=True)) > 10 * ATOL, group
    llm.reset_prefix_cache()


def test_preemption_in_a_tiny_cache(make_llm, folder, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    preempt = Scheduler._preempt_request

    def spy(self, request, *args, **kwargs):
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", spy)
    prompts = random_prompts([60, 61, 62, 63])
    llm = make_llm(folder, num_gpu_blocks_override=34, max_model_len=128, max_num_seqs=4)
    fill_memory(llm, 0xFF)
    check_against_transformers(folder, prompts, answers(llm, prompts, 40), ATOL)
    assert preempted
