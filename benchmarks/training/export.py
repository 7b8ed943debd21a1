"""Writes a small model as a folder that transformers and vLLM load."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .batches import PAD_ID

if TYPE_CHECKING:
    from .llama import Llama

END_ID = 256
TOKENS = 258
"""256 bytes, end, padding. The vocabulary is padded to a multiple of 64."""


def write_tokenizer(folder: Path, max_length: int) -> None:
    """Byte-level tokenizer: id i < 256 is byte i. It adds nothing to a prompt."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    # ByteLevel spells a byte that is not printable as a letter beyond 255, in byte order.
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(256, 512))
    vocabulary = {chr(b if b in plain else next(shifted)): b for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ["<|end|>", "<|pad|>"]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[0],
        "eos_token": names[0],
        "pad_token": names[1],
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def export(model: "Llama", folder: Path) -> None:
    """Writes config.json, model.safetensors (bf16), generation_config.json and the tokenizer."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.config(), indent=2) + "\n")
    generation = {"do_sample": False, "bos_token_id": END_ID, "eos_token_id": END_ID, "pad_token_id": PAD_ID}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    write_tokenizer(folder, model.shape.max_length)
