"""Hand-over between engines of one and of two ranks, both ways: equal tokens, no row cut by its layers."""

import types
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("nixl", reason="needs nixl: pip install vllm-xlayer[nixl]")

from faults import live_connector
from model_fixture import ON_GPU, random_prompts, vllm_greedy
from nixl_fixture import (
    ON_DEVICE,
    OtherEngine,
    blocks_in_use,
    end_leases,
    free_port,
    greedy_answers,
    hand_over,
    side_channel,
    transfer,
)

pytestmark = [
    pytest.mark.anywhere,
    pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

NUM_TOKENS = 8
PROMPTS = random_prompts([97, 33, 193])
BLOCKS = [-(-len(prompt) // 16) for prompt in PROMPTS]
SETTINGS = ON_DEVICE | dict(
    skip_tokenizer_init=True, max_model_len=512, seed=0, dtype="float32", kv_cache_memory_bytes=8 << 20,
    kv_transfer_config=transfer(kv_lease_duration=20),
)  # fmt: skip
CACHES = ["auto"] if ON_GPU else ["auto", "nvfp4"]
"""On a GPU NVFP4 needs 16 bits: see `engines`."""
WAYS = {"two ranks to one": ("two", "one"), "one rank to two": ("one", "two")}


class Answers(NamedTuple):
    """One engine's, of prompts that it computes, and of such that are in its cache."""

    computed: list[list[int]]
    read: list[list[int]]


class ThisEngine:
    """The engine of this process, asked as an OtherEngine is."""

    def __init__(self, llm):
        self.llm = llm

    def call(self, function, *args):
        return function(self.llm, *args)


# These run in an engine's process.


def own_answers(llm):
    """As Answers has them."""
    return [vllm_greedy(llm, PROMPTS, NUM_TOKENS) for _ in range(2)]


def answers_to(llm, handed_over):
    """Tokens by prompt; what is not read shows as NaN."""
    assert blocks_in_use(llm) == 0 and llm.reset_prefix_cache()
    llm.collective_rpc(spoil_pool)
    return greedy_answers(llm, PROMPTS, handed_over, NUM_TOKENS)


def in_workers(llm, function, *args):
    return llm.collective_rpc(function, args=args)


# These in its workers.


def spoil_pool(_):
    live_connector().connector_worker.pool.fill_(0xFF)


def count(_):
    """Begins to count what this rank reads: (peer's rank, rows) each; and requests that failed."""
    worker = live_connector().connector_worker
    worker.landed, land = [], worker.wire.land

    def spy(begun, buffer, rows):
        (rank,) = (rank for (_, rank), peer in worker.wire.peers.items() if peer is begun.peer)
        worker.landed.append((rank, len(rows)))
        return land(begun, buffer, rows)

    worker.wire.land = spy


def counted(_):
    worker = live_connector().connector_worker
    landed, failed = sorted(worker.landed), dict(worker.failures)
    worker.landed.clear()
    worker.failures.clear()
    return landed, failed


def read_as_vllm_does(_, on):
    """Straight into the KV cache, by descriptors that vLLM made for a peer of another size."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

    worker = live_connector().connector_worker
    if on:
        worker._read_blocks = types.MethodType(NixlPullConnectorWorker._read_blocks, worker)
    else:
        del worker._read_blocks


# These here.


@pytest.fixture(scope="module", params=CACHES)
def engines(request, make_llm, tiny_llama):
    """Computed in 32 bits: ranks add up in another order, and in 16 bits tokens would show it."""
    settings = SETTINGS | dict(kv_cache_dtype=request.param)
    environment = {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "OMP_NUM_THREADS": "1"}
    with side_channel(free_port(), **environment):
        one = ThisEngine(make_llm(tiny_llama, **settings))
        two = OtherEngine(tiny_llama, environment=environment, tensor_parallel_size=2, **settings)
        try:
            for engine in (one, two):
                engine.call(in_workers, count)
            yield {"one": one, "two": two, "answers": Answers(*one.call(own_answers))}
        finally:
            two.kill()


@pytest.fixture(params=WAYS.values(), ids=WAYS)
def way(request, engines):
    """(prefill engine, decode engine, the ranks that each of its ranks reads from)."""
    source, target = request.param
    return engines[source], engines[target], [[0, 1]] if source == "two" else [[0], [0]]


def test_equal_tokens_and_every_row_read_once(engines, way):
    source, target, sources = way
    assert target.call(answers_to, source.call(hand_over, PROMPTS)) == engines["answers"].read
    for (landed, failed), ranks in zip(target.call(in_workers, counted), sources, strict=True):
        assert landed == sorted((rank, rows) for rank in ranks for rows in BLOCKS)
        assert not failed
    assert source.call(blocks_in_use) == target.call(blocks_in_use) == 0


def test_a_row_cannot_be_cut_by_its_layers(engines, way):
    """vLLM would cut a row of another size in two by its bytes: one half has the first layers of all heads.
    Its own way of reading, given our descriptors, ends without a byte read."""
    source, target, _ = way
    target.call(in_workers, read_as_vllm_does, True)
    try:
        assert target.call(answers_to, source.call(hand_over, PROMPTS)) == engines["answers"].computed
    finally:
        target.call(in_workers, read_as_vllm_does, False)
        source.call(end_leases)  # vLLM's reads that failed leave them to their time
        assert source.call(blocks_in_use) == 0
