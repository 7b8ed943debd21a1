"""How the decode benchmark calls its peers, and what it compares their results with.

They run on a GPU only; here the Triton ones run in Triton's interpreter, and a stand-in is FlashInfer.
"""

import inspect
import os
import subprocess
import sys
import types
from dataclasses import replace

import pytest
import torch
from reference import nvfp4_ref as ref
from reference.attention_ref import Softmax, attention

from vllm_xlayer import nvfp4
from vllm_xlayer.bench import decode
from vllm_xlayer.bench.inputs import Inputs, Shape
from vllm_xlayer.bench.peers import PEERS, check, flash_attention_3, flashinfer_fa2, ours, triton_int4

KEYWORDS = ("out", "kv_cache_sf", "q_scale", "k_scale", "v_scale")
SHAPE = Shape("small", (1, 16, 37), num_q_heads=4, num_kv_heads=2)


class ReadsAsDocumented:
    """Stands in for FlashInfer's wrapper: dequantises by the tests' own codec, in float64."""

    def __init__(
        self, workspace, kv_layout, use_cuda_graph, paged_kv_indptr_buffer, paged_kv_indices_buffer,
        paged_kv_last_page_len_buffer, use_tensor_cores, backend,
    ):  # fmt: skip
        assert (kv_layout, use_cuda_graph, use_tensor_cores, backend) == ("HND", True, True, "auto")
        assert len(paged_kv_indptr_buffer) == len(paged_kv_last_page_len_buffer) + 1

    def plan(
        self, indptr, indices, last, q_heads, kv_heads, head_size, page, pos_encoding_mode, window_left,
        logits_soft_cap, q_data_type, kv_data_type, o_data_type, sm_scale, fixed_split_size,
        disable_split_kv, q_len_per_req,
    ):  # fmt: skip
        assert (q_data_type, kv_data_type, o_data_type) == (torch.bfloat16, torch.uint8, torch.bfloat16)
        assert (window_left, fixed_split_size, disable_split_kv, q_len_per_req) == (-1, -1, False, 1)
        self.plan_made = (indptr.tolist(), indices.long(), last.tolist(), head_size, page, sm_scale)

    def run(self, q, cache, *, out, kv_cache_sf, q_scale, k_scale, v_scale):
        assert (q_scale, k_scale, v_scale) == (1.0, 1.0, 1.0)
        indptr, indices, last, head_size, page, sm_scale = self.plan_made
        sides = []
        for data, scale in zip(cache, kv_cache_sf, strict=True):  # K, V: (blocks, heads, tokens, bytes)
            assert scale.dtype == torch.float8_e4m3fn
            nibbles = torch.stack((data & 15, data >> 4), -1).flatten(-2).numpy().reshape(-1, ref.GROUP)
            values = ref.dequantise(nibbles, scale.contiguous().view(torch.uint8).numpy().ravel())
            sides.append(torch.from_numpy(values).view(*data.shape[:-1], head_size).transpose(1, 2))
        for r, used in enumerate(last):
            pages = indices[indptr[r] : indptr[r + 1]]
            count = (len(pages) - 1) * page + used
            k, v = (side[pages].flatten(0, 1)[:count] for side in sides)  # tokens, heads, D
            out[r] = attention(q[r : r + 1], k, v, Softmax(sm_scale))[0][0]


@pytest.fixture
def flashinfer(monkeypatch):
    """A package with that wrapper."""
    package = types.SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=ReadsAsDocumented, __version__="0")
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setattr(flashinfer_fa2, "WORKSPACE", 16)
    flashinfer_fa2._unusable.cache_clear()
    decode.error_of.cache_clear()
    yield package
    flashinfer_fa2._unusable.cache_clear()
    decode.error_of.cache_clear()


def error(name, shape=SHAPE):
    return check.error(PEERS[name].make, PEERS[name].kept, shape, "cpu")


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("q_len", [1, 4])
def test_ours_passes_the_check(q_len, layers):
    assert error("nvfp4", replace(SHAPE, q_len=q_len, layers=layers)) < 0.005


def test_ours_passes_the_check_with_other_numbers_of_query_tokens():
    shape = replace(SHAPE, q_len=4, q_lens=(4, 1, 2))
    inputs = Inputs(shape, 1, "cpu")
    assert inputs.starts.tolist() == [0, 4, 5, 7] and inputs.q.shape[0] == 7
    assert error("nvfp4", shape) < 0.005


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("q_len", [1, 4])
def test_newest_tokens_pass_the_check_and_are_not_read_from_pages(q_len, layers, monkeypatch):
    shape = replace(SHAPE, q_len=q_len, layers=layers)
    assert error("nvfp4_newest", shape) < 0.005
    arguments = ours.newest_arguments
    nowhere = lambda inputs, *rest: arguments(inputs, *rest) | {"newest_from": inputs.seq_lens + 1}  # noqa: E731
    monkeypatch.setattr(ours, "newest_arguments", nowhere)
    assert error("nvfp4_newest", shape) > 10 * PEERS["nvfp4_newest"].max_error


