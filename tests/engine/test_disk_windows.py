"""A model with windows and a disk tier: what a lookup fetches from the disk takes the room of something."""

import pytest
from disk_fixture import connector
from faults import check, core_of, forget_device_cache, manager_of, scheduler_side, settle, without_connector
from model_fixture import SHAPE, random_prompts, save_random_model, vllm_greedy
from transformers import Gemma2Config
from vllm import SamplingParams
from vllm.v1.kv_offload.base import ReqContext, make_offload_key
from vllm.v1.request import Request

BLOCK, WINDOW, NUM_TOKENS = 16, 3, 8
(PROMPT,) = random_prompts([10 * BLOCK + 1])
SHORT = PROMPT[: 8 * BLOCK + 1]


@pytest.fixture
def folder(tmp_path):
    config = Gemma2Config(
        **(SHAPE | dict(tie_word_embeddings=True, num_hidden_layers=4)),
        sliding_window=WINDOW * BLOCK,
        query_pre_attn_scalar=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    save_random_model(config, tmp_path / "model")
    return tmp_path / "model"


def keys_of(llm, prompt):
    """(of the group with a window, of the other) by block."""
    request = Request("keys", prompt, SamplingParams(), None, block_hasher=core_of(llm).request_block_hasher)
    groups = scheduler_side(llm).config.kv_group_configs
    by_window = sorted(groups, key=lambda group: group.sliding_window_size_in_chunks is None)
    hashes = request.block_hashes
    return [[make_offload_key(hash_, group.group_idx) for hash_ in hashes] for group in by_window]


def test_what_is_fetched_takes_the_room_of_what_was_just_found(make_llm, folder, tmp_path, monkeypatch):
    """The prompt's end is on the disk only, a block before it nowhere, and the host tier is full: the lookup
    fetches the end, which evicts a block of the other group that it has found before."""
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    answers = without_connector(make_llm, folder, [PROMPT], NUM_TOKENS)
    llm = make_llm(folder, kv_transfer_config=connector(tmp_path / "tier"))
    vllm_greedy(llm, [SHORT, PROMPT], 1)
    forget_device_cache(llm)
    manager, (window, full) = manager_of(llm), keys_of(llm, PROMPT)
    host = manager.host
    for key in window[8:]:
        assert host._forget(key)
    manager.disk._store._remove(manager.disk._store._path(window[8]))
    host._policy.touch(set(host.chunks()) - {full[3]}, ReqContext("other prompts"))
    host._num_chunks = host._num_allocated_chunks  # full, once what was forgotten has another owner
    others = [make_offload_key(bytes([i]) * 32, 0) for i in range(len(host._free_list))]
    context = ReqContext("other prompts")
    assert host.prepare_store(others, context).evicted_keys == []
    host.complete_store(others, context)

    (found,) = check(llm, [PROMPT], answers)
    assert found >= 8 * BLOCK
    assert manager.disk.counts["hit"] >= 2  # the prompt's end, and the block that had gone for it
    settle(llm)
