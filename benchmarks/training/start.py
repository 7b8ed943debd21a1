"""Where training starts from: random weights with a rough induction circuit in the first two layers."""

import torch
from torch import Tensor

from .llama import Llama

SHARP = 0.9
"""Size of the constant parts of q and k in `start_as_induction`: the right distance scores about 50, its
neighbours 8 less. A 4-bit cache moves these by about 1.5."""
MATCH = 1.5
"""Square of the norm of a byte's code in `start_as_induction`."""
SCALE, WIDTH = 128**-0.5, 192 / 128
"""What both are for: what scores are multiplied by, and the hidden size as a multiple of the head size."""
FAST, APART = 8, 3
"""Pairs of RoPE that tell neighbours apart, and slow pairs for each byte that is compared."""
STILL = 0.5
"""A pair that turns by less than so many radians in the longest row is *slow*."""


@torch.no_grad()
def start_as_induction(model: Llama) -> None:
    """Lets training start from a rough induction circuit, so that minutes are enough to sharpen it.

    All three tasks ask for what followed the same few bytes earlier. Trained models do that with two
    layers, and finding the two together is the long plateau of a run from random weights:

    * head h of layer 0 looks h + 1 bytes back (RoPE scores the distance: q and k have a constant part,
      in the fast pairs, turned against each other by h + 1 positions) and copies what it sees, by M_h;
      only as many heads do as there are slow pairs to compare their bytes in;
    * layer 1 compares, in the slow pairs of RoPE, the bytes at i, i-1, .. with those at j-1, j-2, ..
      (q reads e, M_0, M_1, ..; k reads M_0, M_1, ..) and copies the byte at j to the output.

    All else starts at random, smaller than usual. Coordinate 0 of every embedding is the constant.
    """
    s, layers = model.shape, list(model.model.decoder_layers())
    first, second = layers[0].self_attn, layers[1].self_attn
    half, fast, rates = s.head_size // 2, FAST, s.rope_rates()
    slow = int((rates * s.max_length < STILL).sum())
    looking = min(slow // APART, s.heads)
    # Scores of other heads are multiplied by something else: q and k make up for it, half each.
    factor = (SCALE / (s.rope_scale**2 * s.head_size**-0.5)) ** 0.5
    # Of wider hidden states a head's value holds less.
    wide = (s.hidden / s.head_size / WIDTH) ** 0.5
    first.v_proj.weight.mul_(wide)
    model.model.embed_tokens.weight[:, 0] = 1.0
    model.output_embedding().copy_(model.model.embed_tokens.weight)
    for layer in layers:
        layer.mlp.output_weight().mul_(0.2)
        layer.self_attn.o_proj.weight.mul_(0.2)

    def heads(w: Tensor) -> Tensor:
        return w.view(-1, s.head_size, s.hidden)

    for w in (first.q_proj.weight, first.k_proj.weight):
        w.mul_(0.1)
        w[:, 0] = 0.0
    rate, sharp = rates[:fast], SHARP * factor
    heads(first.k_proj.weight)[:, :fast, 0] = sharp
    copies = [torch.eye(s.hidden)]
    for head in range(looking):
        q = heads(first.q_proj.weight)[head]
        q[:fast, 0] = sharp * (rate * (head + 1)).cos()
        q[half : half + fast, 0] = -sharp * (rate * (head + 1)).sin()
        value = heads(first.v_proj.weight)[head * s.kv_heads // s.heads]
        value[:, 0] = 0.0
        out = torch.nn.init.orthogonal_(torch.empty(s.hidden, s.head_size))
        first.o_proj.weight[:, head * s.head_size : (head + 1) * s.head_size] = 0.12 * out
        copies.append(out @ value)

    pairs = torch.cat((torch.arange(half - slow, half), torch.arange(s.head_size - slow, s.head_size)))
    for w in (second.q_proj.weight, second.k_proj.weight):
        w.mul_(0.1)
        w[:, 0] = 0.0
    share = s.heads // s.kv_heads
    for group in range(s.kv_heads):
        heads_of_group = range(group * share, (group + 1) * share)
        codes = torch.randn(looking, 2 * slow, s.hidden) * (MATCH / (2 * slow)) ** 0.5 * factor / wide
        codes[:, :, 0] = 0.0
        read = [c @ m.T for c, m in zip(codes, copies[1:], strict=True)]
        heads(second.k_proj.weight)[group, pairs] += torch.stack(read).sum(0)
        query = [c @ m.T for c, m in zip(codes, copies[:-1], strict=True)]
        for head in heads_of_group:
            heads(second.q_proj.weight)[head, pairs] += torch.stack(query).sum(0)
        value = torch.nn.init.orthogonal_(torch.empty(s.head_size, s.hidden))
        value[:, 0] = 0.0
        heads(second.v_proj.weight)[group] = value
        for head in heads_of_group:
            second.o_proj.weight[:, head * s.head_size : (head + 1) * s.head_size] = 0.2 * value.T
