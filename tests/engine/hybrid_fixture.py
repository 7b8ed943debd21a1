"""Tiny models with states beside attention, their pages in the cache, and transformers' logprobs."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from model_fixture import ON_GPU, random_prompts, save_random_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.model_configs import configs

CONFIGS = configs(gpu=ON_GPU)


def save_hybrid(name: str, folder: Path) -> Path:
    """A model of that name in benchmarks/models.json, with random weights."""
    save_hybrid_config(CONFIGS[name], folder)
    return folder


def save_hybrid_config(config: dict, folder: Path) -> dict[str, str]:
    """A model of that config, with random weights; what vLLM is told besides its folder.

    With "load_format" in the config vLLM makes the weights: where transformers' model has other names.
    """
    if "load_format" not in config:
        save_random_model(AutoConfig.for_model(**config), folder, dtype=getattr(torch, config["dtype"]))
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return {"load_format": config["load_format"]}


def save_qwen3_next_with_mtp(config: dict, folder: Path) -> dict[str, str]:
    """A Qwen3-Next that drafts by a layer of its own (MTP), as in its checkpoints; as `save_hybrid_config`.

    Its draft layer is one of attention and experts, and vLLM takes it for layer 0: that has experts, too.
    """
    layers = config["num_hidden_layers"]
    # All experts of a token: were they chosen, other rounding could choose others.
    config = config | {"mlp_only_layers": [*range(1, layers)], "num_experts_per_tok": config["num_experts"]}
    more = config | {
        "num_hidden_layers": layers + 1, "layer_types": [*config["layer_types"], "full_attention"],
    }  # fmt: skip
    save_hybrid_config(more, folder)
    theirs, mtp = f"model.layers.{layers}.", "mtp.layers.0."
    weights = load_file(folder / "model.safetensors")
    weights = {name.replace(theirs, mtp): weight for name, weight in weights.items()}
    norm = weights["model.norm.weight"]
    for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        weights[f"mtp.{name}.weight"] = norm.clone()
    size, generator = config["hidden_size"], torch.Generator().manual_seed(1)
    drawn = torch.randn(size, 2 * size, generator=generator) * (2 * size) ** -0.5
    weights["mtp.fc.weight"] = drawn.to(norm.dtype)
    weights["lm_head.weight"][:2] *= 3  # one of two tokens comes next, mostly: so drafts are accepted
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return {}


def answers(llm, prompts: list[list[int]], num_tokens: int) -> list[tuple[list[int], list[float]]]:
    """vLLM's greedy tokens and their logprobs, in one batch."""
    return [answer[:2] for answer in answers_and_hits(llm, prompts, num_tokens)]


def answers_and_hits(llm, prompts: list[list[int]], num_tokens: int) -> list:
    """As `answers`, and how many tokens of the prompt came from the cache."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False, logprobs=0
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
    found = []
    for output in outputs:
        tokens, steps = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        logprobs = [step[token].logprob for token, step in zip(tokens, steps, strict=True)]
        found.append((tokens, logprobs, output.num_cached_tokens))
    return found


def _logprobs(model, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """What transformers expects at each of the tokens: [tokens, vocabulary]."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + tokens[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return logits.float().log_softmax(-1)


def check_against_transformers(folder: Path, prompts, found, atol: float | None) -> None:
    """Every token must have the logprob that transformers gives it in float32, and be as likely as any.

    Without atol, of a 16-bit model: within twice of what transformers itself is off in that precision.
    """
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "time_step_min"):  # transformers' Nemotron-H takes no smaller time steps; vLLM's any
        config.time_step_min = 1e-30
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="eager")
    answered = [(prompt, tokens) for prompt, (tokens, _) in zip(prompts, found, strict=True)]
    rounded = [_logprobs(model, *answer) for answer in answered] if atol is None else []
    model.float()
    if atol is None:
        exact = [_logprobs(model, *answer) for answer in answered]
        atol = 2 * max((a - b).abs().max().item() for a, b in zip(rounded, exact, strict=True))
    for prompt, (tokens, logprobs) in zip(prompts, found, strict=True):
        expected = _logprobs(model, prompt, tokens)
        chosen = expected[torch.arange(len(tokens)), torch.tensor(tokens)]
        torch.testing.assert_close(torch.tensor(logprobs), chosen, rtol=0, atol=atol)
        assert (chosen >= expected.max(-1).values - 2 * atol).all()
        assert len(set(tokens)) > 3, "a model that repeats itself tests no state"


def engine_core(llm):
    return llm.llm_engine.engine_core.engine_core


def groups(llm) -> list[list[str]]:
    """The names of the layers of each KV cache group."""
    return [group.layer_names for group in engine_core(llm).scheduler.kv_cache_config.kv_cache_groups]


def layer_tensors(llm, layer: str) -> list[torch.Tensor]:
    """A layer's cache: a tensor of pages, or one of each kind of state; block ids come first."""
    found = llm.llm_engine.vllm_config.compilation_config.static_forward_context[layer].kv_cache
    return [found] if isinstance(found, torch.Tensor) else list(found)


def fill_memory(llm, byte: int) -> None:
    """Overwrite all of the cache's memory, padding and rows' ends included.

    On a GPU block 0, which nobody owns, stays as vLLM allocates it: kernels read it for what a window has
    left behind, and multiply it by 0.
    """
    wait_for_device()
    layers = [layer for group in groups(llm) for layer in group]
    for layer in layers:
        tensor = layer_tensors(llm, layer)[0]
        memory = torch.empty(0, dtype=torch.uint8, device=tensor.device)
        memory.set_(tensor.untyped_storage()).fill_(byte)
    if ON_GPU:
        for layer in layers:
            for tensor in layer_tensors(llm, layer):
                tensor[0].zero_()
    wait_for_device()


def wait_for_device() -> None:
    """The engine's steps may run on another stream than what a test does to its cache."""
    if ON_GPU:
        torch.cuda.synchronize()


def last_blocks_first(llm) -> None:
    """Blocks are handed out from the end of an idle engine's memory, where offsets are largest."""
    from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

    pool = engine_core(llm).scheduler.kv_cache_manager.block_pool
    pool.free_block_queue = FreeKVCacheBlockQueue(pool.blocks[:0:-1])


def cached_blocks(llm, group: int) -> Iterator[int]:
    """Ids of the blocks of a group that the prefix cache knows."""
    from vllm.v1.core.kv_cache_utils import get_group_id

    for block in engine_core(llm).scheduler.kv_cache_manager.block_pool.blocks:
        if block.block_hash is not None and get_group_id(block.block_hash) == group:
            yield block.block_id


def corrupt_group(llm, group: int) -> int:
    """Change what every cached block of a group holds, or change it back; returns how many."""
    wait_for_device()
    blocks = list(cached_blocks(llm, group))
    for layer in groups(llm)[group]:
        for tensor in layer_tensors(llm, layer):
            for block in blocks:
                page = tensor[block]
                if page.dtype == torch.uint8:
                    page.bitwise_xor_(8)  # of NVFP4: a sign of every other element, an exponent of each scale
                else:
                    page.neg_()
    wait_for_device()
    return len(blocks)


PROMPTS = random_prompts([5, 100, 16, 33, 150, 1])
