"""The CUDA kernels on the CPU (tests/emulation): nvfp4_paged_attention as a `Batch`, writer and gather."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from reference.attention_batches import Batch
from reference.pools import Pool

from vllm_xlayer.nvfp4 import GROUP, ScaleChoice, ScaleOrder

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "tests/emulation"

POINTER, INT, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
# As struct Args in include/attention_args.h.
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
    ("warps", INT),
    ("teams", INT),
    ("newest", POINTER), ("newest_rows", POINTER), ("newest_from", POINTER), ("newest_tokens", INT),
    ("query_starts", POINTER), ("kernel_q_len", INT), ("rotated_keys", INT),
]  # fmt: skip


# As struct WriteArgs in nvfp4_write.cpp.
WRITE_FIELDS = [
    ("key", POINTER), ("value", POINTER),
    ("key_stride_t", INT), ("key_stride_h", INT), ("value_stride_t", INT), ("value_stride_h", INT),
    ("cache", POINTER), ("block_stride", INT), ("heads", INT), ("block_size", INT), ("head_size", INT),
    ("slots", POINTER), ("num_slots", INT), ("k_scale", POINTER), ("v_scale", POINTER),
    ("swizzled", INT), ("lanes", INT), ("wide", INT), ("rotated_keys", INT),
    ("newest", POINTER), ("newest_slots", POINTER), ("newest_tokens", INT),
]  # fmt: skip


# As struct GatherArgs in nvfp4_gather.cpp.
GATHER_FIELDS = [
    ("cache", POINTER), ("block_stride", INT), ("heads", INT), ("block_size", INT), ("head_size", INT),
    ("block_table", POINTER), ("block_table_stride", INT), ("max_blocks", INT),
    ("seq_starts", POINTER), ("cu_seqlens", POINTER), ("num_requests", INT),
    ("k_scale", POINTER), ("v_scale", POINTER), ("k_out", POINTER), ("v_out", POINTER),
    ("k_stride_t", INT), ("k_stride_h", INT), ("v_stride_t", INT), ("v_stride_h", INT),
    ("num_tokens", INT), ("dtype", INT), ("swizzled", INT), ("rotated_keys", INT),
    ("query_starts", POINTER), ("seq_lens", POINTER), ("key", POINTER), ("value", POINTER),
    ("key_stride_t", INT), ("key_stride_h", INT), ("value_stride_t", INT), ("value_stride_h", INT),
    ("newest", POINTER), ("newest_rows", POINTER), ("newest_from", POINTER), ("newest_tokens", INT),
    ("source_dtype", INT), ("each", INT), ("forwards", INT), ("at_once", INT),
]  # fmt: skip
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
"""In the order of enum Dtype."""


class Args(ctypes.Structure):
    _fields_ = FIELDS


class WriteArgs(ctypes.Structure):
    _fields_ = WRITE_FIELDS


AT_ONCE = 5 * 132
"""Thread blocks that an H200 holds."""


class GatherArgs(ctypes.Structure):
    _fields_ = GATHER_FIELDS


def why_not() -> str | None:
    """The reason why the kernels cannot be built for the CPU here, None if they can."""
    if shutil.which("g++") is None:
        return "no g++, which builds the kernels for the CPU"
    if not SOURCES.is_dir():
        return f"no source tree: {SOURCES} is not there"
    return None


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """Builds and loads NAME.cpp of tests/emulation."""
    folder = Path(tempfile.mkdtemp(prefix="vllm-xlayer-emulation-"))
    target = folder / "kernels.so"
    command = ["g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-DXLAYER_EMULATED"]
    command += ["-fno-strict-aliasing"]  # kernels move elements by words of 16 bytes
    command += ["-I", str(SOURCES / "include"), "-I", str(ROOT / "csrc"), str(SOURCES / f"{name}.cpp")]
    command += ["-o", str(target)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(target))
    except subprocess.CalledProcessError as error:
        raise AssertionError(f"the kernels do not compile for the CPU:\n{error.stderr[-3000:]}") from error
    finally:
        shutil.rmtree(folder)


def attention_args(batch: Batch, out: torch.Tensor, lse: torch.Tensor | None, **how: int) -> Args:
    """What a kernel is given for a batch. how: fields of the emulation's own."""

    def at(tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    c, q, cache = batch.case, batch.q, batch.pool.cache
    return Args(
        q=at(q), q_stride_t=q.stride(0), q_stride_h=q.stride(1), is_f16=q.dtype == torch.float16,
        out=at(out), out_stride_t=out.stride(0), out_stride_h=out.stride(1),
        lse=at(lse), lse_stride_h=0 if lse is None else lse.stride(0),
        cache=at(cache), block_stride=cache.stride(0),
        heads=c.kv_heads, block_size=c.block_size, head_size=c.head_size, num_q_heads=c.heads,
        block_table=at(batch.block_table), block_table_stride=batch.block_table.stride(0),
        max_blocks=batch.block_table.shape[1],
        seq_lens=at(batch.seq_lens), num_requests=len(c.lengths), q_len=c.q_len,
        k_scale=at(batch.k_scale), v_scale=at(batch.v_scale), sinks=at(batch.sinks),
        scale=c.softmax_scale, soft_cap=c.soft_cap, window=c.window, swizzled=int(c.order),
        split_units=c.split_units, newest=at(batch.newest), newest_rows=at(batch.newest_rows),
        newest_from=at(batch.newest_from), newest_tokens=c.newest,
        query_starts=at(batch.query_starts), kernel_q_len=c.kernel_q_len, rotated_keys=c.rotated_keys, **how,
    )  # fmt: skip


@dataclass(frozen=True)
class EmulatedBatch(Batch):
    """Runs through the CUDA kernels' own code, with as many thread blocks as `parts`, of so many warps."""

    parts: int = 3
    late_copies: bool = True
    warps: int = 4
    teams: int = 1

    def launch(self, workspace: object, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        how = {"parts": self.parts, "late_copies": self.late_copies, "warps": self.warps, "teams": self.teams}
        args = attention_args(self, out, lse, **how)
        assert library("nvfp4_attention").run_nvfp4_attention(ctypes.byref(args)) == 0


@dataclass(frozen=True)
class Schedule:
    """How the schedule kernel cuts a batch.

    Attributes:
        chunk: units of a part.
        total: units of the whole line.
        begins: [R + 1], where on it each request's units begin, and ``total``.
    """

    chunk: int
    parts: int
    total: int
    counts_newest: int
    begins: list[int]


def schedule_of(
    lengths: list[int],
    heads: int,
    parts: int,
    unit: int,
    newest_from: list[int] | None = None,
    q_len: int = 1,
    window: int = 0,
    split_units: int = 0,
) -> Schedule:
    """Of a batch with a query head for each of so many KV heads. parts: to aim for. unit: tokens."""
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    newest = None if newest_from is None else torch.tensor(newest_from, dtype=torch.int32)
    schedule = torch.empty(5 + len(lengths) * (1 + heads), dtype=torch.int32)
    run = library("nvfp4_attention").run_nvfp4_schedule
    run.argtypes = [POINTER, POINTER, INT, INT, INT, INT, INT, INT, INT, POINTER]
    newest_at = None if newest is None else newest.data_ptr()
    run(
        seq_lens.data_ptr(), newest_at, len(lengths), unit, heads, parts, q_len, window, split_units,
        schedule.data_ptr(),
    )  # fmt: skip
    chunk, made, total, counts_newest, *begins = schedule[: 5 + len(lengths)].tolist()
    return Schedule(chunk, made, total, counts_newest, begins)


def emulated(batch: Batch, **how: object) -> EmulatedBatch:
    return EmulatedBatch(**vars(batch), **how)  # type: ignore[arg-type]


def encode(groups: torch.Tensor, inverse: float, choice: ScaleChoice) -> tuple[torch.Tensor, torch.Tensor]:
    """The GPU's codec: float32 groups [G, 16] times inverse to (data [G, 8], scale [G]) uint8."""
    assert groups.dtype == torch.float32 and groups.is_contiguous() and groups.shape[1] == GROUP
    count = groups.shape[0]
    data, scale = (torch.empty(count, width, dtype=torch.uint8) for width in (GROUP // 2, 1))
    run = library("nvfp4_write").run_encode
    run.argtypes = [POINTER, INT, ctypes.c_float, INT, POINTER, POINTER]
    run(groups.data_ptr(), count, inverse, int(choice), data.data_ptr(), scale.data_ptr())
    return data, scale.flatten()


def write(
    pool: Pool,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    order: ScaleOrder,
    lanes: int,
    wide: bool,
    rotated_keys: bool = False,
    newest: torch.Tensor | None = None,
    newest_slots: torch.Tensor | None = None,
) -> None:
    """The writer's kernel with ``lanes`` threads a group, best of 9, bf16. ``wide``: 16-byte loads."""
    args = WriteArgs(
        key.data_ptr(), value.data_ptr(), key.stride(0), key.stride(1), value.stride(0), value.stride(1),
        pool.cache.data_ptr(), pool.cache.stride(0), pool.heads, pool.block_size, pool.head_size,
        slots.data_ptr(), slots.shape[0], k_scale.data_ptr(), v_scale.data_ptr(),
        int(order), lanes, wide, rotated_keys,
        *(None if t is None else t.data_ptr() for t in (newest, newest_slots)),
        1 if newest is None else newest.shape[3],
    )  # fmt: skip
    library("nvfp4_write").run_nvfp4_write(ctypes.byref(args))


def gather_nvfp4(
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_starts: torch.Tensor,
    cu_seqlens: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    scale_order: int = ScaleOrder.LINEAR,
    rotated_keys: bool = False,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    query_starts: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    newest: torch.Tensor | None = None,
    newest_rows: torch.Tensor | None = None,
    newest_from: torch.Tensor | None = None,
    each: int = 3,
    forwards: bool = True,
) -> None:
    """The gather's kernel, called as ``ops.gather_nvfp4`` is. It checks nothing.

    ``each``: tokens that a thread goes through, 0: as the launch chooses. ``forwards``: order of warps."""

    def at(tensor: torch.Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    def strides(tensor: torch.Tensor | None) -> tuple[int, int]:
        return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))

    _, heads, block_size, content = kv_cache.shape
    source = next((t.dtype for t in (key, newest) if t is not None), k_out.dtype)
    args = GatherArgs(
        kv_cache.data_ptr(), kv_cache.stride(0), heads, block_size, content // 9 * 8,
        block_table.data_ptr(), block_table.stride(0), block_table.shape[1],
        seq_starts.data_ptr(), cu_seqlens.data_ptr(), len(seq_starts),
        k_scale.data_ptr(), v_scale.data_ptr(), k_out.data_ptr(), v_out.data_ptr(),
        *strides(k_out), *strides(v_out), len(k_out), DTYPES.index(k_out.dtype), int(scale_order),
        rotated_keys,
        at(query_starts), at(seq_lens), at(key), at(value), *strides(key), *strides(value),
        at(newest), at(newest_rows), at(newest_from), 0 if newest is None else newest.shape[3],
        DTYPES.index(source), each, forwards, AT_ONCE,
    )  # fmt: skip
    library("nvfp4_gather").run_nvfp4_gather(ctypes.byref(args))


def gather_plan(heads: int, head_size: int, tokens: int, at_once: int = AT_ONCE) -> dict[str, int]:
    """How the gather's launch cuts its work, ``GatherPlan``. at_once: thread blocks that a device holds."""
    args = GatherArgs(heads=heads, block_size=16, head_size=head_size, num_tokens=tokens, at_once=at_once)
    plan = (INT * 6)()
    library("nvfp4_gather").run_gather_plan(ctypes.byref(args), plan)
    return dict(zip(("shares", "rounds", "lanes", "slots", "each", "threads"), plan, strict=True))
