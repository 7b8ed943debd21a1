"""The entry point: nothing leaves it, nothing happens twice, and a vLLM that does not fit is named."""

import logging
import sys
from types import ModuleType

import pytest

pytest.importorskip("vllm")

from vllm_xlayer import plugin
from vllm_xlayer.compat import UnsupportedVllm, check_vllm, probe


def test_this_vllm_is_supported():
    check_vllm()


def test_an_unsupported_vllm_is_named(monkeypatch):
    monkeypatch.setattr(probe, "missing_feature", lambda: "KVCacheTensor has no layer_stride")
    with pytest.raises(UnsupportedVllm, match=r"expected vLLM 0.31 to 0.33, found .*no layer_stride"):
        check_vllm()


def test_the_probe_sees_an_older_vllm(monkeypatch):
    """0.30 has layouts, but its backends do not hear of the cache spec."""
    from vllm.v1.attention.backend import AttentionBackend

    monkeypatch.setattr(AttentionBackend, "get_supported_kernel_block_sizes", staticmethod(lambda: [16]))
    assert "takes no kv_cache_spec" in probe.missing_feature()


def test_no_exception_leaves_the_entry_point(monkeypatch, caplog):
    def broken():
        raise RuntimeError("a changed vLLM")

    monkeypatch.setattr(logging.getLogger("vllm_xlayer"), "propagate", True)
    monkeypatch.setattr(plugin, "_register", broken)
    plugin.register()
    assert "not active: RuntimeError: a changed vLLM" in caplog.text

    monkeypatch.setitem(sys.modules, "vllm.logger", ModuleType("vllm.logger"))
    plugin.register()


def test_registering_twice_changes_nothing():
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    once = EngineArgs.add_cli_args, KVConnectorFactory.get_connector_class
    plugin.register()
    assert (EngineArgs.add_cli_args, KVConnectorFactory.get_connector_class) == once
