"""What the benchmark compares FlashInfer's result with, and how it calls it. It runs only on a GPU."""

import inspect
import sys
import types
from functools import partial

import pytest
import torch
from reference import nvfp4_ref as ref
from reference.attention_ref import Softmax, attention

from vllm_xlayer import nvfp4
from vllm_xlayer.bench import decode, flashinfer_peer
from vllm_xlayer.bench.inputs import Inputs, Shape
from vllm_xlayer.bench.peers import Peer

KEYWORDS = (
    "kv_layout", "use_tensor_cores", "backend", "q_data_type", "kv_data_type", "out", "kv_cache_sf",
    "k_scale", "v_scale",
)  # fmt: skip
SHAPE = Shape("small", (1, 16, 37), num_q_heads=4, num_kv_heads=2)


class ReadsAsDocumented:
    """Stands in for FlashInfer's wrapper: dequantises by the tests' own codec, in float64."""

    def __init__(self, workspace, kv_layout, use_tensor_cores, backend):
        assert (kv_layout, use_tensor_cores, backend) == ("HND", True, "fa2")

    def plan(self, indptr, indices, last, q_heads, kv_heads, head_size, page, q_data_type, kv_data_type):
        assert (q_data_type, kv_data_type) == (torch.bfloat16, torch.uint8)
        self.plan_made = (indptr.tolist(), indices.long(), last.tolist(), head_size, page)

    def run(self, q, cache, *, out, kv_cache_sf, k_scale, v_scale):
        assert kv_cache_sf.dtype == torch.float8_e4m3fn and (k_scale, v_scale) == (1.0, 1.0)
        indptr, indices, last, head_size, page = self.plan_made
        nibbles = torch.stack((cache & 15, cache >> 4), -1).flatten(-2).numpy()
        values = ref.dequantise(nibbles.reshape(-1, ref.GROUP), kv_cache_sf.view(torch.uint8).numpy().ravel())
        values = torch.from_numpy(values).view(*cache.shape[:-1], head_size)  # blocks, 2, heads, tokens, D
        for r, used in enumerate(last):
            pages = values[indices[indptr[r] : indptr[r + 1]]].transpose(2, 3)  # pages, 2, tokens, heads, D
            count = (pages.shape[0] - 1) * page + used
            k, v = (pages[:, i].flatten(0, 1)[:count] for i in (0, 1))
            out[r] = attention(q[r : r + 1], k, v, Softmax(head_size**-0.5))[0][0]


@pytest.fixture
def flashinfer(monkeypatch):
    """A package with that wrapper."""
    package = types.SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=ReadsAsDocumented, __version__="0")
    monkeypatch.setitem(sys.modules, "flashinfer", package)
    monkeypatch.setattr(flashinfer_peer, "WORKSPACE", 16)
    flashinfer_peer._unusable.cache_clear()
    yield package
    flashinfer_peer._unusable.cache_clear()


def test_a_right_result_passes_the_check(flashinfer):
    assert flashinfer_peer.error(SHAPE, "cpu") < 0.005


def test_a_wrongly_read_page_does_not(flashinfer, monkeypatch):
    right = ReadsAsDocumented.run
    swapped = lambda self, q, cache, **how: right(self, q, (cache >> 4) | (cache << 4), **how)  # noqa: E731
    monkeypatch.setattr(ReadsAsDocumented, "run", swapped)
    assert flashinfer_peer.error(SHAPE, "cpu") > 10 * decode.MAX_ERROR


def test_float64_attention_is_that_of_the_tests():
    inputs = Inputs(SHAPE, 1, "cpu")
    cache = torch.randn(inputs.num_blocks, 2, 2, 16, 128)
    got = flashinfer_peer.attention(inputs, cache)
    for r, (length, count) in enumerate(zip(SHAPE.lens, SHAPE.blocks, strict=True)):
        pages = cache[inputs.tables[0][r, :count].long()].transpose(2, 3)
        k, v = (pages[:, i].flatten(0, 1)[:length] for i in (0, 1))
        exact, _ = attention(inputs.q[r : r + 1], k, v, Softmax(128**-0.5))
        torch.testing.assert_close(got[r], exact[0], rtol=1e-12, atol=1e-12)


def test_the_calls_fit_the_installed_flashinfer():
    wrapper = pytest.importorskip("flashinfer").BatchDecodeWithPagedKVCacheWrapper
    for method in ("__init__", "plan", "run"):
        taken = inspect.signature(getattr(ReadsAsDocumented, method)).parameters
        assert {name for name in taken if name in KEYWORDS} <= set(
            inspect.signature(getattr(wrapper, method)).parameters
        ), method
    assert list(inspect.signature(wrapper.plan).parameters)[1:8] == [
        "indptr", "indices", "last_page_len", "num_qo_heads", "num_kv_heads", "head_dim", "page_size",
    ]  # fmt: skip


def test_a_peer_that_cannot_run_is_named_and_tried_once(flashinfer, monkeypatch):
    tries = []

    def refuse(self, *plan, **how):
        tries.append(plan)
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ReadsAsDocumented, "plan", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=1))
    error = partial(flashinfer_peer.error, device="cpu")
    peer = Peer("theirs", "flashinfer", 4.5, flashinfer_peer.nvfp4, error)
    results = [{"name": f"shape {i}", "seconds": {}, "bytes": {}, "error": {}, "failed": {}} for i in (1, 2)]
    for result in results:
        decode.measure("flashinfer_nvfp4", peer, SHAPE, 1, result)
        assert not result["seconds"]
    assert len(tries) == 1
    (line,) = [line for line in decode.missing(results) if "flashinfer" in line.lower() and "no such" in line]
    assert "shape 1; shape 2" in line and "FlashInfer 0: RuntimeError: no such kernel" in line


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=1))
    peer = Peer("theirs", "flashinfer", 4.5, lambda inputs: pytest.fail("timed"), lambda shape: float("nan"))
    result = {"name": "small", "seconds": {}, "bytes": {}, "error": {}, "failed": {}}
    decode.measure("flashinfer_nvfp4", peer, SHAPE, 1, result)
    assert not result["seconds"] and "relative error" in result["failed"]["flashinfer_nvfp4"]


def test_stand_in_and_package_agree_on_the_format():
    x = torch.randn(3, 32)
    data, scale = nvfp4.encode(x)
    nibbles = torch.stack((data & 15, data >> 4), -1).flatten(-2).numpy().reshape(-1, ref.GROUP)
    values = torch.from_numpy(ref.dequantise(nibbles, scale.numpy().ravel())).view(3, 32)
    assert torch.equal(values.float(), nvfp4.decode(data, scale))
