"""The torch ops of layers with states, against other forms of the same mathematics in float64.

Caches are views of rows, and what no request owns is NaN before and after.
"""

import pytest
import torch
from torch.nn import functional

from vllm_xlayer.platform.kernels import define_missing_ops

SLOTS, USED = 7, [5, 2, 3]
LENGTHS = [9, 1, 4]
STARTS = torch.tensor([0, 9, 10, 14])


@pytest.fixture(scope="module")
def ops():
    define_missing_ops()
    return torch.ops._C


def pool(shape, used) -> torch.Tensor:
    """A cache [SLOTS, *shape] of rows twice as long, NaN but for the states of the used slots."""
    size = torch.Size(shape).numel()
    rows = torch.full((SLOTS, 2 * size), torch.nan)
    cache = rows[:, size // 2 : size // 2 + size].view(SLOTS, *shape)
    for i, slot in enumerate(used):
        cache[slot] = torch.randn(shape, generator=torch.Generator().manual_seed(i))
    return cache


def check_unowned(cache: torch.Tensor, used) -> None:
    rest = [slot for slot in range(SLOTS) if slot not in used]
    assert cache[rest].isnan().all()
    assert cache[used].isfinite().all()


def whole_convolution(x, weight, bias):
    """x [channels, tokens] from its first token on, in float64."""
    x, width = functional.pad(x.double(), (weight.shape[1] - 1, 0)), weight.shape[1]
    out = sum(weight.double()[:, i, None] * x[:, i : x.shape[1] - width + 1 + i] for i in range(width))
    return out if bias is None else out + bias.double()[:, None]


@pytest.mark.parametrize(("width", "bias", "silu"), [(3, None, False), (4, torch.linspace(-1, 1, 6), True)])
def test_convolution_in_chunks_and_tokens(ops, width, bias, silu):
    """Three prompts in one chunk, in two, and in a chunk and single tokens: all as in one go."""
    weight = torch.randn(6, width)
    packed = ops.causal_conv1d_weight_pack(weight)
    prompts = [torch.randn(6, n) for n in (8, 5, 2)]
    expected = [whole_convolution(x, weight, bias) for x in prompts]
    expected = [functional.silu(y) if silu else y for y in expected]
    for first in (2, 1):
        cache, found = pool((6, width - 1), []), [[] for _ in prompts]
        parts = [(0, first), (first, 2)]
        for start, stop in parts:
            if start == stop:
                continue
            batch = torch.cat([x[:, start:stop] for x in prompts], dim=1)
            starts = torch.arange(4) * (stop - start)
            has_state = torch.full((3,), start > 0)
            y = ops.causal_conv1d_fwd_cpu(
                batch, packed, bias, cache, starts, torch.tensor(USED), has_state, silu, -1, True
            )
            for i, part in enumerate(y.split(stop - start, dim=1)):
                found[i].append(part)
        for t in range(2, 8):
            alive = [i for i, x in enumerate(prompts) if x.shape[1] > t]
            x = torch.stack([prompts[i][:, t] for i in alive])
            slots = torch.tensor([USED[i] for i in alive])
            if t % 2:
                y = ops.causal_conv1d_update_cpu(x, cache, packed, bias, silu, None, slots, -1, True)
            else:  # one request of padding beside them
                name = "silu" if silu else None
                x, slots = torch.cat((x, torch.ones(1, 6))), torch.cat((slots, torch.tensor([0])))
                y = ops.causal_conv1d_update_cpu_vec(x, cache, weight, bias, name, slots, None, 0)
            for i, part in zip(alive, y, strict=False):
                found[i].append(part[:, None])
        for y, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.cat(y, dim=1).double(), wanted, rtol=1e-5, atol=1e-5)
        check_unowned(cache, USED)


