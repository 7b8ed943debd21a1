"""nvfp4_paged_attention with pages of 16 tokens and a warp a KV head, which an sm_90 has.

Other GPUs run the same batches through the kernels that they have. Batches of few requests would run through
thread blocks of sixteen warps: these have enough.
"""

from dataclasses import replace

import pytest
import torch
from reference.attention_cases import SHARP, Case, check_batch, check_case, make_batch

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)

AROUND = (0, 1, 15, 16, 17, 31, 33, 80, 129, 500)
RAGGED = (*(30 + i * i % 2900 for i in range(50)), 9000)


@pytest.mark.parametrize("kv_heads", [4, 8])
@pytest.mark.parametrize(
    "how",
    [
        {}, {"newest": 64}, {"window": 100, "sinks": True}, {"window": 40, "newest": 128, "q_len": 2},
        {"soft_cap": 20.0, "dtype": torch.float16}, {"q_len": 2, "rotated_keys": True, "newest": 64},
        {"group": 8, "newest": 16}, {"all_scales": True, "q_size": 1e4},
    ],
    ids=str,
)  # fmt: skip
def test_many_requests(kv_heads, how):
    check_case(Case(AROUND * 6, kv_heads=kv_heads, **how), CUDA)


@pytest.mark.parametrize("newest", [0, 64])
def test_ragged(newest):
    """Requests of many parts, and parts of many requests."""
    check_case(Case(RAGGED, kv_heads=8, newest=newest, sinks=True), CUDA)


@pytest.mark.parametrize("length", [640, 1023])
def test_equal_lengths(length):
    check_case(Case((length,) * 40, kv_heads=8), CUDA)


@pytest.mark.parametrize("case", [c for c in SHARP if c.head_size == 128 and c.q_len <= 2], ids=str)
def test_what_models_look_like(case):
    check_case(replace(case, lengths=(2048, 100, 1, 33) * 9, kv_heads=4, newest=64), CUDA)


def test_uneven_queries():
    q_lens = (1, 0, 8, 3, 2, 1) * 8
    case = Case((700, 130, 64, 9, 300, 5) * 8, 8, q_lens, 2, kv_heads=8, newest=64)
    check_case(case, CUDA)


def test_the_same_bits_each_time():
    batch = make_batch(Case(RAGGED, kv_heads=8, newest=64), CUDA)
    first = batch.run()
    for _ in range(20):
        for a, b in zip(first, batch.run(), strict=True):
            assert torch.equal(a, b)
    check_batch(batch, *first)


def test_graph_replay_with_other_lengths():
    batch = make_batch(Case(RAGGED, kv_heads=8, sinks=True), CUDA)
    seq_lens = batch.seq_lens.clone()
    static = replace(batch, seq_lens=seq_lens)
    workspace, out = batch.workspace(), torch.full_like(batch.q, torch.nan)
    lse = torch.full((batch.case.heads, len(batch.q)), torch.nan, device=CUDA)
    static.launch(workspace, out, lse)  # modules are loaded at the first launch, which capture forbids
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static.launch(workspace, out, lse)
    for lengths in (RAGGED, tuple(n // 2 for n in RAGGED), (0,) * len(RAGGED), (1,) * len(RAGGED)):
        eager = replace(
            batch,
            case=replace(batch.case, lengths=lengths),
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=CUDA),
        )
        seq_lens.copy_(eager.seq_lens)
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        expected, expected_lse = eager.run()
        assert torch.equal(out.cpu(), expected) and torch.equal(lse.cpu(), expected_lse)
