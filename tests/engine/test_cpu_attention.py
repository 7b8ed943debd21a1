"""The reference platform's attention and ops alone, against float64 loops written here."""

import math
import types
from itertools import pairwise

import pytest
import torch
from model_fixture import vllm_greedy
from reference.nvfp4_ref import keys_from_kept, unpacked

from vllm_xlayer.kv_scales import Scales

pytestmark = pytest.mark.usefixtures("reference_platform", "pages_alone")

HEADS, KV_HEADS, HEAD_SIZE, BLOCK = 6, 2, 32, 16
SCALE = 0.3


def expected_attention(query, keys, values, first, window=None, soft_cap=None, sinks=None, slopes=None):
    """One request, one query and head at a time: query [n, Hq, D], keys and values [m, H, D]."""
    query, keys, values = query.double(), keys.double(), values.double()
    out = torch.zeros_like(query)
    for i in range(query.shape[0]):
        position = first + i
        start = 0 if window is None else max(0, position - window + 1)
        for head in range(query.shape[1]):
            kv_head = head * keys.shape[1] // query.shape[1]
            logits = keys[start : position + 1, kv_head] @ query[i, head] * SCALE
            if soft_cap is not None:
                logits = soft_cap * torch.tanh(logits / soft_cap)
            if slopes is not None:
                for key in range(len(logits)):
                    logits[key] -= slopes[head] * (position - start - key)
            weights = logits.exp()
            total = weights.sum() + (0.0 if sinks is None else sinks[head].double().exp())
            out[i, head] = (weights / total) @ values[start : position + 1, kv_head]
    return out


