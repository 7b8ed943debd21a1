"""The hand-over on this machine's GPUs: answers of a model read over NIXL, and times beside the link's floor.

Every step is a process of its own with a limit, and the JSON is written anew after each thing that a step has
measured, also where others fail. Answers of one cache do not disturb those of another (``--at-once``); times
are taken alone. With ``--devices`` the engines have GPUs of their own.
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
from typing import IO, Any

from vllm_xlayer.bench.engines import end_when_told
from vllm_xlayer.provenance import provenance

from . import RESULTS
from .faults import device

START_SECONDS = 30.0
"""Of a step that is not begun with less time left."""
TELL_SECONDS = 5.0
"""For a step to end its engines once it is told to."""


@dataclass(frozen=True)
class Step:
    """A process that writes a JSON."""

    name: str
    module: str
    arguments: list[str]
    alone: bool = True


def steps(args: argparse.Namespace) -> Iterator[Step]:
    """Answers first: a time of wrong rows would be nothing."""
    where = ["--devices", *args.devices] if args.devices else []
    for cache in args.caches if args.limit else ():
        asked = ["--cache", cache, "--limit", str(args.limit), *where]
        yield Step(f"answers, {cache}", "benchmarks.handover_answers", asked, alone=False)
    for cache in args.caches if args.tokens else ():
        tokens = [str(n) for n in args.tokens]
        asked = ["handover", "--cache", cache, "--tokens", *tokens, "--ways", *args.ways, *where]
        if args.shape:
            asked += ["--shape", args.shape]
        yield Step(f"times, {cache}", "vllm_xlayer.bench", asked)


class Running:
    """A step that has begun, and what it has found."""

    def __init__(self, step: Step, seconds: float, out: Path, log: IO[bytes] | None = None) -> None:
        """
        seconds: after which it is ended.
        out: the JSON that it writes.
        log: takes its output, in place of this process's.
        """
        self.name = step.name
        self.found: dict[str, Any] = {}
        self._out = out
        self._written = 0.0
        self._begin, self._seconds = time.monotonic(), seconds
        command = [sys.executable, "-m", step.module, *step.arguments, "--json", str(self._out)]
        self._process = subprocess.Popen(
            command, start_new_session=True, stdout=log, stderr=subprocess.STDOUT if log else None
        )

    def look(self) -> tuple[bool, bool]:
        """Whether it has ended, and whether it has found more since."""
        took = time.monotonic() - self._begin
        code = self._process.poll()
        problem = None
        if code is None and took > self._seconds:
            self.end()
            problem = f"not done in {self._seconds:.0f} s"
        elif code:
            problem = f"ended with exit code {code}, see above"
        ended = code is not None or problem is not None
        more = ended
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # it may be half written
            written = self._out.stat().st_mtime
            if ended or written != self._written:
                self.found = json.loads(self._out.read_text())
                self._written, more = written, True
        self.found["seconds"] = round(took, 1)
        if problem:
            self.found["problem"] = problem
        return ended, more

    def end(self) -> None:
        """With its engines, which are in groups of their own."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.terminate()
            self._process.wait(TELL_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def run(args: argparse.Namespace) -> int:
    """Runs every step that the time is enough for; 0 if all were run, and none failed."""
    end_when_told()
    out = args.json or RESULTS / f"{device()}-handover.json"
    about = provenance() | {"devices": args.devices}
    end = time.monotonic() + args.seconds
    found: dict[str, Any] = {}
    waiting, running = list(steps(args)), list[Running]()

    def write() -> None:
        text = json.dumps({**about, "steps": found}, indent=2) + "\n"
        new = out.with_suffix(".new")
        new.write_text(text)
        new.replace(out)  # never half of it

    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-handover-") as folder:
        try:
            while waiting or running:
                left = end - time.monotonic()
                if waiting and _may_begin(waiting[0], len(running), args.at_once):
                    step = waiting.pop(0)
                    if left < START_SECONDS:
                        found[step.name] = {
                            "problem": f"not begun: {left:.0f} s were left of {args.seconds:.0f} s"
                        }
                        print(f"{step.name}: {found[step.name]['problem']}", flush=True)
                        write()
                    else:
                        print(f"{step.name}: begins, {left:.0f} s are left", flush=True)
                        out_of_it = Path(folder) / f"{step.name}.json"
                        running.append(Running(step, min(left, args.step_seconds), out_of_it))
                    continue
                time.sleep(0.2)
                for one in list(running):
                    ended, more = one.look()
                    found[one.name] = one.found
                    if ended:
                        running.remove(one)
                        print(f"{one.name}: {one.found.get('problem') or 'done'}", flush=True)
                    if more:
                        write()
        finally:
            for one in running:
                one.end()
    return int(any("problem" in result for result in found.values()))


def _may_begin(step: Step, running: int, at_once: int) -> bool:
    return running < (1 if step.alone else at_once)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.handover", description=__doc__)
    parser.add_argument("--devices", nargs=2, metavar=("PREFILL", "DECODE"), help="as bench handover has it")
    parser.add_argument("--caches", nargs="+", choices=("nvfp4", "fp8", "bf16"), default=["nvfp4"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[16384], help="none for no times")
    parser.add_argument("--ways", nargs="+", default=["rows", "pages"], help="as bench handover has it")
    parser.add_argument("--shape", help="as bench handover has it")
    parser.add_argument("--limit", type=int, default=32, help="documents a task; 0 for no answers")
    parser.add_argument("--at-once", type=int, default=1, help="caches whose answers are asked for at once")
    parser.add_argument("--seconds", type=float, default=300, help="for all (default: %(default)s)")
    parser.add_argument("--step-seconds", type=float, default=200, help="for a step (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file to write (default: results/DEVICE-handover.json)")
    return run(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
