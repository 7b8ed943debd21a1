"""``vllm-xlayer demo``: the same tasks with several KV caches, in vLLM's real engine, and one table.

Each cache is served by an engine in a process of its own (`engine.py`), so that memory and patches of one
cannot touch the next, and Ctrl-C ends whatever runs. What vLLM and lm_eval say there goes to a file, which is
shown if the engine fails; the engine says through a pipe what it is doing.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from . import TASKS

DOCUMENTS = 32
"""Documents a task where nobody says how many."""

WIDTH = 120
"""Characters: the table with all of its columns."""


@dataclass(frozen=True)
class Setup:
    """One column of the table."""

    name: str
    title: str
    kv_cache_dtype: str
    rows: bool


OPTIONAL = ("fp8",)
"""For comparison: left out where vLLM has no such cache."""
SETUPS = (
    Setup("stock", "stock\nbf16, layer by layer", "auto", False),
    Setup("fp8", "stock\nfp8, layer by layer", "fp8", False),
    Setup("rows", "rows\nbf16, all layers", "auto", True),
    Setup("nvfp4", "rows\nNVFP4, restored", "nvfp4", True),
)


def run(args: argparse.Namespace) -> int:
    """Runs the engines one after the other and prints the table. Returns a process exit code."""
    limit = DOCUMENTS if args.limit is None else args.limit
    if limit < 1:
        print(f"--limit: expected at least 1, got {limit}", file=sys.stderr)
        return 2
    if importlib.util.find_spec("lm_eval") is None:
        print('demo: expected lm-eval, found none: pip install "vllm-xlayer[eval]"', file=sys.stderr)
        return 1
    console = Console(width=WIDTH, highlight=False)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-demo-") as folder:
        for number, setup in enumerate(SETUPS, 1):
            title = " ".join(setup.title.split())
            console.print(f"[bold][{number}/{len(SETUPS)}] {title}", markup=True)
            if setup.name in OPTIONAL and not torch.cuda.is_available():
                console.print(f"left out: the CPU reference platform has no {setup.kv_cache_dtype} KV cache")
                continue
            result = _run_engine(setup, limit, Path(folder), console)
            if result is None and setup.name in OPTIONAL:
                console.print(f"left out: {title} does not run here")
                continue
            if result is None:
                return 1
            results[setup.name] = result
    add_identical(results)
    console.print(table(results))
    console.print(footer(results), markup=False)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _run_engine(setup: Setup, limit: int, folder: Path, console: Console) -> dict[str, Any] | None:
    """What the engine wrote; None if it failed, with its log and why on stderr."""
    out, log = folder / f"{setup.name}.json", folder / f"{setup.name}.log"
    command = [sys.executable, "-m", "vllm_xlayer.demo.engine", "--out", str(out), "--limit", str(limit)]
    command += ["--kv-cache-dtype", setup.kv_cache_dtype] + (["--rows"] if setup.rows else [])
    quiet = {
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # Threads that wait by spinning make a busy machine ten times slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        # The engine core in the same process: one start of Python less.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    begin = time.perf_counter()
    code = _follow(command, {**quiet, **os.environ}, log, console)
    if code or not out.exists():
        sys.stderr.write(log.read_text(errors="replace"))
        print(f"the engine with {' '.join(setup.title.split())} ended with exit code {code}, "
              f"its log is above; alone it is: {' '.join(command)}", file=sys.stderr)  # fmt: skip
        return None
    console.print(f"done in {time.perf_counter() - begin:.0f} s")
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def _follow(command: list[str], environment: dict[str, str], log: Path, console: Console) -> int:
    """Runs an engine to its end, showing what it says it is doing; its output goes to a file. Exit code."""
    said, says = os.pipe()
    with (
        open(said) as lines,
        log.open("wb") as output,
        console.status("starting Python and vLLM") as status,
        # Not in the current folder: `-m` would import a source tree there instead of the installed package.
        subprocess.Popen(
            [*command, "--progress", str(says)], env=environment, cwd=log.parent, stdout=output,
            stderr=subprocess.STDOUT, pass_fds=[says],
        ) as process,
    ):  # fmt: skip
        os.close(says)
        try:
            for line in lines:
                status.update(line.strip())
            return process.wait()
        except BaseException:
            process.kill()
            raise


def add_identical(results: dict[str, dict[str, Any]]) -> None:
    """Adds to each result how many answers are the stock cache's, and out of how many."""
    stock = results["stock"]["answers"]
    for result in results.values():
        same = sum(result["answers"][key] == answer for key, answer in stock.items())
        result["identical"] = [same, len(stock)]


def table(results: dict[str, dict[str, Any]]) -> Table:
    shown = [setup for setup in SETUPS if setup.name in results]
    grid = Table(title=f"The same tasks with {len(shown)} KV caches", title_justify="left")
    grid.add_column("", no_wrap=True)
    for setup in shown:
        grid.add_column(setup.title, justify="right", no_wrap=True)
    columns = [results[setup.name] for setup in shown]
    rows: list[tuple[str, list[str]]] = [
        ("bytes a token", [f"{r['bytes_per_token']:,}" for r in columns]),
        ("tokens in 256 MiB", [f"{r['tokens_per_256_mib']:,}" for r in columns]),
        ("copies x bytes to move a block", [f"{r['copies']} x {r['copy_bytes']:,}" for r in columns]),
    ]
    for kind in ("cold", "cached on device", "restored"):
        rows.append((f"first token, {kind}", [_milliseconds(r["ttft"].get(kind)) for r in columns]))
    for task in TASKS:
        rows.append((f"exact match, {task}", [_score(r["scores"][task]) for r in columns]))
    rows.append(("answers identical to stock", ["{} of {}".format(*r["identical"]) for r in columns]))
    for name, cells in rows:
        grid.add_row(name, *cells)
    return grid


def footer(results: dict[str, dict[str, Any]]) -> str:
    nvfp4 = results["nvfp4"]
    same, out_of = nvfp4["restored_identical"]
    return (
        f"{nvfp4['hardware']}; vLLM {nvfp4['versions']['vllm']}, model runner {nvfp4['runner']}. "
        f"NVFP4 column: {nvfp4['restored_tokens']:,} prompt tokens came from the host tier; "
        f"{same} of {out_of} restored answers equal the cold ones. "
        f"Prompts for the times: {nvfp4['ttft']['tokens']} tokens."
    )


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f} ms"


def _score(score: dict[str, float]) -> str:
    return f"{100 * score['exact_match']:.1f} ± {100 * score['stderr']:.1f} %"
