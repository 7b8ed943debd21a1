"""What the NVFP4 ops refuse: each message says what was expected and what came, and nothing is written."""

import pytest
import torch
from reference.pools import POISON, make_pool, scalar

from vllm_xlayer import ops

CPU = torch.device("cpu")
B, H, N, D = 4, 2, 16, 64
C = D * 9 // 8


def nhd_cache() -> torch.Tensor:
    """(B, H, N, C) view of memory in the order B, N, H, C."""
    return torch.zeros(B, N, H, C, dtype=torch.uint8).permute(0, 2, 1, 3)


def bhlnc_cache() -> torch.Tensor:
    """(B, H, N, C) view of one of 3 layers of memory in the order B, H, L, N, C."""
    return torch.zeros(B, H, 3, N, C, dtype=torch.uint8)[:, :, 1]


def misaligned_cache() -> torch.Tensor:
    return torch.zeros(B * H * N * C + 8, dtype=torch.uint8)[8:].view(B, H, N, C)


def overlapping_cache() -> torch.Tensor:
    return torch.zeros(B * H * N * C, dtype=torch.uint8).as_strided((B, H, N, C), (N * C, N * C, C, 1))


BAD_CACHES = [
    (lambda: torch.zeros(B, H, N, C), "kv_cache: expected uint8, got float32"),
    (
        lambda: torch.zeros(B, N, C, dtype=torch.uint8),
        r"kv_cache: expected 4 dimensions .*got shape \(4, 16, 72\)",
    ),
    (
        lambda: torch.zeros(B, H, N, 80, dtype=torch.uint8),
        r"head_size a multiple of 16 .*got shape \(4, 2, 16, 80\)",
    ),
    (lambda: torch.zeros(B, H, 24, C, dtype=torch.uint8), "block size that is a multiple of 16, got 24"),
    (nhd_cache, r"dense NVFP4 pages, strides \(any, 1152, 72, 1\), got strides \(2304, 72, 144, 1\); .*NHD"),
    (bhlnc_cache, r"dense NVFP4 pages, .*got strides \(6912, 3456, 72, 1\); .*BHLNC"),
    (misaligned_cache, "an address and a block stride that are multiples of 16"),
    (overlapping_cache, r"a block stride of at least 2304 bytes \(one page\), got 1152"),
]


def write_arguments() -> dict[str, torch.Tensor | int]:
    return {
        "key": torch.ones(3, H, D, dtype=torch.bfloat16),
        "value": torch.ones(3, H, D, dtype=torch.bfloat16),
        "kv_cache": make_pool(CPU, B, H, N, D).cache,
        "slot_mapping": torch.arange(3),
        "k_scale": scalar(1.0, CPU),
        "v_scale": scalar(1.0, CPU),
        "scale_order": 0,
        "scale_choice": 0,
    }


def gather_arguments() -> dict[str, torch.Tensor | int]:
    return {
        "kv_cache": make_pool(CPU, B, H, N, D).cache,
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "seq_starts": torch.zeros(2, dtype=torch.int32),
        "cu_seqlens": torch.tensor([0, 5, 20], dtype=torch.int32),
        "k_scale": scalar(1.0, CPU),
        "v_scale": scalar(1.0, CPU),
        "k_out": torch.full((20, H, D), 7.0),
        "v_out": torch.full((20, H, D), 7.0),
        "scale_order": 0,
    }


