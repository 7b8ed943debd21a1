"""All that needs a GPU, in order of value, for a machine that is lent for minutes.

Every question runs in a process of its own with a limit, and writes its results file as it goes: what was
measured when the time is up, or a question fails, is there.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from . import RESULTS
from .faults import device


@dataclass(frozen=True)
class Question:
    """One of ``vllm-xlayer bench``, and what it may take."""

    name: str
    seconds: int
    arguments: tuple[str, ...] = ()


ENGINES = ("--caches", "nvfp4", "fp8", "stock-nvfp4")
QUESTIONS = (
    Question("decode", 300, ("--peers", "fa3", "flashinfer", "int4", "turboquant")),
    Question("engine", 420, (*ENGINES, "nvfp4-pages", "--starts", "1")),
    Question("traffic", 580, (*ENGINES, "--requests", "128")),
    Question("offload", 420),
    Question("capacity", 150),
    Question("write", 60),
    Question("gather", 90),
    Question("prefill", 240),
    Question("copy", 90),
)
LEAST_SECONDS = 20
"""A question is not begun with less."""
END_SECONDS = 15
"""For a question to end when its time is up, and for its engines to give the GPU's memory back."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [question.name for question in QUESTIONS]
    parser.add_argument(
        "questions", nargs="*", metavar="QUESTION", default=names, help=f"of: {' '.join(names)}"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="for all of them (default: 30)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results files")


def run(args: argparse.Namespace) -> int:
    """Asks the questions, says what each took. Returns 1 if one failed or was not answered in its time."""
    if unknown := set(args.questions) - {question.name for question in QUESTIONS}:
        print(f"all: expected questions of {', '.join(q.name for q in QUESTIONS)}, got {', '.join(unknown)}")
        return 2
    end = time.monotonic() + 60 * args.minutes
    outcomes = []
    for question in QUESTIONS:
        if question.name not in args.questions:
            continue
        begin = time.monotonic()
        seconds = min(question.seconds, end - begin - END_SECONDS)
        outcome = "no time left"
        if seconds >= LEAST_SECONDS:
            command = [sys.executable, "-m", "vllm_xlayer.bench", question.name, *question.arguments]
            outcome = ask([*command, "--json", str(args.out / f"{device()}-{question.name}.json")], seconds)
        outcomes.append(outcome)
        print(f"== {question.name}: {outcome}, {time.monotonic() - begin:.0f} s", flush=True)
    return int(any(outcome != "done" for outcome in outcomes))


def ask(command: list[str], seconds: float) -> str:
    """Runs a command for at most so long; how it ended, in words."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        for sent in (signal.SIGTERM, signal.SIGKILL):
            _signal(process.pid, sent)
            time.sleep(END_SECONDS / 2)
        process.wait()
        return f"stopped after {seconds:.0f} s"
    return "done" if code == 0 else f"failed with {code}"


def _signal(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.every", description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
