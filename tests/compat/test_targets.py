"""Every patch still fits the installed vLLM, and is still needed."""

import sys
from pathlib import Path
from types import ModuleType

import pytest

from vllm_xlayer.patches import FEATURES
from vllm_xlayer.patches.registry import Verdict

PATCHES = [(feature, patch) for feature, patches in FEATURES.items() for patch in patches]


@pytest.mark.parametrize(("feature", "patch"), PATCHES, ids=lambda value: getattr(value, "target", ""))
def test_probe_finds_its_target(feature, patch):
    finding = patch.probe()
    if finding.verdict is Verdict.NOT_NEEDED:
        # The attention patch concerns CUDA only; anywhere else a patch that is not needed is to be removed.
        from vllm.platforms import current_platform

        assert feature == "NVFP4 KV cache" and not current_platform.is_cuda(), finding.reason
    else:
        assert finding.verdict is Verdict.FOUND, finding.reason
    assert all((patch.why, patch.how, patch.upstream, patch.remove_when))


def test_nvfp4_selection_is_still_needed():
    """Upstream refuses nvfp4 below compute capability 10: read from its own class, without a GPU."""
    import inspect

    from vllm.v1.attention.backends import flashinfer

    source = inspect.getsource(flashinfer.FlashInferBackend.supports_kv_cache_dtype)
    assert "is_device_capability_family(100)" in source


def test_the_cuda_platform_has_what_the_attention_patch_wraps():
    """Where there is no GPU the probe does not look; the class can be read all the same."""
    import ast
    import importlib.util

    folder = Path(importlib.util.find_spec("vllm").submodule_search_locations[0])
    tree = ast.parse((folder / "platforms/cuda.py").read_text(encoding="utf-8"))
    methods = [
        [a.arg for a in node.args.args]
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "get_attn_backend_cls"
    ]
    assert methods == [["cls", "selected_backend", "attn_selector_config", "num_heads"]]


def test_unsupported_vllm_is_named(monkeypatch):
    from vllm_xlayer.compat import probe

    monkeypatch.setattr(probe, "CANDIDATES", {"v0_26": lambda: "KVCacheTensor has no block_stride"})
    probe.current.cache_clear()
    try:
        with pytest.raises(probe.UnsupportedVllm, match=r"expected vLLM 0.26, found .*no block_stride"):
            probe.current()
    finally:
        probe.current.cache_clear()


def test_no_exception_leaves_the_entry_point(monkeypatch, caplog):
    from vllm_xlayer import plugin

    def broken():
        raise RuntimeError("a changed vLLM")

    monkeypatch.setattr(plugin, "_register", broken)
    plugin.register()
    assert "not active: RuntimeError: a changed vLLM" in caplog.text

    monkeypatch.setitem(sys.modules, "vllm.logger", ModuleType("vllm.logger"))
    plugin.register()


def test_registering_twice_changes_nothing():
    from vllm.v1.core import kv_cache_utils

    from vllm_xlayer import plugin

    plugin.register()
    once = kv_cache_utils._use_packed_kv_cache_config
    plugin.register()
    assert kv_cache_utils._use_packed_kv_cache_config is once


def test_swizzled_pages_are_not_laid_in_rows(monkeypatch):
    """Upstream's NVFP4 kernels for sm_100 were never tried with rows: nothing may assume that they work."""
    from vllm_xlayer.attention.backend import NVFP4Backend
    from vllm_xlayer.compat import v0_26
    from vllm_xlayer.layout import Layout
    from vllm_xlayer.nvfp4 import ScaleOrder

    offer = v0_26.offer_of_backend(NVFP4Backend, "nvfp4")
    assert offer.problem(Layout.BLHNC, "nvfp4") is None
    monkeypatch.setattr(v0_26, "scale_order", lambda: ScaleOrder.SWIZZLED)
    offer = v0_26.offer_of_backend(NVFP4Backend, "nvfp4")
    assert "not been tried" in offer.problem(Layout.BLHNC, "nvfp4")
    assert offer.scale_orders == (ScaleOrder.SWIZZLED,)
