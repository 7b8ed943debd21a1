"""Hand-over and tiers in one decode engine: a prompt is read, and later comes from host memory."""

import pytest

pytest.importorskip("nixl", reason="needs nixl: pip install vllm-xlayer[nixl]")

from faults import compare, finish, live_connector
from model_fixture import ON_GPU, random_prompts, vllm_greedy
from nixl_fixture import PrefillEngine, add_all, free_port, side_channel, transfer

from vllm_xlayer.compat.engine import empty_device_cache

pytestmark = pytest.mark.skipif(ON_GPU, reason="the prefill engine's settings are the CPU platform's")

NUM_TOKENS = 8
PROMPTS = random_prompts([100, 33, 200])
SETTINGS = dict(skip_tokenizer_init=True, max_model_len=512, seed=0, dtype="bfloat16")
BOTH = dict(
    kv_connector="MultiConnector", kv_role="kv_both", kv_load_failure_policy="recompute",
    kv_connector_extra_config={"connectors": [
        transfer(), dict(kv_connector="XLayerConnector", kv_role="kv_both",
                         kv_connector_extra_config={"cpu_bytes_to_use": 4 << 20}),
    ]},
)  # fmt: skip


def test_a_prompt_is_read_and_later_restored_from_host_memory(make_llm, tiny_llama):
    with side_channel(free_port()):
        decode = make_llm(tiny_llama, kv_transfer_config=BOTH, **SETTINGS)
    nixl, tiers = live_connector().sub_connectors
    worker = nixl.connector_worker
    prefill = PrefillEngine(
        tiny_llama, kv_transfer_config=transfer(), kv_cache_memory_bytes=4 << 20, **SETTINGS
    )
    try:
        answers = vllm_greedy(decode, PROMPTS, NUM_TOKENS)
        expected = {f"r{i}": answer for i, answer in enumerate(answers)}

        def ask(params):
            add_all(decode, PROMPTS, params, NUM_TOKENS)
            outputs = {name.split("-")[0]: output for name, output in finish(decode).items()}
            compare(outputs, expected)

        def forget():
            empty_device_cache(decode)
            tiers.pool.fill_(0xFF)

        loaded = tiers.connector_worker.worker.rows_loaded
        rows, land = [], worker.wire.land
        worker.wire.land = lambda peer, buffer, chunk: (rows.extend(chunk), land(peer, buffer, chunk))[1]
        forget()
        ask([prefill.prefill(prompt) for prompt in PROMPTS])
        assert len(rows) == sum(-(-len(prompt) // 16) for prompt in PROMPTS) and not worker.failures
        assert tiers.connector_worker.worker.rows_loaded == loaded, "the hand-over goes first"
        forget()
        ask([None] * len(PROMPTS))
        assert tiers.connector_worker.worker.rows_loaded - loaded == sum(len(p) // 16 for p in PROMPTS)
    finally:
        prefill.kill()
