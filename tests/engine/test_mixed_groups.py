"""Groups whose pages differ (Gemma 4), attention in chunks (Llama 4), windows of blocks and one (Cohere 2).

On the CPU reference platform as in transformers, with XLayerConnector from the host as cached on the device.

Equal tokens, logprobs and hits. Whatever is not restored is 0xFF, which is a NaN.
"""

import contextlib
import json

import pytest
from hybrid_fixture import (
    CONFIGS,
    answers_and_hits,
    check_against_transformers,
    corrupt_group,
    fill_memory,
    groups,
    save_hybrid,
)
from model_fixture import random_prompts

NUM_TOKENS = 12
LENGTHS = [1, 15, 33, 64, 100, 161]
"""Within, at and beyond a window or chunk of 64 tokens."""
PROMPTS = random_prompts(LENGTHS, seed=11)
SETTINGS = {"auto": {}, "nvfp4": {"kv_cache_dtype": "nvfp4"}}


@pytest.fixture(scope="module", params=["gemma4", "llama4", "cohere2"])
def model(request, tmp_path_factory):
    """(its name, its folder)"""
    return request.param, save_hybrid(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=SETTINGS)
def served(request, make_llm, model):
    """(engine with the connector, its answers to prompts that are cached on the device)"""
    name, folder = model
    transfer = dict(
        kv_connector="XLayerConnector", kv_role="kv_both",
        kv_connector_extra_config={"cpu_bytes_to_use": 16 << 20},
    )  # fmt: skip
    llm = make_llm(
        folder, dtype=CONFIGS[name]["dtype"], max_num_batched_tokens=64, max_num_seqs=4,
        kv_cache_memory_bytes=8 << 20, kv_transfer_config=transfer, **SETTINGS[request.param],
    )  # fmt: skip
    fill_memory(llm, 0xFF)
    first = one_by_one(llm)
    if request.param == "auto":
        with as_transformers_has_it(name, folder) as folder:
            check_against_transformers(folder, PROMPTS, [answer[:2] for answer in first], atol=5e-4)
    return llm, one_by_one(llm)


@contextlib.contextmanager
def as_transformers_has_it(name, folder):
    """vLLM's Cohere 2 sees one token more than the config says, as it was trained."""
    config = folder / "config.json"
    text = config.read_text()
    if name == "cohere2":
        config.write_text(json.dumps(json.loads(text) | {"sliding_window": 65}))
    yield folder
    config.write_text(text)


def one_by_one(llm):
    return [answers_and_hits(llm, [prompt], NUM_TOKENS)[0] for prompt in PROMPTS]


def restored(llm):
    assert llm.reset_prefix_cache()
    fill_memory(llm, 0xFF)
    return one_by_one(llm)


def test_restored_from_host_is_as_cached(served):
    llm, cached = served
    assert [hit for *_, hit in cached] == [(length - 1) // 16 * 16 for length in LENGTHS]
    assert restored(llm) == cached


def test_every_groups_blocks_matter(served):
    """The power check: a wrong page of any group changes an answer."""
    llm, cached = served
    assert len(groups(llm)) > 1
    for group in range(len(groups(llm))):
        assert restored(llm) == cached
        assert corrupt_group(llm, group) > 0
        assert one_by_one(llm) != cached
