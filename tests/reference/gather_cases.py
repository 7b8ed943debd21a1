"""Batches for gather_nvfp4 whose tokens have three sources, and what must come out, in float64.

What must not be read is NaN: places of rows that hold nothing, tokens of pages that are at hand elsewhere,
rows of K and V that are no request's, and other layers' pages.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from reference import nvfp4_ref as ref
from reference.pools import make_pool, put_token, scalar, strided_rows

from vllm_xlayer.nvfp4 import ScaleOrder

NEVER = 2**31 - 1
UNTOUCHED = 7.0


@dataclass(frozen=True)
class Request:
    """Tokens [first, last) of a request with ``cached`` tokens and then ``own`` ones of this step.

    newest_from: what the op is told; row: whether it has one.
    """

    cached: int
    own: int
    first: int = 0
    last: int | None = None
    newest_from: int = NEVER
    row: bool = True

    @property
    def total(self) -> int:
        return self.cached + self.own

    @property
    def end(self) -> int:
        return self.total if self.last is None else self.last


MIXED = (
    Request(100, 7, newest_from=80),
    Request(100, 7, newest_from=83),  # its tile is not whole: from the next one
    Request(0, 5),
    Request(40, 0, first=40),  # a padding row
    Request(50, 3, newest_from=0, row=False),
    Request(64, 40, newest_from=72),  # more own tokens than places
    Request(90, 2, first=61, newest_from=64),  # a window begins within
    Request(90, 10, last=85, newest_from=70),  # a part of a request that was cut: none of its own
    Request(16, 1, newest_from=0),
    Request(35, 3),
    Request(70, 6, newest_from=0),  # the row has the last of them only
)


@dataclass(frozen=True)
class Case:
    requests: tuple[Request, ...] = MIXED
    head_size: int = 128
    heads: int = 2
    block_size: int = 16
    places: int = 32
    dtype: torch.dtype = torch.bfloat16
    source_dtype: torch.dtype | None = None
    """Of own and newest tokens, if it is another."""
    rotated: bool = True
    order: ScaleOrder = ScaleOrder.LINEAR
    has_own: bool = True
    has_newest: bool = True
    pad: int = 16
    """Elements between two heads of key and value."""

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if k != "requests" and v != getattr(Case, k)}
        return ",".join(f"{k}={v}" for k, v in changed.items()) or "mixed"

    def source(self, request: Request, position: int) -> str:
        """From the definition: own, newest or page."""
        if position >= request.cached:
            return "own" if self.has_own else "page"
        tile = position - position % 16
        is_among_last = request.total - position <= self.places
        if self.has_newest and request.row and is_among_last and request.newest_from <= tile:
            return "newest"
        return "page"


@dataclass
class Expected:
    """[T, H, D] float64 K and V; of which tokens the bits are given, and how far others may be."""

    k: torch.Tensor
    v: torch.Tensor
    k_is_exact: torch.Tensor
    """bool [T]: own tokens, and all where nothing was rotated"""
    largest: torch.Tensor
    """float64 [T]: the largest element of what K was rotated back from"""


@dataclass
class Gathering:
    """A case's arguments, as keywords of the op, and what it must make of them."""

    case: Case
    arguments: dict = field(default_factory=dict)
    sources: Counter = field(default_factory=Counter)

    def check(self, gather: Callable[..., None]) -> None:
        expected = self.expected
        gather(**self.arguments)
        outs = [self.arguments[name].cpu() for name in ("k_out", "v_out")]
        total = len(expected.k)
        for out in outs:
            assert (out[total:] == UNTOUCHED).all(), "rows beyond the requests were written"
        k, v = (out[:total] for out in outs)
        assert torch.equal(v, expected.v.to(v.dtype)), "V"
        exact = expected.k_is_exact
        assert torch.equal(k[exact], expected.k[exact].to(k.dtype)), "K that is not rotated back"
        # At most 31 additions in float32, of terms that are at most the largest; and one rounding.
        bound = 64 * 2.0**-24 * expected.largest[:, None, None]
        if k.dtype != torch.float32:
            bound = bound + torch.finfo(k.dtype).eps / 2 * (expected.k.abs() + bound)
        error = (k.double() - expected.k).abs()
        wrong = (~(error <= bound)).flatten(1).any(1).nonzero().flatten()
        assert len(wrong) == 0, f"K of tokens {wrong.tolist()[:10]}"

    expected: Expected = None  # type: ignore[assignment]


