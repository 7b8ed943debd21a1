"""Steps and start in vLLM's engine, with each KV cache: an engine of a real model's shape. Decode steps, and
one in which many requests go on by a few tokens.

All are started once more at the end (`--starts 2`): a first start on a machine reads files that the next
finds in memory, and compiles what the next finds compiled. Caches that are not asked for stay in the file as
they were measured before.

A model with experts reads those that its tokens ask for, and without weights its answers are as they fall:
with one cache all requests may say the same, with another not. So there each request says a token of its own,
over and over, which is the same with every cache.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..provenance import kept, stamped, write
from .arguments import caches_argument, shape_argument
from .bounds import SHAPE, Bound
from .engines import CACHES, GRAPHS_ONLY, Engine, goes_on, prompts
from .shapes import SETTINGS, has_experts, same_answers, write_model

DECODES: dict[str, dict[tuple[int, int], float]] = {
    SHAPE: {(64, 8192): 0.70, (1, 16384): 1.0},
    "qwen3-next": {(64, 8192): 1.0, (16, 65536): 1.0},
    "gpt-oss-20b": {(64, 8192): 1.0, (16, 65536): 1.0},
}
"""Shape -> requests, tokens of each -> what a step with nvfp4 may take of one with fp8. Other shapes are
asked the first one's, without a bound."""
TURNS: dict[str, tuple[int, int, int, float]] = {SHAPE: (64, 8192, 100, 1.03)}
"""Shape -> requests, tokens of each in the cache, tokens that each goes on with, all in one step; what it may
take with nvfp4 of the time with fp8."""
TURN_REPEATS, FRESH = 3, 4
"""Times it is measured; prompts that are computed while the requests arrive, which are running requests,
too, until the step after."""
STEPS = 128
"""Decode steps timed, on top of the first tokens."""
START_SECONDS = 3.0
"""What nvfp4 may start later than fp8."""
STEP_MS = 11.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shape_argument(parser)
    caches_argument(parser, CACHES)
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, help="as for vllm serve (default: %(default)s)"
    )
    parser.add_argument("--starts", type=int, choices=(1, 2), default=2, help="of each engine (default: 2)")
    parser.add_argument("--scale", type=int, default=1, help="divides requests and tokens, to try it out")
    parser.add_argument(
        "--json", type=Path, default=Path("engine.json"), help="file to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs an engine for each cache, prints the table, writes the JSON. Returns 1 if an engine failed."""
    full_size = DECODES.get(args.shape, DECODES[SHAPE])
    decodes = [(max(1, n // args.scale), tokens // args.scale) for n, tokens in full_size]
    settings = dict(
        max_model_len=2 * max(tokens for _, tokens in decodes),
        max_num_seqs=max(n for n, _ in decodes) + FRESH,
        gpu_memory_utilization=args.gpu_memory_utilization, **GRAPHS_ONLY, **SETTINGS.get(args.shape, {}),
    )  # fmt: skip
    same = has_experts(args.shape)
    question = {"shape": args.shape, "scale": args.scale, "steps": STEPS, "same_answers": same}
    caches = kept(args.json, "caches", args.caches, **question)
    results: dict[str, Any] = question | {"caches": caches}
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-engine-") as folder:
        model = write_model(Path(folder), args.shape)
        for again in (False, True)[: args.starts]:
            for cache in args.caches:
                if cache in failed:
                    continue
                print(f"{cache}: starting{' again' if again else ''}", flush=True)
                with goes_on(cache, failed), Engine(model, cache, **settings) as engine:
                    if again:
                        caches[cache]["start_again_seconds"] = engine.about["start_seconds"]
                    else:
                        measured = measure(engine, decodes, same)
                        if args.shape in TURNS:
                            measured["turn"] = measure_turn(engine, args.shape, args.scale)
                        caches[cache] = stamped(measured)
                # What is measured is kept, whatever happens to the next engine.
                write(args.json, results)
    if caches:
        grid = Table("", *caches, title=f"One engine a KV cache, {args.shape}")
        for label, cells in rows(results):
            grid.add_row(label, *cells)
        Console(width=100).print(grid)
    for bound in bounds(results):
        print(bound)
    return int(bool(failed))


def measure(engine: Engine, decodes: list[tuple[int, int]], same: bool) -> dict[str, Any]:
    """Decode steps of one engine."""
    report: dict[str, Any] = {key: engine.about[key] for key in ("start_seconds", "runner", "block_size")}
    report["decodes"] = []
    for requests, tokens in decodes:
        asked = prompts(f"{requests} x {tokens}", requests, tokens, engine.about["vocabulary"])
        engine.generate(asked, 1)  # they are in the prefix cache then
        said = same_answers(requests, engine.about["vocabulary"]) if same else None
        step = engine.step_seconds(asked, STEPS, said)
        report["decodes"].append({"requests": requests, "tokens": tokens, "step_seconds": step})
    return report


def measure_turn(engine: Engine, shape: str, scale: int) -> dict[str, Any]:
    """A step in which all requests go on: seconds, the median of several; None where vLLM made more of it."""
    requests, tokens, new, _ = TURNS[shape]
    requests, tokens = max(1, requests // scale), tokens // scale
    vocabulary, taken = engine.about["vocabulary"], []
    before = prompts(f"{requests} x {tokens}", requests, tokens, vocabulary)
    engine.generate(before, 1)
    for number in range(TURN_REPEATS):
        ends = prompts(f"turn {number}", requests, new, vocabulary)
        fresh = prompts(f"fresh {number}", FRESH, engine.about["step_tokens"], vocabulary)
        asked = [first + end for first, end in zip(before, ends, strict=True)]
        taken.append(engine.turn_seconds(asked, fresh))
    steps = [seconds for seconds in taken if seconds is not None]
    return {
        "requests": requests, "tokens": tokens, "new": new,
        "step_seconds": statistics.median(steps) if steps else None,
    }  # fmt: skip


def rows(results: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Label and a cell for each cache."""
    columns = list(results["caches"].values())
    lines = []
    for i, first in enumerate(columns[0]["decodes"]):
        steps = [f"{c['decodes'][i]['step_seconds'] * 1e3:.2f}" for c in columns]
        lines.append((f"decode step {first['requests']} x {first['tokens']:,}, ms", steps))
    turns: list[dict[str, Any]] = [c.get("turn", {}) for c in columns]
    if turn := next((t for t in turns if t.get("step_seconds")), None):
        what = "step of {requests} x {new} new tokens after {tokens:,}, ms".format(**turn)
        taken = [t.get("step_seconds") for t in turns]
        lines.append((what, ["-" if step is None else f"{step * 1e3:.2f}" for step in taken]))
    if all("start_again_seconds" in c for c in columns):
        lines.append(("first start, in this order, s", [f"{c['start_seconds']:.1f}" for c in columns]))
        lines.append(("start again, s", [f"{c['start_again_seconds']:.1f}" for c in columns]))
    return lines


def bounds(results: dict[str, Any]) -> list[Bound]:
    """Of nvfp4, where both it and fp8 were measured at full size."""
    nvfp4, fp8 = (results["caches"].get(name) for name in ("nvfp4", "fp8"))
    ratios = DECODES.get(results["shape"], {})
    if not ratios or nvfp4 is None or fp8 is None:
        return []
    found = []
    for ours, theirs in zip(nvfp4["decodes"], fp8["decodes"], strict=True):
        batch = (ours["requests"], ours["tokens"])
        what = "decode step {} x {:,}".format(*batch)
        if results["shape"] == SHAPE and batch == next(iter(ratios)):
            found.append(Bound(f"nvfp4, {what}", ours["step_seconds"] * 1e3, STEP_MS, " ms"))
        if batch in ratios:
            ratio = ours["step_seconds"] / theirs["step_seconds"]
            found.append(Bound(f"nvfp4 / fp8, {what}", ratio, ratios[batch]))
    turns = [cache.get("turn", {}).get("step_seconds") for cache in (nvfp4, fp8)]
    if results["shape"] in TURNS and all(turns):
        requests, tokens, new, limit = TURNS[results["shape"]]
        what = f"nvfp4 / fp8, step of {requests} x {new} new tokens after {tokens}"
        found.append(Bound(what, turns[0] / turns[1], limit))
    if "start_again_seconds" in nvfp4 and "start_again_seconds" in fp8:
        later = nvfp4["start_again_seconds"] - fp8["start_again_seconds"]
        found.append(Bound("nvfp4 - fp8, start again", later, START_SECONDS, " s"))
    return found
