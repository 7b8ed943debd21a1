"""Cases of nvfp4_paged_attention as tensors in poisoned pools, and what the op makes of them."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from reference import attention_ref as ref
from reference import nvfp4_ref as ref4
from reference.attention_cases import TILE, Case
from reference.pools import Pool, make_pool, scalar

from vllm_xlayer import ops
from vllm_xlayer.nvfp4 import ScaleOrder

NEVER_WRITTEN = 2  # blocks of each pool that stay poisoned


@dataclass(frozen=True)
class Batch:
    """A case's inputs on a device."""

    case: Case
    pool: Pool
    q: torch.Tensor
    """[T, Hq, D], a slice of a fused projection whose other parts are NaN"""
    block_table: torch.Tensor
    """int32 [R, M], a slice of a wider one"""
    seq_lens: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    sinks: torch.Tensor | None
    newest: torch.Tensor | None = None
    """[rows, 2, H, n, D] of q's dtype"""
    newest_rows: torch.Tensor | None = None
    newest_from: torch.Tensor | None = None
    query_starts: torch.Tensor | None = None
    """int32 [R + 1], where the case has q_lens"""

    @property
    def device(self) -> torch.device:
        return self.q.device

    def only(self, requests: list[int]) -> "Batch":
        """The batch of some of the requests."""
        assert not self.case.q_lens
        q = self.q.unflatten(0, (-1, self.case.q_len))[requests].flatten(0, 1)
        case = replace(self.case, lengths=tuple(self.case.lengths[r] for r in requests))
        rows = None if self.newest_rows is None else self.newest_rows[requests]
        first = None if self.newest_from is None else self.newest_from[requests]
        return replace(
            self, case=case, q=q, block_table=self.block_table[requests], seq_lens=self.seq_lens[requests],
            newest_rows=rows, newest_from=first,
        )  # fmt: skip

    def workspace(self, max_requests: int | None = None) -> ops.AttentionWorkspace:
        """Poisoned, as memory may be."""
        c = self.case
        made = ops.AttentionWorkspace.create(
            self.device,
            num_q_heads=c.heads,
            num_kv_heads=c.kv_heads,
            head_size=c.head_size,
            max_requests=len(c.lengths) if max_requests is None else max_requests,
            max_q_len=c.q_len,
            split_units=c.split_units,
            max_tokens=self.block_table.shape[1] * c.block_size,
        )
        made.schedule.fill_(-1)
        made.partial.fill_(torch.nan)
        return made

    def launch(self, workspace: ops.AttentionWorkspace, out: torch.Tensor, lse: torch.Tensor | None) -> None:
        c = self.case
        kernel_q_len = c.kernel_q_len if c.q_lens else None
        ops.nvfp4_attention_schedule(
            self.seq_lens, workspace, c.q_len, c.window, self.query_starts, kernel_q_len, self.newest_from
        )
        ops.nvfp4_paged_attention(
            self.q,
            self.pool.cache,
            self.block_table,
            self.seq_lens,
            workspace,
            self.k_scale,
            self.v_scale,
            out,
            scale=c.softmax_scale,
            q_len=c.q_len,
            window=c.window,
            soft_cap=c.soft_cap,
            sinks=self.sinks,
            lse=lse,
            scale_order=c.order,
            newest=self.newest,
            newest_rows=self.newest_rows,
            newest_from=self.newest_from,
            query_starts=self.query_starts,
            kernel_q_len=kernel_q_len,
            rotated_keys=c.rotated_keys,
        )

    def run(self, workspace: ops.AttentionWorkspace | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """(output [T, Hq, D], LSE [Hq, T]) on the CPU, after a look at the memory around."""
        tokens, heads, head_size = self.q.shape
        wide = torch.full(
            (tokens + 2, heads + 1, head_size + 8), torch.nan, dtype=self.q.dtype, device=self.device
        )
        wide_lse = torch.full((heads + 1, tokens + 3), 7.0, device=self.device)
        out, lse = wide[1:-1, 1:, 8:], wide_lse[1:, 2:-1]
        self.launch(workspace or self.workspace(len(self.case.lengths) + 3), out, lse)
        result = out.cpu().clone(), lse.cpu().clone()
        out.fill_(torch.nan)
        lse.fill_(7.0)
        assert wide.isnan().all() and (wide_lse == 7.0).all(), "memory around the outputs was written"
        return result

    def dequantised(self) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of all blocks [B, N, H, D] float64 on the CPU, with the global scales."""
        c, pool = self.case, self.pool
        start = pool.layer * pool.page_bytes
        pages = pool.raw[:, start : start + pool.page_bytes].cpu().numpy()
        shape = (c.kv_heads, c.block_size, c.head_size)
        k = ref.dequantise_pages(pages, *shape, False, False) * c.k_scale
        v = ref.dequantise_pages(pages, *shape, True, c.order == ScaleOrder.SWIZZLED) * c.v_scale
        return keys_of(c, torch.from_numpy(k)), torch.from_numpy(v)


def keys_of(case: Case, kept: torch.Tensor) -> torch.Tensor:
    """K of what a case keeps of it, float64 [..., D]."""
    return kept @ torch.from_numpy(ref4.keys_from_kept(case.head_size)) if case.rotated_keys else kept


def make_batch(case: Case, device: torch.device) -> Batch:
    """Random nibbles and block scales where some query sees them; all else in the pool is poisoned.

    Full blocks are shuffled and repeated, inside a request and between requests. Table entries past a
    request's tokens, and before its window, are -1 or a block that is never written.
    """
    rng = np.random.default_rng(case.seed)
    n = case.block_size
    full = [length // n for length in case.lengths]
    partial = [int(length % n > 0) for length in case.lengths]
    newest_from = _draw_newest_from(case, rng)
    shared = max(1, sum(full) * 2 // 3)
    firsts = len(case.lengths) if case.first_logit else 0
    ids = rng.permutation(shared + sum(partial) + NEVER_WRITTEN + firsts)
    at_split = [NEVER_WRITTEN, NEVER_WRITTEN + shared, len(ids) - firsts]
    poisoned, shared_ids, own_ids, first_ids = np.split(ids, at_split)

    columns = max([f + p for f, p in zip(full, partial, strict=True)], default=0) + 1
    table = rng.choice([-1, *poisoned], (len(case.lengths), columns + 2)).astype(np.int32)
    seen = np.zeros((len(ids), n), bool)
    for r, length in enumerate(case.lengths):
        first = case.first_seen(r)
        blocks = rng.choice(shared_ids, full[r])
        if firsts:
            blocks[:1] = first_ids[r]
        if partial[r]:
            blocks = np.append(blocks, own_ids[sum(partial[:r])])
        table[r, first // n : len(blocks)] = blocks[first // n :]
        tokens = np.arange(first, length)
        tokens = tokens[tokens // TILE * TILE < newest_from[r]]
        seen[blocks[tokens // n], tokens % n] = True

    pool = make_pool(device, len(ids), case.kv_heads, n, case.head_size)
    start = pool.layer * pool.page_bytes
    raw = pool.raw.cpu().numpy()
    pages = raw[:, start : start + pool.page_bytes]
    block, token = np.nonzero(seen)
    low, high = (0, 0x7F) if case.all_scales else (32, 52)  # 2^-3 ... 0.7: values of about 1
    for is_v in (False, True):
        swizzled = case.order == ScaleOrder.SWIZZLED
        data_at, scale_at = ref.byte_addresses(case.kv_heads, n, case.head_size, is_v, swizzled)
        at = data_at[token]
        pages[block[:, None, None], at] = rng.integers(0, 256, at.shape, dtype=np.uint8)
        if is_v and firsts:
            of_first = block[token == 0, None, None], data_at[0]
            pages[of_first] = ref4.packed(ref4.unpacked(pages[of_first]) & 8)  # only its signs are left
        at = scale_at[token]
        scales = rng.integers(low, high, at.shape, dtype=np.uint8)
        if case.outliers and not is_v:
            scales[..., 0] += 4 * 8  # an octave of e4m3 is 8 numbers
        if case.small_v and is_v:
            scales = rng.integers(1, 8, at.shape, dtype=np.uint8)
        # Zero and subnormal scales, too.
        pages[block[:, None, None], at] = np.where(
            rng.random(at.shape) < 0.05, rng.integers(0, 8, at.shape, dtype=np.uint8), scales
        )
    pool.raw.copy_(torch.from_numpy(raw))

    generator = torch.Generator().manual_seed(case.seed)
    rows = sum(case.queries)
    width = case.heads * case.head_size
    fused = torch.full((rows, width + 2 * case.kv_heads * case.head_size), torch.nan)
    fused[:, :width] = torch.randn(rows, width, generator=generator) * case.q_size
    if firsts:
        fused[:, :width] += _towards_first_tokens(case, pages, table).flatten(1)
    q = fused.to(case.dtype).to(device)[:, :width].unflatten(1, (case.heads, case.head_size))
    sinks = torch.randn(case.heads, generator=generator) * 2 if case.sinks else None
    newest, newest_rows = _make_newest(case, newest_from, rng, generator)
    with_newest = () if newest is None else (newest, newest_rows, torch.from_numpy(newest_from))
    return Batch(
        case,
        pool,
        q,
        torch.from_numpy(table).to(device)[:, :columns],
        torch.tensor(case.lengths, dtype=torch.int32, device=device),
        scalar(case.k_scale, device),
        scalar(case.v_scale, device),
        None if sinks is None else sinks.to(device),
        *(t.to(device) for t in with_newest),
        query_starts=_query_starts(case, device),
    )


def _query_starts(case: Case, device: torch.device) -> torch.Tensor | None:
    if not case.q_lens:
        return None
    starts = [case.rows(r).start for r in range(len(case.lengths))]
    return torch.tensor([*starts, sum(case.q_lens)], dtype=torch.int32, device=device)


def _draw_newest_from(case: Case, rng: np.random.Generator) -> np.ndarray:
    """int32 [R]: from which token on each request's are read unquantised; past its tokens for some."""
    lengths = np.array(case.lengths, dtype=np.int64)
    low = np.maximum(lengths - case.newest, 0)
    drawn = rng.integers(low, lengths + 1)
    # Half of them all that a row holds; a fifth none.
    how = rng.random(len(lengths))
    drawn = np.where(how < 0.5, low, np.where(how < 0.7, 2**31 - 1, drawn))
    return (drawn if case.newest else np.full_like(drawn, 2**31 - 1)).astype(np.int32)


def _make_newest(
    case: Case, newest_from: np.ndarray, rng: np.random.Generator, generator: torch.Generator
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(memory, int32 rows [R]): Gaussian tokens at the places that are read, NaN elsewhere."""
    requests = len(case.lengths)
    rows = torch.from_numpy(rng.permutation(requests + 2)[:requests].astype(np.int32))
    if not case.newest:
        return None, rows
    shape = (requests + 2, 2, case.kv_heads, case.newest, case.head_size)
    memory = torch.full(shape, torch.nan, dtype=case.dtype)
    size = torch.tensor([case.k_scale * (400 if case.all_scales else 1), case.v_scale])
    size *= torch.tensor([1.0, 0.005 if case.small_v else 1.0])
    for r, length in enumerate(case.lengths):
        tokens = np.arange(case.first_seen(r), length)
        places = tokens[tokens // TILE * TILE >= newest_from[r]] % case.newest
        values = torch.randn(2, case.kv_heads, len(places), case.head_size, generator=generator)
        memory[int(rows[r])][:, :, places] = (values * size[:, None, None, None]).to(case.dtype)
        if newest_from[r] >= length:
            rows[r] = -1 if rng.random() < 0.5 else 2**30  # not read
    return memory, rows


def _towards_first_tokens(case: Case, pages: np.ndarray, table: np.ndarray) -> torch.Tensor:
    """[T, Hq, D]: what gives a query the logit ``case.first_logit`` of its request's first token."""
    blocks = table[:, 0].clip(0)  # a request without tokens has none, and no query that sees any
    shape = (case.kv_heads, case.block_size, case.head_size)
    k = ref.dequantise_pages(pages[blocks], *shape, False, False)[:, 0] * case.k_scale
    k = keys_of(case, torch.from_numpy(k)).numpy()
    along = np.nan_to_num(k) / np.maximum(np.nan_to_num((k * k).sum(-1, keepdims=True)), 1e-9)
    rows = torch.from_numpy(along * case.first_logit / case.softmax_scale).float()
    return rows.repeat_interleave(case.group, 1).repeat_interleave(torch.tensor(case.queries), 0)