@pytest.mark.parametrize(("make_cache", "message"), BAD_CACHES)
@pytest.mark.parametrize("op", ["write", "gather"])
def test_caches(op, make_cache, message):
    cache = make_cache()
    call, arguments = (
        (ops.reshape_and_cache_nvfp4, write_arguments())
        if op == "write"
        else (ops.gather_nvfp4, gather_arguments())
    )
    with pytest.raises(RuntimeError, match=message):
        call(**{**arguments, "kv_cache": cache})
    assert not cache.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"key": torch.ones(3, H, D, dtype=torch.float64)},
            "key: expected bfloat16 or float16 or float32, got float64",
        ),
        ({"value": torch.ones(3, H, D)}, "value: expected bfloat16, got float32"),
        ({"slot_mapping": torch.arange(3, dtype=torch.int32)}, "slot_mapping: expected int64, got int32"),
        ({"slot_mapping": torch.arange(6)[::2]}, "slot_mapping: expected a contiguous tensor"),
        ({"slot_mapping": torch.arange(4)}, r"slot_mapping: expected at most 3 entries .*got 4"),
        ({"slot_mapping": torch.tensor([0, 64])}, "slot_mapping: expected -1 or slots below 64, got 64 at 1"),
        ({"slot_mapping": torch.tensor([-2])}, "slot_mapping: expected -1 or slots below 64, got -2 at 0"),
        (
            {"key": torch.ones(3, D, dtype=torch.bfloat16)},
            r"key: expected 3 dimensions .*got shape \(3, 64\)",
        ),
        (
            {"key": torch.ones(3, H, 72, dtype=torch.bfloat16)},
            "key: expected size 64 in dimension 2 .*head size of kv",
        ),
        (
            {"key": torch.ones(3, 4, D, dtype=torch.bfloat16)},
            "key: expected size 2 in dimension 1 .*heads of kv",
        ),
        ({"value": torch.ones(3, H, 32, dtype=torch.bfloat16)}, "value: .*K and V head sizes must be equal"),
        (
            {"value": torch.ones(2, H, D, dtype=torch.bfloat16)},
            "value: expected size 3 in dimension 0 .*tokens of key",
        ),
        (
            {"key": torch.ones(3, H, 2 * D, dtype=torch.bfloat16)[..., ::2]},
            "key: expected a dense last dimension",
        ),
        ({"k_scale": torch.ones(2)}, r"k_scale: expected one element, got shape \(2\)"),
        ({"v_scale": torch.ones(1, dtype=torch.float16)}, "v_scale: expected float32, got float16"),
        ({"scale_order": 2}, "scale_order: expected 0 .*got 2"),
        ({"scale_choice": 3}, "scale_choice: expected 0 .*got 3"),
    ],
)
def test_write(change, message):
    arguments = write_arguments()
    with pytest.raises(RuntimeError, match=message):
        ops.reshape_and_cache_nvfp4(**{**arguments, **change})
    assert (arguments["kv_cache"] == POISON).all()


@pytest.mark.parametrize("head_size", [16, 80])
def test_the_swizzled_order_needs_multiples_of_64(head_size):
    pool = make_pool(CPU, head_size=head_size)
    key = torch.ones(1, 2, head_size)
    one = scalar(1.0, CPU)
    with pytest.raises(RuntimeError, match=f"multiple of 64 for the swizzled order, got {head_size}"):
        ops.reshape_and_cache_nvfp4(key, key, pool.cache, torch.tensor([0]), one, one, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_table": torch.zeros(2, 3, dtype=torch.int64)}, "block_table: expected int32, got int64"),
        (
            {"seq_starts": torch.zeros(3, dtype=torch.int32)},
            "seq_starts: expected size 2 .*requests of block_table",
        ),
        ({"cu_seqlens": torch.zeros(2, dtype=torch.int32)}, "cu_seqlens: expected size 3"),
        (
            {"cu_seqlens": torch.tensor([0, 9, 8], dtype=torch.int32)},
            "cu_seqlens: expected ascending .*got 9 then 8",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 9, 21], dtype=torch.int32)},
            "cu_seqlens: expected at most 20 .*got 21",
        ),
        ({"cu_seqlens": torch.tensor([1, 9, 20], dtype=torch.int32)}, "cu_seqlens: expected 0 first, got 1"),
        ({"seq_starts": torch.tensor([0, -1], dtype=torch.int32)}, "seq_starts: expected 0 or more, got -1"),
        ({"seq_starts": torch.tensor([0, 40], dtype=torch.int32)}, "at least 4 blocks for request 1 .*got 3"),
        (
            {
                "block_table": torch.tensor([[0, 0, 0], [0, 4, 0]], dtype=torch.int32),
                "seq_starts": torch.tensor([0, 9], dtype=torch.int32),
            },
            "expected blocks from 0 to 3, got 4 for request 1 at 1",
        ),
        (
            {"k_out": torch.zeros(20, H, D, dtype=torch.int32)},
            "k_out: expected bfloat16 or float16 or float32, got",
        ),
        ({"v_out": torch.zeros(20, H, D, dtype=torch.float16)}, "v_out: expected float32, got float16"),
        ({"k_out": torch.zeros(20, H, 80)}, "k_out: expected size 64 in dimension 2"),
        ({"v_out": torch.zeros(19, H, D)}, "v_out: expected size 20 in dimension 0"),
        (
            {"k_out": torch.zeros(20, H, D + 1)[..., 1:]},
            "k_out: expected rows that start at multiples of 16 bytes",
        ),
    ],
)
def test_gather(change, message):
    arguments = gather_arguments()
    with pytest.raises(RuntimeError, match=message):
        ops.gather_nvfp4(**{**arguments, **change})
    assert (arguments["k_out"] == 7.0).all() and (arguments["v_out"] == 7.0).all()


