"""CUDA kernels built for the CPU (tests/emulation); those of nvfp4_paged_attention as a `Batch` to check."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from reference.attention_cases import Batch

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests/emulation"

POINTER, INT, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
# As struct Args in nvfp4_attention.cpp.
FIELDS = [
    ("q", POINTER), ("q_stride_t", INT), ("q_stride_h", INT),
    ("out", POINTER), ("out_stride_t", INT), ("out_stride_h", INT),
    ("lse", POINTER), ("lse_stride_h", INT), ("is_f16", INT),
    ("cache", POINTER), ("block_stride", INT), ("heads", INT), ("block_size", INT), ("head_size", INT),
    ("block_table", POINTER), ("block_table_stride", INT), ("max_blocks", INT),
    ("seq_lens", POINTER), ("num_requests", INT), ("q_len", INT), ("num_q_heads", INT),
    ("k_scale", POINTER), ("v_scale", POINTER), ("sinks", POINTER),
    ("scale", DOUBLE), ("soft_cap", DOUBLE),
    ("window", INT), ("swizzled", INT), ("parts", INT), ("split_units", INT), ("late_copies", INT),
]  # fmt: skip


class Args(ctypes.Structure):
    _fields_ = FIELDS


def why_not() -> str | None:
    """The reason why the kernels cannot be built for the CPU here, None if they can."""
    if shutil.which("g++") is None:
        return "no g++, which builds the kernels for the CPU"
    if not (ROOT / "csrc").is_dir():
        return f"no source tree: {ROOT / 'csrc'} is not there"
    return None


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """tests/emulation/`name`.cpp, compiled."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-xlayer-emulation-"))
    target = folder / "kernels.so"
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-DXLAYER_EMULATED"]
    command += ["-I", str(SOURCES / "include"), "-I", str(ROOT / "csrc")]
    command += [str(SOURCES / f"{name}.cpp"), "-o", str(target)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(target))
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"the kernels do not compile for the CPU:\n{error.stderr[-3000:]}") from error
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class EmulatedBatch(Batch):
    """Runs through the CUDA kernels' own code, with as many thread blocks as `parts`."""

    parts: int = 3
    late_copies: bool = True

    def launch(self, workspace: object, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        c, cache = self.case, self.pool.cache
        args = Args(
            self.q.data_ptr(), self.q.stride(0), self.q.stride(1),
            out.data_ptr(), out.stride(0), out.stride(1),
            None if lse is None else lse.data_ptr(), 0 if lse is None else lse.stride(0),
            self.q.dtype == torch.float16,
            cache.data_ptr(), cache.stride(0), c.kv_heads, c.block_size, c.head_size,
            self.block_table.data_ptr(), self.block_table.stride(0), self.block_table.shape[1],
            self.seq_lens.data_ptr(), len(c.lengths), c.q_len, c.heads,
            self.k_scale.data_ptr(), self.v_scale.data_ptr(),
            None if self.sinks is None else self.sinks.data_ptr(),
            c.softmax_scale, c.soft_cap,
            c.window, int(c.order), self.parts, c.split_units, self.late_copies,
        )  # fmt: skip
        assert library("nvfp4_attention").run_nvfp4_attention(ctypes.byref(args)) == 0


def emulated(batch: Batch, **how: object) -> EmulatedBatch:
    return EmulatedBatch(**vars(batch), **how)  # type: ignore[arg-type]
