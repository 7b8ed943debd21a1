"""Qwen3-Next with drafts of its own (MTP): states of accepted drafts, cached and from the host tier."""

import pytest
from faults import settle
from hybrid_fixture import CONFIGS, answers_and_hits, fill_memory, save_qwen3_next_with_mtp
from model_fixture import random_prompts

NUM_TOKENS = 60
"""Answers go through several blocks."""
NEAR = 0.4
"""Of logprobs in bfloat16: twice what moves them in `benchmarks.soak`; wrong states mostly do by more."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp")
    return folder, save_qwen3_next_with_mtp(dict(CONFIGS["qwen3_next"]), folder)


def start(make_llm, model, **settings):
    folder, more = model
    llm = make_llm(
        folder, dtype="bfloat16", max_num_seqs=4, max_num_batched_tokens=512, mamba_ssm_cache_dtype="float32",
        speculative_config=dict(method="mtp", num_speculative_tokens=2), disable_log_stats=False,
        kv_cache_memory_bytes=16 << 20, **more, **settings,
    )  # fmt: skip
    fill_memory(llm, 0xFF)
    return llm


def accepted_drafts(llm):
    return {metric.name: metric for metric in llm.get_metrics()}["vllm:spec_decode_num_accepted_tokens"].value


def one_by_one(llm, prompts):
    return [answers_and_hits(llm, [prompt], NUM_TOKENS)[0] for prompt in prompts]


def test_cached_and_restored_answers_are_those_of_computed_prompts(make_llm, model):
    prompts = random_prompts([17, 60, 130, 190], seed=4)
    connector = dict(kv_connector="XLayerConnector", kv_role="kv_both")
    extra = dict(cpu_bytes_to_use=64 << 20)
    llm = start(make_llm, model, kv_transfer_config=connector | dict(kv_connector_extra_config=extra))
    computed = one_by_one(llm, prompts)
    assert accepted_drafts(llm) > 10
    settle(llm)
    cached = one_by_one(llm, prompts)
    settle(llm)
    llm.reset_prefix_cache()  # of the device; 0xFF is what a state that is not restored would be
    fill_memory(llm, 0xFF)
    restored = one_by_one(llm, prompts)
    hits = [hit for *_, hit in cached]
    assert hits[-1] > 0 and [hit for *_, hit in restored] == hits
    assert [answer[:2] for answer in restored] == [answer[:2] for answer in cached]
    pairs = list(zip(computed, cached, strict=True))
    same = [(first[1][0], again[1][0]) for first, again in pairs if first[0][0] == again[0][0]]
    assert same and all(
        abs(right - found) < NEAR for right, found in same
    )  # where two were as likely, either
