"""Scattered pieces between device and host: ours beside vLLM's two paths, against the link's own rate.

A copy engine is told every piece by the host, which can take longer than copying. So there are three rates:
of a stream of calls, which is what a long transfer gets; of one call, which is what its caller waits for; and
of the device alone, as if submitting took no time.
"""

import argparse
import gc
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..connector.copy.choice import Way
from ..provenance import write
from .bounds import Bound
from .copy_peers import NOT_MEASURED, TITLES, VLLM, Call, Peer, peers
from .timing import called_seconds, copy_rate, link_rate, queued_seconds, streamed_seconds

PIECES = (4608, 9216, 18432, 32768, 65536, 589824, 2097152)
"""Bytes: pages of NVFP4 (4,608 to 18,432) and bf16 (65,536) caches, rows of an 8B model in NVFP4 and bf16."""
BOTH = "BOTH"
"""Host to device and device to host at once; the rate is of their sum."""
WAYS = {way.name: way.value for way in Way} | {BOTH: "both directions at once"}
MEASURES = {"stream": "a stream of calls", "done": "one call", "device": "device alone"}
"""Bytes a second: of calls one behind the other; from one call until all is copied; of the device alone."""
ROW_BYTES, ROW_SHARE = 589824, 0.95
PAGES, PAGE_GAIN = PIECES[:3], {"H2D": 1.2, "D2H": 1.0}
DEVICE_SHARE = 0.85
"""Bounds. Of streams: rows' share of the link, and small pages against the better of vLLM's paths. Of the
device alone: the share of a large copy inside it. (It copies 32,768 pieces before the next are submitted.)"""
HOST_GIB, DEVICE_GIB = 1, 4
"""Of each buffer. Pieces are picked anew, from all of it, for every timed call."""
HOST_MOVED, DEVICE_MOVED = 128 << 20, 1 << 30
"""Bytes of a timed copy, at most."""
HOST_PIECES, DEVICE_PIECES = 1 << 12, 1 << 15
"""Of a timed copy, at most: peers that work through them one by one on the host take long."""
WRONG = "copied other bytes than expected"
CHECKED = 16 << 20
"""Bytes of a copy that are compared."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeats", type=int, default=5, help="times each is measured (default: %(default)s)"
    )
    parser.add_argument("--pieces", type=int, nargs="+", default=PIECES, help="bytes of a piece")
    parser.add_argument(
        "--json", type=Path, default=Path("copy.json"), help="file to write (default: %(default)s)"
    )
    parser.add_argument("--plot", type=Path, help="PNG to draw from the results (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measures all, prints the tables, writes the JSON. Returns a process exit code, 1 for wrong bytes."""
    console = Console(width=100, highlight=False)
    device_rate = copy_rate() / 2  # of copying: read plus written is twice that
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        buffers = Buffers()
        link = {"D2D": device_rate, **buffers.link_rates()}
        ways: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        numbers = {"link": link, "ways": ways}
        for way, size in track([(w, s) for w in WAYS for s in args.pieces], "copy", console=console):
            ways[way].append(measure(buffers, way, size, peers(), args.repeats))
            write(args.json, numbers)  # what is measured is kept
    for way in WAYS:
        console.print(_table(way, ways[way], link[way]))
    for bound in bounds(numbers):
        console.print(str(bound))
    console.print(f"Missing peers, not measured here: {', '.join(NOT_MEASURED)}")
    failed = Counter(f for lines in ways.values() for r in lines for f in r["failed"].items())
    for (name, why), times_failed in failed.items():
        console.print(f"{TITLES[name]}, {times_failed} times: {why}", markup=False, style="red")
    if args.plot:
        from .plot import copy_plot

        copy_plot(args.json, args.plot)
    return int(any(why == WRONG for _, why in failed))


