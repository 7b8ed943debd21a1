"""Tiers and link in one prompt in a decode engine of two ranks: each loads both parts, and waits for both."""

import pytest
import torch

pytest.importorskip("nixl", reason="needs nixl: pip install vllm-xlayer[nixl]")

from faults import live_connector
from model_fixture import ON_GPU, random_prompts, vllm_greedy
from nixl_fixture import (
    ON_DEVICE,
    OtherEngine,
    blocks_in_use,
    free_port,
    greedy_answers,
    hand_over,
    side_channel,
    transfer,
)
from nixl_tiers_fixture import tiered_connector

pytestmark = [
    pytest.mark.anywhere,
    pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

NUM_TOKENS = 8
PROMPTS = random_prompts([97, 33, 193])
HEADS = [48, 16, 96]
HELD, REST = 3 + 1 + 6, 4 + 2 + 7
SETTINGS = ON_DEVICE | dict(
    skip_tokenizer_init=True, max_model_len=512, seed=0, dtype="float32", kv_cache_memory_bytes=8 << 20
)  # fmt: skip


@pytest.fixture(scope="module")
def engines(make_llm, tiny_llama):
    """(the prefill engine, here; the decode engine of two ranks; the prefill engine's own answers)"""
    with side_channel(free_port()):
        prefill = make_llm(tiny_llama, kv_transfer_config=transfer(kv_lease_duration=600), **SETTINGS)
    answers = vllm_greedy(prefill, PROMPTS, NUM_TOKENS)
    tiered = tiered_connector(4 << 20)
    decode = OtherEngine(tiny_llama, kv_transfer_config=tiered, tensor_parallel_size=2, **SETTINGS)
    yield prefill, decode, answers
    decode.kill()


# These run in the decode engine's process.


def hold(llm):
    """Tokens of HEADS are in the tiers, and what is not loaded shows as NaN."""
    assert blocks_in_use(llm) == 0
    assert llm.reset_prefix_cache(reset_connector=True)
    vllm_greedy(llm, [prompt[:n] for prompt, n in zip(PROMPTS, HEADS, strict=True)], 1)
    assert blocks_in_use(llm) == 0 and llm.reset_prefix_cache()
    llm.collective_rpc(spoil_and_count)


def answers_to(llm, handed_over):
    """(tokens by prompt, (rows read, rows loaded, failed requests, requests still awaited) of each rank)"""
    tokens = greedy_answers(llm, PROMPTS, handed_over, NUM_TOKENS)
    assert blocks_in_use(llm) == 0
    return tokens, llm.collective_rpc(counted)


def fail_loads_of_the_second_rank(llm):
    return sum(llm.collective_rpc(fail_loads)) == 1


# These in its workers.


def spoil_and_count(_):
    link, tiers = live_connector().sub_connectors
    tiers.pool.fill_(0xFF)
    link.connector_worker.failures.clear()
    link.connector_worker.landed, land = [], type(link.connector_worker.wire).land
    wire, loads = link.connector_worker.wire, tiers.connector_worker.worker
    wire.land = lambda *args: link.connector_worker.landed.append(len(args[2])) or land(wire, *args)
    loads.loaded_before = loads.rows_loaded


def counted(_):
    link, tiers = live_connector().sub_connectors
    worker, loads = link.connector_worker, tiers.connector_worker.worker
    waited_for = len(live_connector().joining.missing)
    return (
        sum(worker.landed), loads.rows_loaded - loads.loaded_before, dict(worker.failures), waited_for
    )  # fmt: skip


def fail_loads(_):
    """From now on, if this is the second rank; whether it is."""
    link, tiers = live_connector().sub_connectors
    loads = tiers.connector_worker.worker._load
    if link.connector_worker.tp_rank == 1:
        loads.submit = lambda job_id, *job: loads.fail(job_id, RuntimeError("injected copy error"))
    return link.connector_worker.tp_rank == 1


def test_both_ranks_load_both_parts(engines):
    prefill, decode, answers = engines
    decode.call(hold)
    assert decode.call(answers_to, hand_over(prefill, PROMPTS)) == (answers, [(REST, HELD, {}, 0)] * 2)
    assert blocks_in_use(prefill) == 0


def test_the_tiers_of_one_rank_fail(engines):
    """The requests are computed, on both ranks."""
    prefill, decode, answers = engines
    decode.call(hold)
    assert decode.call(fail_loads_of_the_second_rank)
    got, ranks = decode.call(answers_to, hand_over(prefill, PROMPTS))
    assert got == answers
    assert ranks == [(REST, HELD, {}, 0), (REST, 0, {}, 0)]
    assert blocks_in_use(prefill) == 0
