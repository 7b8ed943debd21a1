"""The gated delta rule of Qwen3-Next and its successors, a token at a time, in float32.

A head's state is a matrix S [K, V] that maps keys to values. A token with query q, key k, value v, decay g
and strength beta makes of it

    S = exp(g) * S
    S = S + k (beta * (v - S^T k))^T
    o = S^T q / sqrt(K)

Value head h goes with query and key head h // (value heads / key heads). The cache may be strided in any way,
and slots that no request of the step owns are neither read nor written.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

EPSILON = 1e-5
"""Added to squared norms. vLLM names it for chunks of prompts, and not for single tokens."""


def gates(
    A_log: torch.Tensor, a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decays g and the strengths beta, float32 [1, tokens, value heads] each.

    Args:
        A_log, dt_bias: [value heads], of the layer.
        a, b: [tokens, value heads], of the tokens.
    """
    g = -A_log.float().exp() * functional.softplus(a.float() + dt_bias.float())
    return g.unsqueeze(0), b.float().sigmoid().unsqueeze(0)


def _heads(x: torch.Tensor, num_heads: int, normalise: bool, eps: float) -> torch.Tensor:
    """Queries or keys [tokens, key heads, K] for each value head, in float32 and of norm 1 if asked for."""
    x = x.float()
    if normalise:
        x = x * (x.square().sum(-1, keepdim=True) + eps).rsqrt()
    return x.repeat_interleave(num_heads // x.shape[1], dim=1)


def _token(
    state: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of n requests: state [n, H, K, V], q and k [n, H, K], v [n, H, V], g and beta [n, H].

    Returns the outputs [n, H, V] and the new states.
    """
    state = state * g.exp()[..., None, None]
    error = v - torch.einsum("nhkv,nhk->nhv", state, k)
    state = state + k.unsqueeze(-1) * (beta.unsqueeze(-1) * error).unsqueeze(-2)
    return torch.einsum("nhkv,nhk->nhv", state, q) * q.shape[-1] ** -0.5, state


def chunks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    output_final_state: bool,
    cu_seqlens: torch.Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
    initial_state_indices: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks of n prompts, one behind the other; their states move on in place.

    Args:
        query, key: [1, tokens, key heads, K].
        value: [1, tokens, value heads, V].
        g, beta: [1, tokens, value heads].
        initial_state: [slots, value heads, K, V], written.
        cu_seqlens: int [n + 1], where each request's tokens start.
        initial_state_indices: int [n], each request's slot.

    Returns:
        The outputs, like value, and the states [n, value heads, K, V].
    """
    if head_first:
        raise NotImplementedError("gated delta rule: expected tokens before heads, got head_first")
    out, num_heads, starts = torch.empty_like(value), value.shape[2], cu_seqlens.tolist()
    q = _heads(query[0], num_heads, use_qk_l2norm_in_kernel, eps)
    k = _heads(key[0], num_heads, use_qk_l2norm_in_kernel, eps)
    v, g, beta = value[0].float(), g[0].float(), beta[0].float()
    for i, slot in enumerate(initial_state_indices.tolist()):
        state = initial_state[slot].float().unsqueeze(0)
        for t in range(starts[i], starts[i + 1]):
            one = slice(t, t + 1)
            out[0, one], state = _token(state, q[one], k[one], v[one], g[one], beta[one])
        initial_state[slot] = state[0]
    return out, initial_state[initial_state_indices.long()]


def update(
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    cu_seqlens: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    softplus_beta: float,
    softplus_threshold: float,
) -> torch.Tensor:
    """One more token for each of n requests; their states move on in place.

    Args:
        A_log, dt_bias: [value heads], of the layer.
        q, k: [1, n, key heads, K].
        v: [1, n, value heads, V].
        a, b: [n, value heads], see `gates`.
        initial_state_source: [slots, value heads, K, V], written.
        initial_state_indices: int [n], each request's slot.
        cu_seqlens: 0, 1 ... n.

    Returns:
        The outputs [n, 1, value heads, V].
    """
    num_heads, slots = v.shape[2], initial_state_indices.long()
    g, beta = gates(A_log, a, b, dt_bias)
    queries, keys = (_heads(x[0], num_heads, use_qk_l2norm_in_kernel, EPSILON) for x in (q, k))
    states = initial_state_source[slots].float()
    out, states = _token(states, queries, keys, v[0].float(), g[0], beta[0])
    initial_state_source[slots] = states.to(initial_state_source.dtype)
    return out.to(v.dtype).unsqueeze(1)


def update_drafted(
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    spec_state_indices: torch.Tensor,
    num_accepted_tokens: torch.Tensor,
    cu_seqlens: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    softplus_beta: float,
    softplus_threshold: float,
) -> torch.Tensor:
    """A token and its drafts for each of n requests; each token's state is kept in a slot of its own.

    Args: as `update`'s, of all requests' tokens one behind the other, and
        spec_state_indices: int [n, 1 + drafts], a request's slots. Read is the one of the last token that was
            accepted; slot t is written with the state after token t.
        num_accepted_tokens: int [n], of the step before, at least 1.
        cu_seqlens: int [n + 1], where each request's tokens start.

    Returns:
        The outputs [tokens, value heads, V].
    """
    num_heads, out = v.shape[-2], torch.empty_like(v)
    g, beta = (x[0] for x in gates(A_log, a, b, dt_bias))
    queries, keys = (_heads(x, num_heads, use_qk_l2norm_in_kernel, EPSILON) for x in (q, k))
    starts, accepted = cu_seqlens.tolist(), num_accepted_tokens.tolist()
    for i, slots in enumerate(spec_state_indices.tolist()):
        state = initial_state_source[slots[accepted[i] - 1]].float().unsqueeze(0)
        for t in range(starts[i], starts[i + 1]):
            one = slice(t, t + 1)
            out[one], state = _token(state, queries[one], keys[one], v[one].float(), g[one], beta[one])
            initial_state_source[slots[t - starts[i]]] = state[0].to(initial_state_source.dtype)
    return out


OPS: dict[str, Callable[..., Any]] = {
    "fused_gdn_gating_cpu(Tensor A_log, Tensor a, Tensor b, Tensor dt_bias) -> (Tensor, Tensor)": gates,
    "chunk_gated_delta_rule_cpu(Tensor query, Tensor key, Tensor value, Tensor g, Tensor beta, "
    "Tensor(a!) initial_state, bool output_final_state, Tensor cu_seqlens, bool head_first, "
    "bool use_qk_l2norm_in_kernel, Tensor initial_state_indices, float eps) -> (Tensor, Tensor)": chunks,
    "fused_sigmoid_gating_delta_rule_update_cpu(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, Tensor v, "
    "Tensor a, Tensor b, Tensor(a!) initial_state_source, Tensor initial_state_indices, Tensor cu_seqlens, "
    "bool use_qk_l2norm_in_kernel, float softplus_beta, float softplus_threshold) -> Tensor": update,
    "fused_sigmoid_gating_delta_rule_update_spec_cpu(Tensor A_log, Tensor dt_bias, Tensor q, Tensor k, "
    "Tensor v, Tensor a, Tensor b, Tensor(a!) initial_state_source, Tensor spec_state_indices, "
    "Tensor num_accepted_tokens, Tensor cu_seqlens, bool use_qk_l2norm_in_kernel, float softplus_beta, "
    "float softplus_threshold) -> Tensor": update_drafted,
}
"""Schemas, with the arguments in vLLM's order."""
