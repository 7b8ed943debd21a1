"""A small gpt-oss in plain PyTorch, with the names and the arithmetic of transformers' GptOssForCausalLM.

Heads of 64, 8 query heads a KV head, attention sinks that are learnt, windows of 128 tokens in every other
layer, a mixture of experts, and the RoPE of gpt-oss-20b. What a small Llama has, too, is in `llama`.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .llama import Attention, Layer, Llama, Shape

ALPHA, LIMIT = 1.702, 7.0
"""Of the experts' activation."""
EXTRA = 8
"""Coordinates that `attend` adds to a head: one is used, SDPA's kernels want a multiple of 8."""
NEVER = -1e4
"""A score that no query looks at."""
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""Without cuDNN, which plans anew for each length."""


@dataclass(frozen=True)
class GptOssShape(Shape):
    """Sizes of the model; the defaults make 12 MB in bf16."""

    hidden: int = 256
    heads: int = 16
    kv_heads: int = 2
    head_size: int = 64
    mlp: int = 128
    """Of each expert."""
    rope_theta: float = 150000.0
    window: int = 128
    experts: int = 4
    experts_per_token: int = 2
    yarn_factor: float = 32.0
    original_length: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    @property
    def rope_scale(self) -> float:
        return 0.1 * math.log(self.yarn_factor) + 1.0

    def rope_rates(self) -> Tensor:
        """YaRN: pairs that turn often in the original length stay, slow ones turn by 1 / factor."""

        def pair(turns: float) -> float:
            """Which pair makes so many turns in the original length."""
            rate = 2 * math.pi * turns / self.original_length
            return -math.log(rate) * self.head_size / (2 * math.log(self.rope_theta))

        low, high = max(pair(self.beta_fast), 0.0), min(pair(self.beta_slow), self.head_size - 1.0)
        slowed = ((torch.arange(self.head_size // 2) - low) / (high - low)).clamp(0, 1)
        return super().rope_rates() * (1 - slowed + slowed / self.yarn_factor)


def attend(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
    """Causal attention with sinks: q, k and v [batch, heads, length, D], sinks [heads] -> as q.

    A sink is one more score in every softmax, of nothing. Here it is a key with a value of zeros: a
    coordinate that is 1 in every query is its score in that key, 0 in others, NEVER in keys that fill up.

    Args:
        window: of how many newest tokens, itself among them, a query sees; None: of all.
    """
    batch, heads, length, size = q.shape
    q = F.pad(F.pad(q, (0, 1), value=1.0), (0, EXTRA - 1))
    k, v = F.pad(k, (0, EXTRA)), F.pad(v, (0, EXTRA))
    score = (sinks * size**0.5).to(k.dtype).view(1, heads, 1, 1).expand(batch, heads, 1, 1)
    sink = F.pad(score, (size, EXTRA - 1))
    with sdpa_kernel(KERNELS):
        if window is None:
            # A query before all others for the sink's own place.
            k, v, q = torch.cat((sink, k), 2), F.pad(v, (0, 0, 1, 0)), F.pad(q, (0, 0, 1, 0))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=size**-0.5)
            return out[:, :, 1:, :size]
        blocks = -(-length // window)
        behind = blocks * window - length
        nothing = F.pad(k.new_full((batch, heads, window, 1), NEVER), (size, EXTRA - 1))
        k = F.pad(torch.cat((nothing, k), 2), (0, 0, 0, behind))
        v, q = F.pad(v, (0, 0, window, behind)), F.pad(q, (0, 0, 0, behind))
        # [batch * blocks, heads, ..]: a block of queries reads its own block of keys and the one before.
        k, v = (
            torch.cat((t[:, :, :-1], t[:, :, 1:]), 3).transpose(1, 2).flatten(0, 1)
            for t in (x.unflatten(2, (blocks + 1, window)) for x in (k, v))
        )
        q = q.unflatten(2, (blocks, window)).transpose(1, 2).flatten(0, 1)
        k = torch.cat((sink[:1].expand(len(k), -1, -1, -1), k), 2)
        v = F.pad(v, (0, 0, 1, 0))
        query = torch.arange(window, device=q.device)[:, None]
        key = torch.arange(2 * window, device=q.device)[None]
        seen = F.pad((key > query) & (key <= query + window), (1, 0), value=True)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=size**-0.5)
    out = out.unflatten(0, (batch, blocks)).transpose(1, 2).flatten(2, 3)
    return out[:, :, :length, :size]


class SinkAttention(Attention):
    def __init__(self, s: Shape):
        super().__init__(s, bias=True)
        self.sinks = nn.Parameter(torch.zeros(s.heads))


class Experts(nn.Module):
    """Parameters of the experts, as transformers names them."""

    def __init__(self, s: GptOssShape):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(s.experts, s.hidden, 2 * s.mlp) * s.hidden**-0.5)
        self.gate_up_proj_bias = nn.Parameter(torch.zeros(s.experts, 2 * s.mlp))
        std = (s.mlp * 2 * s.layers) ** -0.5
        self.down_proj = nn.Parameter(torch.randn(s.experts, s.mlp, s.hidden) * std)
        self.down_proj_bias = nn.Parameter(torch.zeros(s.experts, s.hidden))


class Mixture(nn.Module):
    """Experts, all computed for every token: in a small model that takes less time than sorting tokens."""

    def __init__(self, s: GptOssShape):
        super().__init__()
        self.per_token = s.experts_per_token
        self.router = nn.Linear(s.hidden, s.experts)
        self.experts = Experts(s)

    def forward(self, x: Tensor) -> Tensor:
        e = self.experts
        best = self.router(x).topk(self.per_token, -1)
        shares = torch.zeros(len(x), len(e.down_proj), dtype=best.values.dtype, device=x.device)
        shares = shares.scatter(-1, best.indices, best.values.softmax(-1).to(shares.dtype))
        both = x @ e.gate_up_proj.transpose(0, 1).flatten(1) + e.gate_up_proj_bias.flatten()
        gate, up = both[..., ::2].clamp(max=LIMIT), both[..., 1::2].clamp(-LIMIT, LIMIT)
        active = gate * torch.sigmoid(ALPHA * gate) * (up + 1)
        weighted = active.unflatten(-1, (len(e.down_proj), -1)) * shares[..., None]
        return weighted.flatten(-2) @ e.down_proj.flatten(0, 1) + shares @ e.down_proj_bias

    def output_weight(self) -> Tensor:
        return self.experts.down_proj


class GptOssLayer(Layer):
    self_attn: SinkAttention

    def __init__(self, s: GptOssShape, window: int | None):
        super().__init__(s)
        self.self_attn = SinkAttention(s)
        self.mlp = Mixture(s)
        self.window = window

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        return attend(q, k, v, self.self_attn.sinks, self.window)


class GptOss(Llama):
    """Causal language model with a head of its own; parameters carry transformers' names."""

    shape: GptOssShape

    def __init__(self, shape: GptOssShape):
        super().__init__(shape)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)

    def make_layer(self, index: int) -> Layer:
        return GptOssLayer(self.shape, None if index % 2 else self.shape.window)

    def sink_layers(self) -> Iterator[GptOssLayer]:
        """The layers with their type."""
        return (cast(GptOssLayer, layer) for layer in self.model.layers)

    def output_embedding(self) -> Tensor:
        return self.lm_head.weight

    def config(self) -> dict[str, object]:
        s = self.shape
        rope = {
            "rope_type": "yarn", "rope_theta": s.rope_theta, "factor": s.yarn_factor, "truncate": False,
            "beta_fast": s.beta_fast, "beta_slow": s.beta_slow,
            "original_max_position_embeddings": s.original_length,
        }  # fmt: skip
        mine = {
            "architectures": ["GptOssForCausalLM"],
            "model_type": "gpt_oss",
            "max_position_embeddings": int(s.original_length * s.yarn_factor),
            "rope_parameters": rope,
            "attention_bias": True,
            "tie_word_embeddings": False,
            "layer_types": ["full_attention" if i % 2 else "sliding_attention" for i in range(s.layers)],
            "sliding_window": s.window,
            "num_local_experts": s.experts,
            "num_experts_per_tok": s.experts_per_token,
            "swiglu_limit": LIMIT,
        }
        return super().config() | mine

    def variants(self) -> dict[str, Llama]:
        """Copies without sinks, and without windows: what the trained model makes of each."""
        without_sinks, without_windows = copy.deepcopy(self), copy.deepcopy(self)
        for layer in without_sinks.sink_layers():
            nn.init.constant_(layer.self_attn.sinks, NEVER)
        for layer in without_windows.sink_layers():
            layer.window = None
        return {"without_sinks": without_sinks, "without_windows": without_windows}


@torch.no_grad()
def sink_shares(model: GptOss, ids: Tensor) -> list[list[float]]:
    """Of each layer and head the mean share of attention that goes to the sink, for ids [batch, length]."""
    shares: list[list[float]] = []

    def watched(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def look(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            # Values of one add up to what does not go to the sink.
            rest = attend(q, k, torch.ones_like(v))[..., 0]
            shares.append((1 - rest.float()).mean((0, 2)).tolist())
            return attend(q, k, v)

        return look

    other = copy.deepcopy(model)
    for layer in other.model.decoder_layers():
        layer.attend = watched(layer.attend)  # type: ignore[method-assign]
    other(ids)
    return shares
