"""Latent attention (DeepSeek): on the CPU reference platform as in transformers, with XLayerConnector from
every tier as cached on the device.

Equal tokens, logprobs and hits. Whatever is not restored is `UNWRITTEN`.
"""

import pytest
from hybrid_fixture import (
    CONFIGS,
    answers_and_hits,
    check_against_transformers,
    corrupt_group,
    fill_memory,
    save_hybrid,
)
from model_fixture import ON_GPU, random_prompts

NUM_TOKENS, BLOCK = 12, 64 if ON_GPU else 16
LENGTHS = [1, 15, 16, 33, 100, 160]
PROMPTS = random_prompts(LENGTHS, seed=9)
HITS = [(length - 1) // BLOCK * BLOCK for length in LENGTHS]
UNWRITTEN = 0x3F if ON_GPU else 0xFF
"""Bytes of memory that nothing was written to: a NaN; on a GPU 0.75, as vLLM's kernels for latents multiply
what they do not attend to by zero."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hybrid("deepseek_v2", tmp_path_factory.mktemp("deepseek"))


def start(make_llm, folder, extra=None, **settings):
    """Prompts in parts of 64 tokens; with the connector unless extra is None. Memory is UNWRITTEN."""
    if extra is not None:
        settings["kv_transfer_config"] = dict(
            kv_connector="XLayerConnector", kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": 16 << 20} | extra,
        )  # fmt: skip
    llm = make_llm(
        folder, dtype=CONFIGS["deepseek_v2"]["dtype"], max_num_batched_tokens=64, max_num_seqs=4,
        kv_cache_memory_bytes=8 << 20, block_size=BLOCK, **settings,
    )  # fmt: skip
    if "tensor_parallel_size" not in settings:  # else it is in other processes
        fill_memory(llm, UNWRITTEN)
    return llm


def one_by_one(llm, num_tokens=NUM_TOKENS):
    return [answers_and_hits(llm, [prompt], num_tokens)[0] for prompt in PROMPTS]


def in_layout(make_llm, folder, layout):
    """Answers to cached prompts of an engine without connector."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_KV_CACHE_LAYOUT", layout)
        llm = start(make_llm, folder)
    one_by_one(llm, 1)
    return one_by_one(llm)


@pytest.fixture(scope="module")
def cached(make_llm, folder):
    return in_layout(make_llm, folder, "LBHNC")


def test_as_in_transformers(make_llm, folder, cached):
    assert [hit for *_, hit in cached] == HITS
    check_against_transformers(folder, PROMPTS, [answer[:2] for answer in cached], atol=None)
    llm = start(make_llm, folder)
    together = answers_and_hits(llm, PROMPTS, NUM_TOKENS)  # decodes beside parts of prompts
    check_against_transformers(folder, PROMPTS, [answer[:2] for answer in together], atol=None)


@pytest.mark.anywhere
def test_rows_answer_as_vllms_own_layout(make_llm, folder, cached):
    assert in_layout(make_llm, folder, "BLHNC") == cached


def test_restored_from_host_and_from_disk_is_as_cached(make_llm, folder, cached, tmp_path, monkeypatch):
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    disk = dict(disk_path=str(tmp_path / "tier"), disk_bytes_to_use=64 << 20)
    llm = start(make_llm, folder, disk)
    (group,) = get_kv_transfer_group().layout.groups
    assert group.kinds == ("MLAAttentionSpec",)
    assert one_by_one(llm, 1) and one_by_one(llm) == cached
    assert llm.reset_prefix_cache()
    fill_memory(llm, UNWRITTEN)
    worker = get_kv_transfer_group().connector_worker.worker
    before = worker.rows_loaded
    assert one_by_one(llm) == cached
    assert worker.rows_loaded - before == sum(HITS) // BLOCK
    assert corrupt_group(llm, 0) and one_by_one(llm) != cached, "a wrong latent changes no answer"
    llm = start(make_llm, folder, disk)
    assert one_by_one(llm) == cached
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector.connector_scheduler
    assert scheduler.manager.disk.counts["hit"] > 0
