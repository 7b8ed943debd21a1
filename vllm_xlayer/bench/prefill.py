"""Prefill in vLLM's engine with each KV cache: many new prompts, and long ones whose first half is cached.

The engines share the GPU and are timed in turn, each round in the other direction, so that a drift of the
clock does not look like a difference. Only the one that is timed computes.
"""

import argparse
import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..provenance import write
from .arguments import caches_argument, shape_argument
from .bounds import SHAPE, Bound
from .engines import GRAPHS_ONLY, Engine, goes_on, prompts
from .shapes import write_model

BATCH = (64, 8192)
"""Requests, tokens of each: new ones every time."""
LONG = 16384
"""Tokens of a prompt whose first half is cached."""
BATCH_RATIO, LONG_RATIO = 1.03, 1.05
"""What the batch may take with nvfp4 of fp8's time, a half cached prompt of bf16's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shape_argument(parser)
    caches_argument(parser, ["bf16", "fp8", "nvfp4"])
    parser.add_argument("--rounds", type=int, default=2, help="times each engine is measured")
    parser.add_argument("--prompts", type=int, default=5, help="half cached prompts a round")
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.3, help="of each engine")
    parser.add_argument("--scale", type=int, default=1, help="divides requests and tokens, to try it out")
    parser.add_argument(
        "--json", type=Path, default=Path("prefill.json"), help="file to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures, prints the table, writes the JSON. Returns 1 if an engine failed."""
    batch, long = (max(1, BATCH[0] // args.scale), BATCH[1] // args.scale), LONG // args.scale
    settings = dict(
        max_model_len=long + 16, max_num_seqs=batch[0],
        gpu_memory_utilization=args.gpu_memory_utilization, **GRAPHS_ONLY,
    )  # fmt: skip
    caches: dict[str, Any] = {}
    results = {
        "shape": args.shape, "requests": batch[0], "tokens": batch[1], "long": long, "caches": caches,
    }  # fmt: skip
    engines: dict[str, Engine] = {}
    failed: list[str] = []
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vllm-xlayer-prefill-"))
        model = write_model(Path(folder), args.shape)
        for cache in args.caches:
            print(f"{cache}: starting", flush=True)
            with goes_on(cache, failed):
                engine = stack.enter_context(Engine(model, cache, **settings))
                warm_up(engine, batch[1], long)
                engines[cache] = engine
                caches[cache] = {
                    "runner": engine.about["runner"],
                    "batch_seconds": [], "half_seconds": [], "cached_seconds": [],
                }  # fmt: skip
        for number in range(args.rounds):
            for cache in list(engines)[:: 1 if number % 2 == 0 else -1]:
                with goes_on(cache, failed):
                    measure(engines[cache], caches[cache], number, batch, long, args.prompts)
                    seconds = caches[cache]["batch_seconds"][-1]
                    print(f"round {number + 1} of {args.rounds}, {cache}: {seconds:.2f} s", flush=True)
                if cache in failed:
                    del engines[cache], caches[cache]
            if caches:
                write(args.json, results)
    if caches:
        grid = Table("", *caches, title=f"Engines in turn on one GPU, {args.shape}")
        for label, cells in rows(results):
            grid.add_row(label, *cells)
        Console(width=100).print(grid)
    for bound in bounds(results):
        print(bound)
    return int(bool(failed))


def warm_up(engine: Engine, tokens: int, long: int) -> None:
    """Once each kind of step that will be timed: kernels are loaded and chosen at their first use."""
    vocabulary = engine.about["vocabulary"]
    engine.generate(prompts("warm up", 4, tokens, vocabulary), 1)
    prompt = prompts("warm up, long", 1, long, vocabulary)[0]
    engine.generate([prompt[: long // 2]], 1)
    engine.generate([prompt], 1)


def measure(
    engine: Engine, report: dict[str, Any], number: int, batch: tuple[int, int], long: int, count: int
) -> None:
    """One round of one engine. All engines get the same prompts.

    Raises:
        RuntimeError: the prefix cache held something else than is said to be measured.
    """
    vocabulary, half = engine.about["vocabulary"], long // 2
    new = engine.generate(prompts(f"new {number}", *batch, vocabulary), 1)
    _expect("a new prompt", new.cached, [0] * batch[0])
    report["batch_seconds"].append(new.seconds)

    ends = prompts(f"halves {number}", count + 1, half, vocabulary)
    shared = ends.pop()
    engine.generate([shared], 1)
    for end in ends:
        prompt = shared + end
        first = engine.generate([prompt], 1)
        _expect("a half cached prompt", first.cached, [half])
        report["half_seconds"].append(first.seconds)
        # What is left of the time when nearly all is cached is not prefill.
        report["cached_seconds"].append(engine.generate([prompt], 1).seconds)


def _expect(what: str, cached: list[int], expected: list[int]) -> None:
    if cached != expected:
        raise RuntimeError(f"{what}: expected {expected[0]} tokens in the prefix cache, got {cached}")


def rows(results: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Label and a cell for each cache: medians."""
    columns = list(results["caches"].values())
    batch, long = f"{results['requests']} x {results['tokens']:,}", f"{results['long']:,}"

    def cells(key: str, scale: float, digits: int) -> list[str]:
        return [f"{statistics.median(c[key]) * scale:.{digits}f}" for c in columns]

    return [
        (f"prefill {batch}, s", cells("batch_seconds", 1, 2)),
        (f"first token of {long}, half cached, ms", cells("half_seconds", 1e3, 1)),
        (f"first token of {long}, all cached, ms", cells("cached_seconds", 1e3, 1)),
    ]


def bounds(results: dict[str, Any]) -> list[Bound]:
    """Of nvfp4, against the caches that were measured beside it, at full size."""
    caches, found = results["caches"], []
    measured = tuple(results[key] for key in ("shape", "requests", "tokens", "long"))
    for key, peer, what, limit in (
        ("batch_seconds", "fp8", "prefill {} x {:,}".format(*BATCH), BATCH_RATIO),
        ("half_seconds", "bf16", f"first token of {LONG:,}, half cached", LONG_RATIO),
    ):
        if measured == (SHAPE, *BATCH, LONG) and "nvfp4" in caches and peer in caches:
            ours, theirs = (statistics.median(caches[name][key]) for name in ("nvfp4", peer))
            found.append(Bound(f"nvfp4 / {peer}, {what}", ours / theirs, limit))
    return found
