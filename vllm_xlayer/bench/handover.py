"""A prompt that another engine has computed: its first token, read as rows or pages, against computing it.

Two engines at a time, on one GPU or with GPUs of their own (``--devices``), where all ways' engines start at
once; only one of them computes. Needs nixl. Without a GPU it runs on the CPU reference platform, whose times
say nothing of a GPU's.
"""

import argparse
import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..nvfp4 import content_bytes
from ..provenance import write
from .arguments import shape_argument
from .bounds import SHAPE
from .engines import Engine, EngineFailed, end_when_told
from .handover_link import Link
from .handover_pair import NotMeasured, Pair
from .handover_ways import BLOCK, CONNECTORS, LARGE_RING, WAYS, begin, measure, start
from .handover_worker import Geometry, WorkerLink
from .shapes import SHAPES, write_model

ELEMENT_BYTES = {"bf16": 2, "fp8": 1}
STAGINGS = (64 << 20, 256 << 20, LARGE_RING)
"""Bytes of the rings of a worker without an engine; the first one alone where there is no GPU."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    on_gpu = torch.cuda.is_available()
    shape_argument(parser, SHAPE if on_gpu else "tiny")
    parser.add_argument(
        "--cache",
        choices=("nvfp4", "fp8", "bf16"),
        default="nvfp4",
        help="KV cache of both engines (default: %(default)s)",
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[16384 if on_gpu else 512], help="of each prompt"
    )
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="none for NIXL alone")
    parser.add_argument(
        "--devices", nargs=2, metavar=("PREFILL", "DECODE"),
        help="GPUs of each engine, as CUDA_VISIBLE_DEVICES has them; several for as many ranks: 0,1",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=int, default=3, help="times each is measured (default: %(default)s)"
    )
    parser.add_argument(
        "--way-seconds", type=float, default=60, help="limit of a way and length (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.2, help="what must be free for each engine"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("handover.json"), help="file to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints a table for each length, writes the JSON after each thing that is measured. Returns 1
    if something could not be measured."""
    end_when_told()
    of_a_token = token_bytes(args.shape, args.cache)
    lengths: list[dict[str, Any]] = [
        {
            "tokens": tokens, "kv_bytes": tokens * of_a_token, "link": {},
            "worker": {"neighbours": {}, "scattered": {}}, "ways": {},
        }
        for tokens in sorted(set(args.tokens))
    ]  # fmt: skip
    problems: dict[str, str] = {}
    results = {
        "shape": args.shape, "cache": args.cache, "devices": args.devices, "lengths": lengths,
        "problems": problems,
    }  # fmt: skip
    began = time.monotonic()

    def say(text: str) -> None:
        """With what is measured so far kept."""
        print(f"[{time.monotonic() - began:6.1f} s] {text}", flush=True)
        write(args.json, results)

    try:
        _measure_all(args, lengths, problems, say)
    except ImportError as error:
        print(f"handover: {error}")
        return 1
    say("done")
    for length in lengths:
        grid = Table(*HEAD, title=title(results, length))
        for cells in rows(length):
            grid.add_row(*cells)
        Console(width=120).print(grid)
    return int(bool(problems))


