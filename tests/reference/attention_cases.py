"""Batches for nvfp4_paged_attention in poisoned pools, and the check against float64 attention."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from reference import attention_ref as ref
from reference import nvfp4_ref as ref4
from reference.pools import Pool, make_pool, scalar

from vllm_xlayer import ops
from vllm_xlayer.nvfp4 import ScaleOrder

HEAD_SIZES = [64, 80, 96, 112, 128, 192, 256]  # with a decode kernel (tests/ops/test_published_limits.py)
TILE = 16  # tokens that come from one place
NEVER_WRITTEN = 2  # blocks of each pool that stay poisoned
LSE_ERROR = 1e-3
FLOAT32_ERROR = 1e-6  # relative: an LSE in the tens of thousands is a float32, too


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    """Tokens of each request, its q_len new ones included."""
    q_len: int = 1
    """Query tokens of each request; with q_lens the most."""
    q_lens: tuple[int, ...] = ()
    """Query tokens of each request, if they are not as many."""
    kernel_q_len: int = 1
    """With q_lens, what the kernel is chosen for."""
    kv_heads: int = 2
    group: int = 4
    head_size: int = 128
    block_size: int = 16
    window: int = 0
    soft_cap: float = 0.0
    sinks: bool = False
    order: ScaleOrder = ScaleOrder.LINEAR
    dtype: torch.dtype = torch.bfloat16
    k_scale: float = 1.0
    v_scale: float = 1.0
    q_size: float = 1.0
    """Standard deviation of the queries; the softmax scale is divided by it, so scores stay about 1."""
    all_scales: bool = False
    """Block scales of K and V over e4m3's whole range, instead of those of Gaussian K and V."""
    first_logit: float = 0.0
    """If not 0, about what every query's logit of its request's first token is, whose V is 0. Models attend
    to that token where they have nothing to look for; what they see then is in the others' tiny weights."""
    outliers: bool = False
    """Sixteen channels of K are sixteen times as large as the others, so logits are about 6."""
    small_v: bool = False
    """V of about 0.005: its block scales are subnormal numbers."""
    newest: int = 0
    """Places of a row of unquantised newest tokens; 0: there is no such memory. Which of a request's tokens
    are read from there is drawn; their pages are poisoned, and so is every place that no token is read from.
    """
    rotated_keys: bool = False
    """What is in pages and among the newest is rotated K."""
    split_units: int = 0
    sees_all: bool = False
    """Queries come after all of the tokens, of which a request may have none (nvfp4_prefix_attention)."""
    seed: int = 0

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in fields(self)[1:]]
        changed = [f"{name}={value}" for name, value in changed if value != getattr(Case, name)]
        return ",".join(["+".join(map(str, self.lengths)), *changed]).replace("torch.", "")

    @property
    def heads(self) -> int:
        return self.kv_heads * self.group

    @property
    def softmax_scale(self) -> float:
        k_size = self.k_scale * (400.0 if self.all_scales else 1.0)
        return self.head_size**-0.5 / (self.q_size * k_size)

    @property
    def queries(self) -> tuple[int, ...]:
        """Query tokens of each request."""
        return self.q_lens or (self.q_len,) * len(self.lengths)

    def first_seen(self, r: int) -> int:
        """The first token that a query of request r sees."""
        return max(0, self.lengths[r] - self.queries[r] - self.window + 1) if self.window else 0

    def rows(self, r: int) -> slice:
        """Request r's in q."""
        return slice(sum(self.queries[:r]), sum(self.queries[: r + 1]))


SHARP = tuple(
    Case((2048, 100, 1, 33), head_size=head_size, dtype=dtype, **how)
    for head_size, dtype in ((128, torch.bfloat16), (64, torch.bfloat16), (256, torch.float16))
    for how in (
        {"first_logit": 20.0},
        {"first_logit": 14.0, "q_len": 4, "window": 700, "sinks": True},
        {"outliers": True, "q_len": 2},
        {"outliers": True, "first_logit": 25.0, "small_v": True, "soft_cap": 50.0},
        {"small_v": True, "v_scale": 0.01},
    )
)
"""What real models' caches look like, and random ones never do."""


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


def rounding(dtype: torch.dtype, exact: torch.Tensor) -> float:
    """The error of rounding a result once."""
    info = torch.finfo(dtype)
    return max(info.eps / 2 * float(exact.abs().max()), info.smallest_normal * info.eps / 2)