class Buffers:
    """Source and destination of every way, full of random bytes."""

    def __init__(self) -> None:
        near, far = torch.randint(0, 256, (2, DEVICE_GIB << 30), dtype=torch.uint8, device="cuda")
        source, target = torch.empty((2, HOST_GIB << 30), dtype=torch.uint8, pin_memory=True)
        source.copy_(near[: source.numel()])
        target.zero_()
        # The first ends of H2D and D2H are not each other's, so that both can run at once.
        self.ends = {"H2D": (source, near), "D2H": (far, target), "D2D": (far, near)}
        self.other_stream = torch.cuda.Stream()
        self.random = numpy.random.default_rng(0)

    def link_rates(self) -> dict[str, float]:
        """Bytes a second of large copies to device, to host, and both at once."""
        whole = {way: [t[: HOST_GIB << 29] for t in self.ends[way]] for way in ("H2D", "D2H")}
        rates = {way: link_rate(*pair) for way, pair in whole.items()}

        def both() -> Call:
            copies = [partial(dst.copy_, src, non_blocking=True) for src, dst in whole.values()]
            return self.at_once(*copies)

        seconds, _ = queued_seconds(both, 5)
        return rates | {BOTH: 2 * whole["H2D"][0].nbytes / seconds}

    def pick(self, way: str, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(src, dst, src_ids, dst_ids): pieces that lie anywhere in the buffers."""
        src, dst = (t[: t.numel() // size * size].view(-1, size) for t in self.ends[way])
        moved, pieces = (DEVICE_MOVED, DEVICE_PIECES) if way == "D2D" else (HOST_MOVED, HOST_PIECES)
        count = min(moved // size, pieces, len(src), len(dst))
        src_ids, dst_ids = (self.random.choice(len(pieces), count, replace=False) for pieces in (src, dst))
        return src, dst, torch.from_numpy(src_ids), torch.from_numpy(dst_ids)

    def at_once(self, first: Call, second: Call) -> Call:
        """The second on another stream; the current one goes on when both are done."""

        def call() -> None:
            here = torch.cuda.current_stream()
            self.other_stream.wait_stream(here)
            with torch.cuda.stream(self.other_stream):
                second()
            first()
            here.wait_stream(self.other_stream)

        return call


def measure(buffers: Buffers, way: str, size: int, by: dict[str, Peer], repeats: int) -> dict[str, Any]:
    """What every peer does with pieces of one size: each of MEASURES in bytes a second, `submit` in seconds
    until one call returns; `failed`: why one could not run.
    """
    directions = ("H2D", "D2H") if way == BOTH else (way,)
    count = len(buffers.pick(directions[0], size)[2])
    moved = len(directions) * count * size
    result: dict[str, Any] = {"piece_bytes": size, "pieces": count}
    result |= {numbers: {} for numbers in (*MEASURES, "submit", "failed")}
    for name, peer in by.items():

        def make(peer: Peer = peer) -> Call:
            calls = [peer(*buffers.pick(d, size)) for d in directions]
            return buffers.at_once(*calls) if way == BOTH else calls[0]

        try:
            if not all(copies_right(peer, *buffers.pick(d, size)) for d in directions):
                result["failed"][name] = WRONG
                continue
            device, submit = queued_seconds(make, repeats)
            seconds = {
                "stream": streamed_seconds(make, repeats),
                "done": called_seconds(make, repeats),
                "device": device,
            }
        except (RuntimeError, ImportError, TypeError, AttributeError) as error:
            result["failed"][name] = f"{type(error).__name__}: {error}"[:300]
            continue
        for rate in MEASURES:
            result[rate][name] = moved / seconds[rate]
        result["submit"][name] = submit
    gc.collect()
    return result


def copies_right(
    peer: Peer, src: torch.Tensor, dst: torch.Tensor, src_ids: torch.Tensor, dst_ids: torch.Tensor
) -> bool:
    """Whether the bytes arrive, looked at in the first CHECKED bytes and the last piece."""
    some = [*range(min(len(src_ids), max(1, CHECKED // src.shape[1]))), len(src_ids) - 1]
    dst[dst_ids[some].to(dst.device)] = 0
    torch.cuda.synchronize()
    peer(src, dst, src_ids, dst_ids)()
    torch.cuda.synchronize()
    return torch.equal(dst[dst_ids[some].to(dst.device)].cpu(), src[src_ids[some].to(src.device)].cpu())


def _table(way: str, results: list[dict[str, Any]], link: float) -> Table:
    title = f"{WAYS[way]}, GB/s (one large copy: {link / 1e9:,.1f})"
    grid = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    size, *others = table_head(way)
    grid.add_column(size, justify="right", min_width=len("2,097,152"))
    for title in others:
        grid.add_column(title, justify="right", max_width=8)
    for r in results:
        grid.add_row(*table_line(r, link))
    return grid


def table_head(way: str) -> list[str]:
    """Of a table whose lines are `table_line`'s."""
    reference = "device copy" if way == "D2D" else "link"
    _, *others = MEASURES.values()
    return ["bytes a piece", *TITLES.values(), f"ours / {reference}", "ours / vLLM", *others]


def table_line(result: dict[str, Any], link: float) -> list[str]:
    """The rates of a stream, ours of the link's, and how many times as fast as the better of vLLM's paths it
    is in a stream, for one call, and on the device alone."""
    rates = result["stream"]
    cells = (f"{rates[name] / 1e9:,.1f}" if name in rates else "-" for name in TITLES)
    share = f"{rates['ours'] / link:.2f}" if "ours" in rates else "-"
    gains = (gain(result[measure]) for measure in MEASURES)
    return [f"{result['piece_bytes']:,}", *cells, share, *(f"{g:.2f}x" if g else "-" for g in gains)]


def gain(rates: dict[str, float]) -> float | None:
    """How many times the better of vLLM's paths ours is."""
    theirs = max((rates[name] for name in VLLM if name in rates), default=None)
    return rates["ours"] / theirs if "ours" in rates and theirs else None


def bounds(results: dict[str, Any]) -> list[Bound]:
    """For the pieces that were measured."""
    found, link = [], results["link"]
    lines = {
        way: {r["piece_bytes"]: r for r in results["ways"][way] if "ours" in r["stream"]} for way in WAYS
    }
    for way, least in PAGE_GAIN.items():
        shares = [r["stream"]["ours"] / link[way] for size, r in lines[way].items() if size >= ROW_BYTES]
        if shares:
            what = f"{WAYS[way]}, {ROW_BYTES:,} bytes and more, of the link"
            found.append(Bound(what, min(shares), ROW_SHARE, least=True))
        for size in PAGES:
            if size in lines[way] and (ratio := gain(lines[way][size]["stream"])):
                found.append(Bound(f"{WAYS[way]}, {size:,} bytes, ours / vLLM", ratio, least, least=True))
    shares = [r["device"]["ours"] / link["D2D"] for r in lines["D2D"].values()]
    if shares:
        what = f"{WAYS['D2D']}, on the device alone, of its own copy"
        found.append(Bound(what, min(shares), DEVICE_SHARE, least=True))
    return found
