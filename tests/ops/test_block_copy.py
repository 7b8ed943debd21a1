"""copy_blocks: every device pair, every alignment, bytes compared."""

import pytest
import torch

from vllm_xlayer import ops

CPU = torch.device("cpu")
PIECES = [1, 15, 16, 4096, 18432 + 16]


GPU_PAIRS = ("cuda-cuda", "cuda-cpu", "cpu-cuda")


@pytest.fixture(params=["cpu-cpu", *(pytest.param(pair, marks=pytest.mark.gpu) for pair in GPU_PAIRS)])
def devices(request: pytest.FixtureRequest) -> tuple[torch.device, torch.device]:
    src, dst = request.param.split("-")
    return torch.device(src), torch.device(dst)


def pieces(count: int, size: int, gap: int, device: torch.device, pinned: bool, seed: int) -> torch.Tensor:
    """[count, size] random bytes with `gap` bytes between the pieces."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (count, size + gap), dtype=torch.uint8, generator=generator)
    raw = raw.pin_memory() if pinned else raw.to(device)
    return raw[:, :size]


def copy_and_compare(devices, size: int, src_gap: int, dst_gap: int, pairs: int, pinned: bool) -> None:
    on_gpu = "cuda" in {device.type for device in devices}
    pins = [pinned and on_gpu and device == CPU for device in devices]
    src = pieces(pairs + 3, size, src_gap, devices[0], pins[0], 1)
    dst = pieces(pairs + 5, size, dst_gap, devices[1], pins[1], 2)
    generator = torch.Generator().manual_seed(3)
    src_ids = torch.randint(0, pairs + 3, (pairs,), generator=generator)  # a source may occur twice
    dst_ids = torch.randperm(pairs + 5, generator=generator)[:pairs]
    whole = dst.as_strided((pairs + 5, size + dst_gap), (size + dst_gap, 1))
    expected = whole.cpu().clone()
    expected[dst_ids, :size] = src.cpu()[src_ids]
    ops.copy_blocks(src, dst, src_ids, dst_ids)
    if on_gpu:
        torch.cuda.synchronize()
    assert torch.equal(whole.cpu(), expected)


@pytest.mark.parametrize("size", PIECES)
@pytest.mark.parametrize("gaps", [(0, 0), (32, 16), (3, 0)], ids=["dense", "strided", "odd"])
def test_pieces_and_gaps(devices, size, gaps):
    copy_and_compare(devices, size, *gaps, pairs=7, pinned=True)


def test_more_pairs_than_one_launch_takes(devices):
    copy_and_compare(devices, 64, 0, 64, pairs=1000, pinned=True)


def test_pageable_host_memory(devices):
    copy_and_compare(devices, 4096, 0, 0, pairs=9, pinned=False)


def test_a_row_of_an_8b_model(devices):
    """589,824 bytes: 32 layers, 8 KV heads, head size 128, 16 tokens."""
    copy_and_compare(devices, 589824, 0, 0, pairs=5, pinned=True)


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("pair", GPU_PAIRS)
def test_on_a_side_stream(pair, pinned):
    """On torch's current stream, after what is already queued there: here the batched submission is used."""
    src, dst = (
        torch.zeros(64, 1 << 20, dtype=torch.uint8, device=place, pin_memory=pinned and place == "cpu")
        for place in pair.split("-")
    )
    ids = torch.arange(64)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if src.is_cuda:
            torch.cuda._sleep(10_000_000)  # cycles: a copy on another stream would be too early
        src.copy_(torch.arange(64, dtype=torch.uint8).unsqueeze(1))
        ops.copy_blocks(src, dst, ids, ids.flip(0))
    stream.synchronize()
    assert torch.equal(
        dst.cpu(), torch.arange(64, dtype=torch.uint8).flip(0).unsqueeze(1).expand(64, 1 << 20)
    )


def test_nothing_to_copy(devices):
    src, dst = pieces(3, 16, 0, devices[0], False, 1), pieces(3, 16, 0, devices[1], False, 2)
    before = dst.cpu().clone()
    none = torch.empty(0, dtype=torch.int64)
    ops.copy_blocks(src, dst, none, none)
    assert torch.equal(dst.cpu(), before)


def test_inside_one_tensor(device):
    """src and dst may be one tensor, as long as no destination is another pair's source."""
    rows = pieces(6, 48, 0, device, False, 1)
    before = rows.cpu().clone()
    ops.copy_blocks(rows, rows, torch.tensor([0, 1]), torch.tensor([4, 1]))
    assert torch.equal(rows[4].cpu(), before[0]) and torch.equal(rows[:4].cpu(), before[:4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"src": torch.zeros(4, 16)}, "src: expected uint8, got float32"),
        (
            {"dst": torch.zeros(4, 15, dtype=torch.uint8)},
            r"dst: expected size 16 in dimension 1 .*got shape \(4, 15\)",
        ),
        (
            {"src": torch.zeros(4, 4, 4, dtype=torch.uint8)},
            r"src: expected 2 dimensions .*got shape \(4, 4, 4\)",
        ),
        ({"src": torch.zeros(4, 32, dtype=torch.uint8)[:, ::2]}, r"src: expected a dense last dimension"),
        (
            {"dst": torch.zeros(1, 16, dtype=torch.uint8).expand(4, 16)},
            "dst: expected a row stride of at least 16",
        ),
        ({"src_ids": torch.tensor([0], dtype=torch.int32)}, "src_ids: expected int64, got int32"),
        ({"src_ids": torch.tensor([4])}, r"src_ids: expected ids from 0 to 3 .*got 4 at 0"),
        ({"dst_ids": torch.tensor([-1])}, r"dst_ids: expected ids from 0 to 3 .*got -1 at 0"),
        ({"dst_ids": torch.tensor([1, 2])}, "dst_ids: expected size 1"),
    ],
)
def test_bad_input(change, message):
    good = {
        "src": torch.ones(4, 16, dtype=torch.uint8),
        "dst": torch.zeros(4, 16, dtype=torch.uint8),
        "src_ids": torch.tensor([0]),
        "dst_ids": torch.tensor([0]),
    }
    with pytest.raises(RuntimeError, match=message):
        ops.copy_blocks(**{**good, **change})
    assert (good["dst"] == 0).all()


@pytest.mark.gpu
def test_ids_on_the_gpu_are_refused():
    rows = torch.zeros(4, 16, dtype=torch.uint8, device="cuda")
    with pytest.raises(RuntimeError, match="src_ids: expected cpu, got cuda:0"):
        ops.copy_blocks(rows, rows, torch.tensor([0], device="cuda"), torch.tensor([1]))
