"""Exact match of a model on held-out documents, with an exact or a damaged KV cache.

Greedy decoding gives the wanted answer exactly when, with the answer as input, every one of its bytes
and the newline behind it is the arg max at its place. So one forward pass scores a document; no
decoding loop. (test_eval_model.py compares with transformers' generate.)
"""

import torch
from torch import Tensor

from vllm_xlayer.demo.documents import TASK_NAMES, Prefix, prefixes

from .batches import PAD_ID
from .llama import KVChange, Llama


def gaussian_noise(relative: float, seed: int) -> KVChange:
    """Adds noise of ``relative`` times the root mean square of each vector of head_size."""
    generators: dict[torch.device, torch.Generator] = {}

    def change(x: Tensor) -> Tensor:
        generator = generators.setdefault(x.device, torch.Generator(x.device).manual_seed(seed))
        noise = torch.randn(x.shape, generator=generator, device=x.device)
        rms = x.float().square().mean(-1, keepdim=True).sqrt()
        return (x.float() + relative * rms * noise).to(x.dtype)

    return change


def nvfp4_rounding(x: Tensor) -> Tensor:
    """x through NVFP4 and back: groups of 16, e4m3 scale of amax / 6, e2m1 elements, global scale 1.

    The plainest choice of scales, so a lower bound for the writer in the package, which picks them better.
    """
    groups = x.float().unflatten(-1, (-1, 16))
    scale = (groups.abs().amax(-1, keepdim=True) / 6).clamp(max=448).to(torch.float8_e4m3fn).float()
    # A group whose scale rounds to zero becomes zeros.
    y = torch.where(scale > 0, groups / scale.clamp(min=2.0**-9), 0).clamp(-6, 6)
    step = torch.where(y.abs() < 2, 0.5, torch.where(y.abs() < 4, 1.0, 2.0))
    return ((y / step).round() * step * scale).flatten(-2).to(x.dtype)


def _rows(group: Prefix, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompt + answer of each question of ``group``: (text [docs, length], answer bytes as bool)."""
    docs = [(group["prefix"] + question, answer + "\n") for question, answer in group["questions"]]
    length = max(len(p) + len(a) for p, a in docs)
    text = torch.full((len(docs), length), PAD_ID)
    counted = torch.zeros_like(text, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(docs):
        text[row, : len(prompt) + len(answer)] = torch.tensor(list((prompt + answer).encode()))
        counted[row, len(prompt) : len(prompt) + len(answer)] = True
    return text.to(device), counted.to(device)


@torch.no_grad()
def exact_match(model: Llama, groups: list[Prefix], change: KVChange | None = None) -> list[bool]:
    """One bool a question of ``groups``: does greedy decoding give its answer?

    ``change`` damages K (after RoPE) and V of every token, the newest included, as a cache would.
    """
    device = next(model.parameters()).device
    right: list[bool] = []
    for group in groups:
        text, counted = _rows(group, device)
        logits = model(text[:, :-1], change, change).view(len(text), text.shape[1] - 1, -1)
        hit = (logits.argmax(-1) == text[:, 1:]) | ~counted[:, 1:]
        right += hit.all(1).tolist()
    return right


def score(
    model: Llama, seed: int, sizes: tuple[int, ...], change: KVChange | None = None
) -> dict[str, float | int]:
    """Exact match of each task and of all documents together, from 0 to 1, and the documents' number."""
    right = {task: exact_match(model, prefixes(task, seed, sizes), change) for task in TASK_NAMES}
    together = [r for rights in right.values() for r in rights]
    scores: dict[str, float | int] = {task: sum(r) / len(r) for task, r in right.items()}
    return {**scores, "overall": sum(together) / len(together), "documents": len(together)}