def sources() -> dict[str, torch.Tensor]:
    """Own and newest tokens, beside ``gather_arguments``."""
    ints = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 5], [5, 15], [0, 1], [0, 0])]
    names = ("query_starts", "seq_lens", "newest_rows", "newest_from")
    key = torch.ones(5, H, D)
    newest = torch.ones(2, 2, H, 16, D)
    return dict(key=key, value=key.clone(), newest=newest, **dict(zip(names, ints, strict=True)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": None}, "key, value: expected both or neither, got key alone"),
        ({"seq_lens": None}, "query_starts, seq_lens: expected both or neither, got query_starts alone"),
        (
            {"seq_lens": None, "query_starts": None},
            "query_starts, seq_lens: expected with key, got neither",
        ),
        (
            {"key": None, "value": None, "seq_lens": None, "query_starts": None},
            "query_starts, seq_lens: expected with newest, got neither",
        ),
        ({"newest_rows": None}, "newest_rows: expected a tensor with newest, got none"),
        ({"newest": None}, "newest_rows: expected none without newest, got one"),
        ({"newest_from": torch.zeros(2)}, "newest_from: expected int32, got float32"),
        ({"newest_from": torch.zeros(3, dtype=torch.int32)}, "newest_from: expected size 2 in dimension 0"),
        ({"query_starts": torch.zeros(2, dtype=torch.int32)}, "query_starts: expected size 3"),
        ({"seq_lens": torch.zeros(2)}, "seq_lens: expected int32, got float32"),
        ({"key": torch.ones(5, H, D).double()}, "key: expected bfloat16 or float16 or float32, got float64"),
        ({"value": torch.ones(5, H, D).half()}, "value: expected float32, got float16"),
        ({"key": torch.ones(5, 3, D)}, "key: expected size 2 in dimension 1 .*heads of kv"),
        ({"key": torch.ones(5, H, 80)}, "key: expected size 64 in dimension 2 .*head size of kv"),
        ({"value": torch.ones(4, H, D)}, "value: expected size 5 in dimension 0 .*tokens of key"),
        ({"key": torch.ones(5, H, 2 * D)[..., ::2]}, "key: expected a dense last dimension"),
        ({"newest": torch.ones(2, 2, H, 16, D).half()}, "newest: expected float32, got float16"),
        ({"newest": torch.ones(2, 2, H, 12, D)}, "newest: expected a multiple of 16 tokens a row, got 12"),
        ({"newest": torch.ones(2, 2, 3, 16, D)}, "newest: expected size 2 in dimension 2"),
        (
            {"query_starts": torch.tensor([0, 2, 6], dtype=torch.int32)},
            r"query_starts: .*tokens of key \(5\), got 2 then 6 for request 1",
        ),
        ({"query_starts": torch.tensor([0, 5, 2], dtype=torch.int32)}, "query_starts: .* got 5 then 2 for"),
        (
            {"seq_lens": torch.tensor([5, 14], dtype=torch.int32)},
            r"seq_lens: expected at least 15 \(request 1 is gathered up to token 15 .*got 14",
        ),
        (
            {
                "query_starts": torch.tensor([0, 5, 5], dtype=torch.int32),
                "seq_lens": torch.tensor([4, 15]).int(),
            },
            "seq_lens: expected at least 5 .*got 4",
        ),
        (
            {"newest_rows": torch.tensor([0, 2], dtype=torch.int32)},
            "newest_rows: expected rows below 2, got 2 for request 1",
        ),
    ],
)
def test_gather_of_own_and_newest_tokens(change, message):
    arguments = gather_arguments() | sources()
    ops.gather_nvfp4(**arguments)
    assert (arguments["k_out"] != 7.0).all()
    arguments = gather_arguments() | sources()
    with pytest.raises(RuntimeError, match=message):
        ops.gather_nvfp4(**{**arguments, **change})
    assert (arguments["k_out"] == 7.0).all() and (arguments["v_out"] == 7.0).all()


