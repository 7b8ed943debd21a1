"""What the attention ops refuse: each message says what was expected and what came; nothing is written."""

from dataclasses import replace

import pytest
import torch
from reference.attention_batches import make_batch
from reference.attention_cases import Case
from reference.pools import make_pool, scalar
from test_bad_input import BAD_CACHES, CPU, B, D, H, N

from vllm_xlayer import ops
from vllm_xlayer.ops import attention


def attend(**arguments) -> None:
    """The attention op with its arguments by name."""
    ops.load()
    torch.ops.vllm_xlayer.nvfp4_paged_attention(**arguments)


ENTRIES = 11
"""Of a schedule for 2 requests: 4, where each begins, the end, and a counter for each (request, KV head)."""


def schedule(**arguments) -> None:
    ops.load()
    torch.ops.vllm_xlayer.nvfp4_attention_schedule(**arguments)


def attention_arguments() -> dict[str, torch.Tensor | int | float]:
    """2 requests of 2 query tokens, 4 query heads."""
    return {
        "q": torch.ones(4, 4, D, dtype=torch.bfloat16),
        "kv_cache": make_pool(CPU, B, H, N, D).cache,
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "seq_lens": torch.tensor([5, 48], dtype=torch.int32),
        "schedule": torch.zeros(ENTRIES, dtype=torch.int32),
        "k_scale": scalar(1.0, CPU),
        "v_scale": scalar(1.0, CPU),
        "out": torch.full((4, 4, D), 7.0, dtype=torch.bfloat16),
        "lse": torch.full((4, 4), 7.0),
        "sinks": torch.zeros(4),
        "workspace": torch.zeros(0),
        "scale": 0.125,
        "q_len": 2,
        "window": 0,
        "soft_cap": 0.0,
        "scale_order": 0,
        "parts": 1,
        "split_units": 0,
    }


def schedule_arguments() -> dict[str, torch.Tensor | int]:
    return {
        "seq_lens": torch.tensor([5, 48], dtype=torch.int32),
        "schedule": torch.full((ENTRIES,), -9, dtype=torch.int32),
        "q_len": 2,
        "num_q_heads": 4,
        "num_kv_heads": H,
        "head_size": D,
        "window": 0,
        "parts": 1,
        "split_units": 0,
    }


