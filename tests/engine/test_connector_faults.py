"""Faults on the way to the host tier and back. Whatever happens, every request that was not aborted gets the
tokens it gets without a connector, and the tier's accounts balance (checked after every step: debug mode)."""

import random

import pytest
from faults import (
    Copies,
    core_of,
    forget_device_cache,
    live_connector,
    manager_of,
    settle,
    slow_down,
)
from model_fixture import (
    SHAPE,
    random_prompts,
    save_random_model,
    transformers_greedy,
    vllm_greedy,
    vllm_outputs,
)
from transformers import Gemma2Config
from vllm import SamplingParams

from vllm_xlayer import compat

NUM_TOKENS = 8
PROMPTS = random_prompts([5, 100, 16, 33, 200, 1])
ROW = 2 * 2 * 2 * 16 * 32 * 4
LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True, detokenize=False)


def connector(**extra):
    extra = {"cpu_bytes_to_use": 256 * ROW} | extra
    return dict(kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=extra)


@pytest.fixture(autouse=True)
def debug(monkeypatch):
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")


@pytest.fixture(scope="module")
def answers(tiny_llama):
    return transformers_greedy(tiny_llama, PROMPTS, NUM_TOKENS)


@pytest.fixture
def copies(monkeypatch):
    return Copies(monkeypatch, lambda: live_connector().pool)


def add(llm, names, prompts, sampling=LONG):
    for name, prompt in zip(names, prompts, strict=True):
        llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling)


def rows_loaded():
    return live_connector().connector_worker.worker.rows_loaded


