"""What only a GPU can show: CUDA graphs, streams, CPU and GPU bit for bit. The op tests themselves run on the
GPU through the ``device`` fixture (tests/ops)."""

import pytest
import torch
from reference.pools import make_pool, scalar

from vllm_xlayer import ops
from vllm_xlayer.nvfp4 import ScaleChoice, ScaleOrder

pytestmark = pytest.mark.gpu
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def write(pool, key, value, slots, order=ScaleOrder.LINEAR, choice=ScaleChoice.BEST_OF_9) -> None:
    device = pool.raw.device
    k_scale, v_scale = scalar(0.7, device), scalar(1.3, device)
    ops.reshape_and_cache_nvfp4(
        key.to(device), value.to(device), pool.cache, slots.to(device), k_scale, v_scale, order, choice
    )


def test_the_build_has_this_gpu():
    """Code for one architecture also runs on later ones of the same major number."""
    capability = torch.cuda.get_device_capability(0)
    built = [divmod(int(arch.rstrip("af")), 10) for arch in ops.build_info()["archs"]]
    assert any(major == capability[0] and minor <= capability[1] for major, minor in built)


@pytest.mark.parametrize("choice", list(ScaleChoice))
@pytest.mark.parametrize("order", list(ScaleOrder))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 128), (8, 128), (40, 64), (3, 256)], ids=str)
def test_cpu_and_gpu_write_the_same_bytes(choice, order, dtype, shape):
    heads, head_size = shape
    generator = torch.Generator().manual_seed(heads)
    x = torch.randn(2, 100, heads, head_size, generator=generator) * torch.logspace(-4, 4, 100).view(
        1, -1, 1, 1
    )
    x = x.to(dtype)
    slots = torch.randperm(7 * 16, generator=generator)[:100]
    pools = [make_pool(device, 7, heads, 16, head_size) for device in (CUDA, CPU)]
    for pool in pools:
        write(pool, x[0], x[1], slots, order, choice)
    assert torch.equal(pools[0].raw.cpu(), pools[1].raw)


def test_graph_replay_follows_its_inputs():
    """Write, gather and device copy captured once, replayed with other tokens, slots and lengths."""
    generator = torch.Generator().manual_seed(0)
    heads, head_size, tokens = 8, 128, 24
    pool, reference = (make_pool(device, 6, heads, 16, head_size) for device in (CUDA, CPU))
    key = torch.zeros(2, tokens, heads, head_size, dtype=torch.bfloat16, device=CUDA)
    slots = torch.full((tokens,), -1, device=CUDA)
    table = torch.arange(6, dtype=torch.int32, device=CUDA).view(2, 3)
    starts = torch.zeros(2, dtype=torch.int32, device=CUDA)
    cumulative = torch.zeros(3, dtype=torch.int32, device=CUDA)
    out = torch.zeros(2, 96, heads, head_size, dtype=torch.bfloat16, device=CUDA)
    rows = torch.zeros_like(pool.raw)
    ids = torch.arange(6)
    k_scale, v_scale = scalar(0.7, CUDA), scalar(1.3, CUDA)

    def step() -> None:
        ops.reshape_and_cache_nvfp4(key[0], key[1], pool.cache, slots, k_scale, v_scale)
        ops.gather_nvfp4(pool.cache, table, starts, cumulative, k_scale, v_scale, out[0], out[1])
        ops.copy_blocks(pool.raw, rows, ids, ids.flip(0))

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lengths in ([24, 0], [3, 40], [48, 48]):
        x = torch.randn(2, tokens, heads, head_size, generator=generator, dtype=torch.bfloat16)
        new_slots = torch.randperm(96, generator=generator)[:tokens]
        new_slots[5] = -1
        key.copy_(x)
        slots.copy_(new_slots)
        cumulative.copy_(torch.tensor([0, *lengths]).cumsum(0))
        graph.replay()
        torch.cuda.synchronize()
        write(reference, x[0], x[1], new_slots)
        assert torch.equal(pool.raw.cpu(), reference.raw)
        assert torch.equal(rows.cpu().flip(0), reference.raw)
        expected = torch.zeros(2, sum(lengths), heads, head_size, dtype=torch.bfloat16)
        ops.gather_nvfp4(
            reference.cache,
            table.cpu(),
            starts.cpu(),
            cumulative.cpu(),
            k_scale.cpu(),
            v_scale.cpu(),
            *expected,
        )
        # Slots that were never written decode to NaN, on both.
        torch.testing.assert_close(out[:, : sum(lengths)].cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_ops_run_on_the_current_stream():
    """Queued behind a long wait on a side stream: work on another stream would see the old input."""
    pool, reference = (make_pool(device, 4, 8, 16, 128) for device in (CUDA, CPU))
    x = torch.randn(2, 64, 8, 128, dtype=torch.bfloat16)
    source, slots = x.to(CUDA), torch.arange(64, device=CUDA)
    key = torch.zeros_like(source)
    out = torch.zeros_like(source)
    one = scalar(1.0, CUDA)
    table = torch.arange(4, dtype=torch.int32, device=CUDA).view(1, 4)
    starts = torch.zeros(1, dtype=torch.int32, device=CUDA)
    cumulative = torch.tensor([0, 64], dtype=torch.int32, device=CUDA)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        key.copy_(source)
        ops.reshape_and_cache_nvfp4(key[0], key[1], pool.cache, slots, one, one)
        ops.gather_nvfp4(pool.cache, table, starts, cumulative, one, one, out[0], out[1])
    stream.synchronize()
    host = scalar(1.0, CPU)
    ops.reshape_and_cache_nvfp4(x[0], x[1], reference.cache, torch.arange(64), host, host)
    assert torch.equal(pool.raw.cpu(), reference.raw)
    expected = torch.zeros_like(x)
    ops.gather_nvfp4(reference.cache, table.cpu(), starts.cpu(), cumulative.cpu(), host, host, *expected)
    assert torch.equal(out.cpu(), expected)