def make(case: Case, device: torch.device) -> Gathering:
    rng, generator = np.random.default_rng(case.head_size), torch.Generator().manual_seed(case.head_size)
    heads, size, n = case.heads, case.head_size, case.block_size
    source_dtype = case.source_dtype or case.dtype
    k_scale, v_scale = 0.37, 1.9
    back = torch.from_numpy(ref.keys_from_kept(size)) if case.rotated else torch.eye(size).double()

    blocks_of = [-(-r.total // n) for r in case.requests]
    order = rng.permutation(sum(blocks_of) + 2)
    pool = make_pool(device, len(order), heads, n, size)
    pages = pool.raw.cpu().numpy()
    table = np.full((len(case.requests), max(blocks_of)), -99, np.int32)
    total_own = sum(r.own for r in case.requests)
    first_own, behind = 2, 3  # rows of key and value that are no request's
    own = torch.full((2, first_own + total_own + behind, heads, size), torch.nan)
    own[:, first_own : first_own + total_own] = torch.randn(2, total_own, heads, size, generator=generator)
    own = own.to(source_dtype)
    newest = torch.full((len(case.requests) + 1, 2, heads, case.places, size), torch.nan, dtype=source_dtype)
    made = Gathering(case)
    k, v, is_kept = [], [], []
    at_block, at_own = 0, first_own
    for r, request in enumerate(case.requests):
        table[r, : blocks_of[r]] = order[at_block : at_block + blocks_of[r]]
        at_block += blocks_of[r]
        for position in range(request.first, request.end):
            source = case.source(request, position)
            made.sources[source] += 1
            if source == "own":
                token = own[:, at_own + position - request.cached].double()
                k.append(token[0])
                v.append(token[1])
                is_kept.append(False)
                continue
            if source == "newest":
                kept = torch.randn(2, heads, size, generator=generator).to(source_dtype)
                newest[r + 1, :, :, position % case.places] = kept
                kept_k, token_v = kept.double()
            else:
                kept_k, token_v = _put(pages, pool, table[r, position // n], position % n, rng, case.order)
                # The op's own float32 product, which is rounded once more.
                kept_k = (kept_k.float() * np.float32(k_scale)).double()
                token_v = (token_v.float() * np.float32(v_scale)).double()
            k.append(kept_k)
            v.append(token_v)
            is_kept.append(case.rotated)
        at_own += request.own
    pool.raw.copy_(torch.from_numpy(pages))
    tokens, as_kept, rotated = len(k), torch.stack(k), torch.tensor(is_kept)
    made.expected = Expected(
        torch.where(rotated[:, None, None], as_kept @ back, as_kept),
        torch.stack(v),
        ~rotated,
        as_kept.abs().amax((1, 2)),
    )

    def ints(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    out = torch.full((2, tokens + 2, heads, size), UNTOUCHED, dtype=case.dtype, device=device)
    lens = [request.end - request.first for request in case.requests]
    key, value = (strided_rows(part.to(device), case.pad) for part in own)
    made.arguments = dict(
        kv_cache=pool.cache, block_table=ints(table), seq_starts=ints([r.first for r in case.requests]),
        cu_seqlens=ints([0, *np.cumsum(lens)]), k_scale=scalar(k_scale, device),
        v_scale=scalar(v_scale, device), k_out=out[0], v_out=out[1], scale_order=case.order,
        rotated_keys=case.rotated,
        query_starts=ints(first_own + np.array([0, *np.cumsum([r.own for r in case.requests])])),
        seq_lens=ints([r.total for r in case.requests]),
    )  # fmt: skip
    if case.has_own:
        made.arguments |= dict(key=key, value=value)
    if case.has_newest:
        made.arguments |= dict(
            newest=newest.to(device),
            newest_rows=ints([r + 1 if request.row else -1 for r, request in enumerate(case.requests)]),
            newest_from=ints([request.newest_from for request in case.requests]),
        )
    return made


def _put(pages, pool, block: int, n: int, rng, order: ScaleOrder) -> torch.Tensor:
    """Random nibbles and scales of a token into its page; what they stand for: [2, H, D] float64."""
    values = []
    page = pages[block, pool.layer * pool.page_bytes : (pool.layer + 1) * pool.page_bytes]
    for is_v in (False, True):
        nibbles = rng.integers(0, 16, (pool.heads, pool.head_size), dtype=np.uint8)
        scales = rng.integers(0x20, 0x50, (pool.heads, pool.head_size // ref.GROUP), dtype=np.uint8)
        put_token(page, pool, is_v, n, nibbles, scales, order == ScaleOrder.SWIZZLED)
        exact = ref.dequantise(nibbles.reshape(-1, ref.GROUP), scales.reshape(-1))
        values.append(torch.from_numpy(exact.reshape(pool.heads, pool.head_size)))
    return torch.stack(values)