@pytest.mark.parametrize(("make_cache", "message"), BAD_CACHES)
def test_caches(make_cache, message):
    cache = make_cache()
    with pytest.raises(RuntimeError, match=message):
        attend(**{**attention_arguments(), "kv_cache": cache})
    assert not cache.any()


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(4, 4, D)}, "q: expected bfloat16 or float16, got float32"),
        ({"out": torch.full((4, 4, D), 7.0)}, "out: expected bfloat16, got float32"),
        ({"block_table": torch.zeros(2, 3)}, "block_table: expected int32, got float32"),
        ({"seq_lens": torch.tensor([5, 48])}, "seq_lens: expected int32, got int64"),
        ({"schedule": torch.zeros(ENTRIES)}, "schedule: expected int32, got float32"),
        ({"workspace": torch.zeros(0, dtype=torch.uint8)}, "workspace: expected float32, got uint8"),
        ({"lse": torch.zeros(4, 4, dtype=torch.bfloat16)}, "lse: expected float32, got bfloat16"),
        ({"sinks": torch.zeros(4, dtype=torch.float64)}, "sinks: expected float32, got float64"),
        ({"k_scale": torch.ones(2)}, r"k_scale: expected one element, got shape \(2\)"),
        (
            {"q": torch.ones(4, 4, D + 8, dtype=torch.bfloat16)[..., ::2]},
            "q: expected a dense last dimension",
        ),
        (
            {"q": torch.ones(4, 4, D + 4, dtype=torch.bfloat16)[..., 4:]},
            "q: expected rows that start at multiples of 16 bytes",
        ),
        (
            {"out": torch.ones(4, 4, D + 4, dtype=torch.bfloat16)[..., 4:]},
            "out: expected rows that start at multiples of 16 bytes",
        ),
        (
            {"block_table": int32(*[0] * 12).view(2, 6)[:, ::2]},
            "block_table: expected a dense last",
        ),
        ({"seq_lens": int32(5, 0, 48)[::2]}, "seq_lens: expected a contiguous tensor"),
        ({"sinks": torch.zeros(8)[::2]}, "sinks: expected a contiguous tensor"),
        ({"lse": torch.zeros(4, 8)[:, ::2]}, "lse: expected a dense last dimension"),
        (
            {"workspace": torch.zeros(0, 4)},
            r"workspace: expected 1 dimensions .*got shape \(0, 4\)",
        ),
        ({"q": torch.ones(4, 4 * D, dtype=torch.bfloat16)}, "q: expected 3 dimensions"),
        ({"q": torch.ones(4, 4, 80, dtype=torch.bfloat16)}, "q: expected size 64 in dimension 2"),
        ({"q": torch.ones(4, 3, D, dtype=torch.bfloat16)}, "query heads a KV head, got 3 .* for 2 KV heads"),
        (
            {"q": torch.ones(4, 34, D, dtype=torch.bfloat16)},
            "q: expected 1 to 16 query heads .*got 34",
        ),
        (
            {"q": torch.ones(5, 4, D, dtype=torch.bfloat16)},
            r"q: expected size 4 in dimension 0 .*seq_lens times q_len\), got shape \(5, 4, 64\)",
        ),
        ({"out": torch.ones(4, 2, D, dtype=torch.bfloat16)}, "out: expected size 4 in dimension 1"),
        (
            {"block_table": torch.zeros(3, 3, dtype=torch.int32)},
            "block_table: expected size 2 in dim",
        ),
        ({"lse": torch.zeros(4, 5)}, "lse: expected size 4 in dimension 1 .*tokens of q"),
        ({"lse": torch.zeros(2, 4)}, "lse: expected size 4 in dimension 0 .*heads of q"),
        ({"sinks": torch.zeros(2)}, "sinks: expected size 4 in dimension 0"),
        ({"schedule": int32(*[0] * 10)}, r"schedule: expected at least 11 entries .*got 10"),
        ({"q_len": 0}, "q_len: expected 1 to 8, got 0"),
        ({"q_len": 9}, "q_len: expected 1 to 8, got 9"),
        ({"window": -1}, "window: expected 0 to 2147483647, got -1"),
        ({"parts": 0}, "parts: expected 1 to 2147483647, got 0"),
        ({"split_units": -1}, "split_units: expected 0 to 2147483647, got -1"),
        ({"soft_cap": -1.0}, r"soft_cap: expected 0 \(none\) or a positive number, got -1"),
        ({"scale": float("nan")}, "scale: expected a positive number, got nan"),
        ({"scale": -0.1}, "scale: expected a positive number, got -0.1"),
        ({"scale_order": 2}, "scale_order: expected 0 .*got 2"),
        ({"seq_lens": int32(-1, 48)}, "seq_lens: expected 0 to 48 .*got -1 for request 0"),
        (
            {"seq_lens": int32(5, 49)},
            r"seq_lens: expected 0 to 48 \(3 blocks of 16 tokens\), got 49 for request 1",
        ),
        (
            {"block_table": int32(0, -1, -1, 0, 4, 0).view(2, 3)},
            "block_table: expected blocks from 0 to 3, got 4 for request 1 at 1",
        ),
        (
            {"block_table": int32(0, -1, -1, -1, -1, 0).view(2, 3), "window": 16},
            "block_table: expected blocks from 0 to 3, got -1 for request 1 at 1",
        ),
    ],
)
def test_attention(change, message):
    arguments = attention_arguments()
    with pytest.raises(RuntimeError, match=message):
        attend(**{**arguments, **change})
    assert (arguments["out"] == 7.0).all() and (arguments["lse"] == 7.0).all()


