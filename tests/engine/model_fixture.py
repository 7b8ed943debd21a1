"""Tiny models with random weights, saved as checkpoints that vLLM and transformers both load."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, set_seed

VOCAB = 256


def llama_config(**overrides) -> LlamaConfig:
    """Grouped-query Llama: 2 layers, 4 query heads, 2 KV heads, head_dim 32."""
    settings = dict(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return LlamaConfig(**(settings | overrides))


def save_random_model(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a model of random weights, large enough that its greedy tokens are no ties.

    transformers initialises with a standard deviation of 0.02, where attention is nearly
    uniform: a cache that returned the wrong tokens would go unnoticed.
    """
    set_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 1.0
            std = gain if "embed" in name else gain / weight.shape[1] ** 0.5
            weight.data.normal_(0.0, std, generator=generator)
    model.save_pretrained(folder)
    return folder


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]
