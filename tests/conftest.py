"""Devices and the ``gpu`` mark.

A test that takes ``device`` runs once on the CPU and, under the mark ``gpu``, once on the first NVIDIA GPU.
Where no GPU is visible the marked ones are skipped, with what was looked for.
"""

import functools
import os
import sys
from pathlib import Path

# pytest-xdist's workers share the cores: with a thread a core in each, tests take several times as long.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    cores = len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
# Before vLLM is imported: one of its libraries starts compilers in the background, of kernels for GPUs.
os.environ.setdefault("HUMMING_DISABLE_PARALLEL_BUILD", "1")
# Engines of several ranks: no all-reduce of vLLM's that asks for NVLink multicast, which a program can put a
# host's GPUs out of service with. FlashInfer's does whatever NCCL's and PyTorch's own variables say.
os.environ.setdefault("VLLM_ALLREDUCE_USE_FLASHINFER", "0")
os.environ.setdefault("VLLM_ALLREDUCE_USE_SYMM_MEM", "0")
os.environ.setdefault("VLLM_FLASHINFER_ALLREDUCE_BACKEND", "trtllm")

import pytest
import torch

# For benchmarks/, which is not installed. Last, so that vllm_xlayer is the installed one, with its extension.
sys.path.append(str(Path(__file__).parents[1]))


@functools.cache
def why_no_gpu() -> str | None:
    """The reason why tests marked gpu cannot run here, None if they can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    count = torch.cuda.device_count()
    if count == 0:
        return "no NVIDIA GPU visible: torch.cuda.device_count() is 0"
    capability = torch.cuda.get_device_capability(0)
    if capability < (8, 0):
        return f"expected a GPU of compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    reason = why_no_gpu() if marked else None
    if reason is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def pages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVFP4 KV is read from its pages only: no newest tokens in 16 bits beside them."""
    monkeypatch.setenv("VLLM_XLAYER_NEWEST_TOKENS", "0")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device to put tensors on."""
    return torch.device(request.param, 0) if request.param == "cuda" else torch.device("cpu")