class Step:
    """A mixed batch in cross-layer rows whose every unused byte is NaN.

    Requests (cached tokens, new tokens): a decode, a chunk behind a prefix, a fresh prompt
    longer than a query tile, a decode at the end of a block, a single-token prompt.
    """

    requests = ((37, 1), (50, 21), (0, 150), (31, 1), (0, 1))

    def __init__(self, impl, kv_cache_dtype="auto", dtype=torch.float32):
        from vllm_xlayer.attention.cpu_impl import CpuReferenceMetadata

        torch.manual_seed(0)
        lens = [computed + new for computed, new in self.requests]
        blocks_needed = [math.ceil(n / BLOCK) for n in lens]
        ids = (1 + torch.randperm(sum(blocks_needed))).split(blocks_needed)
        self.block_table = torch.zeros(len(lens), max(blocks_needed), dtype=torch.int32)
        for row, blocks in zip(self.block_table, ids, strict=True):
            row[: len(blocks)] = blocks
        content = HEAD_SIZE * 9 // 8 if kv_cache_dtype == "nvfp4" else 2 * HEAD_SIZE
        layers = (1 + sum(blocks_needed), 3, KV_HEADS, BLOCK, content)
        if kv_cache_dtype == "nvfp4":
            rows = torch.full(layers, 0xFF, dtype=torch.uint8)  # scales that are NaN
        else:
            rows = torch.full(layers, float("nan"), dtype=dtype)
        self.other_layers = rows[:, [0, 2]].clone()
        self.rows, self.cache = rows, rows[:, 1]
        self.impl = impl
        self.layer = types.SimpleNamespace(_k_scale=torch.tensor(0.5), _v_scale=torch.tensor(2.0))
        self.keys = [torch.randn(n, KV_HEADS, HEAD_SIZE).to(dtype) for n in lens]
        self.values = [torch.randn(n, KV_HEADS, HEAD_SIZE).to(dtype) for n in lens]
        self.queries = [torch.randn(new, HEADS, HEAD_SIZE).to(dtype) for _, new in self.requests]
        bounds = torch.tensor([0] + [new for _, new in self.requests]).cumsum(0).tolist()
        self.metadata = CpuReferenceMetadata(
            query_ranges=list(pairwise(bounds)),
            seq_lens=lens,
            block_table=self.block_table,
        )

    def slots(self, request, start, stop):
        positions = torch.arange(start, stop)
        return self.block_table[request].long()[positions // BLOCK] * BLOCK + positions % BLOCK

    def write(self, start_stop):
        """Write tokens start .. stop of every request, and padding that must be skipped."""
        slots, keys, values = [torch.tensor([-1])], [], []
        for r, (computed, new) in enumerate(self.requests):
            start, stop = start_stop(computed, new)
            slots.append(self.slots(r, start, stop))
            keys.append(self.keys[r][start:stop])
            values.append(self.values[r][start:stop])
        pad = torch.full((1, KV_HEADS, HEAD_SIZE), float("nan"), dtype=self.keys[0].dtype)
        self.impl.do_kv_cache_update(
            self.layer, torch.cat([pad, *keys]), torch.cat([pad, *values]), self.cache, torch.cat(slots)
        )

    def run(self):
        """Write the prefixes, then the chunks, and attend; returns the outputs per request."""
        self.write(lambda computed, new: (0, computed))
        self.write(lambda computed, new: (computed, computed + new))
        assert torch.equal(self.rows[:, [0, 2]].view(torch.uint8), self.other_layers.view(torch.uint8))
        query = torch.cat(self.queries)
        new = [n for _, n in self.requests]
        own_keys = torch.cat([k[-n:] for k, n in zip(self.keys, new, strict=True)])
        own_values = torch.cat([v[-n:] for v, n in zip(self.values, new, strict=True)])
        output = torch.full_like(query, float("nan"))
        self.impl.forward(self.layer, query, own_keys, own_values, self.cache, self.metadata, output)
        return output.split(new)


def make_impl(**settings):
    from vllm.config import VllmConfig, set_current_vllm_config

    from vllm_xlayer.attention.cpu_impl import CpuReferenceImpl

    with set_current_vllm_config(VllmConfig()):
        return CpuReferenceImpl(HEADS, HEAD_SIZE, SCALE, KV_HEADS, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(sliding_window=1),
        dict(sliding_window=20),
        dict(sliding_window=140),
        dict(logits_soft_cap=2.0),
        dict(sinks=torch.linspace(-2, 2, HEADS)),
        dict(sliding_window=33, logits_soft_cap=3.0, sinks=torch.linspace(2, -2, HEADS)),
        dict(alibi_slopes=[2.0**-i for i in range(HEADS)]),
        dict(sliding_window=20, alibi_slopes=[2.0**-i for i in range(HEADS)]),
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_mixed_batch(settings):
    step = Step(make_impl(**settings))
    outputs = step.run()
    reference = dict(
        window=settings.get("sliding_window"),
        soft_cap=settings.get("logits_soft_cap"),
        sinks=settings.get("sinks"),
        slopes=settings.get("alibi_slopes"),
    )
    for r, (computed, _) in enumerate(step.requests):
        expected = expected_attention(step.queries[r], step.keys[r], step.values[r], computed, **reference)
        # float32 sums of at most 150 terms of magnitude 1: errors near 150 * 2**-24 = 1e-5.
        torch.testing.assert_close(outputs[r].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_output_is_rounded_once(dtype):
    """Inputs are 16-bit, everything between is float32: the output is off by one rounding."""
    step = Step(make_impl(), dtype=dtype)
    outputs = step.run()
    for r, (computed, _) in enumerate(step.requests):
        expected = expected_attention(step.queries[r], step.keys[r], step.values[r], computed)
        half_unit = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(outputs[r].double(), expected, rtol=half_unit * 1.01, atol=1e-5)


def test_own_chunk_is_not_rounded_by_a_narrower_cache():
    """A float32 model with a bfloat16 cache: earlier tokens are rounded, the step's own are not."""
    step = Step(make_impl())
    step.rows = step.rows.to(torch.bfloat16)
    step.other_layers, step.cache = step.rows[:, [0, 2]].clone(), step.rows[:, 1]
    outputs = step.run()
    for r, (computed, _) in enumerate(step.requests):
        keys, values = step.keys[r].clone(), step.values[r].clone()
        keys[:computed] = keys[:computed].bfloat16()
        values[:computed] = values[:computed].bfloat16()
        expected = expected_attention(step.queries[r], keys, values, computed)
        torch.testing.assert_close(outputs[r].double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("quant_mode", "dtype", "content"), [("NONE", torch.bfloat16, 512), ("NVFP4", torch.uint8, 144)]
)
def test_page_and_orders(quant_mode, dtype, content):
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVQuantMode

    from vllm_xlayer.attention.cpu import CpuReferenceBackend as Backend

    spec = FullAttentionSpec(
        block_size=16, num_kv_heads=2, head_size=128, dtype=dtype, kv_quant_mode=KVQuantMode[quant_mode]
    )
    page = Backend.customize_spec(spec)
    assert (page.num_heads, page.state_content_size_bytes) == (2, content)
    assert page.page_size_bytes == 2 * 16 * content
    assert Backend.customize_spec(page) == page
    assert [layout.name for layout in Backend.supported_kv_cache_layouts()] == ["LBHNC", "BLHNC"]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (dict(kv_cache_dtype="nvfp4", alibi_slopes=[0.5] * HEADS), "nvfp4: expected no ALiBi slopes"),
        (dict(kv_sharing_target_layer_name="layers.0"), "share another layer's KV cache"),
    ],
)
def test_refused_layers(settings, reason):
    with pytest.raises(NotImplementedError, match=reason):
        make_impl(**settings)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(use_mla=True, use_sparse=True), "sparse not supported"),
        (dict(use_mla=True, kv_cache_dtype="nvfp4"), "kv_cache_dtype not supported"),
        (dict(attn_type="encoder_only"), "attention type encoder_only not supported"),
        (dict(kv_cache_dtype="fp8"), "kv_cache_dtype not supported"),
        (dict(kv_cache_dtype="nvfp4", head_size=72), "multiple of 16"),
        (dict(use_non_causal=True), "non-causal attention not supported"),
    ],
)
def test_refused_selections(reference_platform, changes, reason):
    from vllm.v1.attention.selector import AttentionSelectorConfig

    plain = AttentionSelectorConfig(head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=16)
    assert reference_platform.get_attn_backend_cls(None, plain).endswith("CpuReferenceBackend")
    latent = plain._replace(use_mla=True)
    assert reference_platform.get_attn_backend_cls(None, latent).endswith("CpuMlaBackend")
    with pytest.raises(ValueError, match=reason):
        reference_platform.get_attn_backend_cls(None, plain._replace(**changes))


