"""Who serves an NVFP4 layer: ours, vLLM's, or nobody, with the reasons of both."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.attention.selector import AttentionSelectorConfig

from vllm_xlayer import ops
from vllm_xlayer.patches.attention import BACKEND, select_nvfp4_backend

FLASHINFER = "vllm.v1.attention.backends.flashinfer.FlashInferBackend"


@pytest.fixture(autouse=True)
def built_with_cuda(monkeypatch):
    monkeypatch.setattr(ops, "build_info", lambda: {"cuda": True})


def selector(dtype="nvfp4", **more):
    settings = dict(head_size=128, dtype=torch.bfloat16, kv_cache_dtype=dtype, block_size=16) | more
    return AttentionSelectorConfig(**settings)


def choose(config, capability=(9, 0), selected=None, refusal=None):
    """(answer, what vLLM was asked for), where vLLM serves everything, or refuses with ``refusal``."""
    asked = []

    def original(cls, selected_backend, attn_selector_config, num_heads):
        asked.append(selected_backend and selected_backend.name)
        assert (attn_selector_config, num_heads) == (config, 32)
        if refusal:
            raise ValueError(refusal)
        return FLASHINFER

    from vllm.platforms.interface import DeviceCapability

    platform = SimpleNamespace(get_device_capability=lambda: DeviceCapability(*capability))
    named = selected and SimpleNamespace(name=selected)
    return select_nvfp4_backend(original, platform, named, config, 32), asked


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (8, 9), (9, 0)])
@pytest.mark.parametrize("dtype", ["nvfp4", "nvfp4_4over6"])
def test_ours_on_ampere_to_hopper(dtype, capability):
    assert choose(selector(dtype), capability) == (BACKEND, [])


@pytest.mark.parametrize("dtype", ["auto", "fp8", "int4_per_token_head", "nvfp4_ds_mla"])
def test_other_dtypes_are_vllms(dtype):
    assert choose(selector(dtype)) == (FLASHINFER, [None])


@pytest.mark.parametrize("capability", [(10, 0), (10, 3), (12, 0), (12, 1)])
def test_vllms_on_blackwell(capability):
    assert choose(selector(), capability) == (FLASHINFER, [None])


def test_what_we_refuse_vllm_may_serve(caplog_vllm):
    config = selector(head_size=512)
    assert choose(config) == (FLASHINFER, [None])
    assert "FlashInferBackend serves it" in caplog_vllm.text and "head_size" in caplog_vllm.text


def test_without_cuda_ops_vllm_may_serve(monkeypatch, caplog_vllm):
    monkeypatch.setattr(ops, "build_info", lambda: {"cuda": False})
    assert choose(selector()) == (FLASHINFER, [None])
    assert "VLLM_XLAYER_CUDA=1" in caplog_vllm.text


def test_without_the_extension_vllm_may_serve(monkeypatch, caplog_vllm):
    def missing():
        raise ops.ExtensionMissingError("expected the compiled extension")

    monkeypatch.setattr(ops, "build_info", missing)
    assert choose(selector()) == (FLASHINFER, [None])
    assert "expected the compiled extension" in caplog_vllm.text


def test_both_reasons_where_both_refuse():
    with pytest.raises(ValueError, match=r"(?s)vllm-xlayer cannot serve.*head_size.*no valid backend"):
        choose(selector(head_size=512), refusal="no valid backend")


def test_ours_on_consumer_blackwell_where_vllm_refuses():
    assert choose(selector(head_size=64), (12, 0), refusal="misreads it") == (BACKEND, [None])


def test_vllm_alone_where_its_pages_are_swizzled():
    with pytest.raises(ValueError, match=r"^no$"):
        choose(selector(), (10, 0), refusal="no")


def test_a_named_backend_is_obeyed():
    assert choose(selector(), selected="FLASHINFER") == (FLASHINFER, ["FLASHINFER"])
    assert choose(selector(), (12, 0), selected="CUSTOM") == (BACKEND, [])
    with pytest.raises(ValueError, match=r"^FLASH_ATTN has no such kernels$"):
        choose(selector(), selected="FLASH_ATTN", refusal="FLASH_ATTN has no such kernels")
    with pytest.raises(ValueError, match=r"vllm-xlayer cannot serve .*head_size"):
        choose(selector(head_size=512), selected="CUSTOM")


def test_triton_may_be_named_by_vllm_itself(caplog_vllm):
    assert choose(selector(), selected="TRITON_ATTN") == (BACKEND, [])
    assert "TRITON_ATTN has no kernels for --kv-cache-dtype nvfp4" in caplog_vllm.text
    assert choose(selector(head_size=512), selected="TRITON_ATTN") == (FLASHINFER, [None])
    assert choose(selector("auto"), selected="TRITON_ATTN") == (FLASHINFER, ["TRITON_ATTN"])


def test_latent_attention_is_vllms():
    assert choose(selector(use_mla=True)) == (FLASHINFER, [None])


def test_vllm_still_refuses_what_we_take():
    """Read from its source, without a GPU: 0.31 has no NVFP4 here, later ones no scale search."""
    folder = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    source = (folder / "v1/attention/backends/flashinfer.py").read_text()
    assert "has no scale search" in source or "_nvfp4_kv_on_fa2" not in source


def test_the_dtype_says_how_scales_are_picked():
    from vllm.v1.kv_cache_interface import get_kv_quant_mode

    from vllm_xlayer.nvfp4 import KV_DTYPES, ScaleChoice, scale_choice_of

    assert all(get_kv_quant_mode(dtype).is_nvfp4 for dtype in KV_DTYPES)
    assert scale_choice_of("nvfp4_4over6", ScaleChoice.AMAX_6) is ScaleChoice.FOUR_OVER_SIX
    assert scale_choice_of("nvfp4", ScaleChoice.AMAX_6) is ScaleChoice.AMAX_6


def test_our_builder_needs_the_hosts_query_lengths():
    from vllm_xlayer.attention.backend import NVFP4Backend

    assert NVFP4Backend.supports_device_cpu_query_lens_mismatch() is False
