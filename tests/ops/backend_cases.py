"""Batches for the NVFP4 backend, and the check against float64 attention. Used on CPU and GPU."""

from dataclasses import dataclass

import numpy as np
import torch

from vllm_xlayer import nvfp4, ops
from vllm_xlayer.attention.decode import DecodePlanner
from vllm_xlayer.attention.metadata import NVFP4Metadata


@dataclass(frozen=True)
class Case:
    """Requests as (tokens cached before this step, tokens of this step)."""

    requests: tuple[tuple[int, int], ...]
    capacity: int = 4096
    window: int | None = None
    soft_cap: float | None = None
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    layers: int = 1
    dtype: torch.dtype = torch.bfloat16
    decodes: int = 0
    """So many of the first requests are decode requests, which see their own tokens quantised too."""
    sinks: bool = False
    shares_kv: bool = False
    """The layer reads another's pages: its step's tokens are quantised, too."""

    def sink_values(self) -> torch.Tensor:
        """[Hq] as in a checkpoint. A score is about N(0, 1), so they take from a few percent to most of the
        weight of a token's keys, and no two heads have the same."""
        return torch.linspace(-2, 5, self.num_heads).to(self.dtype)

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if k != "requests" and v != getattr(Case, k)]
        return "+".join(f"{c}/{n}" for c, n in self.requests) + "".join(f",{c}" for c in changed)


CASES = (
    Case(((0, 5),)),
    Case(((37, 1),)),
    Case(((15, 1), (16, 1), (17, 1), (0, 1))),
    Case(((100, 1), (0, 40), (33, 17), (250, 3)), layers=3),
    Case(((100, 1), (0, 0), (33, 17)), layers=3),
    Case(((300, 1), (20, 30), (300, 40)), capacity=64),
    Case(((300, 1), (20, 30), (300, 40)), capacity=64, soft_cap=5.0),
    Case(((300, 1), (20, 30), (300, 40)), capacity=90, window=50, layers=2),
    Case(((90, 9),), window=1),
    Case(((64, 20), (10, 2)), head_size=128, num_heads=8, num_kv_heads=1, dtype=torch.float16),
    Case(((64, 20), (10, 2)), head_size=80, block_size=32, num_heads=3, num_kv_heads=3),
    Case(((100, 1), (0, 1), (300, 1)), decodes=3, layers=3),
    Case(((100, 1), (37, 1), (0, 40), (33, 17)), decodes=2, layers=3),
    Case(((100, 4), (12, 4), (0, 0)), decodes=3, head_size=128, num_heads=8, num_kv_heads=1),
    Case(
        ((100, 3), (300, 3), (33, 5)), decodes=2, window=50, soft_cap=5.0, block_size=32, dtype=torch.float16
    ),
    Case(((15, 1), (16, 1), (17, 1), (0, 1)), sinks=True),
    Case(((0, 5), (0, 0), (33, 17)), sinks=True, num_heads=16, layers=3),
    Case(((300, 1), (20, 30), (300, 40)), capacity=64, sinks=True),
    Case(((300, 1), (20, 30), (300, 40)), capacity=90, window=50, soft_cap=5.0, sinks=True),
    Case(((100, 1), (37, 1), (0, 40), (33, 17)), decodes=2, layers=3, sinks=True),
    Case(((100, 4), (12, 4), (0, 0)), decodes=3, num_heads=16, sinks=True),
    Case(((100, 3), (300, 3), (33, 5)), decodes=2, window=50, block_size=32, dtype=torch.float16, sinks=True),
    Case(((100, 1), (37, 4), (300, 2), (0, 1), (33, 17)), decodes=4, layers=3, sinks=True),
    Case(
        ((100, 2), (300, 4), (12, 1), (0, 0)),
        decodes=4,
        window=50,
        head_size=128,
        num_heads=8,
        num_kv_heads=1,
    ),
    Case(((0, 5), (0, 40), (0, 0), (0, 1)), sinks=True),  # nothing is in the cache
    Case(((0, 40), (0, 30), (0, 17)), capacity=64, window=20),
    Case(((0, 5), (33, 17), (300, 2)), capacity=100, shares_kv=True, layers=3),
)


