"""Requests of one step that begin alike, where parts of blocks are found."""

import time

import pytest
from hybrid_fixture import cached_blocks, check_against_transformers, engine_core, fill_memory, save_hybrid
from model_fixture import random_prompts
from vllm.v1.kv_cache_interface import FullAttentionSpec

UNIT, BLOCK = 16, 64
SAME, ATOL = 3 * UNIT, 5e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    save_hybrid("lfm2", folder)
    return folder


def request(llm, name, prompt, num_tokens, **more):
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, logprobs=0, **more
    )
    llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)


def finish(llm):
    done = {}
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                tokens, steps = list(output.outputs[0].token_ids), output.outputs[0].logprobs
                logprobs = [step[token].logprob for token, step in zip(tokens, steps, strict=True)]
                done[output.request_id] = (tokens, logprobs, output.num_cached_tokens)
    return done


@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
def test_a_block_that_a_resumed_request_computes_in_the_same_step(make_llm, folder, monkeypatch, layout):
    """The states of the beginning are still there, of its attention only what is computed anew."""
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
    llm = make_llm(
        folder, block_size=BLOCK, prefix_match_unit=UNIT, max_num_batched_tokens=512, max_num_seqs=4,
        dtype="float32", kv_cache_memory_bytes=8 << 20, async_scheduling=False,
    )  # fmt: skip
    fill_memory(llm, 0xFF)
    (prompt,) = random_prompts([SAME + 2], seed=31)
    request(llm, "resumed", prompt, 40)
    for _ in range(24):  # so far that it does not end a chunk at the end of its prompt when it is resumed
        llm.llm_engine.step()
    preempt_and_forget_attention(llm)
    request(llm, "goes on", prompt, 4)
    found = finish(llm)
    assert found["goes on"][2] == SAME
    check_against_transformers(folder, [prompt] * 2, [answer[:2] for answer in found.values()], ATOL)


def preempt_and_forget_attention(llm):
    scheduler = engine_core(llm).scheduler
    (resumed,) = scheduler.running
    scheduler.running.remove(resumed)
    scheduler._preempt_request(resumed, time.monotonic())
    blocks = [
        block
        for group, spec in enumerate(scheduler.kv_cache_config.kv_cache_groups)
        if isinstance(spec.kv_cache_spec, FullAttentionSpec)
        for block in cached_blocks(llm, group)
    ]
    assert blocks
    scheduler.kv_cache_manager.block_pool.evict_blocks(set(blocks))
