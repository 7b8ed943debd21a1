"""Faults on the way to the host tier and back. Whatever happens, every request that was not aborted gets the
tokens it gets without a connector, and the tier's accounts balance (checked after every step: debug mode)."""

import random

import pytest
from faults import (
    TALLY,
    Copies,
    add,
    check,
    compare,
    core_of,
    finish,
    forget_device_cache,
    greedy,
    live_connector,
    manager_of,
    scheduler_side,
    settle,
    slow_down,
    step_until,
    under_way,
    without_connector,
)
from model_fixture import (
    ON_GPU,
    SHAPE,
    random_prompts,
    save_random_model,
    transformers_greedy,
    vllm_greedy,
)
from transformers import Gemma2Config

from vllm_xlayer.compat.engine import empty_device_cache

NUM_TOKENS = 8
PROMPTS = random_prompts([5, 100, 16, 33, 200, 1])
ROW = 2 * 2 * 2 * 16 * 32 * 4
LONG = greedy(200)
fault = pytest.mark.fault
DURING = {
    what: [pytest.param(way, marks=fault(f"{what} during {way}")) for way in ("load", "store")]
    for what in ("abort", "reset_prefix_cache", "engine stop")
}
"""The fault, while loads or while stores are under way."""


def connector(**extra):
    extra = {"cpu_bytes_to_use": 256 * ROW} | extra
    return dict(kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=extra)


@pytest.fixture(autouse=True)
def debug(monkeypatch):
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")


@pytest.fixture(scope="module")
def answers(make_llm, tiny_llama):
    return without_connector(make_llm, tiny_llama, PROMPTS, NUM_TOKENS)


@pytest.fixture
def copies(monkeypatch):
    return Copies(monkeypatch, lambda: live_connector().pool)


def rows_loaded():
    return live_connector().connector_worker.worker.rows_loaded


