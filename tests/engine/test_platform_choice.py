"""When the plugin offers the CPU reference platform, and that asking costs nothing."""

import subprocess
import sys
import types

import pytest

from vllm_xlayer import platform

CHECKS = ("_gpu_device_nodes", "_builtin_platform_applies", "_other_plugin_applies")


@pytest.fixture
def bare_machine(monkeypatch):
    """No GPU, no other platform, a supported vLLM: each test changes one of these."""
    monkeypatch.setattr(platform, "_vllm_is_supported", lambda: True)
    for check in CHECKS:
        monkeypatch.setattr(platform, check, lambda: False)


def test_offered_on_a_bare_machine(bare_machine):
    assert platform.cpu_reference_platform() == platform.PLATFORM_CLASS


@pytest.mark.parametrize("check", CHECKS)
def test_not_offered_beside_another(bare_machine, monkeypatch, check):
    monkeypatch.setattr(platform, check, lambda: True)
    assert platform.cpu_reference_platform() is None


def test_not_offered_to_a_vllm_without_layouts(bare_machine, monkeypatch):
    monkeypatch.undo()
    assert platform._vllm_is_supported()
    monkeypatch.setattr(platform, "NEEDED_MODULE", "vllm.v1.no_such_module")
    assert not platform._vllm_is_supported()
    assert platform.cpu_reference_platform() is None


def test_never_raises(bare_machine, monkeypatch):
    def broken():
        raise RuntimeError("driver fell over")

    monkeypatch.setattr(platform, "_builtin_platform_applies", broken)
    assert platform.cpu_reference_platform() is None


@pytest.mark.parametrize("cpu_build", [True, False])
def test_an_installed_cpu_build_of_vllm_goes_first(monkeypatch, cpu_build):
    from vllm import platforms

    monkeypatch.setattr(
        platforms, "vllm_version_matches_substr", lambda substr: cpu_build and substr == "cpu"
    )
    for name in ("tpu", "cuda", "rocm", "xpu"):
        monkeypatch.setitem(platforms.builtin_platform_plugins, name, lambda: None)
    assert platform._builtin_platform_applies() is cpu_build


def test_a_visible_gpu_goes_first(monkeypatch):
    from vllm import platforms

    monkeypatch.setitem(
        platforms.builtin_platform_plugins, "cuda", lambda: "vllm.platforms.cuda.CudaPlatform"
    )
    assert platform._builtin_platform_applies()


@pytest.mark.parametrize(
    ("value", "allowed", "applies"),
    [
        ("fake_plugin:offers", None, True),
        ("fake_plugin:declines", None, False),
        ("fake_plugin:breaks", None, False),
        ("fake_plugin:offers", ["vllm_xlayer_cpu"], False),
    ],
)
def test_other_plugins(monkeypatch, value, allowed, applies):
    from importlib.metadata import EntryPoint

    from vllm import envs

    plugin = types.ModuleType("fake_plugin")
    plugin.offers = lambda: "fake.Platform"
    plugin.declines = lambda: None
    plugin.breaks = lambda: 1 / 0
    monkeypatch.setitem(sys.modules, "fake_plugin", plugin)
    ours = EntryPoint("vllm_xlayer_cpu", "vllm_xlayer.platform:cpu_reference_platform", "")
    entries = [ours, EntryPoint("other", value, "")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: entries)
    monkeypatch.setattr(envs, "VLLM_PLUGINS", allowed, raising=False)
    assert platform._other_plugin_applies() is applies


def config(v2: bool):
    return types.SimpleNamespace(use_v2_model_runner=v2)


def test_an_empty_cuda_visible_devices_is_named(monkeypatch):
    """vLLM then takes Triton for usable, and the first step would find no driver."""
    from vllm import triton_utils

    from vllm_xlayer.platform import reference

    monkeypatch.setattr(triton_utils, "HAS_TRITON", True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert 'CUDA_VISIBLE_DEVICES="" makes vLLM' in reference._machine_refusal(config(v2=False))
    monkeypatch.setattr(triton_utils, "HAS_TRITON", False)
    assert reference._machine_refusal(config(v2=False)) is None


def test_model_runner_v1_is_chosen_unless_the_user_chose(monkeypatch):
    import os

    from vllm_xlayer.platform import reference

    monkeypatch.delenv("VLLM_USE_V2_MODEL_RUNNER", raising=False)
    reference.CpuReferencePlatform.pre_register_and_update()
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    reference.CpuReferencePlatform.pre_register_and_update()
    assert os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
    assert "unset VLLM_USE_V2_MODEL_RUNNER" in reference._machine_refusal(config(v2=True))


def test_import_is_cheap():
    script = "import sys, vllm_xlayer.platform; print(sorted({'torch', 'vllm', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
