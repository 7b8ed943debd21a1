"""nvfp4_prefix_attention against float64 attention, on the CPU and where there is a kernel for the GPU."""

import pytest
import torch
from reference.prefix_cases import CASES, EDGES, MERGED, case, check, check_merge, make

from vllm_xlayer import ops


@pytest.fixture
def there(device):
    if not ops.nvfp4_prefix_rows(torch.empty(0, device=device), 128):
        pytest.skip(f"no kernel for this GPU: {torch.cuda.get_device_capability()}, expected (9, 0)")
    return device


@pytest.mark.parametrize("batch", CASES, ids=str)
def test_equals_attention_in_float64(there, batch):
    check(batch, there)


@pytest.mark.parametrize("batch", MERGED, ids=str)
def test_what_is_there_is_merged(there, batch):
    check_merge(batch, there)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 7, 8, 16])
def test_groups(there, group):
    check(case((140, 31), (50, 9), group=group, rotated_keys=True), there)


def test_the_same_batch_gives_the_same_bits(there):
    batch = make(EDGES, there)
    first, second = batch.run(), batch.run()
    assert all(map(torch.equal, first, second))


def test_rows_of_other_heads_and_gpus(device):
    rows = ops.nvfp4_prefix_rows(torch.empty(0, device=device), 128)
    if device.type == "cuda":
        assert ops.nvfp4_prefix_rows(torch.empty(0, device=device), 64) == 0
        assert (rows == 128) == (torch.cuda.get_device_capability(device) == (9, 0))
    else:
        assert rows == 128


WRONG = {
    "q": (lambda b: {"q": b.q.float()}, "q: expected bfloat16 or float16, got float32"),
    "lens": (lambda b: {"lens": b.seq_lens.long()}, "lens: expected int32, got int64"),
    "query_starts": (
        lambda b: {"query_starts": b.query_starts[:-1]},
        "query_starts: expected .* requests of lens",
    ),
    "max_query_len": (lambda b: {"max_query_len": 10**6}, "max_query_len: expected 0 to"),
    "scale": (lambda b: {"scale": 0.0}, "scale: expected a positive number, got 0"),
    "heads": (lambda b: {"q": b.q[:, :3]}, "out: expected"),
    "blocks": (lambda b: {"block_table": b.block_table + 1000}, "block_table: expected blocks from 0"),
    "too few": (lambda b: {"block_table": b.block_table[:, :1]}, r"lens: expected .* got 1\d\d for request"),
    "longer": (lambda b: {"max_query_len": 2}, "query_starts: expected 0 to 2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name):
    batch = make(EDGES, torch.device("cpu"))
    given = {
        "q": batch.q, "block_table": batch.block_table, "lens": batch.seq_lens,
        "query_starts": batch.query_starts, "scale": 1.0, "max_query_len": 40,
    }  # fmt: skip
    changes, message = WRONG[name]
    given |= changes(batch)
    out = torch.full(batch.q.shape, 7.0, dtype=batch.q.dtype)
    lse = torch.full(batch.q.shape[1::-1], 7.0)
    with pytest.raises(RuntimeError, match=message):
        ops.nvfp4_prefix_attention(
            kv_cache=batch.pool.cache, k_scale=batch.k_scale, v_scale=batch.v_scale, out=out, lse=lse, **given
        )
    assert (out == 7).all() and (lse == 7).all(), "something was written"
