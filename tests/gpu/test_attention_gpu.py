"""What only a GPU can show of nvfp4_paged_attention: CUDA graphs, streams, splits, large addresses."""

from dataclasses import replace

import pytest
import torch
from reference.attention_batches import Batch, make_batch
from reference.attention_cases import Case
from reference.attention_checks import check_batch, check_case
from reference.pools import Pool

from vllm_xlayer import ops

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)


def with_lengths(batch: Batch, lengths: tuple[int, ...]) -> Batch:
    """The same blocks and queries with other lengths, none longer than the batch's own."""
    assert all(a <= b for a, b in zip(lengths, batch.case.lengths, strict=True))
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    return replace(batch, case=replace(batch.case, lengths=lengths), seq_lens=seq_lens)


@pytest.mark.parametrize("split_units", [0, 3])
@pytest.mark.parametrize("window", [0, 200])
@pytest.mark.parametrize(("head_size", "q_len"), [(64, 1), (128, 1), (128, 4), (256, 2)])
def test_graph_replay_is_bitwise_the_eager_result(head_size, q_len, window, split_units):
    """Schedule and attention captured once, replayed with other lengths, queries and block tables."""
    longest = (4000, 1000, 300, 300, 70, 33)
    case = Case(longest, q_len, head_size=head_size, sinks=True, split_units=split_units)
    batch = replace(make_batch(case, CUDA), case=replace(case, window=window))
    q, seq_lens, block_table = batch.q.clone(), batch.seq_lens.clone(), batch.block_table.clone()
    static = replace(batch, q=q, seq_lens=seq_lens, block_table=block_table)
    workspace = batch.workspace()
    out = torch.full_like(q, torch.nan)
    lse = torch.full((case.heads, len(q)), torch.nan, device=CUDA)
    static.launch(workspace, out, lse)  # modules are loaded at the first launch, which capture forbids
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.launch(workspace, out, lse)
    swapped = torch.tensor([1, 0, 3, 2, 4, 5], device=CUDA)
    for lengths, table in (
        (longest, batch.block_table),
        ((0, 0, 0, 0, 0, 0), batch.block_table),
        ((1, 1000, 0, 17, 64, 3), batch.block_table),
        ((4000, 1, 1, 1, 1, 1), batch.block_table),
        ((129, 129, 129, 129, 65, 0), batch.block_table[swapped]),
    ):
        eager = with_lengths(replace(batch, q=batch.q.flip(0).contiguous(), block_table=table), lengths)
        q.copy_(eager.q)
        block_table.copy_(table)
        seq_lens.copy_(eager.seq_lens)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        expected, expected_lse = eager.run()
        assert torch.equal(out.cpu(), expected) and torch.equal(lse.cpu(), expected_lse)
        check_batch(eager, expected, expected_lse)


def test_runs_on_the_current_stream():
    """Queued behind a long wait on a side stream: work on another stream would see the old queries."""
    batch = make_batch(Case((1000, 70)), CUDA)
    expected, _ = batch.run()
    late = replace(batch, q=torch.full_like(batch.q.contiguous(), torch.nan))
    workspace, out = batch.workspace(), torch.zeros_like(late.q)
    seq_lens = torch.zeros_like(batch.seq_lens)
    late = replace(late, seq_lens=seq_lens)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.q.copy_(batch.q)
        seq_lens.copy_(batch.seq_lens)
        late.launch(workspace, out, None)
    stream.synchronize()
    assert torch.equal(out.cpu(), expected)


