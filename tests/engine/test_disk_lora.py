"""The disk tier of an engine with LoRA adapters: requests without one use it, those with one do not."""

import json

import torch
from disk_fixture import connector, entries
from faults import core_of, live_connector, settle
from model_fixture import llama_config, random_prompts
from safetensors.torch import save_file

(PROMPT,) = random_prompts([100])
BLOCKS = 6


def save_adapter(folder, seed):
    folder.mkdir()
    rank, config = 4, llama_config()
    settings = {"r": rank, "lora_alpha": 8, "target_modules": ["v_proj"], "peft_type": "LORA", "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    generator, weights = torch.Generator().manual_seed(seed), {}
    for layer in range(config.num_hidden_layers):
        name = f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_"
        rows = config.num_key_value_heads * config.head_dim
        weights[f"{name}A.weight"] = torch.randn(rank, config.hidden_size, generator=generator) * 0.1
        weights[f"{name}B.weight"] = torch.randn(rows, rank, generator=generator)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


def answer(llm, adapter=None):
    """(tokens, tokens of the prompt that came from a cache)."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    request = None if adapter is None else LoRARequest("adapter", 1, str(adapter))
    (output,) = llm.generate([{"prompt_token_ids": PROMPT}], sampling, use_tqdm=False, lora_request=request)
    settle(llm)
    return list(output.outputs[0].token_ids), output.num_cached_tokens


def test_adapters_stay_in_host_memory(make_llm, tiny_llama, tmp_path, caplog_vllm):
    def start():
        llm = make_llm(
            tiny_llama, enable_lora=True, max_lora_rank=8, kv_transfer_config=connector(tmp_path / "tier")
        )
        live_connector().pool.fill_(0xFF)
        return llm

    llm, adapter = start(), save_adapter(tmp_path / "adapter", 0)
    with_adapter, _ = answer(llm, adapter)
    assert llm.reset_prefix_cache()
    assert answer(llm, adapter) == (with_adapter, BLOCKS * 16)  # from host memory
    assert entries(tmp_path / "tier") == []
    assert "requests with a LoRA adapter do not use the disk tier" in caplog_vllm.text
    without, hits = answer(llm)
    assert without != with_adapter and hits == 0
    core_of(llm).shutdown()
    assert len(entries(tmp_path / "tier")) == BLOCKS

    for file in adapter.iterdir():
        file.unlink()
    adapter.rmdir()
    save_adapter(adapter, 1)  # other weights under the same name and path
    llm = start()
    assert answer(llm) == (without, BLOCKS * 16)
    other, hits = answer(llm, adapter)
    assert other != with_adapter and hits == 0