def _measure_all(
    args: argparse.Namespace,
    lengths: list[dict[str, Any]],
    problems: dict[str, str],
    say: Callable[[str], None],
) -> None:
    """Into each length's "link", "worker" and "ways"; what cannot be measured into problems.

    Raises:
        ImportError: NIXL is missing.
    """
    of_a_token = token_bytes(args.shape, args.cache)
    say("NIXL alone: starting")
    with contextlib.ExitStack() as everything:
        until_measured = everything.enter_context(contextlib.ExitStack())
        link = until_measured.enter_context(Link(lengths[-1]["kv_bytes"], args.devices))
        rows = -(-lengths[-1]["tokens"] // BLOCK)
        stagings = STAGINGS if torch.cuda.is_available() else STAGINGS[:1]
        geometry = Geometry(of_a_token * BLOCK, rows, stagings[-1])
        worker = until_measured.enter_context(WorkerLink(geometry, args.devices))
        folder = everything.enter_context(tempfile.TemporaryDirectory(prefix="vllm-xlayer-handover-"))
        model = write_model(Path(folder), args.shape)
        started: dict[str, tuple[contextlib.ExitStack, Engine | Pair]] = {}

        def starts(way: str) -> tuple[contextlib.ExitStack, Engine | Pair]:
            if way not in started:
                say(f"{WAYS[way]}: starting")
                own = everything.enter_context(contextlib.ExitStack())
                tokens = [length["tokens"] for length in lengths]
                engines = start(
                    way, model, args.cache, args.devices, tokens, of_a_token, args.gpu_memory_utilization
                )
                started[way] = own, own.enter_context(engines)
            return started[way]

        # Engines that wait disturb nobody, but on one GPU all of them may not find room.
        for way in args.ways if _apart(args.devices) else args.ways[:1]:
            starts(way)
        with until_measured:
            try:
                _measure_link(link, lengths, SHAPES[args.shape]["num_hidden_layers"], say)
            except RuntimeError as error:
                problems["NIXL alone"] = str(error)
                say(f"NIXL alone: {error}")
            try:
                _measure_worker(worker, lengths, stagings, say)
            except RuntimeError as error:
                problems["a worker alone"] = str(error)
                say(f"a worker alone: {error}")
        for way in args.ways:
            try:
                own, engines = starts(way)
                with own:
                    _measure_way(way, engines, lengths, args, say)
            except (EngineFailed, NotMeasured) as error:
                problems[way] = str(error)
                say(f"{WAYS[way]}: {error}")


def _apart(devices: list[str] | None) -> bool:
    """Whether no GPU is both engines'."""
    return devices is not None and not set(devices[0].split(",")) & set(devices[1].split(","))


def _measure_link(link: Link, lengths: list[dict[str, Any]], layers: int, say: Callable[[str], None]) -> None:
    link.wait()
    for length in lengths:
        blocks = -(-length["tokens"] // BLOCK)
        for name, pieces in {"one": 1, "rows": blocks, "pages": blocks * layers}.items():
            rate = length["link"][name] = link.rate(length["kv_bytes"], pieces)
            say(f"NIXL alone: {length['kv_bytes'] / 1e6:,.1f} MB in {pieces:,}, {rate / 1e9:.2f} GB/s")


def _measure_worker(
    worker: WorkerLink, lengths: list[dict[str, Any]], stagings: tuple[int, ...], say: Callable[[str], None]
) -> None:
    worker.wait()
    for length in lengths:
        blocks = -(-length["tokens"] // BLOCK)
        for staging, (how, rates) in itertools.product(stagings, length["worker"].items()):
            rate = rates[str(staging)] = worker.rows_rate(blocks, staging, how == "neighbours")
            say(
                f"a worker alone: {blocks:,} sealed rows, {how}, staging_bytes {staging >> 20} MiB, "
                f"{rate / 1e9:.2f} GB/s"
            )


def _measure_way(
    way: str,
    engines: Engine | Pair,
    lengths: list[dict[str, Any]],
    args: argparse.Namespace,
    say: Callable[[str], None],
) -> None:
    begin(way, engines, lengths[0]["tokens"], args.way_seconds)
    say(f"{WAYS[way]}: started, a first prompt is done")
    for length in lengths:
        tokens = length["tokens"]
        length["ways"][way] = measure(way, engines, "measured", tokens, args.repeats, args.way_seconds)
        say(f"{WAYS[way]}: {tokens:,} tokens, ms: "
            + ", ".join(f"{seconds * 1e3:.1f}" for seconds in length["ways"][way]["seconds"]))  # fmt: skip
    engines.end()


def token_bytes(shape: str, cache: str) -> int:
    """Of KV, of all layers."""
    model = SHAPES[shape]
    head = model["head_dim"]
    of_a_head = content_bytes(head) if cache == "nvfp4" else 2 * head * ELEMENT_BYTES[cache]
    return int(model["num_hidden_layers"] * model["num_key_value_heads"] * of_a_head)


HEAD = ("", "first token, ms", "on the device, ms", "descriptors", "hand-over / floor")


def title(results: dict[str, Any], length: dict[str, Any]) -> str:
    return (
        f"A prompt of {length['tokens']:,} tokens, {results['shape']}, {results['cache']}: "
        f"{length['kv_bytes'] / 1e6:,.1f} MB"
    )


def rows(length: dict[str, Any]) -> list[tuple[str, ...]]:
    """Cells of a line for NIXL alone, in one piece (the floor) and more, and for each way.

    A hand-over is what a first token takes longer than that of the same prompt once it is on the device.
    """
    link, nbytes = length["link"], length["kv_bytes"]
    floor = nbytes / link["one"] if "one" in link else None

    def of_floor(seconds: float) -> str:
        return f"{seconds / floor:.2f}" if floor else ""

    lines: list[tuple[str, ...]] = []
    for pieces, rate in link.items():
        what = f"NIXL alone, in {'one piece' if pieces == 'one' else pieces} ({rate / 1e9:.2f} GB/s)"
        lines.append((what, f"{nbytes / rate * 1e3:.1f}", "", "", of_floor(nbytes / rate)))
    for how, rates in length["worker"].items():
        for staging, rate in rates.items():
            what = f"worker, {how}, {int(staging) >> 20} MiB ({rate / 1e9:.2f} GB/s)"
            lines.append((what, f"{nbytes / rate * 1e3:.1f}", "", "", of_floor(nbytes / rate)))
    for way, numbers in length["ways"].items():
        seconds = statistics.median(numbers["seconds"])
        cells = ["", "", ""]
        if way in CONNECTORS:
            cached = statistics.median(numbers["cached_seconds"])
            cells = [f"{cached * 1e3:.1f}", f"{numbers['descriptors']:,.0f}", of_floor(seconds - cached)]
        lines.append((WAYS[way], f"{seconds * 1e3:.1f}", *cells))
    return lines