def test_many_requests():
    """More requests than the scheduler has threads, most of them short, some of them empty."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 200, (700,), generator=generator)
    lengths[torch.randint(0, 700, (200,), generator=generator)] = 0
    lengths[[0, 350, 699]] = torch.tensor([3000, 5000, 2000])
    case = Case(tuple(lengths.tolist()), head_size=64, group=2)
    check_case(case, CUDA)
    check_case(replace(case, split_units=2), CUDA)


@pytest.mark.parametrize("q_len", [2, 4])
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize(
    "how",
    [{}, {"window": 100, "sinks": True}, {"soft_cap": 20.0, "dtype": torch.float16}, {"block_size": 48}],
    ids=str,
)
def test_more_lines_than_multiprocessors(head_size, how, q_len):
    """The kernels with small thread blocks, which small batches get with a fixed split only."""
    lengths = (0, 1, 16, 17, 63, 64, 65, 129, 500) * 12
    check_case(Case(lengths, q_len, head_size=head_size, **how), CUDA)


@pytest.mark.parametrize("length", [640, 1023])
@pytest.mark.parametrize("requests", [2, 50, 100])
def test_equal_lengths(requests, length):
    """Whole lines a part, or whole parts a line."""
    check_case(Case((length,) * requests, kv_heads=4, group=2), CUDA)


@pytest.mark.parametrize("length", [20_000, 20_017])
@pytest.mark.parametrize("requests", [1, 40])
def test_split_boundaries(length, requests):
    """Enough units that every part ends inside a request, or holds many heads."""
    check_case(Case((length,) + (100,) * (requests - 1), 2, head_size=64, kv_heads=1), CUDA)


def test_two_hundred_thousand_tokens():
    check_case(Case((200_003, 5), head_size=64, kv_heads=1, group=2, dtype=torch.float16), CUDA)


def test_blocks_beyond_four_gibibytes():
    """A block stride of 1 GiB: offsets do not fit 32 bits."""
    batch = make_batch(Case((70, 100), 2), CUDA)
    stride = 2**30
    blocks, row = batch.pool.raw.shape
    if torch.cuda.mem_get_info()[0] < blocks * stride + 2**30:
        pytest.skip(f"expected {blocks} GiB of free GPU memory")
    memory = torch.empty(blocks * stride, dtype=torch.uint8, device=CUDA)
    raw = memory.as_strided((blocks, row), (stride, 1))
    raw.copy_(batch.pool.raw)
    old = batch.pool
    cache = raw[:, old.layer * old.page_bytes :][:, : old.page_bytes].unflatten(-1, old.cache.shape[1:])
    large = replace(batch, pool=Pool(raw, cache, old.heads, old.block_size, old.head_size, old.layer))
    for a, b in zip(batch.run(), large.run(), strict=True):
        assert torch.equal(a, b)


RUN_COST = 5
"""Units, see csrc/kernels/nvfp4_attention/schedule.cuh; where lines are not equally long."""


def units(case: Case, length: int) -> int:
    """Units of 64 tokens that a request's queries see some token of."""
    first = replace(case, lengths=(length,)).first_seen(0)
    return -(-length // 64) - first // 64 if length else 0


@pytest.mark.parametrize("window", [0, 150])
def test_the_schedule(window):
    """One line of all units, and of what a further run of a part costs for each request that has some: where
    requests begin on it is ascending, and parts cover it."""
    lengths = tuple(range(0, 1400, 3))
    case = Case(lengths, 2, window=window, head_size=64, kv_heads=1, group=4)  # 8 rows: one tile a KV head
    batch = make_batch(replace(case, lengths=lengths[:1]), CUDA)
    workspace = batch.workspace(max_requests=len(lengths))
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=CUDA)
    ops.nvfp4_attention_schedule(seq_lens, workspace, 2, window)
    chunk, parts, total, _, *rest = workspace.schedule.tolist()
    begins, finished = rest[: len(lengths) + 1], rest[len(lengths) + 1 :]
    expected = [0]
    for length in lengths:
        expected.append(expected[-1] + (units(case, length) + RUN_COST if length else 0))
    assert begins == expected and total == expected[-1]
    assert len(finished) == len(lengths) and not any(finished)
    assert (parts - 1) * chunk < total <= parts * chunk and parts <= workspace.parts_for(2)
