"""Models with a small device cache and a host tier, for minutes: what became of their answers.

    python -m benchmarks.soak [--minutes 30] [--engines 1] [--seed 0]
    python -m benchmarks.soak --model lfm2 [--caches auto nvfp4] [--minutes 2.5]
    python -m benchmarks.soak --model qwen3_next_mtp --caches auto

Random arrivals of prompts with shared prefixes, aborts, resets and failing copies, on a GPU or on the CPU
reference platform; accounts are checked after every step. "mimo" speculates with NVFP4 (soak_speculation.py);
the others have states beside attention (soak_hybrids.py).

Results go to results/DEVICE-soak.json as they come, or DEVICE-soak-hybrids.json, which has an entry for each
model and cache: those that are not asked for stay as they are.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_xlayer.provenance import write

from . import RESULTS, serving, soak_hybrids, soak_speculation
from .faults import device

SPECULATING = "mimo"


def run_several(folder: Path, minutes: float, seeds: range, result: Path) -> int:
    """An engine for each seed at the same time, each in a process of its own; adds up what they counted.
    Returns 1 if one of them did."""
    files = [folder / f"{seed}.json" for seed in seeds]
    command = [sys.executable, "-m", "benchmarks.soak", "--minutes", str(minutes)]
    processes = [
        subprocess.Popen([*command, "--seed", str(seed), "--json", str(file)])
        for seed, file in zip(seeds, files, strict=True)
    ]
    try:
        running = True
        while running:
            running = any(process.poll() is None for process in processes)
            if parts := [part for part in map(_counted, files) if part]:
                write(result, {"engines": len(parts), "seed": seeds[0], **added_up(parts)})
            time.sleep(1)
    finally:
        for process in processes:
            process.terminate()  # nothing, where it has ended
    return int(any(process.returncode for process in processes))


def _counted(file: Path) -> dict[str, Any] | None:
    """What an engine has counted so far; None if that is nothing yet, or is being written."""
    try:
        found: dict[str, Any] = json.loads(file.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found


def added_up(parts: list[dict[str, Any]]) -> dict[str, int | float]:
    """What several engines counted, together."""
    counts = [name for name, value in parts[0].items() if isinstance(value, int | float) and name != "seed"]
    return {name: sum(part[name] for part in parts) for name in counts}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default=SPECULATING, choices=[SPECULATING, *soak_hybrids.MODELS])
    parser.add_argument("--caches", nargs="+", choices=soak_hybrids.CACHES, help="of a hybrid (default: all)")
    parser.add_argument("--minutes", type=float, default=30, help="of each engine (default: 30)")
    parser.add_argument("--engines", type=int, default=1, help="at the same time (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file to write (default: in results/, see above)")
    args = parser.parse_args()
    hybrid = args.model != SPECULATING
    if hybrid and args.engines > 1:
        parser.error(f"--engines {args.engines}: expected one engine at a time of a hybrid")
    if args.caches and not hybrid:
        parser.error("--caches: expected a hybrid, which --model names")
    result = args.json or RESULTS / f"{device()}-soak{'-hybrids' if hybrid else ''}.json"
    seconds = 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        if args.engines > 1:
            seeds = range(args.seed, args.seed + args.engines)
            return run_several(Path(folder), args.minutes, seeds, result)
        os.environ["VLLM_XLAYER_DEBUG"] = "1"
        serving.prepare()
        if not hybrid:
            return soak_speculation.run(Path(folder), seconds, args.seed, result)
        caches = args.caches or soak_hybrids.CACHES
        return soak_hybrids.run(Path(folder), args.model, caches, seconds, args.seed, result)


if __name__ == "__main__":
    sys.exit(main())