def assert_accurate(
    what: str, got: torch.Tensor, exact: torch.Tensor, plain: list[torch.Tensor], dtype: torch.dtype
) -> None:
    """flash-attention's rule: at most twice the error of plain PyTorch in the dtype, and one rounding.

    Plain PyTorch may be asked in several ways, of which the worst counts. A NaN must be where the exact
    result has one, and only there. Plain PyTorch may spread one further (some matrix products do): its error
    counts where it has a number.
    """
    nan = exact.isnan()
    assert torch.equal(got.isnan(), nan), f"{what}: NaN at {(got.isnan() != nan).nonzero()[:5].tolist()}"
    if nan.all():
        return
    finite = ~nan
    error = float((got[finite].double() - exact[finite]).abs().max())
    plain_errors = [(way.double() - exact)[finite & way.isfinite()].abs() for way in plain]
    allowed = 2 * max(float(errors.max()) if errors.numel() else 0.0 for errors in plain_errors)
    allowed += rounding(dtype, exact[finite])
    assert error <= allowed, f"{what}: error {error:.3e}, allowed {allowed:.3e}"


def assert_lse(what: str, got: torch.Tensor, exact: torch.Tensor, query_error: float = 0.0) -> None:
    bounds = {"rtol": FLOAT32_ERROR, "atol": LSE_ERROR + query_error, "equal_nan": True}
    torch.testing.assert_close(got.double(), exact, **bounds, msg=lambda m: f"{what}, LSE: {m}")


def check_batch(batch: Batch, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Compares a batch's results, request by request, with float64 attention."""
    c, dtype = batch.case, batch.q.dtype
    k_pool, v_pool = batch.dequantised()
    q, table = batch.q.cpu(), batch.block_table.cpu().long()
    sinks = None if batch.sinks is None else batch.sinks.cpu()
    softmax = ref.Softmax(c.softmax_scale, c.window, c.soft_cap, sinks, c.sees_all)
    for r, length in enumerate(batch.seq_lens.tolist()):
        rows = c.rows(r)
        if rows.start == rows.stop:
            continue
        tokens = torch.arange(c.first_seen(r), length)
        blocks = table[r, tokens // c.block_size]
        k, v = k_pool[blocks, tokens % c.block_size], v_pool[blocks, tokens % c.block_size]
        if batch.newest is not None:
            newest = tokens // TILE * TILE >= batch.newest_from[r].item()
            if newest.any():
                memory = batch.newest.cpu()[int(batch.newest_rows[r])].double()
                kept, v[newest] = memory[:, :, tokens[newest] % c.newest].transpose(1, 2)
                k[newest] = keys_of(c, kept)
        exact, exact_lse = ref.attention(q[rows], k, v, softmax)
        given = as_given_to_products(c, q[rows], k)
        plain = [ref.attention_in(dtype, *given, v, softmax)]
        if (
            c.rotated_keys
        ):  # as they come, queries fit fp16; the roundings that plain adds may cancel this one
            plain.append(ref.attention(given[0].half().double(), given[1], v, softmax)[0])
        what = f"request {r} of {length} tokens in {c}"
        assert_accurate(what, out[rows], exact, plain, dtype)
        assert_lse(what, lse[:, rows], exact_lse, rotated_query_error(c, q[rows], k))


def as_given_to_products(case: Case, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and K that plain PyTorch has to multiply: both rotated where K is kept so, float64."""
    if not case.rotated_keys:
        return q, k
    kept, back = (torch.from_numpy(m(case.head_size)) for m in (ref4.kept_keys, ref4.keys_from_kept))
    return q.double() @ back.T, k @ kept


def rotated_query_error(case: Case, q: torch.Tensor, k: torch.Tensor) -> float:
    """The most that rounding rotated queries to fp16 can change a score by. As they come, they fit fp16."""
    if not case.rotated_keys or not len(k):
        return 0.0
    rotated, kept = as_given_to_products(case, q, k)
    rotated = rotated.unflatten(1, (case.kv_heads, -1)).abs()
    most = torch.einsum("ihgd,nhd->ihgn", rotated, kept.abs().nan_to_num(0.0)).nan_to_num(0.0).amax()
    return float(most) * case.softmax_scale * 2.0**-12


def check_case(case: Case, device: torch.device) -> None:
    batch = make_batch(case, device)
    check_batch(batch, *batch.run())


def check_one_newest(batch: Batch) -> None:
    """Of a batch of one token, which is among the newest: the output is its V, bit for bit."""
    newest_from = batch.newest_from
    assert batch.case.lengths == (1,) and newest_from is not None and int(newest_from[0]) == 0
    values = batch.newest[int(batch.newest_rows[0]), 1, :, 0].cpu()
    out, _ = batch.run()
    assert torch.equal(out[0], values.repeat_interleave(batch.case.group, 0))
