"""Layers whose weights vLLM packs for its CPU kernels, which its CUDA wheel lacks, in plain torch.

Packing does nothing here, and the layers read their weights as they are.
"""

from collections.abc import Callable

import torch
from torch.nn import functional


def _swiglu_oai(x: torch.Tensor) -> torch.Tensor:
    """GPT-OSS's: gates and ups take turns in x [..., 2d], and both are clamped."""
    gate, up = x[..., ::2].clamp(max=7.0), x[..., 1::2].clamp(-7.0, 7.0)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def _gated(function: Callable[..., torch.Tensor], **settings) -> Callable[[torch.Tensor], torch.Tensor]:
    """f(gate) * up of x [..., 2d], whose first half is the gate."""

    def activation(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return function(gate, **settings) * up

    return activation


_ACTIVATIONS = {
    "silu": _gated(functional.silu),
    "gelu": _gated(functional.gelu),
    "gelu_tanh": _gated(functional.gelu, approximate="tanh"),
    "swigluoai": _swiglu_oai,
}
"""vLLM's names of activations: [..., 2d] -> [..., d]."""


def pack_linear(weight: torch.Tensor) -> torch.Tensor:
    """A copy of weight [N, K] as `linear` takes it. vLLM packs small 16-bit layers on CPUs with AMX."""
    return weight.clone()


def linear(
    out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, is_packed: bool
) -> None:
    """Write x [T, K] times weight [N, K], plus bias [N] of any float type, to out [T, N]."""
    out.copy_(functional.linear(x, weight, None if bias is None else bias.to(x.dtype)))


def pack_experts(weight: torch.Tensor, out: torch.Tensor, isa: str) -> None:
    """Copies weight to out, of the same shape. ``isa``: the instructions that vLLM's kernels would use."""
    out.copy_(weight)


def fused_experts(
    out: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_bias: torch.Tensor | None,
    w2_bias: torch.Tensor | None,
    weights: torch.Tensor,
    experts: torch.Tensor,
    skip_weighted: bool,
    activation: str,
    isa: str,
) -> None:
    """Write to out [T, K] the weighted sum of each token's experts, computed in float32.

    Args:
        x: [T, K].
        w13, w2: [E, 2I, K] and [E, K, I].
        w13_bias, w2_bias: [E, 2I] and [E, K], or None.
        weights, experts: [T, k], of each token's experts; an expert below 0 is another rank's.
        skip_weighted: the weights are in x already.
    """
    total = torch.zeros(x.shape, dtype=torch.float32)
    for expert in experts.unique().tolist():
        if expert < 0:
            continue
        tokens, place = torch.nonzero(experts == expert, as_tuple=True)
        y = functional.linear(x[tokens].float(), w13[expert].float(), _float(w13_bias, expert))
        y = functional.linear(_ACTIVATIONS[activation](y), w2[expert].float(), _float(w2_bias, expert))
        total.index_add_(0, tokens, y if skip_weighted else y * weights[tokens, place, None].float())
    out.copy_(total)


def _float(bias: torch.Tensor | None, expert: int) -> torch.Tensor | None:
    return None if bias is None else bias[expert].float()


OPS: dict[str, Callable[..., torch.Tensor | None]] = {
    "convert_weight_packed(Tensor weight) -> Tensor": pack_linear,
    "weight_packed_linear(Tensor(a!) out, Tensor x, Tensor weight, Tensor? bias, "
    "bool is_packed) -> ()": linear,
    "prepack_moe_weight(Tensor weight, Tensor(a!) out, str isa) -> ()": pack_experts,
    "cpu_fused_moe(Tensor(a!) out, Tensor x, Tensor w13, Tensor w2, Tensor? w13_bias, Tensor? w2_bias, "
    "Tensor weights, Tensor experts, bool skip_weighted, str activation, str isa) -> ()": fused_experts,
}
"""Schemas, with the arguments in vLLM's order."""
