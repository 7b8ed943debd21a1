"""The torch ops that stand in for vLLM's CPU kernels, against their definitions."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from vllm_xlayer.platform.kernels import define_missing_ops


@pytest.fixture(scope="module")
def ops():
    define_missing_ops()
    assert define_missing_ops() == []  # again: nothing is left to define
    return torch.ops._C


def test_greedy_takes_the_first_of_the_largest(ops):
    logits = torch.tensor([[0.0, 3.0, 3.0], [-1.0, -2.0, -3.0], [-torch.inf, -torch.inf, 0.0]])
    assert ops.greedy_argmax(logits).tolist() == [1, 0, 2]


def test_sampling_follows_the_softmax(ops):
    """20,000 draws: each frequency within five standard deviations."""
    logits = torch.tensor([1.0, 0.0, -1.0, -torch.inf])
    n = 20_000
    drawn = ops.fused_gumbel_argmax(logits.expand(n, 4).contiguous(), torch.arange(n))
    frequencies = drawn.bincount(minlength=4) / n
    expected = logits.softmax(-1)
    assert frequencies[3] == 0
    assert ((frequencies - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()


def test_a_seed_decides_its_row_alone(ops):
    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    seeds = torch.tensor([5, 1, 5, 9, 2, 3])
    together = ops.fused_gumbel_argmax(logits, seeds)
    alone = [ops.fused_gumbel_argmax(logits[i : i + 1], seeds[i : i + 1]).item() for i in range(6)]
    assert together.tolist() == alone
    other = ops.fused_gumbel_argmax(logits, seeds + 100)
    assert not torch.equal(together, other)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_linear(ops, dtype, with_bias):
    x, weight = torch.randn(5, 32).to(dtype), torch.randn(8, 32).to(dtype)
    bias = torch.randn(8) if with_bias else None  # vLLM makes it float32
    packed, out = ops.convert_weight_packed(weight), torch.full((5, 8), torch.nan, dtype=dtype)
    ops.weight_packed_linear(out, x, packed, bias, True)
    expected = functional.linear(x, weight, None if bias is None else bias.to(dtype))
    assert torch.equal(out, expected)


def _gate(activation: str, y: torch.Tensor) -> torch.Tensor:
    if activation == "swigluoai":  # as transformers has it for GPT-OSS
        gate, up = y[0::2].clamp(max=7.0), y[1::2].clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(gate * 1.702)
    gate, up = y[: len(y) // 2], y[len(y) // 2 :]
    approximate = {"gelu": "none", "gelu_tanh": "tanh"}
    f = (
        functional.silu(gate)
        if activation == "silu"
        else functional.gelu(gate, approximate=approximate[activation])
    )
    return f * up


@pytest.mark.parametrize("skip_weighted", [False, True])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "swigluoai"])
def test_experts_token_by_token(ops, activation, with_bias, skip_weighted):
    torch.manual_seed(0)
    tokens, experts, hidden, inner, k = 7, 4, 16, 8, 2
    x = torch.randn(tokens, hidden)
    w13, w2 = 4 * torch.randn(experts, 2 * inner, hidden), torch.randn(experts, hidden, inner)
    b13, b2 = (torch.randn(experts, n) if with_bias else None for n in (2 * inner, hidden))
    weights = torch.rand(tokens, k)
    chosen = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)]).int()
    chosen[3, 1] = -1  # another rank's
    expected = torch.zeros(tokens, hidden, dtype=torch.float64)
    for t in range(tokens):
        for j in range(k):
            if (e := int(chosen[t, j])) < 0:
                continue
            y = w13[e].double() @ x[t].double() + (0 if b13 is None else b13[e].double())
            y = w2[e].double() @ _gate(activation, y) + (0 if b2 is None else b2[e].double())
            expected[t] += y if skip_weighted else y * weights[t, j].double()
    packed = [torch.empty_like(w) for w in (w13, w2)]
    for weight, out in zip((w13, w2), packed, strict=True):
        ops.prepack_moe_weight(weight, out, "vec")
    out = torch.full_like(x, torch.nan)
    ops.cpu_fused_moe(out, x, *packed, b13, b2, weights, chosen, skip_weighted, activation, "vec")
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-4)


def test_an_object_that_asks_for_a_driver_when_it_is_looked_at(monkeypatch):
    """As that of a library of vLLM 0.31's; what it is asked for by name still reaches the driver."""
    from vllm_xlayer.platform.reference import _let_humming_be_looked_at

    class DeviceInfo:
        __slots__ = ()

        def __getattr__(self, name):
            raise ImportError("libcuda.so.1")

    module = SimpleNamespace(DeviceInfo=DeviceInfo, current_device=DeviceInfo())
    monkeypatch.setitem(sys.modules, "humming.device", module)
    with pytest.raises(ImportError):
        hasattr(module.current_device, "__dict__")
    _let_humming_be_looked_at()
    assert not hasattr(module.current_device, "__dict__")
    with pytest.raises(ImportError, match="libcuda"):
        module.current_device.sm_count  # noqa: B018
