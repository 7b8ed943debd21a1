"""More context than fp8 can keep: requests that all fit as NVFP4, offered at once to the same memory.

Takes minutes, most of them for computing what is asked. A GPU needs memory for the model, for NVFP4 KV of all
requests (30 GB with the default shape), and for what vLLM
computes with.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..nvfp4 import content_bytes
from ..provenance import hardware, provenance, write
from .arguments import caches_argument, shape_argument
from .engines import GRAPHS_ONLY, WARM_STEPS, Engine, goes_on, prompts
from .shapes import SHAPES, write_model

REQUESTS, TOKENS = 24, 32768
"""0.8 million tokens."""
OUTPUT = 64
"""Tokens every request is answered with."""
STEPS = 128
"""Decode steps timed, of as many requests as fit."""
LONGEST = max(OUTPUT, 1 + WARM_STEPS + STEPS)
"""Tokens that a request is answered with at most."""
SPARE = 1.02
"""Memory for so many times what the requests take as NVFP4."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shape_argument(parser)
    caches_argument(parser, ["fp8", "nvfp4"])
    parser.add_argument("--scale", type=int, default=1, help="divides requests and tokens, to try it out")
    parser.add_argument(
        "--json", type=Path, default=Path("load.json"), help="file to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs an engine for each cache, prints the table, writes the JSON. Returns 1 if an engine failed."""
    shape = SHAPES[args.shape]
    requests, tokens = max(1, REQUESTS // args.scale), TOKENS // args.scale
    token_bytes = shape["num_hidden_layers"] * shape["num_key_value_heads"] * content_bytes(shape["head_dim"])
    memory = int(SPARE * requests * (tokens + LONGEST) * token_bytes)
    settings = dict(
        max_model_len=tokens + LONGEST, max_num_seqs=requests, kv_cache_memory_bytes=memory, **GRAPHS_ONLY
    )
    asked = {
        "shape": args.shape, "requests": requests, "tokens": tokens, "output": OUTPUT, "kv_bytes": memory,
    }  # fmt: skip
    caches = kept(args.json, asked, args.caches)
    results = {**asked, "caches": caches}
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-load-") as folder:
        model = write_model(Path(folder), args.shape)
        for cache in args.caches:
            print(f"{cache}: starting", flush=True)
            with goes_on(cache, failed), Engine(model, cache, **settings) as engine:
                taken = {key: provenance()[key] for key in ("date", "commit")}
                caches[cache] = taken | measure(engine, requests, tokens)
            # What is measured is kept, whatever happens to the next engine.
            write(args.json, results)
    if caches:
        grid = Table("", *caches, title=f"{title(results)}, {args.shape}")
        for label, cells in rows(results):
            grid.add_row(label, *cells)
        Console(width=100).print(grid)
    return int(bool(failed))


def kept(path: Path, asked: dict[str, Any], anew: list[str]) -> dict[str, Any]:
    """What a results file has of other caches than those that are measured anew; nothing unless it asked
    the same, on such hardware: an engine takes minutes, for which a machine is not always lent."""
    try:
        before = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    same = all(before.get(key) == value for key, value in {**asked, "hardware": hardware()}.items())
    return {name: found for name, found in before["caches"].items() if same and name not in anew}


def measure(engine: Engine, requests: int, tokens: int) -> dict[str, Any]:
    """The requests twice, then a decode step of as many as fit."""
    asked = prompts("load", requests, tokens, engine.about["vocabulary"])
    report: dict[str, Any] = {key: engine.about[key] for key in ("runner", "capacity")}
    # Kernels are loaded and chosen at their first use.
    engine.generate(prompts("warm up", min(4, requests), tokens, engine.about["vocabulary"]), OUTPUT)
    for turn in ("new", "again"):
        answer = engine.generate(asked, OUTPUT)
        report[turn] = {"seconds": answer.seconds, "cached": sum(answer.cached)}
        print(f"  {turn}: {answer.seconds:.1f} s", flush=True)
    # The last ones: the cache forgets what was not used for longest.
    fit = min(requests, engine.about["capacity"] // (tokens + LONGEST))
    report["fit"] = fit
    report["step_seconds"] = engine.step_seconds(asked[-fit:], STEPS)
    return report


def title(results: dict[str, Any]) -> str:
    """What was offered."""
    context = results["requests"] * results["tokens"]
    return f"{results['requests']} x {results['tokens']:,} tokens ({context / 1e6:.2f} million)"


def rows(results: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Label and a cell for each cache."""
    columns = list(results["caches"].values())
    out, context = results["requests"] * results["output"], results["requests"] * results["tokens"]
    return [
        ("tokens that fit", [f"{c['capacity']:,}" for c in columns]),
        ("contexts that fit", [f"{c['fit']:,}" for c in columns]),
        ("new contexts, s", [f"{c['new']['seconds']:.1f}" for c in columns]),
        ("the same again, s", [f"{c['again']['seconds']:.1f}" for c in columns]),
        (
            "- of their tokens still cached",
            [f"{100 * c['again']['cached'] / context:.0f} %" for c in columns],
        ),
        ("- output tokens a second", [f"{out / c['again']['seconds']:,.0f}" for c in columns]),
        ("decode step of as many as fit, ms", [f"{c['step_seconds'] * 1e3:.2f}" for c in columns]),
        ("- output tokens a second", [f"{c['fit'] / c['step_seconds']:,.0f}" for c in columns]),
    ]