@pytest.mark.parametrize("layers", [1, 3])
def test_flashinfer_reads_the_pages_that_ours_reads(flashinfer, layers):
    assert error("flashinfer_nvfp4", replace(SHAPE, layers=layers)) < 0.005


def test_a_wrongly_read_page_does_not_pass(flashinfer, monkeypatch):
    right = ReadsAsDocumented.run
    swapped = lambda self, q, cache, **how: right(self, q, cache[::-1], **how)  # noqa: E731
    monkeypatch.setattr(ReadsAsDocumented, "run", swapped)
    assert error("flashinfer_nvfp4") > 10 * PEERS["flashinfer_nvfp4"].max_error


@pytest.mark.parametrize("q_len", [1, 4])
def test_float64_attention_is_that_of_the_tests(q_len):
    inputs = Inputs(replace(SHAPE, lens=(4, 16, 37), q_len=q_len), 1, "cpu")
    kv = torch.randn(inputs.num_blocks, 2, 2, 16, 128)
    got = check.attention(inputs, kv).split(q_len)
    for r, (length, count) in enumerate(zip(inputs.shape.lens, inputs.shape.blocks, strict=True)):
        pages = kv[inputs.tables[0][r, :count].long()].transpose(2, 3)
        k, v = (pages[:, i].flatten(0, 1)[:length] for i in (0, 1))
        exact, _ = attention(inputs.q[r * q_len : (r + 1) * q_len], k, v, Softmax(128**-0.5))
        torch.testing.assert_close(got[r], exact, rtol=1e-12, atol=1e-12)


