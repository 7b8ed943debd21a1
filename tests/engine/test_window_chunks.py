"""Chunks of several blocks, of a model with windows, where the host tier had no room for a while.

By then blocks that have left the window have other owners, and what is left of a chunk is nobody's.
"""

import pytest
from disk_fixture import ROW
from faults import check, forget_device_cache, manager_of, settle, without_connector
from model_fixture import SHAPE, random_prompts, save_random_model, vllm_greedy
from transformers import Gemma2Config

BLOCK, PER_CHUNK, CHUNKS, NUM_TOKENS = 16, 4, 6, 8
CHUNK = BLOCK * PER_CHUNK
(PROMPT,) = random_prompts([CHUNKS * CHUNK + 1], seed=3)
SHORTER = [PROMPT[: n * CHUNK + 1] for n in range(1, CHUNKS + 1)]
"""Each ends with another chunk, of whose window the last two blocks are needed."""


@pytest.fixture(scope="module")
def model(tmp_path_factory, make_llm):
    """(folder, answers)"""
    config = Gemma2Config(
        **(SHAPE | dict(tie_word_embeddings=True, num_hidden_layers=4)),
        sliding_window=BLOCK + BLOCK // 2,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    folder = tmp_path_factory.mktemp("model")
    save_random_model(config, folder)
    return folder, without_connector(make_llm, folder, SHORTER, NUM_TOKENS)


@pytest.mark.parametrize("busy", [0, 2, 3, 4, 6])
@pytest.mark.parametrize("interval", [None, CHUNK])
def test_a_chunk_of_which_blocks_are_gone(make_llm, model, monkeypatch, interval, busy):
    """The tier takes nothing the first so many times that it is asked, each time for what is left as well."""
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    folder, answers = model
    llm = make_llm(
        folder, max_num_batched_tokens=2 * BLOCK, prefix_cache_retention_interval=interval,
        kv_transfer_config=dict(
            kv_connector="XLayerConnector", kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": 256 * ROW, "blocks_per_chunk": PER_CHUNK},
        ),
    )  # fmt: skip
    host, asked = manager_of(llm), []
    take = host.prepare_store

    def no_room(keys, context):
        asked.append(keys)
        return None if len(asked) <= busy else take(keys, context)

    monkeypatch.setattr(host, "prepare_store", no_room)
    vllm_greedy(llm, [PROMPT], 1)
    assert len(asked) > busy
    forget_device_cache(llm)
    monkeypatch.setattr(host, "prepare_store", lambda keys, context: None)
    for prompt, answer in zip(SHORTER, answers, strict=True):
        (found,) = check(llm, [prompt], [answer])
        assert found == len(prompt) - 1 or (busy and prompt is not SHORTER[-1])
        forget_device_cache(llm)
    settle(llm)


def test_what_is_left_of_a_chunk_is_not_taken_for_all_of_it(make_llm, tmp_path, monkeypatch):
    """The window is longer than a chunk: of a prompt that ends with a chunk its first block is needed, too.

    What is stored of prompts that were on the device: of layers with a window, their last 36 tokens' blocks.
    """
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    config = Gemma2Config(
        **(SHAPE | dict(tie_word_embeddings=True, num_hidden_layers=4)),
        sliding_window=37, query_pre_attn_scalar=32, layer_types=["sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    save_random_model(config, tmp_path)
    first, prompt, second = PROMPT[:97], PROMPT[:129], PROMPT[:165]
    (answer,) = without_connector(make_llm, tmp_path, [prompt], NUM_TOKENS)
    llm = make_llm(
        tmp_path, kv_transfer_config=dict(
            kv_connector="XLayerConnector", kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": 256 * ROW, "blocks_per_chunk": 2},
        ),
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(manager_of(llm), "prepare_store", lambda keys, context: None)
        vllm_greedy(llm, [second], 1)
    for stored in (first, second):
        vllm_greedy(llm, [stored], 1)
    forget_device_cache(llm)
    check(llm, [prompt], [answer])
    settle(llm)