def test_16_bit_rows_take_own_tokens_of_their_dtype_only():
    arguments = gather_arguments() | sources()
    outs = {name: arguments[name].bfloat16() for name in ("k_out", "v_out")}
    with pytest.raises(RuntimeError, match="key: expected bfloat16, got float32"):
        ops.gather_nvfp4(**{**arguments, **outs})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["key", "value", "kv_cache", "slot_mapping", "k_scale", "v_scale"])
def test_write_with_one_argument_on_another_device(name):
    arguments = write_arguments()
    arguments[name] = arguments[name].cuda()
    message = f"{name}: expected cpu .the device of kv_cache., got cuda:0"
    if name == "kv_cache":
        message = "key: expected cuda:0 .the device of kv_cache., got cpu"
    with pytest.raises(RuntimeError, match=message):
        ops.reshape_and_cache_nvfp4(**arguments)
    assert (arguments["kv_cache"] == POISON).all()


@pytest.mark.gpu
def test_debug_mode_checks_values_in_device_memory(monkeypatch):
    on_gpu = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in write_arguments().items()}
    on_gpu["slot_mapping"] = torch.tensor([0, 64], device="cuda")
    gather = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in gather_arguments().items()}
    monkeypatch.setenv(ops.DEBUG_ENV, "1")
    with pytest.raises(
        RuntimeError, match="slot_mapping: expected -1 or slots below 64, got values from 0 to 64"
    ):
        ops.reshape_and_cache_nvfp4(**on_gpu)
    assert (on_gpu["kv_cache"] == POISON).all()
    ops.gather_nvfp4(**gather)
    for change, message in (
        (
            {"cu_seqlens": torch.tensor([0, 9, 21], dtype=torch.int32)},
            "cu_seqlens: expected ascending values from 0",
        ),
        (
            {"seq_starts": torch.tensor([0, 40], dtype=torch.int32)},
            "block_table: expected blocks for tokens 40 to 55",
        ),
        (
            {"block_table": torch.full((2, 3), 4, dtype=torch.int32)},
            "block_table: expected blocks from 0 to 3",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.gather_nvfp4(**{**gather, **{k: v.cuda() for k, v in change.items()}})
    at_hand = {k: v.cuda() for k, v in sources().items()}
    ops.gather_nvfp4(**gather, **at_hand)
    for change, message in (
        ({"query_starts": torch.tensor([0, 2, 6], dtype=torch.int32)}, "query_starts: expected ascending"),
        ({"seq_lens": torch.tensor([5, 14], dtype=torch.int32)}, "seq_lens: expected at least"),
        ({"newest_rows": torch.tensor([0, 2], dtype=torch.int32)}, "newest_rows: expected rows below 2"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.gather_nvfp4(**gather, **at_hand | {k: v.cuda() for k, v in change.items()})
