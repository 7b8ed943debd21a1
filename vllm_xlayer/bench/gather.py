"""One layer's prefill over a cache: NVFP4 pages gathered and attended to, beside FlashAttention on fp8, bf16.

All of it is timed in CUDA graphs; apart the host's time to submit it, which a step has to wait for where that
is longer. Queries are not quantised for the fp8 cache within the time, which vLLM has to.
"""

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..config import Config
from ..nvfp4 import page_bytes
from ..ops.newest import TILE
from ..provenance import write
from .inputs import Calls, Inputs, Shape
from .layer import Layer
from .peers import check, flash_attention_3
from .peers.ours import NEWEST
from .timing import GRAPH_CALLS, copy_rate, graph_seconds, queued_seconds

L2_TIMES, MAX_COPIES = 4, 16
"""Copies of the cache are rotated until the NVFP4 one is so many times the L2: other layers lie between."""
MOST_SECONDS = 0.4
"""That a number's repeats may take, but for two of them and the warm-up."""
WORKSPACES = (16, 32, 64, 128, 256)
"""MiB of the workspace that tokens are gathered into, tried on the first shape."""
MAX_ERROR = {"attention": 0.1, "attention_newest": 0.1, "fp8": 0.15, "bf16": 0.02}
"""Relative L2 error of results, from exact K and V. Attention that reads a token wrongly is near 1."""
CHECKED = ((133, 20), (0, 17), (16, 1), (100, 30))
"""Requests whose results are compared."""


