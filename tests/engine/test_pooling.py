"""An embedding model: prompts come back from the host tier, except where every token's output is wanted."""

import pytest
import torch
from faults import live_connector, manager_of, settle
from model_fixture import random_prompts, save_random_model
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config

(PROMPT,) = random_prompts([100])
HIT = 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model, with the tokenizer that vLLM wants of one that answers with embeddings."""
    folder = tmp_path_factory.mktemp("embedding")
    config = Qwen2Config(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    save_random_model(config, folder)
    words = models.WordLevel({f"t{i}": i for i in range(256)}, unk_token="t0")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="t0").save_pretrained(folder)
    return folder


def start(make_llm, folder, task):
    return make_llm(
        folder, runner="pooling", convert="embed", pooler_config={"task": task}, skip_tokenizer_init=False,
        kv_transfer_config=dict(
            kv_connector="XLayerConnector", kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": 4 << 20},
        ),
    )  # fmt: skip


def ask(llm, task):
    """(output, how many tokens came from a cache)"""
    (output,) = llm.encode([{"prompt_token_ids": PROMPT}], pooling_task=task, use_tqdm=False)
    return output.outputs.data, output.num_cached_tokens


def forget(llm):
    settle(llm)
    assert llm.reset_prefix_cache()
    live_connector().pool.fill_(0xFF)


@pytest.mark.parametrize(("task", "hit"), [("embed", HIT), ("token_embed", 0)])
def test_embeddings_from_the_host_tier_are_those_from_the_cache(make_llm, folder, task, hit):
    llm = start(make_llm, folder, task)
    live_connector().pool.fill_(0xFF)
    computed, cached = ask(llm, task), ask(llm, task)
    assert (computed[1], cached[1]) == (0, hit)
    torch.testing.assert_close(cached[0], computed[0])
    forget(llm)
    assert len(manager_of(llm).host.chunks()) == HIT // 16
    restored = ask(llm, task)
    assert restored[1] == hit and torch.equal(restored[0], cached[0])
