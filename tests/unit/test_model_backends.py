"""A model's own attention backend that keeps no NVFP4 is named, once; any other is left in peace."""

from types import SimpleNamespace

import pytest

from vllm_xlayer.patches import model_backends
from vllm_xlayer.patches.model_backends import say_what_keeps_no_nvfp4

pytest.importorskip("vllm")


@pytest.fixture
def warnings(monkeypatch):
    import vllm.logger

    said: list[str] = []
    logger = SimpleNamespace(warning_once=lambda text, *values: said.append(text % values))
    others = vllm.logger.init_logger
    monkeypatch.setattr(
        vllm.logger, "init_logger", lambda name: logger if name == model_backends.__name__ else others(name)
    )
    return said


class Layer:
    """As vLLM's Attention, as far as the warning looks."""

    def __init__(self, dtype, backend):
        self.kv_cache_dtype, self.attn_backend = dtype, backend


def backend(name):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[name].get_class()


def made(dtype, backend):
    layer = Layer.__new__(Layer)
    say_what_keeps_no_nvfp4(Layer.__init__, layer, dtype, backend)
    return layer


@pytest.mark.parametrize("dtype", ["nvfp4", "nvfp4_4over6"])
def test_what_keeps_no_nvfp4_is_named(warnings, dtype):
    assert made(dtype, backend("FLASH_ATTN_DIFFKV")).kv_cache_dtype == dtype
    (said,) = warnings
    assert said.startswith(f"--kv-cache-dtype {dtype}: expected an attention backend that keeps NVFP4, got ")
    assert "FLASH_ATTN_DIFFKV" in said


def test_others_are_left_in_peace(warnings):
    from vllm_xlayer.attention.backend import NVFP4Backend

    made("nvfp4", NVFP4Backend)
    made("auto", backend("FLASH_ATTN_DIFFKV"))
    made("fp8", backend("FLASH_ATTN_DIFFKV"))
    made("nvfp4", None)
    say_what_keeps_no_nvfp4(lambda layer: None, object())  # a vLLM whose layers are others
    assert not warnings


def test_it_is_applied_to_this_vllm():
    assert model_backends.PATCH.problem() is None