def test_gated_delta_rule(ops):
    """Chunks behind a state, and then one token more, as transformers has both at once."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    heads, key_heads, size, tokens = 4, 2, 8, sum(LENGTHS)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens + 3, h, size) for h in (key_heads, key_heads, heads))
    a, b = torch.randn(tokens + 3, heads), torch.randn(tokens + 3, heads)
    A_log, dt_bias = torch.randn(heads), torch.randn(heads)
    cache = pool((heads, size, size), USED)
    before = cache.clone()
    g, beta = ops.fused_gdn_gating_cpu(A_log, a[:tokens], b[:tokens], dt_bias)
    prefix = (x[:, :tokens] for x in (q, k, v))
    out, _ = ops.chunk_gated_delta_rule_cpu(
        *prefix, g, beta, cache, True, STARTS, False, True, torch.tensor(USED), 1e-6
    )
    one = (x[:, tokens:] for x in (q, k, v))
    last = ops.fused_sigmoid_gating_delta_rule_update_cpu(
        A_log,
        dt_bias,
        *one,
        a[tokens:],
        b[tokens:],
        cache,
        torch.tensor(USED),
        torch.arange(4),
        True,
        1.0,
        20.0,
    )
    assert last.shape == (3, 1, heads, size)
    check_unowned(cache, USED)
    for i, slot in enumerate(USED):
        places = [*range(STARTS[i], STARTS[i + 1]), tokens + i]
        expected, state = torch_recurrent_gated_delta_rule(
            q[:, places].repeat_interleave(2, dim=2),
            k[:, places].repeat_interleave(2, dim=2),
            v[:, places],
            g=(-A_log.exp() * functional.softplus(a[places] + dt_bias))[None],
            beta=b[places].sigmoid()[None],
            initial_state=before[slot][None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        found = torch.cat((out[0, STARTS[i] : STARTS[i + 1]], last[i]))
        torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(cache[slot], state[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_mamba2(ops, gated):
    """Chunks behind a state, and then one token more, as a sum over all earlier tokens gives them."""
    heads, groups, channels, size, tokens = 4, 2, 3, 5, sum(LENGTHS)
    torch.manual_seed(0)
    x, z = torch.randn(tokens + 3, heads, channels), torch.randn(tokens + 3, heads, channels)
    B, C = torch.randn(tokens + 3, groups, size), torch.randn(tokens + 3, groups, size)
    dt, dt_bias = torch.randn(tokens + 3, heads), torch.randn(heads)
    A, D = -torch.rand(heads), torch.randn(heads)
    cache = pool((heads, channels, size), USED)
    before, states = cache.clone(), cache[USED]
    steps = functional.softplus(dt + dt_bias)
    out = torch.full((tokens, heads, channels), torch.nan)
    gate = z if gated else None
    prefix = (m[:tokens] for m in (B, C))
    ops.mamba_chunk_scan_fwd_cpu(
        out,
        states,
        x[:tokens],
        steps[:tokens],
        A,
        *prefix,
        D,
        None if gate is None else gate[:tokens],
        STARTS,
    )
    cache[USED] = states
    last = torch.full((4, heads, channels), torch.nan)
    spread = (heads, channels)
    ops.selective_state_update_cpu(
        cache,
        torch.cat((x[tokens:], torch.ones(1, *spread))),
        torch.cat((dt[tokens:], torch.ones(1, heads)))[..., None].expand(4, *spread),
        A[:, None, None].expand(*spread, size),
        torch.cat((B[tokens:], torch.ones(1, groups, size))),
        torch.cat((C[tokens:], torch.ones(1, groups, size))),
        D[:, None].expand(spread),
        torch.cat((z[tokens:], torch.ones(1, *spread))) if gated else None,
        dt_bias[:, None].expand(spread),
        True,
        slots := torch.tensor([*USED, 0]),
        slots,
        0,
        last,
        None,
        None,
    )
    check_unowned(cache, USED)
    for i, slot in enumerate(USED):
        places = [*range(STARTS[i], STARTS[i + 1]), tokens + i]
        found = torch.cat((out[STARTS[i] : STARTS[i + 1]], last[i : i + 1]))
        for h in range(heads):
            inputs, b, c = x[places, h].double(), B[places, h // 2].double(), C[places, h // 2].double()
            step = steps[places, h].double()
            logs = (step * A[h].double()).cumsum(0)
            decay = (logs[:, None] - logs[None, :]).exp().tril()
            expected = (c @ b.T * decay * step) @ inputs + D[h].double() * inputs
            expected = expected + logs.exp()[:, None] * (c @ before[slot, h].double().T)
            if gated:
                expected = expected * functional.silu(z[places, h].double())
            torch.testing.assert_close(found[:, h].double(), expected, rtol=1e-4, atol=1e-4)
