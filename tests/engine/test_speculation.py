"""Speculative decoding with XLayerConnector: drafts change no answer, whatever comes back from the tiers.

A vocabulary of 16 tokens makes many drafts right by chance.
"""

import pytest
from hybrid_fixture import answers_and_hits, fill_memory
from model_fixture import llama_config, random_prompts, save_eagle, save_random_model

VOCABULARY, NUM_TOKENS = 16, 24
LENGTHS = [3, 16, 33, 60, 61, 62, 90, 91]
PROMPTS = [[1 + token % (VOCABULARY - 1) for token in p] for p in random_prompts(LENGTHS, seed=5)]
DRAFTERS = ("ngram", "eagle")


@pytest.fixture(autouse=True)
def checked_accounts(monkeypatch):
    """After every step of every engine here the accounts of the host tier must balance."""
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return save_random_model(llama_config(vocab_size=VOCABULARY), tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="module")
def eagle(tmp_path_factory):
    return save_eagle(tmp_path_factory.mktemp("eagle"), 0, vocab_size=VOCABULARY)


def start(make_llm, target, draft, extra, **settings):
    """An engine with the connector, whose memory is 0xFF. draft: None drafts from the text itself."""
    if draft is None:
        speculation = dict(method="ngram", prompt_lookup_max=3, prompt_lookup_min=1, num_speculative_tokens=3)
    else:
        speculation = dict(method="eagle", model=str(draft), num_speculative_tokens=2)
    llm = make_llm(
        target,
        speculative_config=speculation,
        disable_log_stats=False,
        max_num_seqs=4,
        kv_transfer_config=dict(
            kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=extra
        ),
        **settings,
    )
    fill_memory(llm, 0xFF)
    return llm


def accepted_drafts(llm):
    found = {metric.name: metric for metric in llm.get_metrics()}
    return found["vllm:spec_decode_num_accepted_tokens"].value


def live_connector():
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def disk_hits(llm):
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler.connector.connector_scheduler
    return scheduler.manager.disk.counts["hit"]


def one_by_one(llm):
    return [answers_and_hits(llm, [prompt], NUM_TOKENS)[0] for prompt in PROMPTS]


@pytest.fixture(scope="module")
def plain(make_llm, target):
    """Tokens of an engine without speculation and connector."""
    llm = make_llm(target, enable_prefix_caching=False)
    return [tokens for tokens, *_ in answers_and_hits(llm, PROMPTS, NUM_TOKENS)]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_small_caches_and_preemption(make_llm, target, eagle, plain, drafter, preempted):
    draft = eagle if drafter == "eagle" else None
    llm = start(
        make_llm, target, draft, {"cpu_bytes_to_use": 1 << 20}, num_gpu_blocks_override=18, max_model_len=160
    )
    for shift in (0, 3):
        found = answers_and_hits(llm, PROMPTS[shift:] + PROMPTS[:shift], NUM_TOKENS)
        assert [tokens for tokens, *_ in found] == plain[shift:] + plain[:shift]
    worker = live_connector().connector_worker.worker
    assert preempted and worker.rows_loaded > 0 and accepted_drafts(llm) > 10


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_restored_is_as_cached_from_host_and_after_a_restart(make_llm, target, eagle, tmp_path, drafter):
    """With NVFP4, from both tiers; a drafter's own layer is restored with the others."""
    disk = dict(cpu_bytes_to_use=8 << 20, disk_path=str(tmp_path / "tier"), disk_bytes_to_use=64 << 20)
    draft = eagle if drafter == "eagle" else None
    llm = start(make_llm, target, draft, disk, kv_cache_dtype="nvfp4")
    one_by_one(llm)
    cached = one_by_one(llm)
    assert sum(hit for *_, hit in cached) > 200 and accepted_drafts(llm) > 10
    assert llm.reset_prefix_cache()
    fill_memory(llm, 0xFF)
    assert one_by_one(llm) == cached
    llm = start(make_llm, target, draft, disk, kv_cache_dtype="nvfp4")
    assert one_by_one(llm) == cached and disk_hits(llm) > 0
