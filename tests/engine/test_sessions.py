"""Streaming sessions: a request that gets more input as it goes on. What of it is in a tier is its own.

vLLM's AsyncLLM makes them; here the engine core gets the same requests, in this process.
"""

import random

import pytest
from faults import core_of, forget_device_cache, greedy, live_connector, settle, slow_down
from model_fixture import random_prompts, vllm_greedy

HOST = dict(
    kv_connector="XLayerConnector", kv_role="kv_both",
    kv_connector_extra_config={"cpu_bytes_to_use": 16 << 20, "offload_prompt_only": False},
)  # fmt: skip


def send(llm, name, prompt, num_tokens, last=False):
    """More input for a session, or with `last` the word that there is no more."""
    engine = llm.llm_engine
    prompt = prompt | {"prompt_token_ids": [*prompt["prompt_token_ids"]]}  # a session's list grows
    request = engine.input_processor.process_inputs(
        name, prompt, greedy(num_tokens), supported_tasks=("generate",), resumable=not last
    )
    engine.engine_core.add_request(request)


def step(llm, answers):
    for output in llm.llm_engine.engine_core.get_output().outputs:
        answers[output.request_id] += output.new_token_ids


def talk(llm, turns, num_tokens):
    """One session, each turn after the answer to the one before: its tokens, and all it has answered."""
    answers = {"session": []}
    for i, prompt in enumerate(turns):
        send(llm, "session", prompt, num_tokens)
        while len(answers["session"]) < (i + 1) * num_tokens:
            step(llm, answers)
    request = core_of(llm).scheduler.requests["session"]
    send(llm, "session", {"prompt_token_ids": [1]}, 1, last=True)
    settle(llm)
    return list(request.all_token_ids), answers["session"]


def talk_at_once(llm, turns, num_tokens, seed):
    """Sessions that go on whenever a die says so: the tokens of each."""
    dice, left = random.Random(seed), {name: [*mine] for name, mine in turns.items()}
    core, answers, requests = core_of(llm), {name: [] for name in turns}, {}
    while left or core.scheduler.has_requests():
        for name in list(left):
            if name in requests and dice.random() > 0.15:
                continue
            if left[name]:
                send(llm, name, {"prompt_token_ids": left[name].pop(0)}, num_tokens[name])
                requests.setdefault(name, core.scheduler.requests[name])
            else:
                send(llm, name, {"prompt_token_ids": [1]}, 1, last=True)
                del left[name]
        step(llm, answers)
    settle(llm)
    return {name: list(request.all_token_ids) for name, request in requests.items()}


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
@pytest.mark.parametrize("seed", [0, 1])
def test_all_tokens_of_sessions_come_back(make_llm, tiny_llama, monkeypatch, seed, is_async):
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    slow_down(monkeypatch, 4)
    dice = random.Random(seed)
    prompts = random_prompts([dice.choice([1, 3, 15, 16, 17, 31, 33, 48, 60]) for _ in range(24)], seed)
    turns = {f"session {i}": prompts[4 * i : 4 * i + 4] for i in range(6)}
    num_tokens = {name: dice.choice([1, 2, 5, 16, 17]) for name in turns}
    llm = make_llm(
        tiny_llama, kv_transfer_config=HOST, max_num_batched_tokens=64, num_gpu_blocks_override=60,
        async_scheduling=is_async,
    )  # fmt: skip
    said = [*talk_at_once(llm, turns, num_tokens, seed).values()]
    forget_device_cache(llm)
    loaded = live_connector().connector_worker.worker.rows_loaded
    found = vllm_greedy(llm, said, 8)
    assert live_connector().connector_worker.worker.rows_loaded - loaded >= sum(
        len(p) // 16 - 1 for p in said
    )
    assert found == vllm_greedy(make_llm(tiny_llama, enable_prefix_caching=False), said, 8)


def test_the_token_that_a_turn_leaves_out_is_in_no_key(make_llm, tiny_llama):
    """It ends a block, in whose place the next turn's first token comes."""
    first, second = random_prompts([10, 20], seed=3)
    llm = make_llm(tiny_llama, kv_transfer_config=HOST)
    said, answered = talk(llm, [{"prompt_token_ids": p} for p in (first, second)], 6)
    assert said[:35] == first + answered[:5] + second
    left_out = first + answered[:6] + second[:9]
    prompts = [left_out, said[:35]]
    forget_device_cache(llm)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], greedy(8), use_tqdm=False)
    assert [output.num_cached_tokens for output in outputs] == [0, 32]
    found = [list(output.outputs[0].token_ids) for output in outputs]
    assert found == vllm_greedy(make_llm(tiny_llama, enable_prefix_caching=False), prompts, 8)