def test_attention_checks_only_the_blocks_it_reads():
    arguments = attention_arguments()
    arguments["kv_cache"].zero_()
    attend(**{**arguments, "block_table": int32(0, -1, 99, -1, 1, 2).view(2, 3), "window": 14})
    assert (arguments["out"] == 0.0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_lens": torch.tensor([5, 48])}, "seq_lens: expected int32, got int64"),
        ({"schedule": torch.zeros(ENTRIES)}, "schedule: expected int32, got float32"),
        ({"seq_lens": int32(5, 48).view(2, 1)}, "seq_lens: expected 1 dimensions"),
        ({"schedule": int32(*[0] * 2 * ENTRIES)[::2]}, "schedule: expected a contiguous tensor"),
        (
            {"schedule": int32(*[0] * 10)},
            r"schedule: expected at least 11 entries .*got 10",
        ),
        ({"q_len": 9}, "q_len: expected 1 to 8, got 9"),
        ({"num_kv_heads": 0}, "num_kv_heads: expected 1 to .*got 0"),
        ({"num_q_heads": 5}, "query heads a KV head, got 5 query heads for 2 KV heads"),
        ({"num_q_heads": 0}, "query heads a KV head, got 0 query heads for 2 KV heads"),
        ({"head_size": 72}, "head_size: expected a multiple of 16 up to 256, got 72"),
        ({"head_size": 272}, "head_size: expected a multiple of 16 up to 256, got 272"),
        ({"newest_from": torch.zeros(2)}, "newest_from: expected int32, got float32"),
        ({"newest_from": int32(0)}, "newest_from: expected size 2 in dimension 0 .*requests of seq_lens"),
        ({"window": -1}, "window: expected 0 to"),
        ({"parts": 0}, "parts: expected 1 to"),
        ({"split_units": -1}, "split_units: expected 0 to"),
    ],
)
def test_attention_schedule(change, message):
    arguments = schedule_arguments()
    with pytest.raises(RuntimeError, match=message):
        schedule(**{**arguments, **change})
    assert (arguments["schedule"] == -9).all()


def test_debug_mode_checks_whose_schedule_it_is():
    with_newest, without = int32(2, 1, 1, 1), int32(2, 1, 1, 0)
    attention.check_schedule(with_newest, int32(0))
    attention.check_schedule(without, None)
    with pytest.raises(RuntimeError, match="schedule: expected one made without newest_from, got one with"):
        attention.check_schedule(with_newest, None)
    with pytest.raises(RuntimeError, match="schedule: expected one made with newest_from, got one without"):
        attention.check_schedule(without, int32(0))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    [
        *("q", "kv_cache", "block_table", "seq_lens", "schedule", "k_scale", "v_scale"),
        *("out", "lse", "sinks", "workspace"),
    ],
)
def test_attention_with_one_argument_on_another_device(name):
    arguments = attention_arguments()
    arguments[name] = arguments[name].cuda()
    message = f"{name}: expected cpu .the device of kv_cache., got cuda:0"
    if name == "kv_cache":
        message = "q: expected cuda:0 .the device of kv_cache., got cpu"
    with pytest.raises(RuntimeError, match=message):
        attend(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_size", "supported"), [(16, False), (64, True), (144, False), (176, False), (256, True)]
)
def test_attention_head_sizes_on_a_gpu(head_size, supported):
    arguments = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in schedule_arguments().items()}
    arguments["head_size"] = head_size
    if supported:
        schedule(**arguments)
    else:
        with pytest.raises(RuntimeError, match=f"128, 192 or 256 on CUDA, got {head_size}"):
            schedule(**arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("split_units", [0, 2])
def test_a_workspace_that_is_too_small(split_units):
    arguments = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in attention_arguments().items()}
    arguments["split_units"] = split_units
    with pytest.raises(RuntimeError, match=r"workspace: expected at least \d+ floats for this shape, got 0"):
        attend(**arguments)
    assert (arguments["out"] == 7.0).all()


@pytest.mark.gpu
def test_debug_mode_checks_values_in_device_memory(monkeypatch):
    monkeypatch.setenv(ops.DEBUG_ENV, "1")
    batch = make_batch(Case((5, 48)), torch.device("cuda", 0))
    batch.run()
    for change, message in (
        ({"seq_lens": int32(5, 200).cuda()}, "seq_lens: expected 0 to .*got 200 for request 1"),
        ({"block_table": torch.full_like(batch.block_table, 999)}, "block_table: expected blocks from 0 to"),
    ):
        with pytest.raises(RuntimeError, match=message):
            replace(batch, **change).run()
