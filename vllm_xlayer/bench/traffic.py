"""A load at vLLM's default flags: prompts and answers of ragged lengths offered at once, then the same again.

The first time all is computed, the second time the prompts are in the prefix cache, as far as it held them.
An engine starts for one to two minutes (torch.compile, all CUDA graphs): fewer ``--layers`` are for machines
that are lent for less, and caches that are not asked for stay in the file as they were measured before.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..provenance import kept, stamped, write
from .arguments import caches_argument, shape_argument
from .engines import CACHES, Engine, Prompt, goes_on, prompts_of
from .lengths import ragged
from .shapes import SHAPES, write_model

REQUESTS = 256
PROMPT = dict(median=2500, most=30000)
"""Tokens of prompts: 1.1 million in 256 of them."""
OUTPUT = dict(median=250, most=1500)
"""Tokens of answers."""
WARM_UP = 8
"""Requests before the timed ones: kernels are loaded and chosen at their first use."""
TURNS = {"new": "all is computed", "again": "the same again"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shape_argument(parser)
    parser.add_argument("--layers", type=int, help="of the model, instead of the shape's")
    caches_argument(parser, CACHES)
    parser.add_argument(
        "--requests", type=int, default=REQUESTS, help="offered at once (default: %(default)s)"
    )
    parser.add_argument("--scale", type=int, default=1, help="divides their tokens, to try it out")
    parser.add_argument(
        "--json", type=Path, default=Path("traffic.json"), help="file to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs an engine for each cache, prints the table, writes the JSON. Returns 1 if an engine failed."""
    lengths, answers = (
        ragged(kind, args.requests, size["median"] / args.scale, size["most"] // args.scale)
        for kind, size in (("prompts", PROMPT), ("answers", OUTPUT))
    )
    question = {
        "shape": args.shape, "layers": args.layers or SHAPES[args.shape]["num_hidden_layers"],
        "requests": args.requests, "prompt_tokens": sum(lengths), "output_tokens": sum(answers),
        "longest_prompt": max(lengths), "longest_output": max(answers),
    }  # fmt: skip
    caches = kept(args.json, "caches", args.caches, **question)
    results: dict[str, Any] = question | {"caches": caches}
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-traffic-") as folder:
        model = write_model(Path(folder), args.shape, args.layers)
        for cache in args.caches:
            print(f"{cache}: starting", flush=True)
            with goes_on(cache, failed), Engine(model, cache) as engine:
                caches[cache] = stamped(measure(engine, lengths, answers))
            # What is measured is kept, whatever happens to the next engine.
            write(args.json, results)
    if caches:
        grid = Table("", *caches, title=title(results))
        for label, cells in rows(results):
            grid.add_row(label, *cells)
        Console(width=100).print(grid)
    return int(bool(failed))


def measure(engine: Engine, lengths: list[int], answers: list[int]) -> dict[str, Any]:
    """The requests twice. All engines get the same ones."""
    vocabulary = engine.about["vocabulary"]
    report: dict[str, Any] = {key: engine.about[key] for key in ("start_seconds", "runner", "capacity")}
    engine.generate(prompts_of("warm up", lengths[:WARM_UP], vocabulary), WARM_UP)
    asked: list[Prompt] = prompts_of("traffic", lengths, vocabulary)
    for turn in TURNS:
        answer = engine.generate(asked, answers)
        report[turn] = {"seconds": answer.seconds, "cached": sum(answer.cached)}
        print(f"  {TURNS[turn]}: {answer.seconds:.1f} s", flush=True)
    return report


def title(results: dict[str, Any]) -> str:
    """What was offered."""
    return (
        f"{results['requests']} requests, {results['prompt_tokens']:,} prompt tokens (at most "
        f"{results['longest_prompt']:,}), {results['output_tokens']:,} of answers (at most "
        f"{results['longest_output']:,}), {results['shape']}, {results['layers']} layers"
    )


def rows(results: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Label and a cell for each cache."""
    columns, lines = list(results["caches"].values()), []
    lines.append(("start, s", [f"{c['start_seconds']:.0f}" for c in columns]))
    lines.append(("tokens that fit", [f"{c['capacity']:,}" for c in columns]))
    for turn, what in TURNS.items():
        seconds = [c[turn]["seconds"] for c in columns]
        cached = [100 * c[turn]["cached"] / results["prompt_tokens"] for c in columns]
        lines += [
            (f"{what}, s", [f"{s:.1f}" for s in seconds]),
            ("- of prompt tokens cached", [f"{share:.0f} %" for share in cached]),
            ("- output tokens a second", [f"{results['output_tokens'] / s:,.0f}" for s in seconds]),
        ]
    return lines
