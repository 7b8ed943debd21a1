"""Times on a GPU: CUDA graphs, medians, and the device's own copy rate as the ceiling."""

import statistics
from collections.abc import Callable, Sequence

import torch

WARM_UP = 3


def graph_seconds(calls: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median seconds of one call. The calls do the same on different memory, so that together they read more
    than the L2 holds; they are captured into one graph."""
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


def copy_rate(gigabytes: float = 2.0) -> float:
    """Bytes read plus written a second by a large device-to-device copy: the best of ten."""
    n = int(gigabytes * 1e9)
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
