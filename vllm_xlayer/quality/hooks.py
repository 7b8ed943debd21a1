"""Looks at K and V inside a running engine, through vLLM's `LLM.apply_model`."""

from functools import partial
from typing import Any

import torch
from vllm import SamplingParams, TokensPrompt

from ..config import Config
from ..kv_scales import NONE, scales_of
from ..nvfp4 import ROTATED_KEYS
from .statistics import Sums, combine

WINDOWS = 8
"""That are enough to know K and V by."""

_SEEN: dict[str, dict[str, Sums]] = {}
"""Layer -> K and V; of this worker process."""
_HANDLES: list[Any] = []


def _layers(model: torch.nn.Module) -> dict[str, Any]:
    """vLLM's attention layers with a K and a V of their own, by name."""
    found: dict[str, Any] = {}
    for module in model.modules():
        is_one = all(hasattr(module, name) for name in ("layer_name", "impl", "num_kv_heads", "head_size"))
        if is_one and getattr(module, "kv_sharing_target_layer_name", None) is None:
            found[str(module.layer_name)] = module
    return found


def install(model: torch.nn.Module) -> None:
    """From now on every K and V that a layer is given is added to the sums."""
    settings = Config.load()
    for name, layer in _layers(model).items():
        scales = scales_of(name, NONE, settings.kv_scales)
        _SEEN[name] = {
            which: Sums(scale, settings.scale_choice, which == "K" and ROTATED_KEYS)
            for which, scale in zip("KV", scales, strict=True)
        }

        def look(layer, args, name):
            for which, x in zip("KV", args[1:3], strict=True):
                if x is not None:
                    _SEEN[name][which].add(x.view(-1, layer.num_kv_heads, layer.head_size))

        _HANDLES.append(layer.register_forward_pre_hook(partial(look, name=name)))


def collect(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Ends that, and returns the sums of every layer that was given something."""
    while _HANDLES:
        _HANDLES.pop().remove()
    found = {
        name: {which: sums.result() for which, sums in parts.items()}
        for name, parts in _SEEN.items()
        if all(sums.tokens for sums in parts.values())
    }
    _SEEN.clear()
    return found


def look_at_layers(llm: Any, windows: list[list[int]]) -> dict[str, dict[str, Any]]:
    """Statistics of K and V of each layer, as `combine` gives them, while the engine reads some windows."""
    llm.apply_model(install)
    prompts = [TokensPrompt(prompt_token_ids=window) for window in windows[:WINDOWS]]
    llm.generate(prompts, SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    ranks = llm.apply_model(collect)
    return {
        name: {which: combine([rank[name][which] for rank in ranks]) for which in "KV"} for name in ranks[0]
    }