@pytest.mark.parametrize("delay", [0, 3], ids=["at once", "late"])
@pytest.mark.parametrize("which", ["all", "every second"])
def test_failed_loads_are_computed(make_llm, tiny_llama, answers, copies, monkeypatch, which, delay):
    if delay:
        slow_down(monkeypatch, delay)
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    forget_device_cache(llm)
    copies.fail_loads = lambda n: which == "all" or n % 2 == 0
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    assert copies.failed == (copies.loads if which == "all" else (copies.loads + 1) // 2) > 0
    # What failed was stored again from what was computed: a second try finds everything.
    copies.fail_loads = lambda n: False
    forget_device_cache(llm)
    before = rows_loaded()
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    assert rows_loaded() - before == sum((len(p) - 1) // 16 for p in PROMPTS)
    settle(llm)


@pytest.mark.parametrize("delay", [0, 3], ids=["at once", "late"])
def test_failed_stores_are_never_loaded(make_llm, tiny_llama, answers, copies, monkeypatch, delay):
    if delay:
        slow_down(monkeypatch, delay)
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    copies.fail_stores = lambda n: True
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    forget_device_cache(llm)
    assert manager_of(llm).stores_failed == sum(len(p) // 16 for p in PROMPTS)
    assert not manager_of(llm).chunks()
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    assert copies.loads == 0
    copies.fail_stores = lambda n: False
    forget_device_cache(llm)
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    forget_device_cache(llm)
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    assert copies.loads > 0
    settle(llm)


def test_requests_that_wait_for_the_same_load(make_llm, tiny_llama, copies, monkeypatch):
    """The first loads the shared prefix, the others wait for it; it fails."""
    slow_down(monkeypatch)
    shared = PROMPTS[4][:160]
    prompts = [shared + tail for tail in random_prompts([3, 20, 40], seed=1)]
    answers = transformers_greedy(tiny_llama, prompts, NUM_TOKENS)
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    vllm_greedy(llm, [shared], 1)
    forget_device_cache(llm)
    copies.fail_loads = lambda n: n == 0
    assert vllm_greedy(llm, prompts, NUM_TOKENS) == answers
    assert copies.failed == 1
    settle(llm)


def test_hybrid_models_start_over(make_llm, tmp_path, copies):
    config = Gemma2Config(
        **(SHAPE | dict(tie_word_embeddings=True, num_hidden_layers=4)),
        sliding_window=48,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    save_random_model(config, tmp_path)
    answers = transformers_greedy(tmp_path, PROMPTS, NUM_TOKENS)
    llm = make_llm(tmp_path, kv_transfer_config=connector())
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    forget_device_cache(llm)
    copies.fail_loads = lambda n: n % 2 == 0
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    assert copies.failed > 0
    settle(llm)


@pytest.mark.parametrize("faulty", [False, True], ids=["good copies", "failing copies"])
def test_aborts_meet_running_transfers(make_llm, tiny_llama, answers, copies, monkeypatch, faulty):
    """Aborted while the load runs, while the store runs, and in between; others keep running."""
    slow_down(monkeypatch, 4)
    llm = make_llm(tiny_llama, max_num_batched_tokens=64, kv_transfer_config=connector())
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    if faulty:
        copies.fail_loads = lambda n: n % 3 == 0
        copies.fail_stores = lambda n: n % 3 == 1
    for steps in range(9):
        if steps % 3 == 0:
            forget_device_cache(llm)
        fresh = random_prompts([150, 40], seed=100 + steps)
        prompts = [*PROMPTS[1:5], *fresh]
        names = [f"{steps}-{i}" for i in range(len(prompts))]
        add(llm, names, prompts)
        for _ in range(steps):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(names[::2])
        for _ in range(2):
            llm.llm_engine.step()
        llm.llm_engine.abort_request(names[1::2])
        assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    settle(llm)
    assert copies.loads > 0 and (copies.failed > 0) == faulty


def test_an_aborted_prefill_stores_only_what_it_computed(make_llm, tiny_llama):
    """vLLM 0.26 alone asks for all blocks of an aborted request, and asserts that it has them."""
    llm = make_llm(tiny_llama, max_num_batched_tokens=64, kv_transfer_config=connector())
    add(llm, ["a", "b"], [PROMPTS[4], PROMPTS[1]])
    llm.llm_engine.step()
    llm.llm_engine.abort_request(["a", "b"])
    settle(llm)
    assert len(manager_of(llm).chunks()) == 4


def test_an_abort_after_a_reset_during_the_load(make_llm, tiny_llama, monkeypatch):
    """The reset makes vLLM store again from the first chunk, of a request whose blocks it never saw."""
    slow_down(monkeypatch, 4)
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    vllm_greedy(llm, PROMPTS, 1)
    forget_device_cache(llm)
    add(llm, ["a"], [PROMPTS[4]])
    llm.llm_engine.step()
    assert live_connector().connector_worker.worker._load.running
    llm.reset_prefix_cache(reset_connector=True)
    llm.llm_engine.abort_request(["a"])
    settle(llm)
    assert not manager_of(llm).chunks()


def test_the_last_token_of_an_answer_is_not_stored(make_llm, tiny_llama):
    """It was sampled, but never went through the model: its block is not whole."""
    prompt = PROMPTS[1][:20]
    llm = make_llm(tiny_llama, kv_transfer_config=connector(offload_prompt_only=False))
    first = vllm_greedy(llm, [prompt], 12)[0]  # 32 tokens: two blocks, but for the last token's KV
    longer = prompt + first + PROMPTS[4][:5]
    answer = transformers_greedy(tiny_llama, [longer], NUM_TOKENS)
    forget_device_cache(llm)
    assert vllm_greedy(llm, [longer], NUM_TOKENS) == answer
    settle(llm)


@pytest.mark.parametrize("faulty", [False, True], ids=["good copies", "failing copies"])
def test_preemption_with_slow_transfers(make_llm, tiny_llama, copies, monkeypatch, faulty):
    """Neither cache holds all prompts, and transfers are always under way."""
    slow_down(monkeypatch, 2)
    prompts = random_prompts([60, 61, 62, 63, 90, 91, 92, 93])
    answers = transformers_greedy(tiny_llama, prompts, 24)
    settings = dict(num_gpu_blocks_override=24, max_model_len=128)
    llm = make_llm(tiny_llama, kv_transfer_config=connector(cpu_bytes_to_use=10 * ROW), **settings)
    if faulty:
        copies.fail_loads = lambda n: n % 2 == 0
        copies.fail_stores = lambda n: n % 5 == 0
    shuffled = random.Random(0)
    for _ in range(4):
        order = shuffled.sample(range(8), 8)
        assert vllm_greedy(llm, [prompts[i] for i in order], 24) == [answers[i] for i in order]
    settle(llm)
    assert copies.loads > 0


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("tier_too", [False, True], ids=["device cache", "tier too"])
def test_reset_during_transfers(make_llm, tiny_llama, answers, copies, monkeypatch, tier_too, steps):
    slow_down(monkeypatch, 3)
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    forget_device_cache(llm)
    sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
    fresh = random_prompts([70], seed=9)
    add(llm, map(str, range(7)), [*PROMPTS, *fresh], sampling)
    outputs = []
    for _ in range(steps):
        outputs += llm.llm_engine.step()
    llm.reset_prefix_cache(reset_connector=tier_too)
    while llm.llm_engine.has_unfinished_requests():
        outputs += llm.llm_engine.step()
    got = {output.request_id: list(output.outputs[0].token_ids) for output in outputs if output.finished}
    assert [got[str(i)] for i in range(6)] == answers
    settle(llm)
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    settle(llm)


@pytest.mark.parametrize("what", ["load", "store"])
def test_stop_during_transfers(make_llm, tiny_llama, answers, monkeypatch, what):
    slow_down(monkeypatch, 10)
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    if what == "load":
        vllm_greedy(llm, PROMPTS, NUM_TOKENS)
        forget_device_cache(llm)
    add(llm, map(str, range(len(PROMPTS))), PROMPTS)
    for _ in range(2):
        llm.llm_engine.step()
    worker = live_connector().connector_worker.worker
    assert (worker._load if what == "load" else worker._store).running
    core_of(llm).shutdown()
    assert not worker._load.running and not worker._store.running
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    settle(llm)


@pytest.mark.parametrize("host_bytes", [1 << 50, ROW - 1], ids=["too much", "less than a row"])
def test_without_host_memory_the_engine_runs(make_llm, tiny_llama, answers, caplog_vllm, host_bytes):
    llm = make_llm(tiny_llama, kv_transfer_config=connector(cpu_bytes_to_use=host_bytes))
    for _ in range(2):
        assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
        settle(llm)
        assert llm.reset_prefix_cache()
    outputs = vllm_outputs(llm, PROMPTS, NUM_TOKENS)
    assert [output.num_cached_tokens for output in outputs] == [0] * len(PROMPTS)
    assert manager_of(llm).problem and not manager_of(llm).chunks()
    said = [record for record in caplog_vllm.records if "host tier" in record.getMessage()]
    assert any("cpu_bytes_to_use" in record.getMessage() for record in said) and len(said) <= 2


def test_the_device_cache_is_emptied_when_nothing_is_under_way(make_llm, tiny_llama, monkeypatch):
    slow_down(monkeypatch, 50)
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    with pytest.raises(TimeoutError):
        compat.current().empty_device_cache(llm, seconds=0)
    compat.current().empty_device_cache(llm)
    scheduler = core_of(llm).scheduler
    assert not scheduler.has_requests()
    assert len(scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block) == 0
    settle(llm)
