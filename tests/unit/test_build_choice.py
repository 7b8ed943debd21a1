"""What setup.py builds: CPU ops alone only where no GPU misses the others, or somebody asked for it."""

import importlib.util
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(monkeypatch, tmp_path):
    """setup.py as a module, on a machine with a GPU, with no nvcc and no torch; nothing is built."""
    for name in ("VLLM_XLAYER_CUDA", "VLLM_XLAYER_ARCHS", "VLLM_XLAYER_FORCE_SM80"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("xlayer_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    gpu = tmp_path / "nvidia0"
    gpu.touch()
    monkeypatch.setattr(module, "GPU_DEVICES", (tmp_path / "nvidiactl", gpu))
    monkeypatch.setattr(module, "find_nvcc", lambda: None)
    monkeypatch.setattr(module, "find_torch", lambda: None)
    return module


def test_a_gpu_and_no_nvcc_end_it(build):
    with pytest.raises(SystemExit, match=r"has a GPU .*no nvcc in .*pip install .vllm==.*VLLM_XLAYER_CUDA=0"):
        build.cuda_arguments()


def test_that_is_said_before_torch_is_downloaded(build, monkeypatch):
    with pytest.raises(SystemExit, match="no nvcc in"):
        build.build_requirements()
    monkeypatch.setattr(build, "find_nvcc", lambda: Path("/nvcc"))
    assert build.build_requirements() == [build.TORCH_REQUIREMENT]


def test_a_gpu_and_a_torch_without_cuda_end_it(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "find_torch", lambda: tmp_path)
    monkeypatch.setattr(build, "find_nvcc", lambda: tmp_path / "bin/nvcc")
    monkeypatch.setattr(build, "local_archs", lambda: "90")
    command = build.CMakeBuild(setuptools.Distribution({"name": "x"}))
    with pytest.raises(SystemExit, match=r"has a GPU .*no CUDA in the torch at "):
        command.build_extension(setuptools.Extension("x", sources=[]))


def test_cpu_ops_alone_where_asked_for(build, monkeypatch):
    monkeypatch.setenv("VLLM_XLAYER_CUDA", "0")
    assert build.cuda_arguments() == ["-DXLAYER_CUDA=OFF"]
    assert build.build_requirements() == [build.TORCH_REQUIREMENT]


def test_cpu_ops_alone_where_no_gpu_is(build, monkeypatch):
    monkeypatch.setattr(build, "GPU_DEVICES", ())
    assert build.cuda_arguments() == ["-DXLAYER_CUDA=OFF"]
    assert build.build_requirements() == [build.TORCH_REQUIREMENT]


def test_the_vllm_that_is_named_is_one_that_is_served(build):
    """And brings nvcc: the newest that CI runs on."""
    ci = (ROOT / ".ci/run").read_text()
    with pytest.raises(SystemExit) as stop:
        build.cuda_arguments()
    named = str(stop.value).split("vllm==")[1].split('"')[0]
    assert f"enter {named}\n" in ci
