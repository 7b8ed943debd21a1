"""Weight files, and configurations of vLLM's engines, as far as a disk tier's identity looks at them."""

import json
import operator
import os
from types import SimpleNamespace

import torch
from vllm.config import AttentionConfig

from vllm_xlayer.connector.disk import identity
from vllm_xlayer.connector.disk.identity import tier_identity


def save(folder, data, name="model.safetensors", header=None, time=1000):
    folder.mkdir(exist_ok=True)
    text = json.dumps(header or {"a": {"dtype": "F32", "shape": [len(data) // 4]}}).encode()
    path = folder / name
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    os.utime(path, (time, time))
    return folder


DATA = bytes(i % 253 for i in range(300_000))


def engine(**changes):
    """A configuration of vLLM's, as far as it matters: names with dots change one thing."""
    multimodal = SimpleNamespace(**dict.fromkeys(identity.MULTIMODAL))
    model = SimpleNamespace(
        model="model", hf_config=SimpleNamespace(to_dict=lambda: {"rope_theta": 1e4}), model_impl="vllm",
        runner_type="generate", convert_type="none", model_class_overrides={}, dtype=torch.bfloat16,
        quantization=None, quantization_config=None, seed=0,
        max_model_len=4096, disable_sliding_window=False, multimodal_config=multimodal, revision=None,
    )  # fmt: skip
    config = SimpleNamespace(
        model_config=model,
        load_config=SimpleNamespace(load_format="auto", model_loader_extra_config={}, download_dir=None),
        cache_config=SimpleNamespace(
            cache_dtype="auto", prefix_caching_hash_algo="sha256",
            sliding_window=None, kv_cache_dtype_skip_layers=[], use_replayssm=False, prefix_match_unit=None,
            kv_sharing_fast_prefill=False,
        ),
        parallel_config=SimpleNamespace(
            world_size=2, tensor_parallel_size=2, decode_context_parallel_size=1,
            prefill_context_parallel_size=1, cp_kv_cache_interleave_size=1, use_ubatching=False,
        ),
        attention_config=AttentionConfig(),
        mamba_config=SimpleNamespace(
            backend="TRITON", enable_stochastic_rounding=False, stochastic_rounding_philox_rounds=0
        ),
        device_config=SimpleNamespace(device_type="cpu"),
        lora_config=None, speculative_config=None, ec_transfer_config=None, additional_config={},
    )  # fmt: skip
    for name, value in changes.items():
        part, _, field = name.rpartition(".")
        setattr(operator.attrgetter(part)(config) if part else config, field, value)
    return config


def of(folder, **changes):
    layout = SimpleNamespace(
        fingerprint=changes.pop("fingerprint", "BLHNC"),
        attention=[SimpleNamespace(dtype=changes.pop("page_dtype", "bfloat16"))],
        groups=[SimpleNamespace(block_size=16)],
        has_opaque=changes.pop("states", False),
    )
    one_copy = changes.pop("one_copy", False)
    return tier_identity(engine(**{"model_config.model": str(folder)} | changes), layout, 1, one_copy)


def drafted(folder, **changes):
    """With speculative decoding by a draft model; names with dots change one thing."""
    draft = SimpleNamespace(
        model=str(folder), revision=None, dtype=torch.bfloat16, quantization=None,
        hf_config=SimpleNamespace(to_dict=lambda: {"layers": 1}),
    )  # fmt: skip
    speculative = SimpleNamespace(
        method="eagle", num_speculative_tokens=2, parallel_drafting=False, draft_model_config=draft
    )
    for name, value in changes.items():
        part, _, field = name.rpartition(".")
        setattr(operator.attrgetter(part)(speculative) if part else speculative, field, value)
    return {"speculative_config": speculative}
