"""A small Llama in plain PyTorch, with the names and the arithmetic of transformers' LlamaForCausalLM.

Everything but attention works on flat [tokens, hidden] rows, so that one compiled graph serves every
row length of a curriculum. Another architecture replaces a layer's parts (`gpt_oss`).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import PAD_ID
from .export import END_ID


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; the defaults make 8.4 MB in bf16."""

    layers: int = 4
    hidden: int = 192
    heads: int = 8
    kv_heads: int = 2
    head_size: int = 128
    mlp: int = 384
    vocabulary: int = 320
    rope_theta: float = 1000000.0
    max_length: int = 2560
    eps: float = 1e-5

    @property
    def rope_scale(self) -> float:
        """What RoPE multiplies queries and keys by, besides turning them."""
        return 1.0

    def rope_rates(self) -> Tensor:
        """[head_size / 2]: radians a position by which each pair of a head turns."""
        return self.rope_theta ** -(torch.arange(0, self.head_size, 2, dtype=torch.float32) / self.head_size)


KVChange = Callable[[Tensor], Tensor]
"""What a cache does to K (after RoPE) or V, both [batch, kv_heads, length, head_size]."""


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of [tokens, heads, D]; cos and sin are [tokens, 1, D], the halves of D rotate together."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


class Attention(nn.Module):
    def __init__(self, s: Shape, bias: bool = False):
        super().__init__()
        self.s = s
        self.q_proj = nn.Linear(s.hidden, s.heads * s.head_size, bias=bias)
        self.k_proj = nn.Linear(s.hidden, s.kv_heads * s.head_size, bias=bias)
        self.v_proj = nn.Linear(s.hidden, s.kv_heads * s.head_size, bias=bias)
        self.o_proj = nn.Linear(s.heads * s.head_size, s.hidden, bias=bias)


class MLP(nn.Module):
    def __init__(self, s: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(s.hidden, s.mlp, bias=False)
        self.up_proj = nn.Linear(s.hidden, s.mlp, bias=False)
        self.down_proj = nn.Linear(s.mlp, s.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def output_weight(self) -> Tensor:
        """The matrix whose product goes to the residual stream."""
        return self.down_proj.weight


class Layer(nn.Module):
    mlp: Any

    def __init__(self, s: Shape):
        super().__init__()
        self.input_layernorm = RMSNorm(s.hidden, s.eps)
        self.self_attn = Attention(s)
        self.post_attention_layernorm = RMSNorm(s.hidden, s.eps)
        self.mlp = MLP(s)

    def before(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[tokens, hidden] -> q [tokens, heads, D], k and v [tokens, kv_heads, D], q and k rotated."""
        a, size = self.self_attn, self.self_attn.s.head_size
        h = self.input_layernorm(x)
        q, k, v = (w(h).unflatten(-1, (-1, size)) for w in (a.q_proj, a.k_proj, a.v_proj))
        return rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention: q [batch, heads, length, D], k and v [batch, kv_heads, length, D] -> as q."""
        # Repeated K and V rather than enable_gqa: every SDPA backend takes them.
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def after(self, x: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP: x [tokens, hidden], attended [tokens, heads * D]."""
        x = x + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, s: Shape, make_layer: Callable[[int], Layer]):
        super().__init__()
        self.embed_tokens = nn.Embedding(s.vocabulary, s.hidden)
        self.layers = nn.ModuleList(make_layer(i) for i in range(s.layers))
        self.norm = RMSNorm(s.hidden, s.eps)

    def decoder_layers(self) -> Iterator[Layer]:
        """The layers with their type, which a ModuleList does not keep."""
        return (cast(Layer, layer) for layer in self.layers)


class Llama(nn.Module):
    """Causal language model with tied embeddings; parameters carry transformers' names."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.model = Decoder(shape, self.make_layer)
        angles = torch.outer(torch.arange(shape.max_length), shape.rope_rates()).repeat(1, 2)
        self.register_buffer("cos", angles.cos() * shape.rope_scale, persistent=False)
        self.register_buffer("sin", angles.sin() * shape.rope_scale, persistent=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                adds_to_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(p, std=(p.shape[1] * (2 * shape.layers if adds_to_residual else 1)) ** -0.5)

    def make_layer(self, index: int) -> Layer:
        return Layer(self.shape)

    def forward(
        self, ids: Tensor, change_k: KVChange | None = None, change_v: KVChange | None = None
    ) -> Tensor:
        """Token ids [batch, length] -> logits [batch * length, vocabulary].

        ``change_k`` and ``change_v`` stand for a lossy cache: attention reads what they return.
        """
        batch, length = ids.shape
        x = self.model.embed_tokens(ids.flatten())
        cos, sin = (t[:length].to(x.dtype).repeat(batch, 1)[:, None] for t in (self.cos, self.sin))
        for layer in self.model.decoder_layers():
            q, k, v = (
                t.view(batch, length, -1, t.shape[-1]).transpose(1, 2) for t in layer.before(x, cos, sin)
            )
            k = change_k(k) if change_k else k
            v = change_v(v) if change_v else v
            out = layer.attend(q, k, v)
            x = layer.after(x, out.transpose(1, 2).flatten(2).flatten(0, 1))
        return self.head(x)

    def output_embedding(self) -> Tensor:
        """[vocabulary, hidden]: the rows that the last hidden states are compared with."""
        return self.model.embed_tokens.weight

    def head(self, x: Tensor) -> Tensor:
        return F.linear(self.model.norm(x), self.output_embedding())

    def compile_parts(self) -> None:
        """Compiles all but attention. Shapes stay the same as long as batch * length does."""
        for layer in self.model.decoder_layers():
            layer.before = torch.compile(layer.before, dynamic=False)  # type: ignore[method-assign]
            layer.after = torch.compile(layer.after, dynamic=False)  # type: ignore[method-assign]

    def config(self) -> dict[str, object]:
        """Hugging Face configuration of the model."""
        s = self.shape
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": s.hidden,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.kv_heads,
            "head_dim": s.head_size,
            "intermediate_size": s.mlp,
            "vocab_size": s.vocabulary,
            "max_position_embeddings": s.max_length,
            "rms_norm_eps": s.eps,
            "rope_theta": s.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": s.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": True,
            "bos_token_id": END_ID,
            "eos_token_id": END_ID,
            "pad_token_id": PAD_ID,
            "dtype": "bfloat16",
        }

    def variants(self) -> dict[str, "Llama"]:
        """Copies without something that this architecture has, by what they lack."""
        return {}
