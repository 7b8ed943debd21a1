"""The compiled extension: loaded at the first call of an op."""

import functools
import importlib
import json
import os
from typing import Any

import torch

DEBUG_ENV = "VLLM_XLAYER_DEBUG"
OPS = (
    "reshape_and_cache_nvfp4",
    "gather_nvfp4",
    "copy_blocks",
    "land_rows",
    "newest_step",
    "nvfp4_attention_schedule",
    "nvfp4_paged_attention",
    "nvfp4_prefix_attention",
)
"""Those that a traced program may contain. (The others return sizes, once, before anything is traced.)"""


class ExtensionMissingError(ImportError):
    """The compiled extension cannot be imported."""


@functools.cache
def load() -> dict[str, Any]:
    """Load the extension, register the ops' fake versions, and return ``build_info()``."""
    try:
        extension = importlib.import_module("vllm_xlayer._C")
    except ImportError as error:
        raise ExtensionMissingError(
            "vllm_xlayer/_C.abi3.so: expected the compiled extension of this package, but importing it "
            f"failed: {error}. Install the package with `pip install .` in its source folder, or build in "
            "place with `python setup.py build_ext --inplace`; torch must be 2.11 or newer."
        ) from error
    for name in OPS:
        torch.library.register_fake(f"vllm_xlayer::{name}", _no_output)
    info: dict[str, Any] = json.loads(extension.build_info)
    return info


def build_info() -> dict[str, Any]:
    """What the extension was built for: keys cuda (bool), nvcc, archs, force_sm80, kernels, cxx, and decode.

    decode: the decode kernel's bounds max_q_len (query tokens of a request) and max_group (query heads a KV
    head), and its shapes, each with head_size, rows (query rows of a head tile), warps (of a thread block)
    and shared_bytes (dynamic shared memory of a thread block). max_head_size: of the CPU's, which has any
    multiple of 16 up to it, and of layers whose decode requests are dequantised first.
    """
    return dict(load())


def _no_output(*_args: object) -> None:
    """Fake version of the ops: they write into their arguments and return nothing."""


def require_cuda_build(op: str, *tensors: torch.Tensor) -> None:
    device = next((t.device for t in tensors if t.is_cuda), None)
    if device is not None and not load()["cuda"]:
        raise RuntimeError(
            f"{op}: got a tensor on {device}, but this build of vllm_xlayer has CPU ops only. "
            "Reinstall it with nvcc in CUDA_HOME or PATH (VLLM_XLAYER_CUDA=1 makes a missing nvcc an error)."
        )


def checks_values(tensor: torch.Tensor) -> bool:
    """Whether debug mode looks at values in this tensor's device memory.

    Not while a CUDA graph is captured: reading them would end the capture, and they mean nothing yet. What
    is replayed later is not checked.
    """
    debug = os.environ.get(DEBUG_ENV) == "1"  # any other value but 0 ends an engine's start (config.py)
    return debug and tensor.is_cuda and not torch.cuda.is_current_stream_capturing()
