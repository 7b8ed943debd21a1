"""Batches for nvfp4_prefix_attention: those of nvfp4_paged_attention whose queries come after all tokens."""

import ctypes
from dataclasses import dataclass, fields

import torch
from reference.attention_batches import Batch, make_batch
from reference.attention_cases import Case
from reference.attention_checks import check_batch
from reference.emulated import attention_args, library

from vllm_xlayer import ops


class PrefixBatch(Batch):
    """Runs through the op."""

    @property
    def max_query_len(self) -> int:
        """Of requests that attend to anything."""
        c = self.case
        return max(q for q, length in zip(c.queries, c.lengths, strict=True) if length)

    def workspace(self, max_requests=None):
        return None

    def launch(self, workspace, out, lse):
        """Merged with nothing: what is in out must not be read. Only requests without tokens keep theirs."""
        lse.fill_(-torch.inf)
        for r, length in enumerate(self.case.lengths):
            if length == 0:
                out[self.case.rows(r)] = 0
        self.merge(out, lse)

    def merge(self, out, lse):
        c = self.case
        ops.nvfp4_prefix_attention(
            self.q, self.pool.cache, self.block_table, self.seq_lens, self.query_starts, self.k_scale,
            self.v_scale, out, lse, scale=c.softmax_scale, max_query_len=self.max_query_len,
            rotated_keys=c.rotated_keys,
        )  # fmt: skip


@dataclass(frozen=True)
class EmulatedPrefixBatch(PrefixBatch):
    """Runs through the CUDA kernel's own code."""

    late_copies: bool = True

    def merge(self, out, lse):
        args = attention_args(self, out, lse, late_copies=self.late_copies)
        args.q_len = self.max_query_len
        assert library("nvfp4_prefix").run_nvfp4_prefix(ctypes.byref(args)) == 0


def make(case: Case, device: torch.device, kind: type[PrefixBatch] = PrefixBatch, **how) -> PrefixBatch:
    batch = make_batch(case, device)
    return kind(**{f.name: getattr(batch, f.name) for f in fields(batch)}, **how)


def check(case: Case, device: torch.device, kind: type[PrefixBatch] = PrefixBatch, **how) -> None:
    batch = make(case, device, kind, **how)
    check_batch(batch, *batch.run())


def check_merge(case: Case, device: torch.device, kind: type[PrefixBatch] = PrefixBatch, **how) -> None:
    """Merged with attention to other tokens, of any weight: as float64 sees_all the two."""
    batch = make(case, device, kind, **how)
    own, own_lse = batch.run()
    g = torch.Generator().manual_seed(1)
    held = torch.randn(own.shape, generator=g).to(own.dtype)
    held_lse = own_lse.clamp(-50.0) + torch.randn(own_lse.shape, generator=g) * 4
    held_lse[:, ::5] += 60.0
    held_lse[:, 1::5] -= 60.0
    held_lse[:, 2::5] = -torch.inf
    held[2::5] = torch.nan
    out, lse = held.to(device, copy=True), held_lse.to(device, copy=True)
    batch.merge(out, lse)
    out, lse = out.cpu().double(), lse.cpu().double()
    exact_lse = torch.logaddexp(own_lse.double(), held_lse.double())
    weight, others = (
        torch.nan_to_num((x.double() - exact_lse).exp()).T[..., None] for x in (own_lse, held_lse)
    )
    parts = weight * own.double(), others * torch.nan_to_num(held.double())
    # own is rounded once more than the kernel's: two roundings, and 2 ** -18 for weights.
    rounding = torch.finfo(own.dtype).eps
    for r, length in enumerate(case.lengths):
        rows = case.rows(r)
        if length == 0:
            assert torch.equal(out[rows].nan_to_num(7.0), held[rows].double().nan_to_num(7.0))
            assert torch.equal(lse[:, rows], held_lse[:, rows].double())
            continue
        bound = (parts[0][rows].abs() + parts[1][rows].abs()) * (rounding + 2.0**-18) + 1e-6
        assert ((out[rows] - (parts[0] + parts[1])[rows]).abs() <= bound).all(), f"request {r} in {case}"
        off = (lse - exact_lse)[:, rows].abs()
        assert (off <= 4e-6 * (1 + exact_lse[:, rows].abs())).all(), f"request {r} in {case}"


def case(lengths: tuple[int, ...], q_lens: tuple[int, ...], **how) -> Case:
    return Case(lengths, q_len=max(q_lens), q_lens=q_lens, sees_all=True, **how)


EDGES = case((1, 16, 127, 128, 129, 255, 300, 0), (5, 16, 33, 1, 40, 3, 17, 2))
"""Around tiles of 128 tokens; 160 rows are two thread blocks, whose second has one warpgroup's rows."""
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
    case((0, 300, 0), (200, 5, 40)),  # thread blocks are for those that attend to something
)
MERGED = EDGES, case((300, 129), (130, 7), group=1, dtype=torch.float16)