@pytest.fixture
def missing_ops(reference_platform):
    reference_platform.import_kernels()


def test_slot_mapping_op(missing_ops):
    starts = torch.tensor([0, 3, 3, 40], dtype=torch.int32)
    positions = torch.cat([torch.arange(14, 17), torch.arange(37)])
    block_table = torch.tensor([[5, 9, 0], [1, 1, 1], [2, 8, 4], [7, 7, 7]], dtype=torch.int32)
    slots = torch.full((50,), 123)
    torch.ops._C.compute_slot_mapping_kernel_impl(starts, positions, block_table, slots, 16)
    expected = [5 * 16 + 14, 5 * 16 + 15, 9 * 16]
    expected += [(2, 8, 4)[p // 16] * 16 + p % 16 for p in range(37)]
    assert slots.tolist() == expected + [-1] * 10


@pytest.mark.parametrize(
    ("op", "layer"),
    [
        ("silu_and_mul", "SiluAndMul"),
        ("gelu_and_mul", "GeluAndMul"),
        ("gelu_tanh_and_mul", "GeluAndMul-tanh"),
        ("gelu_new", "NewGELU"),
        ("gelu_fast", "FastGELU"),
        ("gelu_quick", "QuickGELU"),
    ],
)
def test_activation_ops(missing_ops, op, layer):
    """Each op against the native forward of the vLLM layer that asks for it."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import activation

    name, _, approximate = layer.partition("-")
    with set_current_vllm_config(VllmConfig()):
        module = getattr(activation, name)(*filter(None, [approximate]))
    x = torch.linspace(-6, 6, 320).view(5, 64)
    expected = module.forward_native(x)
    out = torch.full_like(expected, float("nan"))
    getattr(torch.ops._C, op)(out, x)
    # gelu_fast's constant 0.7978845608 is sqrt(2 / pi) to 10 digits: only rounding differs.
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_ops_are_defined_once(missing_ops):
    from vllm_xlayer.platform.kernels import define_missing_ops

    assert define_missing_ops() == []


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def decode_nvfp4(page, scales):
    """K and V of one page, float64 [N, H, D] each, straight from the format's description.

    page: uint8 (H, N, C), dense: [K data][K scale][V data][V scale], scales linear. K is kept rotated.
    """
    data_bytes = KV_HEADS * BLOCK * HEAD_SIZE // 2
    half = data_bytes + KV_HEADS * BLOCK * HEAD_SIZE // 16
    decoded = []
    for part, scale in zip(page.reshape(2, half), scales, strict=True):
        nibbles = torch.from_numpy(unpacked(part[:data_bytes].numpy())).long()
        groups = E2M1[nibbles].view(KV_HEADS, BLOCK, HEAD_SIZE // 16, 16)
        block_scales = part[data_bytes:].view(torch.float8_e4m3fn).double()
        values = groups * block_scales.view(KV_HEADS, BLOCK, HEAD_SIZE // 16, 1) * scale.double()
        decoded.append(values.flatten(2).transpose(0, 1))
    decoded[0] = decoded[0] @ torch.from_numpy(keys_from_kept(HEAD_SIZE))
    return decoded


@pytest.mark.parametrize(
    "settings",
    [
        dict(),
        dict(sliding_window=20),
        dict(sinks=torch.linspace(-2, 2, HEADS)),
        dict(sliding_window=20, sinks=torch.linspace(2, -2, HEADS)),
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_nvfp4_mixed_batch(settings):
    """Earlier tokens come from the cache's bytes, the step's own are exact."""
    step = Step(make_impl(kv_cache_dtype="nvfp4", **settings), kv_cache_dtype="nvfp4")
    outputs = step.run()
    scales = (step.layer._k_scale, step.layer._v_scale)
    for r, (computed, new) in enumerate(step.requests):
        blocks = step.block_table[r, : math.ceil((computed + new) / BLOCK)]
        pages = [decode_nvfp4(step.cache[block], scales) for block in blocks]
        keys, values = (torch.cat(parts)[: computed + new] for parts in zip(*pages, strict=True))
        for cached, written in ((keys, step.keys[r]), (values, step.values[r])):
            assert (cached - written).norm() <= 0.12 * written.norm()  # the format's error on Gaussian data
        keys[computed:], values[computed:] = step.keys[r][computed:], step.values[r][computed:]
        expected = expected_attention(
            step.queries[r],
            keys,
            values,
            computed,
            window=settings.get("sliding_window"),
            sinks=settings.get("sinks"),
        )
        torch.testing.assert_close(outputs[r].double(), expected, rtol=0, atol=1e-5)


def test_debug_counts_what_the_global_scales_do_not_suit(monkeypatch):
    """Of tokens that are written only, and only where it is asked for."""
    key, value = torch.ones(5, KV_HEADS, HEAD_SIZE), torch.full((5, KV_HEADS, HEAD_SIZE), 1e-3)
    key[1, 0] = 3000.0  # 24,000 in one element of what is kept, as this is a row of its matrix
    key[4] = torch.inf  # padding
    slots = torch.tensor([0, 1, 2, 3, -1])
    layer = types.SimpleNamespace(layer_name="a", _k_scale=torch.tensor(1.0), _v_scale=torch.tensor(1.0))
    cache = torch.zeros(1, KV_HEADS, BLOCK, HEAD_SIZE * 9 // 8, dtype=torch.uint8)
    assert make_impl(kv_cache_dtype="nvfp4").scale_counts is None
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    impl = make_impl(kv_cache_dtype="nvfp4")
    impl.do_kv_cache_update(layer, key, value, cache, slots)
    assert impl.scale_counts.counts.tolist() == [[16, 1, 0], [16, 0, 16]]


def test_debug_says_it_in_an_engine(monkeypatch, make_llm, tiny_llama, caplog_vllm):
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    monkeypatch.setattr("vllm_xlayer.kv_scales.DEFAULT", Scales(2.0**-20, 1.0))
    llm = make_llm(tiny_llama, kv_cache_dtype="nvfp4")
    vllm_greedy(llm, [[1, 2, 3, 4, 5]], 3)
    (line,) = [r.getMessage() for r in caplog_vllm.records if "global scales do not suit" in r.getMessage()]
    assert "model.layers.0" in line and "K, scale 9.53674e-07" in line and "saturated (100 %)" in line
