"""Scattered pieces between device and host: ours beside vLLM's two paths, against the link's own rate.

Twice: the device's time alone, as behind other work that the stream still has, and from the call until all is
copied, as for who waits. A copy engine is told every piece by the host, which can take longer than copying.
"""

import argparse
import gc
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from ..connector import copy_measure
from ..connector.copy_choice import Way
from .copy_peers import NOT_MEASURED, TITLES, VLLM, Call, Peer, peers
from .record import RESULTS, write
from .timing import called_seconds, copy_rate, link_rate, queued_seconds

PIECES = (4608, 9216, 18432, 32768, 65536, 589824, 2097152)
"""Bytes: pages of NVFP4 (4,608 to 18,432) and bf16 (65,536) caches, rows of an 8B model in NVFP4 and bf16."""
BOTH = "BOTH"
"""Host to device and device to host at once; the rate is of their sum."""
WAYS = {way.name: way.value for way in Way} | {BOTH: "both directions at once"}
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
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--pieces", type=int, nargs="+", default=PIECES, help="bytes of a piece")
    parser.add_argument("--json", type=Path, default=RESULTS / "copy.json", help="file to write")
    parser.add_argument("--plot", type=Path, help="PNG to draw from the results (needs matplotlib)")


def run(args: argparse.Namespace) -> int:
    """Measures all, prints the tables, writes the JSON. Returns a process exit code, 1 for wrong bytes."""
    console = Console(width=100, highlight=False)
    if not torch.cuda.is_available():
        console.print("copy: expected an NVIDIA GPU, got none")
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    started = time.perf_counter()
    times = copy_measure.measure(device)
    choice_seconds = time.perf_counter() - started
    console.print(f"measured for the choice in {choice_seconds:.2f} s: {copy_measure.told(times)}")
    device_rate = copy_rate() / 2  # of copying: read plus written is twice that
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        buffers = Buffers()
        link = {"D2D": device_rate, **buffers.link_rates()}
        ways: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
        crossover = {way.name: times.crossover(way) for way in Way}
        numbers = {"link": link, "choice_seconds": choice_seconds, "crossover": crossover, "ways": ways}
        for way, size in track([(w, s) for w in WAYS for s in args.pieces], "copy", console=console):
            ways[way].append(measure(buffers, way, size, peers(times), args.repeats))
            write(args.json, numbers)  # what is measured is kept
    for way in WAYS:
        console.print(_table(way, ways[way], link[way]))
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
        return src, dst, torch.randperm(len(src))[:count], torch.randperm(len(dst))[:count]

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
    """What every peer does with pieces of one size: `rates` (bytes a second on the device), `submit` and
    `done` (seconds from the call until it returns, and until all is copied); `failed`: why one could not run.
    """
    directions = ("H2D", "D2H") if way == BOTH else (way,)
    count = len(buffers.pick(directions[0], size)[2])
    result: dict[str, Any] = {"piece_bytes": size, "pieces": count}
    result |= {numbers: {} for numbers in ("rates", "submit", "done", "failed")}
    for name, peer in by.items():

        def make(peer: Peer = peer) -> Call:
            calls = [peer(*buffers.pick(d, size)) for d in directions]
            return buffers.at_once(*calls) if way == BOTH else calls[0]

        try:
            if not all(copies_right(peer, *buffers.pick(d, size)) for d in directions):
                result["failed"][name] = WRONG
                continue
            seconds, submit = queued_seconds(make, repeats)
            done = called_seconds(make, repeats)
        except (RuntimeError, ImportError, TypeError, AttributeError) as error:
            result["failed"][name] = f"{type(error).__name__}: {error}"[:300]
            continue
        result["rates"][name] = len(directions) * count * size / seconds
        result["submit"][name], result["done"][name] = submit, done
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
    reference = "device copy" if way == "D2D" else "link"
    grid = Table(title=f"{WAYS[way]}, GB/s ({reference}: {link / 1e9:,.1f})")
    grid.add_column("bytes a piece", justify="right")
    for title in TITLES.values():
        grid.add_column(title, justify="right")
    grid.add_column(f"ours / {reference}", justify="right")
    grid.add_column("ours / vLLM", justify="right")
    grid.add_column("call to done", justify="right")
    for r in results:
        cells = (f"{r['rates'][name] / 1e9:,.1f}" if name in r["rates"] else "-" for name in TITLES)
        grid.add_row(f"{r['piece_bytes']:,}", *cells, *ratios(r, link))
    return grid


def ratios(result: dict[str, Any], link: float) -> tuple[str, str, str]:
    """Ours of the link's rate, how many times as fast as the better of vLLM's paths on the device, and how
    many times from the call until all is copied."""
    ours = result["rates"].get("ours")
    share = f"{ours / link:.2f}" if ours else "-"
    seconds_a_byte = {name: 1 / rate for name, rate in result["rates"].items()}
    return share, _gain(seconds_a_byte), _gain(result["done"])


def _gain(seconds: dict[str, float]) -> str:
    """How many times as long the better of vLLM's paths takes."""
    theirs = min((seconds[name] for name in VLLM if name in seconds), default=None)
    ours = seconds.get("ours")
    return f"{theirs / ours:.2f}x" if ours and theirs else "-"