def test_the_calls_fit_the_installed_flashinfer():
    wrapper = pytest.importorskip("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    taken = {name: inspect.signature(getattr(wrapper, name)).parameters for name in ("__init__", "run")}
    assert set(inspect.signature(ReadsAsDocumented.__init__).parameters) - {"workspace"} <= set(
        taken["__init__"]
    )
    assert set(KEYWORDS) <= set(taken["run"])
    plan = inspect.signature(wrapper._plan_impl).parameters  # plan() hands it what it was given
    assert list(plan)[1:8] == [
        "indptr", "indices", "last_page_len", "num_qo_heads", "num_kv_heads", "head_dim", "page_size",
    ]  # fmt: skip
    assert set(list(inspect.signature(ReadsAsDocumented.plan).parameters)[8:]) <= set(plan)


@pytest.mark.parametrize(
    ("dtype", "layers"), [(torch.bfloat16, 1), (torch.float8_e4m3fn, 1), (torch.bfloat16, 3)]
)
def test_fa3_has_the_strides_of_vllms_cache(dtype, layers):
    """A token's K and V lie side by side, a head's tokens one behind the other."""
    inputs = Inputs(replace(SHAPE, layers=layers), 1, "cpu")
    kv = torch.randn(inputs.num_blocks, 2, 2, 16, 128, dtype=torch.bfloat16)
    k, v = flash_attention_3.key_and_value(inputs, dtype, kv)
    block = layers * 2 * 16 * 2 * 128
    assert k.shape == v.shape == (inputs.num_blocks, 16, 2, 128)
    assert k.stride() == v.stride() == (block, 2 * 128, 16 * 2 * 128, 1)
    assert v.storage_offset() - k.storage_offset() == 128
    for side, given in zip((k, v), kv.unbind(1), strict=True):
        assert torch.equal(side.float(), given.transpose(1, 2).to(dtype).float())


def test_times_are_measured_on_wide_logits(monkeypatch):
    """The same few blocks over and over, up to the last, in this package's pages and in FlashAttention's."""
    monkeypatch.setattr("vllm_xlayer.bench.inputs.POOL", 3)
    inputs = Inputs(replace(SHAPE, lens=(2048,), layers=2), 1, "cpu")
    pages = nvfp4.page_views(ours.nvfp4_cache(inputs, None, ours=False))
    nibbles = torch.stack((pages.k_data & 15, pages.k_data >> 4), -1).flatten(-2).numpy()
    scales = pages.k_scale.contiguous().view(torch.uint8).numpy()
    ours_k = torch.from_numpy(ref.dequantise(nibbles.reshape(-1, ref.GROUP), scales.ravel()))
    ours_k = ours_k.view(len(pages.k_data), 2, 16, 128).transpose(1, 2)
    for k in (ours_k, flash_attention_3.key_and_value(inputs, torch.bfloat16, None)[0].double()):
        assert len(k) == 128 and torch.equal(k[127], k[127 % 3]) and not torch.equal(k[0], k[1])
        logits = torch.einsum("bthd,d->bth", k, torch.randn(128, dtype=torch.float64)) * 128**-0.5
        assert 2 < logits.std() < 4


def test_int4_scales_lie_behind_the_elements():
    """A float32 scale after 64 bytes of 128 elements, in every token's and head's K and V."""
    inputs = Inputs(replace(SHAPE, layers=2), 1, "cpu")
    k, v, k_scale, v_scale = triton_int4.cache_views(inputs)
    k_scale[1, 2, 1], v_scale[1, 2, 1] = 2.0, 3.0
    assert k[1, 2, 1, 64:].view(torch.float32) == 2.0 and v[1, 2, 1, 64:].view(torch.float32) == 3.0
    assert v.storage_offset() - k.storage_offset() == 68
    assert k.stride() == v.stride() == (2 * 2 * 16 * 136, 136, 16 * 136, 1)


INTERPRETED = """
from vllm_xlayer.bench.inputs import Shape
from vllm_xlayer.bench.peers import PEERS, check
check.CHECKED = (4, 17)
for name, kind in (("int4", {}), ("int4", {"q_len": 4, "layers": 2}), ("turboquant", {})):
    peer = PEERS[name]
    shape = Shape("", (), num_q_heads=2, num_kv_heads=1, **kind)
    print("error of", name, check.error(peer.make, peer.kept, shape, "cpu"))
"""


def test_vllms_triton_kernels_compute_attention_as_they_are_called():
    """4-bit elements cost 0.13 of the result; anything read wrongly costs all of it."""
    pytest.importorskip("triton")
    # Without visible devices vLLM takes Triton for usable, and the interpreter needs none.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    program = [sys.executable, "-c", INTERPRETED]
    ran = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = [line.split()[2:] for line in ran.stdout.splitlines() if line.startswith("error of")]
    assert [name for name, _ in found] == ["int4", "int4", "turboquant"]
    assert all(0.05 < float(error) < 0.2 < PEERS[name].max_error for name, error in found)


def result(name):
    return {"name": name, "seconds": {}, "bytes": {}, "error": {}, "failed": {}}


@pytest.fixture
def on_cpu(monkeypatch):
    """The check of `decode.measure`, which is for a GPU, on the CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=1))
    original = check.error
    monkeypatch.setattr(check, "error", lambda make, kept, shape: original(make, kept, shape, "cpu"))


def test_why_there_is_no_number_is_said_once_for_all_shapes(flashinfer, on_cpu, monkeypatch):
    tries = []

    def refuse(self, *_, **__):
        tries.append(1)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ReadsAsDocumented, "plan", refuse)
    results = [result(f"shape {i}") for i in (1, 2)]
    for each in results:
        decode.measure("flashinfer_nvfp4", PEERS["flashinfer_nvfp4"], SHAPE, 1, each)
        assert not each["seconds"]
    assert len(tries) == 1
    (line,) = [line for line in decode.missing(results) if "no such" in line]
    assert "shape 1; shape 2" in line and "FlashInfer 0: RuntimeError: no such kernel" in line


def test_a_wrong_result_is_not_timed(on_cpu):
    def wrong(inputs, kv):
        assert kv is not None, "timed"
        return [lambda: inputs.out.fill_(0.0)]

    each = result("small")
    decode.measure("int4", replace(PEERS["int4"], make=wrong), SHAPE, 1, each)
    assert not each["seconds"] and "relative error of its result: 1.000" in each["failed"]["int4"]


def test_stand_in_and_package_agree_on_the_format():
    x = torch.randn(3, 32)
    data, scale = nvfp4.encode(x)
    nibbles = torch.stack((data & 15, data >> 4), -1).flatten(-2).numpy().reshape(-1, ref.GROUP)
    values = torch.from_numpy(ref.dequantise(nibbles, scale.numpy().ravel())).view(3, 32)
    assert torch.equal(values.float(), ours.kept_as_it_is(x))


def test_bytes_a_token():
    """As vLLM's pages have them, of 8 heads of 128."""
    found = {name: peer.bytes_per_token(Shape("", ())) / 8 for name, peer in PEERS.items()}
    assert found == {
        "nvfp4": 144, "nvfp4_newest": 144, "fa3_fp8": 256, "fa3_bf16": 512, "int4": 136, "turboquant": 134,
        "flashinfer_nvfp4": 144,
    }  # fmt: skip
