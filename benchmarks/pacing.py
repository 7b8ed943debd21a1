"""How long others' small copies wait while a prompt's rows are copied, by bytes a batch: paced and not."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from vllm_xlayer import ops
from vllm_xlayer.bench.timing import link_rate
from vllm_xlayer.connector.copy.choice import Way
from vllm_xlayer.connector.copy.pacing import Chain
from vllm_xlayer.connector.copy.transfers import BATCH_BYTES
from vllm_xlayer.ops import CopyMethod
from vllm_xlayer.provenance import write

from . import RESULTS

ROW, ROWS = 589824, 1023
"""A row of an 8B model's NVFP4 cache, and as many as a prompt of 16k tokens restores."""
BATCHES = tuple(mib << 20 for mib in (2, 4, 8, 16, 32, 64))
HOW = ("one stream", "paced")
SMALL = {"4 KiB to the device": (Way.H2D, 4096), "4 KiB to the host": (Way.D2H, 4096),
         "256 KiB to the device": (Way.H2D, 262144)}  # fmt: skip
"""Copies such as an engine makes in a step: indices, sampled tokens, block tables."""
WAYS = (Way.H2D, Way.D2H)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS / "pacing.json", help="file to write")


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table a direction, writes the JSON. Returns a process exit code."""
    console = Console(width=100, highlight=False)
    if not torch.cuda.is_available():
        console.print("pacing: expected an NVIDIA GPU, got none")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    pool = torch.zeros((2 * ROWS, ROW), dtype=torch.uint8, device=device)
    host = torch.zeros(pool.shape, dtype=torch.uint8, pin_memory=True)
    ends = {Way.H2D: (host, pool), Way.D2H: (pool, host)}
    results: dict[str, Any] = {
        "row_bytes": ROW, "rows": ROWS, "link": {way.name: link_rate(*ends[way]) for way in WAYS},
        "batch_bytes": {way.name: BATCH_BYTES[way] for way in WAYS}, "ways": {way.name: [] for way in WAYS},
    }  # fmt: skip
    cases = [(way, size, how) for way in WAYS for size in BATCHES for how in HOW]
    for way, size, how in track(cases, "pacing", console=console):
        line = measure(*ends[way], size, how, args.repeats)
        results["ways"][way.name].append({"batch_bytes": size, "how": how, **line})
    for way in WAYS:
        console.print(_table(way, results))
    write(args.json, results)
    return 0


def measure(src: torch.Tensor, dst: torch.Tensor, size: int, how: str, repeats: int) -> dict[str, Any]:
    """Seconds to submit all rows and to copy them (medians), and what each kind of small copy waited."""
    submit = _on_one_stream(src, dst, size) if how == HOW[0] else _paced(src, dst, size)
    submitting, copying = [], []
    waits: dict[str, list[float]] = {kind: [] for kind in SMALL}
    small = {kind: _small(way, count, src.device, dst.device) for kind, (way, count) in SMALL.items()}
    for _ in range(repeats):
        ids = [torch.randperm(len(src))[:ROWS] for _ in "12"]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        submit(*ids)
        submitting.append(time.perf_counter() - begin)
        torch.cuda.synchronize()
        copying.append(time.perf_counter() - begin)
        for kind, copy in small.items():  # each beside a transfer of its own: they would wait for each other
            end = submit(*ids)
            while not end.query():
                begin = time.perf_counter()
                copy()
                waits[kind].append(time.perf_counter() - begin)
            torch.cuda.synchronize()
    return {
        "submit_seconds": statistics.median(submitting),
        "copy_seconds": statistics.median(copying),
        "waits": {
            kind: {"mean": statistics.mean(seconds), "most": max(seconds), "tries": len(seconds)}
            for kind, seconds in waits.items()
            if seconds
        },
    }


Submit = Callable[[torch.Tensor, torch.Tensor], torch.cuda.Event]
"""(src_ids, dst_ids) -> an event after all rows."""


def _on_one_stream(src: torch.Tensor, dst: torch.Tensor, size: int) -> Submit:
    stream, rows = torch.cuda.Stream(), max(1, size // ROW)

    def submit(src_ids: torch.Tensor, dst_ids: torch.Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(stream):
            for batch in zip(src_ids.split(rows), dst_ids.split(rows), strict=True):
                ops.copy_blocks(src, dst, *batch, CopyMethod.ENGINE)
            return stream.record_event()

    return submit


def _paced(src: torch.Tensor, dst: torch.Tensor, size: int) -> Submit:
    chain, rows = Chain(src.device if src.is_cuda else dst.device), max(1, size // ROW)

    def submit(src_ids: torch.Tensor, dst_ids: torch.Tensor) -> torch.cuda.Event:
        chain.follow()
        for batch in zip(src_ids.split(rows), dst_ids.split(rows), strict=True):
            last = chain.run(partial(ops.copy_blocks, src, dst, *batch, CopyMethod.ENGINE))
        return last.end

    return submit


def _small(way: Way, count: int, *devices: torch.device) -> Callable[[], None]:
    """A copy between pinned memory and the device, waited for."""
    near = torch.zeros(count, dtype=torch.uint8, pin_memory=True)
    far = torch.zeros(count, dtype=torch.uint8, device=next(d for d in devices if d.type == "cuda"))
    src, dst = (near, far) if way is Way.H2D else (far, near)
    stream = torch.cuda.Stream()

    def copy() -> None:
        with torch.cuda.stream(stream):
            dst.copy_(src, non_blocking=True)
        stream.synchronize()

    return copy


def _table(way: Way, results: dict[str, Any]) -> Table:
    link = results["link"][way.name]
    grid = Table(title=f"{results['rows']:,} rows {way.value} (link: {link / 1e9:.1f} GB/s)")
    for title in ("MiB a batch", "", "submit, ms", "GB/s", *SMALL):
        grid.add_column(title, justify="left" if title == "" else "right")
    for line in results["ways"][way.name]:
        rate = results["rows"] * results["row_bytes"] / line["copy_seconds"]
        chosen = line["batch_bytes"] == results["batch_bytes"][way.name] and line["how"] == HOW[1]
        waits = (f"{w['mean'] * 1e3:.2f}" if (w := line["waits"].get(kind)) else "-" for kind in SMALL)
        grid.add_row(
            f"{line['batch_bytes'] >> 20}{' *' if chosen else ''}", line["how"],
            f"{line['submit_seconds'] * 1e3:.1f}", f"{rate / 1e9:.1f}", *waits,
        )  # fmt: skip
    grid.caption = "Small copies: mean wait, ms. *: what the connector does"
    return grid


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pacing", description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
