"""The hand-over on this machine's GPUs: answers of a model read over NIXL, and times beside the link's floor.

Every step is a process of its own with a limit; what it found is in the JSON when it ends, also where others
fail. With ``--devices`` the engines have GPUs of their own.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_xlayer.provenance import provenance

from . import RESULTS
from .faults import device

START_SECONDS = 40.0
"""Of a step that is not begun with less time left."""


@dataclass(frozen=True)
class Step:
    """A process that writes a JSON."""

    name: str
    module: str
    arguments: list[str]


def steps(args: argparse.Namespace) -> Iterator[Step]:
    """Answers first: a time of wrong rows would be nothing."""
    where = ["--devices", *args.devices] if args.devices else []
    for cache in args.caches:
        asked = ["--cache", cache, "--limit", str(args.limit), *where]
        yield Step(f"answers, {cache}", "benchmarks.handover_answers", asked)
    for tokens in args.tokens:
        for cache in args.caches:
            asked = ["handover", "--cache", cache, "--tokens", str(tokens), "--ways", *args.ways, *where]
            if args.shape:
                asked += ["--shape", args.shape]
            yield Step(f"{tokens} tokens, {cache}", "vllm_xlayer.bench", asked)


def run(args: argparse.Namespace) -> int:
    """Runs every step that the time is enough for; 0 if all were run, and none failed."""
    out = args.json or RESULTS / f"{device()}-handover.json"
    end = time.monotonic() + args.seconds
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-handover-") as folder:
        for step in steps(args):
            left = end - time.monotonic()
            if left < START_SECONDS:
                found[step.name] = {"problem": f"not begun: {left:.0f} s were left of {args.seconds:.0f} s"}
            else:
                print(f"{step.name}: begins, {left:.0f} s are left", flush=True)
                found[step.name] = _run(step, min(left, args.step_seconds), Path(folder) / "step.json")
            print(f"{step.name}: {found[step.name].get('problem') or 'done'}", flush=True)
            out.write_text(
                json.dumps({**provenance(), "devices": args.devices, "steps": found}, indent=2) + "\n"
            )
    return int(any("problem" in result for result in found.values()))


def _run(step: Step, seconds: float, out: Path) -> dict[str, Any]:
    """What a step wrote, with "seconds", and "problem" where it failed or did not end."""
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", step.module, *step.arguments, "--json", str(out)]
    begin = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True)
    problem = None
    try:
        if code := process.wait(seconds):
            problem = f"ended with exit code {code}, see above"
    except subprocess.TimeoutExpired:
        problem = f"not done in {seconds:.0f} s"
    finally:
        # Its engines end by themselves once it is gone: they are in groups of their own.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    result["seconds"] = round(time.monotonic() - begin, 1)
    return result | ({"problem": problem} if problem else {})


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.handover", description=__doc__)
    parser.add_argument("--devices", nargs=2, metavar=("PREFILL", "DECODE"), help="as bench handover has it")
    parser.add_argument("--caches", nargs="+", choices=("nvfp4", "fp8", "bf16"), default=["nvfp4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384])
    parser.add_argument("--ways", nargs="+", default=["rows", "pages"], help="as bench handover has it")
    parser.add_argument("--shape", help="as bench handover has it")
    parser.add_argument("--limit", type=int, default=32, help="documents a task")
    parser.add_argument("--seconds", type=float, default=300, help="for all (default: %(default)s)")
    parser.add_argument("--step-seconds", type=float, default=200, help="for a step (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write (default: results/DEVICE-handover.json)")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
