"""Attention from its definition in float64, and the same in a 16-bit dtype as plain PyTorch would do it.

K and V come out of pages by the byte addresses of ``nvfp4_ref``; nothing is shared with vllm_xlayer.
"""

from dataclasses import dataclass

import numpy as np
import torch
from reference import nvfp4_ref as ref


def byte_addresses(
    heads: int, block_size: int, head_size: int, is_v: bool, swizzled: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Where a page's data [N, H, D/2] and scales [N, H, S] are: nvfp4_ref's functions on index arrays."""
    shape = (heads, block_size, head_size)
    n = np.arange(block_size)[:, None, None]
    h = np.arange(heads)[None, :, None]
    data = ref.data_byte(*shape, is_v, h, n, np.arange(head_size // 2))
    scale = ref.scale_byte(*shape, is_v, h, n, np.arange(head_size // ref.GROUP), swizzled)
    return data, scale


def dequantise_pages(
    pages: np.ndarray, heads: int, block_size: int, head_size: int, is_v: bool, swizzled: bool
) -> np.ndarray:
    """Pages [B, bytes] to exact values [B, N, H, D] float64, without the global scale."""
    data_at, scale_at = byte_addresses(heads, block_size, head_size, is_v, swizzled)
    data, scale = pages[:, data_at], pages[:, scale_at]
    nibbles = ref.unpacked(data).reshape(-1, ref.GROUP)
    values = ref.dequantise(nibbles, scale.reshape(-1))
    return values.reshape(len(pages), block_size, heads, head_size)


@dataclass(frozen=True)
class Softmax:
    """How scores become weights."""

    scale: float
    window: int = 0
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    """[Hq]"""
    sees_all: bool = False
    """Queries come after all of the tokens."""


def visible(q_len: int, tokens: int, softmax: Softmax) -> torch.Tensor:
    """[q_len, tokens] bool: which tokens each of the last q_len tokens sees; none at a negative position."""
    if softmax.sees_all:
        return torch.ones(q_len, tokens, dtype=torch.bool)
    window = softmax.window
    position = torch.arange(tokens - q_len, tokens)[:, None]
    key = torch.arange(tokens)[None, :]
    seen = key <= position
    return seen & (key > position - window) if window else seen


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax
) -> tuple[torch.Tensor, torch.Tensor]:
    """q [q_len, Hq, D], k and v [n, H, D] to (output [q_len, Hq, D], LSE [Hq, q_len]), all float64.

    Query i is at position n - q_len + i; where that is negative, the output is 0 and the LSE -inf.
    """
    q_len, heads = q.shape[:2]
    q = q.double().unflatten(1, (k.shape[1], heads // k.shape[1]))
    k, v = k.double(), v.double()
    scores = torch.einsum("ihgd,nhd->hgin", q, k).flatten(0, 1) * softmax.scale
    if softmax.soft_cap:
        scores = softmax.soft_cap * torch.tanh(scores / softmax.soft_cap)
    seen = visible(q_len, k.shape[0], softmax)
    scores = torch.where(seen, scores, -torch.inf)
    exists = seen.any(-1)
    terms = scores
    if softmax.sinks is not None:
        terms = torch.cat((scores, softmax.sinks.double()[:, None, None].expand(-1, q_len, 1)), -1)
    lse = torch.where(exists, torch.logsumexp(terms, -1), -torch.inf)
    weights = torch.where(exists[:, None], torch.exp(scores - lse[..., None]), 0.0)
    out = torch.einsum("hgin,nhd->ihgd", weights.unflatten(0, (k.shape[1], heads // k.shape[1])), v)
    return out.reshape(q_len, heads, -1), lse


def attention_in(
    dtype: torch.dtype, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax: Softmax
) -> torch.Tensor:
    """What plain PyTorch makes of the same in a 16-bit dtype: [q_len, Hq, D] of it.

    Matrix products in the dtype, softmax in float32, weights rounded to the dtype.
    """
    q_len, heads, head_size = q.shape
    if k.shape[0] == 0:
        return torch.zeros_like(q, dtype=dtype)
    # [H, group * q_len, D], so that a KV head is one matrix product
    rows = q.to(dtype).transpose(0, 1).reshape(k.shape[1], -1, head_size)
    k, v = (x.to(dtype).transpose(0, 1) for x in (k, v))
    scores = (rows @ k.transpose(1, 2) * softmax.scale).float().view(heads, q_len, -1)
    if softmax.soft_cap:
        scores = softmax.soft_cap * torch.tanh(scores / softmax.soft_cap)
    seen = visible(q_len, k.shape[1], softmax)
    scores = torch.where(seen, scores, -torch.inf)
    terms = scores
    if softmax.sinks is not None:
        terms = torch.cat((scores, softmax.sinks.float()[:, None, None].expand(-1, q_len, 1)), -1)
    weights = torch.softmax(terms, -1)[..., : scores.shape[-1]]
    weights = torch.where(seen.any(-1)[:, None], weights, 0.0)
    out = weights.to(dtype).view(k.shape[0], -1, scores.shape[-1]) @ v
    return out.view(heads, q_len, head_size).transpose(0, 1)
