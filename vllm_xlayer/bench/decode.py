"""Decode attention: ours beside its peers in one process, against the device's copy rate."""

import argparse
import functools
import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..provenance import write
from .inputs import Inputs, Shape
from .lengths import ragged
from .peers import PEERS, Peer, check
from .timing import copy_rate, graph_seconds

WIDTH = 150
"""Of the printed table."""
L2_TIMES = 4
"""Copies of the cache are rotated until they are so many times the L2."""
MAX_COPIES = 32
IDLE = 0.3
"""Seconds before each measurement: at its power limit a GPU lowers its clock, and the next one is slower."""
COMPILED = "flashinfer"
"""The group that is compiled at first use, for minutes, and so has to be named."""
GROUPS = ("fa3", "int4", "turboquant", COMPILED)
"""What ``--peers`` takes."""

RAGGED = tuple(ragged("decode", 96, median=3000, most=60000))
SHAPES = (
    Shape("64 x 8192", (8192,) * 64),
    Shape("128 x 4096", (4096,) * 128),
    Shape("256 x 1024", (1024,) * 256),
    Shape("16 x 8192", (8192,) * 16),
    Shape("1 x 65536", (65536,)),
    Shape("64 x 1024", (1024,) * 64),
    Shape("64 x 2048", (2048,) * 64),
    Shape("64 x 4096", (4096,) * 64),
    Shape("64 x 16384", (16384,) * 64),
    Shape("64 x 8192, group 1", (8192,) * 64, num_q_heads=8),
    Shape("64 x 8192, group 16", (8192,) * 64, num_q_heads=32, num_kv_heads=2),
    Shape("64 x 8192, 4 KV heads", (8192,) * 64, num_q_heads=16, num_kv_heads=4),
    Shape("64 x 8192, D 64", (8192,) * 64, head_size=64),
    Shape("64 x 8192, D 256", (8192,) * 64, num_q_heads=16, num_kv_heads=4, head_size=256),
    Shape("64 x 8192, 4 query tokens", (8192,) * 64, q_len=4),
    Shape("64 x 8192, page 64", (8192,) * 64, block_size=64),
    Shape("1 x 128k + 63 x 1k", (131072,) + (1024,) * 63),
    Shape("64 x 8192, 1 to 4 query tokens", (8192,) * 64, q_len=4, q_lens=(4, 1, 2, 1)),
    Shape("ragged 96, up to 60k", RAGGED),
    Shape("ragged 96, 8 heads, 1 KV head", RAGGED, num_q_heads=8, num_kv_heads=1),
    Shape("ragged 96, 16 heads, 1 KV head", RAGGED, num_q_heads=16, num_kv_heads=1),
    Shape("ragged 96, 28 heads, 4 KV heads", RAGGED, num_q_heads=28, num_kv_heads=4),
    Shape("ragged 96, 64 heads of 64", RAGGED, num_q_heads=64, head_size=64),
    Shape("ragged 96, 16 heads of 256", RAGGED, num_q_heads=16, head_size=256),
    Shape("ragged 96, 4 query tokens", RAGGED, q_len=4),
    Shape("16 x 8192, layer-major", (8192,) * 16, layers=1),
    Shape("16 x 8192, rows of 32 layers", (8192,) * 16, layers=32),
)
PLOTTED = ("64 x 1024", "64 x 2048", "64 x 4096", "64 x 8192", "64 x 16384")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeats", type=int, default=20, help="times each is measured (default: %(default)s)"
    )
    parser.add_argument("--peers", nargs="*", choices=GROUPS, default=[g for g in GROUPS if g != COMPILED],
                        help="measured in this order, beside ours")  # fmt: skip
    parser.add_argument("--only", help="shapes whose name contains this")
    parser.add_argument(
        "--json", type=Path, default=Path("decode.json"), help="file to write (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, help="PNG to draw from the results (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measures every shape, prints the table, writes the JSON. Returns a process exit code."""
    console = Console(width=WIDTH, highlight=False)
    rate = copy_rate()
    shapes = [s for s in SHAPES if args.only is None or args.only in s.name]
    results: list[dict[str, Any]] = [
        {"name": s.name, "tokens": s.tokens, "seconds": {}, "bytes": {}, "error": {}, "failed": {}}
        for s in shapes
    ]
    for group in ("ours", *args.peers):
        names = [name for name, peer in PEERS.items() if peer.group == group]
        for i in track(range(len(shapes)), f"decode, {', '.join(names)}", console=console):
            for name in names:
                measure(name, PEERS[name], shapes[i], args.repeats, results[i])
            # If a kernel takes the process with it, or the time is up, what was measured is written.
            write(args.json, {"copy_rate": rate, "shapes": results})
    console.print(_table(results, rate))
    console.print(f"device copy rate: {rate / 1e12:.2f} TB/s", markup=False)
    for line in missing(results):
        console.print(line, markup=False)
    if args.plot:
        from .plot import decode_plot

        decode_plot(args.json, args.plot)
    return 0


def measure(name: str, peer: Peer, shape: Shape, repeats: int, result: dict[str, Any]) -> None:
    """Puts a peer's seconds on one shape into the result, or why it has none."""
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    size = peer.bytes_per_token(shape) * shape.tokens
    # Pages of other layers lie between those of a row, which takes memory enough.
    copies = 1 if shape.layers > 1 else min(MAX_COPIES, max(2, int(L2_TIMES * l2 / size) + 1))
    try:
        result["error"][name] = error_of(peer, replace(shape, name="", lens=()))
        if not result["error"][name] <= peer.max_error:
            raise ArithmeticError(f"relative error of its result: {result['error'][name]:.3f}")
        calls = peer.make(Inputs(shape, copies), None)
        time.sleep(IDLE)
        result["seconds"][name] = graph_seconds(calls, repeats)
        result["bytes"][name] = size
    except Exception as error:  # whatever a peer raises: the others are measured
        result["failed"][name] = f"{type(error).__name__}: {error}"[:300]
    gc.collect()
    torch.cuda.empty_cache()


@functools.cache
def error_of(peer: Peer, kind: Shape) -> float:
    """`check.error` of a peer for heads and pages such as these; once for all shapes that have them."""
    return check.error(peer.make, peer.kept, kind)


def missing(results: list[dict[str, Any]]) -> list[str]:
    """A line for each peer that has no number on some shape, with the reason."""
    lines = []
    for name, peer in PEERS.items():
        reasons: dict[str, list[str]] = {}
        for r in results:
            if name in r["failed"]:
                reasons.setdefault(r["failed"][name], []).append(r["name"])
        lines += [f"{peer.title}, missing on {'; '.join(on)}: {why}" for why, on in reasons.items()]
        if not any(name in r["seconds"] or name in r["failed"] for r in results):
            lines.append(f"{peer.title}, missing: not asked for (--peers {peer.group})")
    return lines


def _table(results: list[dict[str, Any]], rate: float) -> Table:
    shown = [name for name in PEERS if any(name in r["seconds"] for r in results)]
    grid = Table(title="One layer's decode attention, microseconds (share of the copy rate)")
    grid.add_column("batch x context")
    for name in shown:
        grid.add_column(PEERS[name].title, justify="right", no_wrap=True)
    grid.add_column("floor", justify="right")
    grid.add_column("fp8 / ours", justify="right")
    for r in results:
        cells = []
        for name in shown:
            seconds = r["seconds"].get(name)
            cells.append(
                "-" if seconds is None else f"{seconds * 1e6:.0f} ({r['bytes'][name] / seconds / rate:.2f})"
            )
        ours, fp8 = r["seconds"].get("nvfp4"), r["seconds"].get("fa3_fp8")
        floor = f"{r['bytes']['nvfp4'] / rate * 1e6:.0f}" if ours else "-"
        grid.add_row(r["name"], *cells, floor, f"{fp8 / ours:.2f}x" if ours and fp8 else "-")
    return grid