@fault("copy error")
@pytest.mark.parametrize("delay", [0, 3], ids=["at once", "late"])
@pytest.mark.parametrize("which", ["all", "every second"])
def test_failed_loads_are_computed(make_llm, tiny_llama, answers, copies, monkeypatch, which, delay):
    if delay:
        slow_down(monkeypatch, delay)
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    check(llm, PROMPTS, answers)
    forget_device_cache(llm)
    copies.fail_loads = lambda n: which == "all" or n % 2 == 0
    check(llm, PROMPTS, answers)
    assert copies.failed == (copies.loads if which == "all" else (copies.loads + 1) // 2) > 0
    # What failed was stored again from what was computed: a second try finds everything.
    copies.fail_loads = lambda n: False
    forget_device_cache(llm)
    before = rows_loaded()
    check(llm, PROMPTS, answers)
    assert rows_loaded() - before == sum((len(p) - 1) // 16 for p in PROMPTS)
    settle(llm)


@fault("copy error")
@pytest.mark.parametrize("delay", [0, 3], ids=["at once", "late"])
def test_failed_stores_are_never_loaded(make_llm, tiny_llama, answers, copies, monkeypatch, delay):
    if delay:
        slow_down(monkeypatch, delay)
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    copies.fail_stores = lambda n: True
    check(llm, PROMPTS, answers)
    forget_device_cache(llm)
    assert manager_of(llm).stores_failed == sum(len(p) // 16 for p in PROMPTS)
    assert not manager_of(llm).chunks()
    check(llm, PROMPTS, answers)
    assert copies.loads == 0
    copies.fail_stores = lambda n: False
    forget_device_cache(llm)
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    forget_device_cache(llm)
    check(llm, PROMPTS, answers)
    assert copies.loads > 0
    settle(llm)


@fault("copy error")
def test_requests_that_wait_for_the_same_load(make_llm, tiny_llama, copies, monkeypatch):
    """The first loads the shared prefix, the others wait for it; it fails."""
    slow_down(monkeypatch)
    shared = PROMPTS[4][:160]
    prompts = [shared + tail for tail in random_prompts([3, 20, 40], seed=1)]
    answers = without_connector(make_llm, tiny_llama, prompts, NUM_TOKENS)
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    vllm_greedy(llm, [shared], 1)
    forget_device_cache(llm)
    copies.fail_loads = lambda n: n == 0
    check(llm, prompts, answers)
    assert copies.failed == 1
    settle(llm)


@fault("copy error")
def test_hybrid_models_start_over(make_llm, tmp_path, copies):
    config = Gemma2Config(
        **(SHAPE | dict(tie_word_embeddings=True, num_hidden_layers=4)),
        sliding_window=48,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    save_random_model(config, tmp_path)
    answers = without_connector(make_llm, tmp_path, PROMPTS, NUM_TOKENS)
    llm = make_llm(tmp_path, kv_transfer_config=connector())
    check(llm, PROMPTS, answers)
    forget_device_cache(llm)
    copies.fail_loads = lambda n: n % 2 == 0
    check(llm, PROMPTS, answers)
    assert copies.failed > 0
    settle(llm)


@pytest.mark.parametrize("faulty", [False, True], ids=["good copies", "failing copies"])
@pytest.mark.parametrize("way", DURING["abort"])
def test_aborts_meet_running_transfers(make_llm, tiny_llama, answers, copies, monkeypatch, way, faulty):
    """Half of the requests at a time, of which some are in the tier and some are new; others keep running."""
    slow_down(monkeypatch, 4)
    llm = make_llm(tiny_llama, max_num_batched_tokens=64, kv_transfer_config=connector())
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    if faulty:
        copies.fail_loads = lambda n: n % 3 == 0
        copies.fail_stores = lambda n: n % 3 == 1
    tries = 0
    for steps in range(9):
        if steps % 3 == 0:
            forget_device_cache(llm)
        fresh = random_prompts([150, 40], seed=100 + steps)
        prompts = [*PROMPTS[1:5], *fresh] if way == "load" else [*fresh, *PROMPTS[1:5]]
        names = [f"{steps}-{i}" for i in range(len(prompts))]
        add(llm, names, prompts, LONG)
        for _ in range(steps):
            llm.llm_engine.step()
        aborted = abort(llm, names[::2], way)
        for _ in range(2):
            llm.llm_engine.step()
        tries += aborted + abort(llm, names[1::2], way)
        check(llm, PROMPTS, answers)
    settle(llm)
    assert tries > 0 and copies.loads > 0 and (copies.failed > 0) == faulty
    TALLY["tries"] = tries


def abort(llm, names, way):
    """How many of them had such a transfer under way."""
    busy = under_way(llm, way)  # vLLM's names for them begin with ours
    llm.llm_engine.abort_request(names)
    return sum(any(other.startswith(f"{name}-") for other in busy) for name in names)


def test_an_aborted_prefill_stores_only_what_it_computed(make_llm, tiny_llama):
    """The rest of its blocks is not KV."""
    llm = make_llm(tiny_llama, max_num_batched_tokens=64, kv_transfer_config=connector())
    add(llm, ["a", "b"], [PROMPTS[4], PROMPTS[1]], LONG)
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
    add(llm, ["a"], [PROMPTS[4]], LONG)
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


@fault("preemption")
@pytest.mark.parametrize("faulty", [False, True], ids=["good copies", "failing copies"])
def test_preemption_with_slow_transfers(make_llm, tiny_llama, copies, monkeypatch, faulty):
    """Neither cache holds all prompts, and transfers are always under way."""
    slow_down(monkeypatch, 2)
    prompts = random_prompts([60, 61, 62, 63, 90, 91, 92, 93])
    answers = without_connector(make_llm, tiny_llama, prompts, 24)
    settings = dict(num_gpu_blocks_override=24, max_model_len=128)
    llm = make_llm(tiny_llama, kv_transfer_config=connector(cpu_bytes_to_use=10 * ROW), **settings)
    if faulty:
        copies.fail_loads = lambda n: n % 2 == 0
        copies.fail_stores = lambda n: n % 5 == 0
    preempted, scheduler = [], core_of(llm).scheduler
    real = scheduler._preempt_request

    def preempt(request, *args, **kwargs):
        preempted.append(request)
        real(request, *args, **kwargs)

    monkeypatch.setattr(scheduler, "_preempt_request", preempt)
    shuffled = random.Random(0)
    for _ in range(4):
        order = shuffled.sample(range(8), 8)
        check(llm, [prompts[i] for i in order], [answers[i] for i in order])
    settle(llm)
    assert copies.loads > 0
    TALLY["tries"] = len(preempted)
    assert preempted


@fault("preemption")
def test_a_reset_that_preempts_running_requests(make_llm, tiny_llama, answers, monkeypatch):
    """They are back in the same step, with loads that begin in it."""
    slow_down(monkeypatch, 3)
    # While a step is in flight, vLLM gives no blocks away, and refuses this.
    llm = make_llm(tiny_llama, kv_transfer_config=connector(), async_scheduling=not ON_GPU)
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    scheduler = core_of(llm).scheduler
    for steps in range(3):
        forget_device_cache(llm)
        names, outputs = list(map(str, range(len(PROMPTS)))), []
        add(llm, names, PROMPTS, greedy(NUM_TOKENS))
        step_until(llm, lambda: under_way(llm, "load"), outputs)
        step_until(llm, lambda: len(scheduler.running) == len(scheduler.requests), outputs)
        for _ in range(steps):
            outputs += llm.llm_engine.step()
        TALLY["tries"] += len(scheduler.running)
        llm.reset_prefix_cache(reset_running_requests=True)
        compare(finish(llm, outputs), dict(zip(names, answers, strict=True)))
    settle(llm)
    assert TALLY["tries"]


@pytest.mark.parametrize("later", [0, 1, 3])
@pytest.mark.parametrize("tier_too", [False, True], ids=["device cache", "tier too"])
@pytest.mark.parametrize("way", DURING["reset_prefix_cache"])
def test_reset_during_transfers(make_llm, tiny_llama, answers, monkeypatch, way, tier_too, later):
    slow_down(monkeypatch, 5)
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    if way == "load":
        vllm_greedy(llm, PROMPTS, NUM_TOKENS)
        forget_device_cache(llm)
    names = [str(i) for i in range(len(PROMPTS))]
    add(llm, names, PROMPTS, greedy(NUM_TOKENS))
    outputs = []
    step_until(llm, lambda: under_way(llm, way), outputs)
    for _ in range(later):
        outputs += llm.llm_engine.step()
    TALLY["tries"] += bool(under_way(llm, way))
    llm.reset_prefix_cache(reset_connector=tier_too)
    compare(finish(llm, outputs), dict(zip(names, answers, strict=True)))
    settle(llm)
    check(llm, PROMPTS, answers)
    settle(llm)
    assert TALLY["tries"]


@pytest.mark.parametrize("way", DURING["engine stop"])
def test_stop_during_transfers(make_llm, tiny_llama, answers, monkeypatch, way):
    slow_down(monkeypatch, 10)
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    if way == "load":
        vllm_greedy(llm, PROMPTS, NUM_TOKENS)
        forget_device_cache(llm)
    add(llm, map(str, range(len(PROMPTS))), PROMPTS, LONG)
    worker = live_connector().connector_worker.worker
    direction = worker._load if way == "load" else worker._store
    step_until(llm, lambda: direction.running)
    core_of(llm).shutdown()
    TALLY["tries"] += 1
    assert not worker._load.running and not worker._store.running
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    check(llm, PROMPTS, answers)
    settle(llm)


@fault("host memory not available")
@pytest.mark.parametrize("host_bytes", [1 << 50, ROW - 1], ids=["too much", "less than a row"])
def test_without_host_memory_the_engine_runs(make_llm, tiny_llama, answers, caplog_vllm, host_bytes):
    llm = make_llm(tiny_llama, kv_transfer_config=connector(cpu_bytes_to_use=host_bytes))
    TALLY["tries"] += 1
    for _ in range(2):
        assert check(llm, PROMPTS, answers) == [0] * len(PROMPTS)
        settle(llm)
        assert llm.reset_prefix_cache()
    assert manager_of(llm).problem and not manager_of(llm).chunks()
    said = [record for record in caplog_vllm.records if "host tier" in record.getMessage()]
    assert any("cpu_bytes_to_use" in record.getMessage() for record in said) and len(said) <= 2


def test_the_device_cache_is_emptied_when_nothing_is_under_way(make_llm, tiny_llama, monkeypatch):
    slow_down(monkeypatch, 50)
    llm = make_llm(tiny_llama, kv_transfer_config=connector())
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    with pytest.raises(TimeoutError):
        empty_device_cache(llm, seconds=0)
    empty_device_cache(llm)
    scheduler = core_of(llm).scheduler
    assert not scheduler.has_requests()
    assert len(scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block) == 0
    settle(llm)


@fault("reset_prefix_cache during store")
def test_what_a_window_left_behind_is_not_stored_after_a_reset(make_llm, tmp_path):
    """The request goes on, and vLLM offers all of its blocks again: also those that are another's by then."""
    config = Gemma2Config(
        **(SHAPE | dict(tie_word_embeddings=True, num_hidden_layers=4)),
        sliding_window=48,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    save_random_model(config, tmp_path)
    long, *others = random_prompts([200, 90, 90, 90, 90], seed=8)
    answers = without_connector(make_llm, tmp_path, [long], NUM_TOKENS)
    settings = dict(num_gpu_blocks_override=48, max_model_len=416, max_num_batched_tokens=64)
    llm = make_llm(tmp_path, kv_transfer_config=connector(), **settings)
    add(llm, ["long"], [long], LONG)
    for _ in range(70):
        llm.llm_engine.step()
    for i, other in enumerate(others):  # in blocks that the long one has left behind
        add(llm, [str(i)], [other], greedy(1))
        step_until(llm, lambda: len(core_of(llm).scheduler.running) == 1)
    assert not llm.reset_prefix_cache(reset_connector=True), "a request was to run"
    ((name, status),) = ((n, s) for n, s in scheduler_side(llm)._req_status.items() if n.startswith("long"))
    tables = core_of(llm).scheduler.kv_cache_manager.get_block_ids(name)
    for table, group in zip(tables, status.group_states, strict=True):
        assert {*group.block_ids} <= {0, *table}, "the others are not its own"
    finish(llm)
    forget_device_cache(llm)
    check(llm, [long], answers)
