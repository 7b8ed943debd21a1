"""Times on a GPU: CUDA graphs, queued calls, medians, and the rates of device and link as the ceiling."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

WARM_UP = 3
GRAPH_CALLS = 16
"""Calls in a graph, at least: starting it takes microseconds, which are a part of short calls else."""


def graph_seconds(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median seconds of one call. The calls do the same on different memory, so that together they read more
    than the L2 holds; they are captured into one graph, again and again."""
    calls = [*calls] * -(-GRAPH_CALLS // len(calls))
    calls[0]()  # outside of capture: modules load, workspaces are made
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for i in range(WARM_UP + repeats):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if i >= WARM_UP:
            times.append(begin.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(times)


def copy_rate() -> float:
    """Bytes read plus written a second by a device-to-device copy of 2 GB: the best of ten."""
    n = 2_000_000_000
    source, target = (torch.empty(n, dtype=torch.uint8, device="cuda") for _ in range(2))
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e-3)
    return 2 * n / best


CYCLES = 2e9
"""A second, in cycles of a GPU's clock, or more."""


def queued_seconds(make: Callable[[], Callable[[], object]], repeats: int) -> tuple[float, float]:
    """Median seconds of a call on the current stream, and seconds that submitting it took.

    The stream is kept busy while a timed call is submitted: so the first number is the device's alone.
    make: prepares the next call, each time on other memory. Not on the default stream.
    """
    submits: list[float] = []
    times: list[float] = []
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for i in range(WARM_UP + repeats):
        call = make()
        torch.cuda.synchronize()
        if i >= WARM_UP:
            # Twice what a warm-up took; not the first, when modules are loaded.
            torch.cuda._sleep(int((2 * max(submits[1:WARM_UP]) + 1e-4) * CYCLES))  # type: ignore[no-untyped-call]
        begin.record()
        started = time.perf_counter()
        call()
        submits.append(time.perf_counter() - started)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(times[WARM_UP:]), min(submits)


def called_seconds(make: Callable[[], Callable[[], object]], repeats: int) -> float:
    """Median seconds from a call on the current stream, which is idle, until the device has done all of it.

    make: as `queued_seconds` takes it.
    """
    times = []
    for i in range(WARM_UP + repeats):
        call = make()
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.current_stream().synchronize()
        if i >= WARM_UP:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


STREAMED = 4
"""Calls of a stream of them."""


def streamed_seconds(make: Callable[[], Callable[[], object]], repeats: int) -> float:
    """Median seconds a call, of STREAMED that are submitted one behind the other to a stream that is idle,
    from the first call until the device has done all: of what the host and the device do, the slower.

    make: as `queued_seconds` takes it.
    """
    times = []
    for i in range(1 + repeats):
        calls = [make() for _ in range(STREAMED)]
        torch.cuda.synchronize()
        started = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.current_stream().synchronize()
        if i >= 1:
            times.append((time.perf_counter() - started) / STREAMED)
    return statistics.median(times)


def link_rate(src: torch.Tensor, dst: torch.Tensor) -> float:
    """Bytes a second of one large copy; the best of five. Host memory must be pinned."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        begin.record()
        dst.copy_(src, non_blocking=True)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e-3)
    return src.nbytes / best
