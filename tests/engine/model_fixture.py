"""Tiny models with random weights, and what transformers says about them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    GptOssConfig,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
    Qwen2Config,
)

VOCAB = 256
ON_GPU = torch.cuda.is_available()
"""The KV of a token has as many bytes on both: 32 elements a head in float32, or 64 in bfloat16."""

SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64 if ON_GPU else 32,
    max_position_embeddings=1024,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
    tie_word_embeddings=False,
)
"""Settings that every decoder's config takes: grouped-query attention with two heads a group."""


def llama_config(**overrides) -> LlamaConfig:
    return LlamaConfig(**(SHAPE | overrides))


def gpt_oss_config() -> GptOssConfig:
    """Attention sinks, every other layer with a sliding window; the experts are not quantised."""
    return GptOssConfig(**SHAPE, sliding_window=24, num_local_experts=4, num_experts_per_tok=2)


IMAGE_TOKEN, IMAGE_SIDE, PATCH_SIDE = VOCAB - 1, 56, 14
IMAGE_TOKENS = (IMAGE_SIDE // PATCH_SIDE) ** 2


def llava_config() -> LlavaConfig:
    """Llama behind a small CLIP: an image is IMAGE_TOKENS tokens."""
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=IMAGE_SIDE,
        patch_size=PATCH_SIDE,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=llama_config(),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=IMAGE_TOKENS,
        tie_word_embeddings=False,
    )


def save_image_processor(folder: Path) -> None:
    """What llava_config's model needs beside its weights: a word for each token, one of them an image."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(IMAGE_TOKEN)} | {"<image>": IMAGE_TOKEN}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    side = {"height": IMAGE_SIDE, "width": IMAGE_SIDE}
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": IMAGE_SIDE}, crop_size=side),
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="w0", additional_special_tokens=["<image>"]
        ),
        patch_size=PATCH_SIDE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)


def save_random_model(config: PretrainedConfig, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Save a model with random weights whose greedy tokens hang on its attention, and on its states.

    With transformers' own initialisation (standard deviation 0.02) attention is nearly uniform
    and the last token's embedding decides: a cache that returned wrong tokens would go
    unnoticed. So queries and keys are large and embeddings are small.
    """
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = auto.from_config(config).to(torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if "q_norm" in name or "k_norm" in name:
            weight.data.fill_(1.0 if "gemma" in config.model_type else 2.0)  # Gemma adds 1
        elif name.endswith("sinks"):
            weight.data.normal_(1.0, 2.0, generator=generator)
        elif "conv" in name and weight.dim() == 3:
            weight.data.normal_(0.0, weight.shape[2] ** -0.5, generator=generator)
        elif name.endswith("A_log"):  # as trained models have it a state would last a few tokens
            weight.data.uniform_(-6.0, -2.0, generator=generator)
        elif weight.dim() == 2:
            gain = 2.0 if "q_proj" in name or "k_proj" in name else 0.1 if "embed" in name else 1.0
            weight.data.normal_(0.0, gain * weight.shape[1] ** -0.5, generator=generator)
    model.to(dtype).save_pretrained(folder)
    return folder


def save_eagle(folder: Path, seed: int, **overrides) -> Path:
    """An EAGLE drafter for a model of llama_config(**overrides): one layer, after a projection of token and
    hidden state."""
    config = llama_config(num_hidden_layers=1, **overrides)
    save_random_model(config, folder)
    theirs = ("lm_head.weight", "model.norm.weight", "model.layers.0.input_layernorm.weight")
    weights = {
        name.removeprefix("model."): weight
        for name, weight in load_file(folder / "model.safetensors").items()
        if name not in theirs
    }
    size, generator = config.hidden_size, torch.Generator().manual_seed(seed)
    weights["fc.weight"] = torch.randn(size, 2 * size, generator=generator) * (2 * size) ** -0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    saved = json.loads((folder / "config.json").read_text())
    saved["architectures"] = ["EagleLlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


def save_mimo(folder: Path, **overrides) -> Path:
    """A Qwen 2 that predicts a second token by a layer of its own (MTP), as in MiMo's checkpoints: behind
    a projection of hidden state and token, all in one folder."""
    layers = overrides.pop("num_hidden_layers", SHAPE["num_hidden_layers"])
    shape = SHAPE | overrides | {"num_hidden_layers": layers + 1}
    del shape["head_dim"]  # Qwen 2 has hidden_size / num_attention_heads
    config = Qwen2Config(**shape)
    save_random_model(config, folder)
    size, generator, last = config.hidden_size, torch.Generator().manual_seed(1), f"model.layers.{layers}."
    mtp = "model.mtp_layers.0."
    weights = {
        name.replace(last, mtp): weight for name, weight in load_file(folder / "model.safetensors").items()
    }
    weights[mtp + "input_proj.weight"] = torch.randn(size, 2 * size, generator=generator) * (2 * size) ** -0.5
    for norm in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
        weights[mtp + norm + ".weight"] = torch.ones(size)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    saved = json.loads((folder / "config.json").read_text())
    saved |= {
        "architectures": ["MiMoForCausalLM"],
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": 1,
    }
    saved.pop("layer_types", None)  # one for each of the saved layers
    (folder / "config.json").write_text(json.dumps(saved))
    return folder


def random_prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def transformers_greedy(folder: Path, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Greedy continuations by transformers in float32, one prompt at a time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    answers = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        answer = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=num_tokens, do_sample=False
        )
        answers.append(answer[0, len(prompt) :].tolist())
        assert num_tokens < 8 or len(set(answers[-1])) > 3, "a model that repeats itself tests no attention"
    return answers


def vllm_outputs(llm, prompts: list[list[int]], num_tokens: int) -> list:
    """vLLM's RequestOutputs of greedy continuations of exactly num_tokens, in one batch."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    return llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)


def vllm_greedy(llm, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """vLLM's greedy continuations, in one batch."""
    return [list(output.outputs[0].token_ids) for output in vllm_outputs(llm, prompts, num_tokens)]