@dataclass(frozen=True)
class Batch:
    """Requests with so many tokens in the cache and so many new ones, over pages of ``block_size`` tokens."""

    requests: int
    cached: int
    new: int
    block_size: int = 16

    @property
    def name(self) -> str:
        return f"{self.requests} x ({self.cached:,} + {self.new:,}), page {self.block_size:,}"

    def shape(self, scale: int) -> Shape:
        requests, cached, new = max(1, self.requests // scale), self.cached // scale, -(-self.new // scale)
        lens = (cached + new,) * requests
        return Shape(self.name, lens, block_size=self.block_size, q_len=new, q_lens=(new,))


BATCHES = (
    Batch(64, 8192, 100),
    Batch(1, 16384, 16),
    Batch(1, 16384, 16, block_size=784),
    Batch(1, 16384, 16, block_size=7424),
    Batch(1, 131072 - 2048, 2048),
    Batch(1, 131072 - 8192, 8192),
    Batch(64, 0, 512),
)
BOTH_WAYS = (
    *(Batch(64, 8192, new) for new in (16, 64, 100, 128, 256, 512, 1024)),
    *(Batch(requests, 8192, 100) for requests in (1, 2, 4, 8, 16)),
    *(Batch(64, cached, 100) for cached in (128, 256, 512, 1024)),
)
"""Attended to in their pages and dequantised first, to see where the one and the other is better."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeats", type=int, default=20, help="times each is measured (default: %(default)s)"
    )
    parser.add_argument("--only", help="batches whose name contains this")
    parser.add_argument("--scale", type=int, default=1, help="divides requests and tokens, to try it out")
    parser.add_argument(
        "--json", type=Path, default=Path("gather.json"), help="file to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON. Returns 1 if a result was wrong or could not be had.

    Without a GPU the kernels' CPU versions and PyTorch's attention are timed, and the peers are missing.
    """
    on_gpu = torch.cuda.is_available()
    device, rate = ("cuda", copy_rate()) if on_gpu else ("cpu", None)
    results: dict[str, Any] = {
        "copy_rate": rate,
        "scale": args.scale,
        "error": {},
        "failed": {},
        "batches": [],
    }
    names = [name for name in MAX_ERROR if on_gpu or name.startswith("attention")]
    for name in names:
        with _noted(results["failed"], name):
            results["error"][name] = error = error_of(name, device)
            if not error <= MAX_ERROR[name]:
                raise ArithmeticError(f"relative error of its result: {error:.3f}")
    names = [name for name in names if name not in results["failed"]]
    for batch in [b for b in BATCHES if args.only is None or args.only in b.name]:
        results["batches"].append(measure(batch, args.scale, args.repeats, device, names))
        print(f"{batch.name}: done", flush=True)
        write(args.json, results)
    first = BATCHES[0]
    if args.only is None and "attention" in names:
        inputs = Inputs(first.shape(args.scale), 2, device)
        results["workspaces"] = {
            mib: seconds(Layer(inputs, (mib << 20) // args.scale, in_pages=False).attend, args.repeats)
            for mib in WORKSPACES
        }
        write(args.json, results)
    if args.only is None and "attention" in names:
        results["ways"] = []
        for batch in BOTH_WAYS:
            results["ways"].append(both_ways(batch, args.scale, args.repeats, device))
            write(args.json, results)
    Console(width=150, highlight=False).print(*tables(results))
    for what, why in _failures(results):
        print(f"{what}: {why}")
    return int(any(True for _ in _failures(results)))


def measure(batch: Batch, scale: int, repeats: int, device: str, names: list[str]) -> dict[str, Any]:
    """Seconds of a batch, of the host's submitting it, and bytes that the gather reads and writes."""
    shape = batch.shape(scale)
    found: dict[str, Any] = {
        "name": batch.name, "tokens": shape.tokens, "seconds": {}, "host_seconds": {}, "bytes": {},
        "failed": {},
    }  # fmt: skip
    inputs = Inputs(shape, _copies(shape, device), device)
    for name in names:
        with _noted(found["failed"], name):
            _measure(name, inputs, repeats, found)
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    return found


def _measure(name: str, inputs: Inputs, repeats: int, found: dict[str, Any]) -> None:
    """One column's numbers; its cache is gone afterwards."""
    calls, layer = calls_of(name, inputs)
    found["seconds"][name] = seconds(calls, repeats)
    found["host_seconds"][name] = _host_seconds(calls)
    if layer is not None and layer.gather:
        what = name.replace("attention", "gather")
        newest = NEWEST if name == "attention_newest" else 0
        found["seconds"][what] = seconds(layer.gather, repeats)
        found["bytes"][what] = moved(inputs.shape, layer, newest)


def both_ways(batch: Batch, scale: int, repeats: int, device: str) -> dict[str, Any]:
    """Seconds of a layer that reads pages as they are, of one that dequantises them first, and of the
    backend's choice."""
    shape = batch.shape(scale)
    found: dict[str, Any] = {"name": batch.name, "tokens": shape.tokens, "seconds": {}}
    inputs = Inputs(shape, _copies(shape, device), device)
    for name, in_pages in WAYS.items():
        layer = Layer(inputs, Config().gather_workspace_bytes, in_pages=in_pages)
        found["seconds"][name] = seconds(layer.attend, repeats)
    return found


def calls_of(
    name: str, inputs: Inputs, kv: torch.Tensor | None = None, in_pages: bool | None = None
) -> tuple[Calls, Layer | None]:
    """Calls of a column, and the layer where it is ours. kv, in_pages: as `Layer` takes them."""
    if name in ("fp8", "bf16"):
        dtype = flash_attention_3.FP8 if name == "fp8" else torch.bfloat16
        return flash_attention_3.make(inputs, dtype, kv, num_splits=0), None
    newest = NEWEST if name == "attention_newest" else 0
    layer = Layer(inputs, Config().gather_workspace_bytes, newest, kv, in_pages)
    return layer.attend, layer


def error_of(name: str, device: str) -> float:
    """Relative L2 error of a column's result for requests of ``CHECKED``, against float64 attention to exact
    K and V; of ours the greater one of those with and without a copy of the pages."""
    lens, new = tuple(cached + n for cached, n in CHECKED), tuple(n for _, n in CHECKED)
    inputs = Inputs(Shape("", lens, q_len=max(new), q_lens=new), 1, device)
    s = inputs.shape
    size = (inputs.num_blocks, 2, s.num_kv_heads, s.block_size, s.head_size)
    kv = torch.randn(size, dtype=torch.bfloat16, device=device)
    exact, errors = check.attention(inputs, kv), []
    for in_pages in (False, True) if name.startswith("attention") else (None,):
        inputs.out.fill_(torch.nan)
        calls_of(name, inputs, kv, in_pages)[0][0]()
        errors.append((inputs.out.double() - exact).norm() / exact.norm())
    return float(torch.stack(errors).max())


def moved(shape: Shape, layer: Layer, newest_tokens: int) -> int:
    """Bytes that the gather of a batch reads and writes."""
    dense = 4 * shape.num_kv_heads * shape.head_size
    page = page_bytes(shape.num_kv_heads, 1, shape.head_size)
    from_pages = 0
    for length, new in zip(shape.lens, shape.queries, strict=True):
        begin = -(-max(0, length - newest_tokens) // TILE) * TILE
        from_pages += min(begin, length - new)
    tokens = layer.gathered_tokens
    return from_pages * page + (tokens - from_pages) * dense + tokens * dense


def seconds(calls: Calls, repeats: int) -> float:
    """Median seconds of a call, in a graph on a GPU."""
    calls[0]()
    if not torch.cuda.is_available():
        return statistics.median(_timed(call) for call in calls * 2)
    once = _timed(calls[-1])
    many = max(GRAPH_CALLS, len(calls))
    return graph_seconds(calls, max(2, min(repeats, int(MOST_SECONDS / (many * once)))))


def _timed(call: Callable[[], Any]) -> float:
    """Seconds until the device has done it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _host_seconds(calls: Calls) -> float | None:
    """Least seconds that submitting a call took; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    following = itertools.cycle(calls)
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        return queued_seconds(lambda: next(following), 5)[1]


def _copies(shape: Shape, device: str) -> int:
    if device == "cpu":
        return 1
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    size = shape.tokens * page_bytes(shape.num_kv_heads, 1, shape.head_size)
    return min(MAX_COPIES, max(2, L2_TIMES * l2 // size + 1))


class _noted:
    """Notes why a column has no number, whatever it raises: the others are measured."""

    def __init__(self, failed: dict[str, str], name: str) -> None:
        self._failed, self._name = failed, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self._failed[self._name] = f"{type(error).__name__}: {error}"[:300]
        return isinstance(error, Exception)


def _failures(results: dict[str, Any]) -> list[tuple[str, str]]:
    found = list(results["failed"].items())
    for batch in results["batches"]:
        found += [(f"{batch['name']}, {name}", why) for name, why in batch["failed"].items()]
    return found


TITLES = {
    "gather": "gather",
    "gather_newest": f"gather, {NEWEST} newest",
    "attention": "ours",
    "attention_newest": f"ours, {NEWEST} newest",
    "fp8": "FA3 fp8",
    "bf16": "FA3 bf16",
}


WAYS = {"in their pages": True, "dequantised first": False, "as chosen": None}
HEAD = ["requests x (cached + new)", *TITLES.values(), "host, ours", "host, FA3 bf16"]
HEAD_WAYS = [HEAD[0], *WAYS]


def rows(results: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Label and cells of each batch: microseconds, in brackets the share of the copy rate."""
    rate = results["copy_rate"]
    for batch in results["batches"]:
        cells = []
        for name in TITLES:
            taken, size = batch["seconds"].get(name), batch["bytes"].get(name)
            cell = "-" if taken is None else f"{taken * 1e6:.0f}"
            cells.append(cell + (f" ({size / taken / rate:.2f})" if taken and size and rate else ""))
        for name in ("attention", "bf16"):
            taken = batch["host_seconds"].get(name)
            cells.append("-" if taken is None else f"{taken * 1e6:.0f}")
        yield batch["name"], cells


def rows_of_ways(results: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """Label and cells of each batch of ``BOTH_WAYS``: microseconds."""
    for batch in results["ways"]:
        yield batch["name"], [f"{batch['seconds'][name] * 1e6:.0f}" for name in WAYS]


def tables(results: dict[str, Any]) -> list[Table]:
    """What was measured, in microseconds."""
    grid = Table(
        title="One layer's prefill attention, us (share of the copy rate); the host's time to submit it"
    )
    for title in HEAD:
        grid.add_column(title, justify="left" if title == HEAD[0] else "right")
    for name, cells in rows(results):
        grid.add_row(name, *cells)
    found = [grid]
    if "workspaces" in results:
        sweep = Table(title=f"{BATCHES[0].name}: ours, dequantised first, us, by the workspace's MiB")
        for mib in results["workspaces"]:
            sweep.add_column(str(mib), justify="right")
        sweep.add_row(*(f"{taken * 1e6:.0f}" for taken in results["workspaces"].values()))
        found.append(sweep)
    if "ways" in results:
        ways = Table(title="Us of a layer's attention, by what is done with the cached tokens")
        for title in HEAD_WAYS:
            ways.add_column(title, justify="left" if title == HEAD[0] else "right")
        for name, cells in rows_of_ways(results):
            ways.add_row(name, *cells)
        found.append(ways)
    return found
