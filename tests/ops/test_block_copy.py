"""copy_blocks: every device pair, method and alignment; every byte of the destination is compared, the gaps
between its pieces and the pieces that are not copied as well."""

import mmap
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch

from vllm_xlayer import ops
from vllm_xlayer.ops import CopyMethod

CPU = torch.device("cpu")
PIECES = [1, 15, 16, 4096, 18432 + 16]

GPU_PAIRS = ("cuda-cuda", "cuda-cpu", "cpu-cuda")
GPU_CASES = [(pair, method) for pair in GPU_PAIRS for method in CopyMethod]
CASES = [("cpu-cpu", None), *(pytest.param(case, marks=pytest.mark.gpu) for case in GPU_CASES)]


def case_id(case) -> str:
    pair, method = case
    return pair if method is None else f"{pair}-{method.name.lower()}"


@pytest.fixture(params=CASES, ids=[case_id(getattr(c, "values", [c])[0]) for c in CASES])
def how(request: pytest.FixtureRequest) -> tuple[tuple[torch.device, torch.device], CopyMethod | None]:
    """((device of src, device of dst), method)."""
    pair, method = request.param
    src, dst = pair.split("-")
    return (torch.device(src), torch.device(dst)), method


def pieces(count: int, size: int, gap: int, device: torch.device, pinned: bool, seed: int) -> torch.Tensor:
    """[count, size] random bytes with `gap` bytes between the pieces."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (count, size + gap), dtype=torch.uint8, generator=generator)
    raw = raw.pin_memory() if pinned else raw.to(device)
    return raw[:, :size]


def copy_and_compare(how, size: int, src_gap: int, dst_gap: int, pairs: int, pinned: bool = True) -> None:
    devices, method = how
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
    ops.copy_blocks(src, dst, src_ids, dst_ids, method)
    if on_gpu:
        torch.cuda.synchronize()
    assert torch.equal(whole.cpu(), expected)


@pytest.mark.parametrize("size", PIECES)
@pytest.mark.parametrize("gaps", [(0, 0), (32, 16), (3, 0)], ids=["dense", "strided", "odd"])
def test_pieces_and_gaps(how, size, gaps):
    copy_and_compare(how, size, *gaps, pairs=7)


@pytest.mark.parametrize("pairs", [448, 449, 4080, 4081, 5000])
def test_pairs_that_travel_with_a_launch_and_more(how, pairs):
    copy_and_compare(how, 64, 0, 64, pairs)


def test_a_row_of_an_8b_model(how):
    """589,824 bytes: 32 layers, 8 KV heads, head size 128, 16 tokens."""
    copy_and_compare(how, 589824, 0, 0, pairs=5)


def test_pageable_host_memory(how):
    devices, method = how
    if method is not CopyMethod.KERNEL or CPU not in devices:
        copy_and_compare(how, 4096, 0, 0, pairs=9, pinned=False)
        return
    name = "src" if devices[0] == CPU else "dst"
    with pytest.raises(RuntimeError, match=f"{name}: expected pinned host memory"):
        copy_and_compare(how, 4096, 0, 0, pairs=9, pinned=False)


@pytest.mark.gpu
@pytest.mark.parametrize("method", list(CopyMethod))
def test_registered_host_memory(method):
    """As the tier has it that workers share: pinned by cudaHostRegister, this rank's rows two rows apart."""
    whole = torch.zeros(20, 2, 4608, dtype=torch.uint8)
    cudart = torch.cuda.cudart()
    assert int(cudart.cudaHostRegister(whole.data_ptr(), whole.nbytes, 0)) == 0
    try:
        rank = whole[:, 1]
        rows = torch.randint(0, 256, (20, 4608), dtype=torch.uint8)
        back, ids = torch.zeros(20, 4608, dtype=torch.uint8, device="cuda"), torch.randperm(20)
        ops.copy_blocks(rows.cuda(), rank, ids, ids.flip(0), method)
        torch.cuda.synchronize()
        assert torch.equal(rank[ids.flip(0)], rows[ids]) and not whole[:, 0].any()
        ops.copy_blocks(rank, back, ids.flip(0), ids, method)
        assert torch.equal(back.cpu(), rows)
    finally:
        torch.cuda.synchronize()
        assert int(cudart.cudaHostUnregister(whole.data_ptr())) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("ids", [torch.arange(20), torch.arange(19, -1, -1)], ids=["up", "down"])
