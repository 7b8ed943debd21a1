"""Mamba 2's state space, a token at a time, in float32.

A head's state is a matrix S [P, N], P its channels. A token with input x [P], step dt, and B, C [N] of its
group makes of it

    S = exp(dt * A) * S + dt * x B^T
    y = S C + D * x

times silu(z) where the layer has a gate z. Head h goes with group h // (heads / groups). The cache may be
strided in any way, and slots that no request of the step owns are neither read nor written.
"""

from collections.abc import Callable

import torch
from torch.nn import functional


def _token(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token of n requests: state [n, H, P, N], x and z [n, H, P], dt [n, H], A, D [H], B, C [n, G, N].

    Returns the outputs [n, H, P] and the new states.
    """
    B, C = (m.repeat_interleave(x.shape[1] // m.shape[1], dim=1) for m in (B, C))
    state = state * (dt * A)[..., None, None].exp() + (dt[..., None] * x)[..., None] * B[:, :, None]
    y = torch.einsum("nhps,nhs->nhp", state, C)
    if D is not None:
        y = y + D[:, None] * x
    return y if z is None else y * functional.silu(z), state


def _a_head(x: torch.Tensor | None) -> torch.Tensor | None:
    """float32 [H] of a parameter that vLLM has spread over the channels: [H, P] or [H, P, N]."""
    return None if x is None else x.float().flatten(1)[:, 0] if x.dim() > 1 else x.float()


def _float(x: torch.Tensor | None, first: slice) -> torch.Tensor | None:
    return None if x is None else x[first].float()


def scan(
    out: torch.Tensor,
    final_states: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
) -> None:
    """Chunks of n prompts, one behind the other.

    Args:
        out: [tokens, heads, P], written.
        final_states: float32 [n, heads, P, N]: what each request starts with, replaced by what it ends with.
        x, z: [tokens, heads, P]; z may be None.
        dt: float32 [tokens, heads], bias and softplus applied.
        A, D: [heads]; D may be None.
        B, C: [tokens, groups, N].
        cu_seqlens: int [n + 1], where each request's tokens start.
    """
    starts, A, D = cu_seqlens.tolist(), A.float(), _a_head(D)
    for i in range(len(starts) - 1):
        state = final_states[i : i + 1]
        for t in range(starts[i], starts[i + 1]):
            one = slice(t, t + 1)
            y, state = _token(
                state, x[one].float(), dt[one], A, B[one].float(), C[one].float(), D, _float(z, one)
            )
            out[t] = y[0]
        final_states[i] = state[0]


def update(
    state: torch.Tensor,
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None,
    z: torch.Tensor | None,
    dt_bias: torch.Tensor | None,
    dt_softplus: bool,
    state_batch_indices: torch.Tensor | None,
    dst_state_batch_indices: torch.Tensor | None,
    null_block_id: int,
    out: torch.Tensor,
    num_accepted_tokens: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
) -> None:
    """One more token for each of n requests; their states move on in place.

    Args:
        state: [slots, heads, P, N], written.
        x, dt, z, out: [n, heads, P]; dt is the same in all of a head, z may be None; out is written.
        A: [heads, P, N], the same for all of a head; D, dt_bias: [heads, P], likewise, or None.
        B, C: [n, groups, N].
        state_batch_indices, dst_state_batch_indices: int [n] or [n, 1], the slots read and written; requests
            that write to null_block_id are padding. None: request i has slot i.
        num_accepted_tokens, cu_seqlens: of speculation, must be None.
    """
    if num_accepted_tokens is not None or cu_seqlens is not None:
        raise NotImplementedError(
            "Mamba 2: expected one token a request, got num_accepted_tokens or cu_seqlens"
        )
    n = x.shape[0]
    source = torch.arange(n) if state_batch_indices is None else state_batch_indices.reshape(n).long()
    target = source if dst_state_batch_indices is None else dst_state_batch_indices.reshape(n).long()
    rows = torch.nonzero(target != null_block_id).squeeze(1)
    step = dt[rows, :, 0].float()
    bias, decay = _a_head(dt_bias), _a_head(A)
    assert decay is not None
    if bias is not None:
        step = step + bias
    if dt_softplus:
        step = functional.softplus(step)
    gate = None if z is None else z[rows].float()
    states = state[source[rows]].float()
    y, states = _token(
        states, x[rows].float(), step, decay, B[rows].float(), C[rows].float(), _a_head(D), gate
    )
    state[target[rows]] = states.to(state.dtype)
    out[rows] = y.to(out.dtype)


OPS: dict[str, Callable[..., None]] = {
    "mamba_chunk_scan_fwd_cpu(Tensor(a!) out, Tensor(b!) final_states, Tensor x, Tensor dt, Tensor A, "
    "Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor cu_seqlens) -> ()": scan,
    "selective_state_update_cpu(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, Tensor? state_batch_indices, "
    "Tensor? dst_state_batch_indices, SymInt null_block_id, Tensor(b!) out, Tensor? num_accepted_tokens, "
    "Tensor? cu_seqlens) -> ()": update,
}
"""Schemas, with the arguments in vLLM's order."""
