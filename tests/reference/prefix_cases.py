"""Batches for nvfp4_prefix_attention: those of nvfp4_paged_attention whose queries come after all tokens."""

import ctypes
from dataclasses import dataclass, fields

import torch
from reference.attention_cases import Batch, Case, check_batch, make_batch
from reference.emulated import DOUBLE, INT, POINTER, library

from vllm_xlayer import ops

# As struct Args in tests/emulation/nvfp4_prefix.cpp.
FIELDS = [
    ("q", POINTER), ("q_stride_t", INT), ("q_stride_h", INT),
    ("out", POINTER), ("out_stride_t", INT), ("out_stride_h", INT),
    ("lse", POINTER), ("lse_stride_h", INT), ("is_f16", INT),
    ("cache", POINTER), ("block_stride", INT), ("heads", INT), ("block_size", INT), ("head_size", INT),
    ("block_table", POINTER), ("block_table_stride", INT),
    ("lens", POINTER), ("num_requests", INT), ("max_query_len", INT), ("num_q_heads", INT),
    ("query_starts", POINTER), ("k_scale", POINTER), ("v_scale", POINTER),
    ("scale", DOUBLE), ("rotated_keys", INT), ("late_copies", INT),
]  # fmt: skip


class Args(ctypes.Structure):
    _fields_ = FIELDS


class PrefixBatch(Batch):
    """Runs through the op."""

    def workspace(self, max_requests=None):
        return None

    def launch(self, workspace, out, lse):
        c = self.case
        ops.nvfp4_prefix_attention(
            self.q, self.pool.cache, self.block_table, self.seq_lens, self.query_starts, self.k_scale,
            self.v_scale, out, lse, scale=c.softmax_scale, max_query_len=max(c.queries),
            rotated_keys=c.rotated_keys,
        )  # fmt: skip


@dataclass(frozen=True)
class EmulatedPrefixBatch(PrefixBatch):
    """Runs through the CUDA kernel's own code."""

    late_copies: bool = True

    def launch(self, workspace, out, lse):
        c, cache = self.case, self.pool.cache
        args = Args(
            self.q.data_ptr(), self.q.stride(0), self.q.stride(1),
            out.data_ptr(), out.stride(0), out.stride(1), lse.data_ptr(), lse.stride(0),
            self.q.dtype == torch.float16,
            cache.data_ptr(), cache.stride(0), c.kv_heads, c.block_size, c.head_size,
            self.block_table.data_ptr(), self.block_table.stride(0),
            self.seq_lens.data_ptr(), len(c.lengths), max(c.queries), c.heads,
            self.query_starts.data_ptr(), self.k_scale.data_ptr(), self.v_scale.data_ptr(),
            c.softmax_scale, c.rotated_keys, self.late_copies,
        )  # fmt: skip
        assert library("nvfp4_prefix").run_nvfp4_prefix(ctypes.byref(args)) == 0


def make(case: Case, device: torch.device, kind: type[PrefixBatch] = PrefixBatch, **how) -> PrefixBatch:
    batch = make_batch(case, device)
    return kind(**{f.name: getattr(batch, f.name) for f in fields(batch)}, **how)


def check(case: Case, device: torch.device, kind: type[PrefixBatch] = PrefixBatch, **how) -> None:
    batch = make(case, device, kind, **how)
    check_batch(batch, *batch.run())


def case(lengths: tuple[int, ...], q_lens: tuple[int, ...], **how) -> Case:
    return Case(lengths, q_len=max(q_lens), q_lens=q_lens, sees_all=True, **how)


EDGES = case((1, 16, 127, 128, 129, 255, 300, 0), (5, 16, 33, 1, 40, 3, 17, 2))
"""Around tiles of 128 tokens; 160 rows are two thread blocks, of which the second has one warpgroup."""
CASES = (
    EDGES,
    case((300, 129), (100, 7), rotated_keys=True),
    case((300, 129), (130, 7), group=1, dtype=torch.float16),
    case((200, 40), (9, 30), group=16, kv_heads=1, rotated_keys=True),
    case((200, 400), (20, 30), block_size=32, k_scale=0.3, v_scale=2.5),
    case((200, 400), (20, 30), block_size=48, rotated_keys=True),
    case((1000, 70), (20, 30), block_size=784, kv_heads=1),
    case((300, 20), (5, 40), all_scales=True),
    case((700, 100), (12, 9), first_logit=20.0),
    case((700, 100), (12, 9), first_logit=14.0, rotated_keys=True, dtype=torch.float16),
    case((300, 100), (12, 9), outliers=True, small_v=True, v_scale=0.01),
    case((300, 100), (12, 9), q_size=100.0),
)
