"""Shapes of real models, which vLLM gives random weights."""

import json
from pathlib import Path
from typing import Any

LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", rms_norm_eps=1e-5, rope_theta=500000.0,
    hidden_act="silu", dtype="bfloat16",
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": LLAMA | dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=131072,
    ),
    "tiny": LLAMA | dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, vocab_size=512, max_position_embeddings=32768,
    ),
    # A third of its layers and an eighth of its experts: what an engine reads of a layer's KV is the same.
    "qwen3-next": dict(
        architectures=["Qwen3NextForCausalLM"], model_type="qwen3_next", dtype="bfloat16",
        hidden_size=2048, num_hidden_layers=16,
        layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 4,
        num_attention_heads=16, num_key_value_heads=2, head_dim=256,
        linear_num_key_heads=16, linear_num_value_heads=32, linear_key_head_dim=128,
        linear_value_head_dim=128, linear_conv_kernel_dim=4,
        num_experts=64, num_experts_per_tok=10, moe_intermediate_size=512, intermediate_size=5120,
        shared_expert_intermediate_size=512, decoder_sparse_step=1, mlp_only_layers=[],
        rope_parameters={"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        vocab_size=151936, max_position_embeddings=262144, tie_word_embeddings=False,
    ),
    "gpt-oss-20b": dict(
        architectures=["GptOssForCausalLM"], model_type="gpt_oss", dtype="bfloat16",
        quantization_config={"quant_method": "mxfp4"},
        hidden_size=2880, num_hidden_layers=24, layer_types=["sliding_attention", "full_attention"] * 12,
        num_attention_heads=64, num_key_value_heads=8, head_dim=64, sliding_window=128,
        num_local_experts=32, num_experts_per_tok=4, intermediate_size=2880, swiglu_limit=7.0,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "truncate": False, "original_max_position_embeddings": 4096,
        },
        vocab_size=201088, max_position_embeddings=131072, tie_word_embeddings=False,
    ),
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "qwen3-next": {"additional_config": {"gdn_prefill_backend": "triton"}},
}
"""Of a shape, vLLM's settings that are not about its KV cache: FlashInfer would be compiled first, for
minutes."""


def has_experts(shape: str) -> bool:
    """Whether what a step reads hangs on the tokens: those choose the experts."""
    return bool({"num_experts", "num_local_experts"} & SHAPES[shape].keys())


def same_answers(requests: int, vocabulary: int) -> list[int]:
    """A token for each request, which its answer shall consist of: then all runs choose the same experts."""
    return [i * vocabulary // requests for i in range(requests)]


def write_model(folder: Path, shape: str, layers: int | None = None) -> Path:
    """A folder with the config of a shape, with so many layers if that is said; vLLM makes the weights."""
    model = folder / shape
    model.mkdir()
    config = dict(SHAPES[shape])
    if layers is not None:
        config["num_hidden_layers"] = layers
    (model / "config.json").write_text(json.dumps(config))
    return model
