"""The CUDA backend's bookkeeping (pieces, workspace, merge) against float64 attention, on CPU tensors.

FlashAttention is replaced by plain torch attention of one piece; everything around it is what runs
on a GPU. tests/gpu runs the same cases with the real kernels.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from backend_cases import CASES, Case, check_case, make_impl

from vllm_xlayer import ops
from vllm_xlayer.attention.plan import Waves
from vllm_xlayer.attention.prefix import Limits

pytest.importorskip("vllm")

pytestmark = pytest.mark.usefixtures("pages_alone")


def torch_attend(impl):
    """What FlashAttention does, in torch: bottom-right aligned causal mask, window, soft cap, LSE."""

    def attend(piece, q, k, v, out):
        outs, lses = [], []
        group = q.shape[1] // k.shape[1]
        for i in range(len(piece.cu_q) - 1):
            qi = q[piece.cu_q[i] : piece.cu_q[i + 1]].double()
            ki, vi = (
                t[piece.cu_k[i] : piece.cu_k[i + 1]].double().repeat_interleave(group, 1) for t in (k, v)
            )
            scores = torch.einsum("qhd,khd->hqk", qi, ki) * impl.scale
            if impl.soft_cap:
                scores = impl.soft_cap * torch.tanh(scores / impl.soft_cap)
            at = torch.arange(len(qi))[:, None] + len(ki) - len(qi)
            keys = torch.arange(len(ki))[None]
            hidden = keys > at if piece.piece.causal else torch.zeros(len(qi), len(ki), dtype=torch.bool)
            if impl.window is not None:
                hidden |= keys <= at - impl.window
            scores = scores.masked_fill(hidden, -math.inf)
            lses.append(scores.logsumexp(-1))
            outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), vi).to(q.dtype))
        if out is None:
            out = torch.empty_like(q)
        out.copy_(torch.cat(outs))
        return out, torch.cat(lses, 1).float()

    return attend


def torch_merge(first, first_lse, second, second_lse):
    lse = torch.logaddexp(first_lse, second_lse)
    a, b = ((x - lse).exp().T[..., None] for x in (first_lse, second_lse))
    return (first * a + second * b).to(first.dtype), lse


def cpu_impl(case: Case):
    from vllm_xlayer.attention.impl import NVFP4Impl

    class OnCpu(NVFP4Impl):
        def _kernels(self):
            return torch_attend(self), torch_merge

        def _waves(self, query_lens):
            return Waves(query_lens, 16)  # a thread block a token, so that pieces are cut back

        def _workspace(self, dtype, tokens):
            # NaN: what a piece does not fill must not be read.
            shape = (2, tokens, self.num_kv_heads, self.head_size)
            return torch.full(shape, math.nan, dtype=dtype).unbind()

        def _workspace_tokens(self, config, workspace_bytes):
            return case.capacity

    return make_impl(OnCpu, case, torch.device("cpu"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case):
    check_case(case, cpu_impl(case), torch.device("cpu"), exact_softmax=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_pages_as_they_are(monkeypatch, case):
    """The same batches, where all that can attend to pages without a copy does."""
    monkeypatch.setattr("vllm_xlayer.attention.impl.LIMITS", Limits(least_tokens=16))
    check_case(case, cpu_impl(case), torch.device("cpu"), exact_softmax=True)


@pytest.mark.parametrize(
    ("case", "lens"),
    [
        (Case(((0, 5), (0, 40))), None),
        (Case(((90, 9), (20, 1), (15, 3))), [80, 16, 0]),
        (Case(((90, 9), (20, 1)), window=30), None),
        (Case(((90, 9), (20, 1)), soft_cap=20.0), None),
        (Case(((300, 1), (0, 30), (300, 40)), capacity=64), [288, 0, 288]),
        (Case(((100, 20), (33, 5)), shares_kv=True), [96, 32]),
        (Case(((300, 5), (100, 600))), [288, 0]),  # too many query tokens for each thread block to dequantise
    ],
    ids=str,
)
def test_which_tokens_are_read_as_they_are(monkeypatch, case, lens):
    monkeypatch.setattr("vllm_xlayer.attention.impl.LIMITS", Limits(least_tokens=16))
    impl, given, gathered = cpu_impl(case), [], []
    impl_ops = SimpleNamespace(**{name: getattr(ops, name) for name in ops.__all__})
    impl_ops.nvfp4_prefix_attention = lambda *args, **how: (
        given.append(args[3].tolist()), ops.nvfp4_prefix_attention(*args, **how)
    )  # fmt: skip
    impl_ops.gather_nvfp4 = lambda *args: (gathered.append(args), ops.gather_nvfp4(*args))
    monkeypatch.setattr("vllm_xlayer.attention.impl.ops", impl_ops)
    check_case(case, impl, torch.device("cpu"), exact_softmax=True)
    assert given == ([] if lens is None else [lens])
    if lens is not None:  # and only the others are dequantised
        keys = sum(context + new - n for (context, new), n in zip(case.requests, lens, strict=True))
        assert sum(len(args[6]) for args in gathered) <= keys


@pytest.mark.parametrize(
    ("case", "launches"),
    [
        (Case(((0, 5), (0, 0), (0, 40))), 0),
        (Case(((0, 40), (0, 30)), capacity=64), 0),
        (Case(((90, 9), (20, 1)), window=1), 0),  # a token sees itself alone
        (Case(((0, 5), (1, 40))), 1),
        (Case(((300, 1), (0, 30), (300, 40)), capacity=64), 5 + 0 + 6),
        (Case(((0, 5), (0, 40)), shares_kv=True), 1),
    ],
    ids=str,
)
def test_a_piece_is_gathered_once_and_without_a_prefix_never(monkeypatch, case, launches):
    calls, gather = [], ops.gather_nvfp4
    impl = cpu_impl(case)
    impl_ops = SimpleNamespace(**{name: getattr(ops, name) for name in ops.__all__})
    impl_ops.gather_nvfp4 = lambda *args: (calls.append(args), gather(*args))
    monkeypatch.setattr("vllm_xlayer.attention.impl.ops", impl_ops)
    check_case(case, impl, torch.device("cpu"), exact_softmax=True)
    assert len(calls) == launches


def test_sinks_of_reloaded_weights_keep_their_address():
    """A captured graph reads the sinks where they were when it was captured."""
    case = Case(((20, 1), (33, 17)), decodes=1, sinks=True)
    impl = cpu_impl(case)
    address = impl.sinks.data_ptr()
    impl._loaded_sinks.data.fill_(-3.0)
    impl.process_weights_after_loading(case.dtype)
    assert impl.sinks.data_ptr() == address
    assert impl.sinks.tolist() == [-3.0] * case.num_heads


def test_sink_factor():
    """exp(lse) / (exp(lse) + exp(sink)), also where an exponential overflows or a token has no keys."""
    from vllm_xlayer.attention.impl import sink_factor

    lse = torch.tensor([[0.0, 3.0, -torch.inf], [200.0, -200.0, torch.inf]])
    factor = sink_factor(lse, torch.tensor([1.5, 0.0]))
    expected = [[1 / (1 + math.exp(1.5)), 1.0], [1 / (1 + math.exp(-1.5)), 0.0], [0.0, 1.0]]
    torch.testing.assert_close(factor, torch.tensor(expected).unsqueeze(-1))


def test_sinks_of_another_size_are_refused():
    from vllm_xlayer.attention.impl import NVFP4Impl

    with pytest.raises(ValueError, match=r"sinks: expected shape \(4,\), got \(2,\)"):
        NVFP4Impl(4, 64, 0.125, 2, sinks=torch.zeros(2))


def test_what_is_not_supported_is_named():
    from vllm_xlayer.attention.backend import NVFP4Backend

    capability = SimpleNamespace(major=9, minor=0)
    config = dict(
        head_size=72, dtype=torch.float32, kv_cache_dtype="nvfp4", block_size=8, use_mla=True, has_sink=False,
        use_sparse=False, use_mm_prefix=False, use_per_head_quant_scales=False, attn_type="decoder",
    )  # fmt: skip
    reasons = NVFP4Backend.validate_configuration(device_capability=capability, **config)
    for said in ("head_size", "dtype", "block_size", "MLA"):
        assert any(said in reason for reason in reasons), (said, reasons)
    supported = config | dict(head_size=64, dtype=torch.bfloat16, block_size=16, use_mla=False, has_sink=True)
    assert NVFP4Backend.validate_configuration(device_capability=capability, **supported) == []
