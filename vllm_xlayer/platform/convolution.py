"""Causal convolutions of the linear attention layers: short convolution, gated delta net, Mamba.

Every channel is convolved by itself: out[t] = sum over i of weight[i] * x[t - width + 1 + i], plus bias. Of
a request's tokens the last width - 1 inputs are its state, [channels, width - 1] in a slot of the cache. With
speculation there is room for one input more for each draft. The cache may be strided in any way, and slots
that no request of the step owns are neither read nor written.
"""

from collections.abc import Callable

import torch
from torch.nn import functional

_ACTIVATIONS: dict[str | None, Callable[[torch.Tensor], torch.Tensor]] = {
    None: lambda x: x,
    "silu": functional.silu,
    "swish": functional.silu,
}


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """vLLM packs weights [channels, width] where the CPU has instructions for it; here they stay.

    With a dimension in the middle, as they are loaded: vLLM 0.31 packs those of short convolutions too, whose
    layer then looks for it.
    """
    return weight.clone().unsqueeze(1)


def _convolve(
    x: torch.Tensor,
    state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve x [n, channels, tokens] behind state [n, channels, width - 1], in float32.

    Returns the outputs, in x's type, and the new state, in the state's.
    """
    weight = weight.view(weight.shape[0], 1, -1)
    inputs = torch.cat((state.to(x.dtype), x), dim=-1)
    bias = None if bias is None else bias.float()
    out = functional.conv1d(inputs.float(), weight.float(), bias, groups=weight.shape[0])
    new_state = inputs[..., inputs.shape[-1] - state.shape[-1] :]
    return _ACTIVATIONS[activation](out).to(x.dtype), new_state.to(state.dtype)


def update(
    x: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None,
    conv_state_indices: torch.Tensor | None,
    query_start_loc: torch.Tensor | None,
    pad_slot_id: int,
) -> torch.Tensor:
    """One more token for each of n requests; their states move on.

    Args:
        x: [n, channels].
        conv_state: [slots, channels, width - 1 or more]: what is more is left alone.
        weight, bias: [channels, width], and [channels] or None.
        conv_state_indices: int [n] or [n, 1], each request's slot; those equal to pad_slot_id are padding,
            and their outputs are zero. None: request i has slot i.
        query_start_loc: of batches with several tokens a request, as speculation makes them: must be None.

    Returns:
        The outputs, like x.
    """
    if query_start_loc is not None:
        raise NotImplementedError("convolution: expected one token a request, got query_start_loc")
    n = x.shape[0]
    slots = torch.arange(n) if conv_state_indices is None else conv_state_indices.reshape(n).long()
    rows = torch.nonzero(slots != pad_slot_id).squeeze(1)
    slots = slots[rows]
    conv_state = conv_state[..., : weight.shape[-1] - 1]
    out, state = _convolve(x[rows].unsqueeze(-1), conv_state[slots], weight, bias, activation)
    conv_state[slots] = state
    return torch.zeros_like(x).index_copy_(0, rows, out.squeeze(-1))


def forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    conv_states: torch.Tensor,
    query_start_loc: torch.Tensor,
    cache_indices: torch.Tensor,
    has_initial_state: torch.Tensor,
    silu_activation: bool,
    pad_slot_id: int,
    is_weight_packed: bool,
) -> torch.Tensor:
    """Chunks of n prompts, one behind the other; their states move on.

    Args:
        x: [channels, tokens].
        weight, bias: [channels, width], and [channels] or None.
        conv_states: [slots, channels, width - 1 or more]: what is more is left alone.
        query_start_loc: int [n + 1], where each request's tokens start.
        cache_indices: int [n], each request's slot, or pad_slot_id.
        has_initial_state: bool [n]; a request without one starts from zeros, whatever its slot holds.

    Returns:
        The outputs, like x; zero for padding.
    """
    activation, out = "silu" if silu_activation else None, torch.zeros_like(x)
    conv_states, starts = conv_states[..., : weight.shape[-1] - 1], query_start_loc.tolist()
    for i, slot in enumerate(cache_indices.tolist()):
        tokens = slice(starts[i], starts[i + 1])
        if slot == pad_slot_id or tokens.start == tokens.stop:
            continue
        state = conv_states[slot] if has_initial_state[i] else torch.zeros_like(conv_states[slot])
        y, new_state = _convolve(x[None, :, tokens], state[None], weight, bias, activation)
        out[:, tokens], conv_states[slot] = y[0], new_state[0]
    return out


def update_packed(
    x: torch.Tensor,
    conv_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    silu_activation: bool,
    num_accepted_tokens: torch.Tensor | None,
    conv_state_indices: torch.Tensor | None,
    pad_slot_id: int,
    is_weight_packed: bool,
) -> torch.Tensor:
    """As `update`; with num_accepted_tokens, a token and its drafts for each of n requests.

    Args:
        x: then [n, tokens, channels].
        conv_states: then [slots, channels, width - 2 + tokens or more]. The state that is read begins at the
            last token that was accepted. Written is what follows its first input, and the tokens behind it.
        num_accepted_tokens: int [n], of the step before, at least 1.
    """
    activation = "silu" if silu_activation else None
    if num_accepted_tokens is None:
        return update(x, conv_states, weight, bias, activation, conv_state_indices, None, pad_slot_id)
    if conv_state_indices is None:
        raise NotImplementedError("convolution: expected slots of requests with drafts, got none")
    before, out = weight.shape[-1] - 1, torch.zeros_like(x)
    slots, accepted = conv_state_indices.flatten().tolist(), num_accepted_tokens.tolist()
    for i, slot in enumerate(slots):
        if slot == pad_slot_id:
            continue
        first, tokens = accepted[i] - 1, x[i].transpose(0, 1)
        state = conv_states[slot, :, first : first + before]
        inputs = torch.cat((state.to(x.dtype), tokens), dim=-1)[:, 1:]
        y, _ = _convolve(tokens[None], state[None], weight, bias, activation)
        out[i] = y[0].transpose(0, 1)
        conv_states[slot, :, : inputs.shape[-1]] = inputs.to(conv_states.dtype)
    return out


OPS: dict[str, Callable[..., torch.Tensor]] = {
    "causal_conv1d_update_cpu_vec(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, "
    "str? activation, Tensor? conv_state_indices, Tensor? query_start_loc, SymInt pad_slot_id) "
    "-> Tensor": update,
    "causal_conv1d_weight_pack(Tensor weight) -> Tensor": pack_weight,
    "causal_conv1d_fwd_cpu(Tensor x, Tensor weight, Tensor? bias, Tensor(a!) conv_states, "
    "Tensor query_start_loc, Tensor cache_indices, Tensor has_initial_state, bool silu_activation, "
    "SymInt pad_slot_id, bool is_weight_packed) -> Tensor": forward,
    "causal_conv1d_update_cpu(Tensor x, Tensor(a!) conv_states, Tensor weight, Tensor? bias, "
    "bool silu_activation, Tensor? num_accepted_tokens, Tensor? conv_state_indices, SymInt pad_slot_id, "
    "bool is_weight_packed) -> Tensor": update_packed,
}
"""Schemas, with the arguments in vLLM's order."""