def test_rows_side_by_side_across_two_registrations(ids):
    """As the tier's memory is pinned, piece by piece: the copy engine is not to be asked for one copy."""
    page = mmap.PAGESIZE
    memory, cudart = torch.zeros(21 * page, dtype=torch.uint8), torch.cuda.cudart()
    rows = memory[-memory.data_ptr() % page :][: 20 * page].view(20, page)
    values = torch.randint(0, 256, rows.shape, dtype=torch.uint8)
    halves = [(part.data_ptr(), part.nbytes) for part in (rows[:10], rows[10:])]
    for half in halves:
        assert int(cudart.cudaHostRegister(*half, 0)) == 0
    try:
        back = torch.zeros_like(rows, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            ops.copy_blocks(values.cuda(), rows, ids, ids, CopyMethod.ENGINE)
            ops.copy_blocks(rows, back, ids, ids, CopyMethod.ENGINE)
            torch.cuda.current_stream().synchronize()
        assert torch.equal(rows, values) and torch.equal(back.cpu(), values)
    finally:
        torch.cuda.synchronize()
        for address, _ in halves:
            assert int(cudart.cudaHostUnregister(address)) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("pairs", [100, 1000, 4200, 10_000])
def test_the_kernel_in_a_graph(pairs):
    """The ids are those of the capture, also where they are more than travel with one launch."""
    src, dst = (torch.zeros(pairs, 48, dtype=torch.uint8, device="cuda") for _ in range(2))
    ids = torch.randperm(pairs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.copy_blocks(src, dst, ids, ids.flip(0), CopyMethod.KERNEL)
    src.copy_(torch.randint(0, 256, (pairs, 48), dtype=torch.uint8))
    graph.replay()
    assert torch.equal(dst[ids.flip(0)], src[ids])


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize(("pair", "method"), GPU_CASES, ids=map(case_id, GPU_CASES))
def test_on_a_side_stream(pair, method, pinned):
    """On torch's current stream, after what is already queued there."""
    if not pinned and method is CopyMethod.KERNEL and pair != "cuda-cuda":
        pytest.skip("refused, see test_pageable_host_memory")
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
        ops.copy_blocks(src, dst, ids, ids.flip(0), method)
    stream.synchronize()
    assert torch.equal(
        dst.cpu(), torch.arange(64, dtype=torch.uint8).flip(0).unsqueeze(1).expand(64, 1 << 20)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("pairs", [63, 64, 65, 128, 129, 320, 321, 5000])
@pytest.mark.parametrize("pair", GPU_PAIRS)
def test_batches_of_the_copy_engine(pair, pairs):
    """Of 64 pairs and more, one behind the other. The default stream would take them one by one."""
    devices = tuple(torch.device(place) for place in pair.split("-"))
    with torch.cuda.stream(torch.cuda.Stream()):
        copy_and_compare((devices, CopyMethod.ENGINE), 4608, 16, 32, pairs)


@pytest.mark.parametrize("steps", [(1, 1), (-1, -1), (1, -1), (-1, 1), (0, 1)])
@pytest.mark.parametrize("gaps", [(0, 0), (32, 0), (0, 32)], ids=["dense", "source", "destination"])
def test_ids_in_a_row(how, gaps, steps):
    """Up, down or a source for all: the copy engine takes some of these as one copy, also of 2 MiB."""
    devices, method = how
    on_gpu = "cuda" in {device.type for device in devices}
    pins = [on_gpu and device == CPU for device in devices]
    pairs, size = 700, 4608
    src, dst = (pieces(pairs + 2, size, gaps[i], devices[i], pins[i], i) for i in range(2))
    whole = dst.as_strided((pairs + 2, size + gaps[1]), (size + gaps[1], 1))
    src_ids, dst_ids = (torch.arange(pairs) * step + (1 if step >= 0 else pairs) for step in steps)
    expected = whole.cpu().clone()
    expected[dst_ids, :size] = src.cpu()[src_ids]
    with torch.cuda.stream(torch.cuda.Stream()) if on_gpu else nullcontext():
        ops.copy_blocks(src, dst, src_ids, dst_ids, method)
    if on_gpu:
        torch.cuda.synchronize()
    assert torch.equal(whole.cpu(), expected)


@pytest.mark.gpu
def test_many_copies_in_flight():
    """More of them, each with more pairs than travel with a launch, than may have their pairs uploaded."""
    src = pieces(20_000, 16, 0, torch.device("cuda"), False, 1)
    copies, streams = [], [torch.cuda.Stream() for _ in range(3)]
    for i in range(60):
        ids = torch.randperm(20_000, generator=torch.Generator().manual_seed(i))[: 4100 + 250 * i]
        copies.append((torch.zeros_like(src), ids, ids.roll(1)))
    torch.cuda.synchronize()
    for i, (dst, src_ids, dst_ids) in enumerate(copies):
        with torch.cuda.stream(streams[i % 3]):
            if i < 3:
                torch.cuda._sleep(100_000_000)  # cycles: until all copies are submitted
            ops.copy_blocks(src, dst, src_ids, dst_ids, CopyMethod.KERNEL)
    torch.cuda.synchronize()
    for dst, src_ids, dst_ids in copies:
        expected = torch.zeros(20_000, 16, dtype=torch.uint8)
        expected[dst_ids] = src.cpu()[src_ids]
        assert torch.equal(dst.cpu(), expected)


@pytest.mark.gpu
def test_more_pairs_than_are_uploaded_at_once():
    copy_and_compare(
        ((torch.device("cuda"), torch.device("cuda")), CopyMethod.KERNEL), 48, 0, 16, pairs=150_000
    )


@pytest.mark.gpu
def test_while_another_thread_captures_a_graph():
    """The capture goes on, although the pairs need memory that this thread has to ask for."""
    src = pieces(5000, 16, 0, torch.device("cuda"), False, 1)
    dst, counter = torch.zeros_like(src), torch.zeros(1, device="cuda")
    ids, stream = torch.randperm(5000), torch.cuda.Stream()
    ops.copy_blocks(src, dst, ids[:1], ids[:1], CopyMethod.KERNEL)  # the kernel is loaded
    counter.add_(1)
    torch.cuda.synchronize()

    def copy_four_times() -> None:
        with torch.cuda.stream(stream):
            for _ in range(4):
                ops.copy_blocks(src, dst, ids, ids.flip(0), CopyMethod.KERNEL)

    graph = torch.cuda.CUDAGraph()
    with ThreadPoolExecutor(1) as pool, torch.cuda.graph(graph):
        counter.add_(1)
        pool.submit(copy_four_times).result()
        counter.add_(1)
    graph.replay()
    torch.cuda.synchronize()
    assert counter.item() == 3
    assert torch.equal(dst[ids.flip(0)], src[ids])


def test_nothing_to_copy(how):
    devices, method = how
    src, dst = pieces(3, 16, 0, devices[0], False, 1), pieces(3, 16, 0, devices[1], False, 2)
    before = dst.cpu().clone()
    none = torch.empty(0, dtype=torch.int64)
    ops.copy_blocks(src, dst, none, none, method)
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
        (
            {"src_ids": torch.tensor([2**63 - 1])},
            "src_ids: expected ids from 0 to 3 .*got 9223372036854775807 at 0",
        ),
        (
            {"src_ids": torch.tensor([-(2**63)])},
            "src_ids: expected ids from 0 to 3 .*got -9223372036854775808 at 0",
        ),
        (
            {"src_ids": torch.tensor([3, 0, 4, 5]), "dst_ids": torch.arange(4)},
            "src_ids: expected ids from 0 to 3 .*got 4 at 2",
        ),
        ({"dst_ids": torch.tensor([1, 2])}, "dst_ids: expected size 1"),
        ({"method": 2}, r"method: expected 0 \(copy engine\) or 1 \(kernel\), got 2"),
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
