"""Hand-over between engines of different tensor-parallel sizes, of NVFP4 rows: equal tokens to one engine."""

import pytest

pytest.importorskip("nixl", reason="needs nixl: pip install vllm-xlayer[nixl]")

from faults import compare, finish, live_connector
from model_fixture import ON_GPU, random_prompts, vllm_greedy
from nixl_fixture import PrefillEngine, add_all, free_port, side_channel, transfer

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="the prefill engine's settings are the CPU platform's"),
    pytest.mark.timeout(400, func_only=True),
]

NUM_TOKENS = 8
PROMPTS = random_prompts([97, 33, 193])
BLOCKS = [-(-len(prompt) // 16) for prompt in PROMPTS]
SETTINGS = dict(
    skip_tokenizer_init=True, max_model_len=512, seed=0, dtype="float32", kv_cache_dtype="nvfp4",
    kv_cache_memory_bytes=4 << 20, kv_transfer_config=transfer(),
)  # fmt: skip


# These run in the decode engine's workers.


def spoil_pool(_):
    live_connector().connector_worker.pool.fill_(0xFF)


def rows_read(_):
    """(rows that were read so far, reads that failed) of this worker; counts from now on, if it did not."""
    worker = live_connector().connector_worker
    if not hasattr(worker, "landed"):
        worker.landed, original = [], worker.wire.land

        def land(peer, buffer, rows):
            worker.landed.append((peer[1], len(rows)))
            return original(peer, buffer, rows)

        worker.wire.land = land
    return worker.landed, sum(worker.failures.values())


@pytest.mark.parametrize(("theirs", "ours"), [(2, 1), (1, 2)])
def test_rows_of_another_size(make_llm, tiny_llama, monkeypatch, theirs, ours):
    for name in ("VLLM_ALLOW_INSECURE_SERIALIZATION", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    with side_channel(free_port()):
        decode = make_llm(tiny_llama, tensor_parallel_size=ours, **SETTINGS)
    prefill = PrefillEngine(tiny_llama, tensor_parallel_size=theirs, **SETTINGS)
    try:
        vllm_greedy(decode, PROMPTS, NUM_TOKENS)
        answers = vllm_greedy(decode, PROMPTS, NUM_TOKENS)  # from its cache
        assert decode.reset_prefix_cache()
        decode.collective_rpc(spoil_pool)
        decode.collective_rpc(rows_read)
        add_all(decode, PROMPTS, [prefill.prefill(prompt) for prompt in PROMPTS], NUM_TOKENS)
        outputs = {name.split("-")[0]: output for name, output in finish(decode).items()}
        compare(outputs, {f"r{i}": answer for i, answer in enumerate(answers)})
        for rank, (landed, failed) in enumerate(decode.collective_rpc(rows_read)):
            # All of each prompt's rows, from each rank that has heads of ours.
            sources = range(2) if theirs == 2 else [0]
            assert sorted(landed) == sorted((r, n) for r in sources for n in BLOCKS), rank
            assert failed == 0
    finally:
        prefill.kill()