def make_impl(impl_class, case: Case, device: torch.device):
    """A layer's impl, made and loaded as vLLM does it: the sinks get their values after the constructor."""
    from vllm.config import VllmConfig, set_current_vllm_config

    sinks = None
    if case.sinks:
        sinks = torch.nn.Parameter(torch.full((case.num_heads,), torch.nan, dtype=case.dtype, device=device))
    with set_current_vllm_config(VllmConfig()):
        impl = impl_class(
            case.num_heads, case.head_size, case.head_size**-0.5, case.num_kv_heads,
            sliding_window=case.window, logits_soft_cap=case.soft_cap, sinks=sinks,
        )  # fmt: skip
    if sinks is not None:
        sinks.data.copy_(case.sink_values())
    impl.process_weights_after_loading(case.dtype)
    if case.shares_kv:
        impl.shared_kv = "another"
    return impl


def check_case(case: Case, impl, device: torch.device, exact_softmax: bool) -> None:
    """Writes random K and V through the impl, runs one step, and compares with float64 attention in which
    cached tokens have their dequantised values and this step's tokens the exact ones.

    The error allowed is one rounding of the output to 16 bits and one more of each part that is merged;
    unless ``exact_softmax``, also twice the error of plain PyTorch attention in the query's dtype.
    """
    generator = torch.Generator().manual_seed(0)
    n, heads, size = case.block_size, case.num_kv_heads, case.head_size
    totals = [c + q for c, q in case.requests]
    blocks_of = [-(-t // n) for t in totals]
    table = torch.randperm(sum(blocks_of) + 3, generator=generator)
    pool = torch.full(
        (len(table), case.layers, heads, n, nvfp4.content_bytes(size)), 0xFF, dtype=torch.uint8, device=device
    )
    kv_cache = pool[:, -1]
    block_table = torch.full((len(totals), max(1, *blocks_of)), -1, dtype=torch.int32)
    at = 0
    for r, count in enumerate(blocks_of):
        block_table[r, :count] = table[at : at + count]
        at += count

    def random(tokens: int, h: int) -> torch.Tensor:
        return torch.randn(tokens, h, size, generator=generator).to(case.dtype).to(device)

    def slots(r: int, first: int, last: int) -> torch.Tensor:
        p = torch.arange(first, last)
        return block_table[r, p // n].long() * n + p % n

    layer = type("Layer", (), {})()
    layer._k_scale = torch.tensor(0.5, device=device)
    layer._v_scale = torch.tensor(2.0, device=device)
    keys = [random(t, heads) for t in totals]
    values = [random(t, heads) for t in totals]
    for r, t in enumerate(totals):
        impl.do_kv_cache_update(layer, keys[r], values[r], kv_cache, slots(r, 0, t).to(device))

    queries = [random(q, case.num_heads) for _, q in case.requests]
    own = [slice(c, c + q) for c, q in case.requests]
    starts = np.concatenate([[0], np.cumsum([q for _, q in case.requests])])
    metadata = NVFP4Metadata(
        num_actual_tokens=int(starts[-1]),
        query_starts=starts[case.decodes :],
        seq_lens=np.array(totals[case.decodes :]),
        block_table=block_table[case.decodes :].to(device),
        slot_mapping=torch.empty(0),
        decode=decode_batch(case, totals, block_table, device),
    )
    # vLLM's buffers are as long as the batch is padded.
    padded = max(int(starts[-1]), case.decodes * case.requests[0][1])
    queries.append(random(padded - int(starts[-1]), case.num_heads))
    # As vLLM has them: views of one projection's result.
    own_kv = [torch.cat([x[s] for x, s in zip(side, own, strict=True)]) for side in (keys, values)]
    counts = (case.num_heads, heads, heads)
    queries = torch.cat(queries)
    projected = torch.full((padded, sum(counts), size), torch.nan, dtype=case.dtype, device=device)
    query, key, value = projected.split(counts, dim=1)
    query.copy_(queries)
    key[: len(own_kv[0])], value[: len(own_kv[1])] = own_kv
    output = torch.full((padded + 2, case.num_heads, size), 7.0, dtype=case.dtype, device=device)
    impl.forward(layer, query, key, value, kv_cache, metadata, output)
    assert (output[-2:] == 7.0).all(), "rows past the batch were written"
    for r, (cached, q) in enumerate(case.requests):
        if q == 0:
            continue
        k, v = keys[r].double().cpu(), values[r].double().cpu()
        quantised = totals[r] if r < case.decodes or case.shares_kv else cached
        if quantised:
            dense = [torch.empty(quantised, heads, size, device=device) for _ in range(2)]
            ops.gather_nvfp4(
                kv_cache, block_table[r : r + 1].to(device), torch.zeros(1, dtype=torch.int32, device=device),
                torch.tensor([0, quantised], dtype=torch.int32, device=device),
                layer._k_scale, layer._v_scale, *dense, rotated_keys=nvfp4.ROTATED_KEYS,
            )  # fmt: skip
            if r >= case.decodes:  # the workspace holds 16-bit values: round as it does
                dense = [d.to(case.dtype) for d in dense]
            k[:quantised], v[:quantised] = (d.double().cpu() for d in dense)
        query_r = queries[starts[r] : starts[r + 1]].cpu()
        expected = exact(case, query_r.double(), k, v, cached)
        got = output[starts[r] : starts[r + 1]].double().cpu()
        error = (got - expected).abs().amax((0, 2))  # of each head: with sinks they differ in magnitude
        bound = 3 * torch.finfo(case.dtype).eps * expected.abs().amax((0, 2))
        if not exact_softmax:
            plain = exact(case, *(t.to(case.dtype) for t in (query_r, k, v)), cached)
            bound += 2 * (plain.double() - expected).abs().amax((0, 2))
        assert (error <= bound).all(), (
            f"request {r} of {case}: errors {error.tolist()}, bounds {bound.tolist()}"
        )


def decode_batch(case: Case, totals: list[int], block_table: torch.Tensor, device: torch.device):
    """The metadata's decode part as the builder makes it, or None."""
    if case.decodes == 0:
        return None
    planner = DecodePlanner(
        device,
        num_heads=case.num_heads,
        num_kv_heads=case.num_kv_heads,
        head_size=case.head_size,
        max_requests=len(totals),
        max_query_len=4,
        windows=[None, case.window],
    )
    query_lens = np.array([q for _, q in case.requests])
    starts = torch.tensor([0, *query_lens.cumsum()], dtype=torch.int32, device=device)
    # Padding has no tokens, whatever its request's row says.
    lens = [t if q else 0 for t, (_, q) in zip(totals, case.requests, strict=True)]
    lens = torch.tensor(lens, dtype=torch.int32, device=device)
    return planner.plan(query_lens[: case.decodes], starts, lens, block_table.to(device))


def exact(case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cached: int) -> torch.Tensor:
    """Attention of one request in the tensors' dtype, query by query: q [n, Hq, D], k and v [m, H, D]."""
    group = case.num_heads // case.num_kv_heads
    sinks = case.sink_values().to(q.dtype)
    out = torch.empty_like(q)
    for i in range(len(q)):
        last = cached + i
        first = 0 if case.window is None else max(0, last - case.window + 1)
        for h in range(case.num_heads):
            scores = k[first : last + 1, h // group] @ q[i, h] * case.head_size**-0.5
            if case.soft_cap:
                scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
            if case.sinks:
                scores = torch.cat((scores, sinks[h : h + 1]))
            weights = torch.softmax(scores, 0)[: last + 1 - first]
            out[i, h] = weights @ v[first : last + 1, h // group]
    return out
