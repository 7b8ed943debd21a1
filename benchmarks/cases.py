"""Cases that start engines: each in a process of its own with a time limit, several at once.

What a case finds is sent question by question, so that what it knew when it hung, died or ran out of time is
kept. The others go on.
"""

import contextlib
import io
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Run = Callable[[Any, Connection], None]
"""In the case's process: sends (question, answer) for each question."""
ASSERTION = re.compile(r"([^/\s]+:\d+): .*?(Assertion .*)")
"""What a GPU prints where an assertion of a kernel fails; the error that follows does not repeat it."""


def try_case(
    case: Any, run: Run, questions: Sequence[str], seconds: float, name: str = "", log: Path | None = None
) -> dict[str, str]:
    """Question -> answer; what was not known in time says so.

    Args:
        name: before each answer that is printed.
        log: file for what the case's process writes; without one it writes to this process's output. An
            answer that tells of a failed assertion on the device gets it from there.
    """
    context = multiprocessing.get_context("spawn")  # a fork of what torch has threads in may hang
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_enter, args=(run, case, theirs, log))
    process.start()
    theirs.close()
    found: dict[str, str] = {}
    end = time.monotonic() + seconds
    missing = f"not known after {seconds:.0f} s"
    try:
        while len(found) < len(questions) and ours.poll(max(0.0, end - time.monotonic())):
            question, answer = ours.recv()
            found[question] = answer
            print(f"{name}: {question}: {answer}", flush=True)
    except EOFError:
        process.join()
        missing = f"the process died (exit code {process.exitcode})"
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.kill()  # before it had a group of its own
    process.join()
    found = {question: found.get(question, missing) for question in questions}
    wrote = log.read_text(errors="replace") if log is not None and log.exists() else ""
    said = ASSERTION.search(wrote)
    if said:
        found = {
            question: f"{answer}; {said[1]}: {said[2]}" if "device-side assert" in answer else answer
            for question, answer in found.items()
        }
    return found


def try_all(
    cases: dict[str, Any],
    run: Run,
    questions: Sequence[str],
    finished: Callable[[str, dict[str, str]], None],
    *,
    seconds: float,
    at_once: int = 1,
    total_seconds: float = float("inf"),
    logs: Path | None = None,
) -> None:
    """Tries cases in their order, at most `at_once` at a time.

    Args:
        cases: name -> what `run` is told.
        finished: called with a case's name and answers, never by two threads at a time.
        seconds: limit of a case.
        total_seconds: limit of all; a case for which none are left is not begun.
        logs: folder for a log of each case.
    """
    end, lock = time.monotonic() + total_seconds, threading.Lock()
    if logs is not None:
        logs.mkdir(parents=True, exist_ok=True)

    def try_one(name: str) -> None:
        begin = time.monotonic()
        limit = min(seconds, end - begin)
        answers = {question: "not tried: no time left" for question in questions}
        if limit > 0:
            log = logs and logs / f"{name}.log"
            answers = try_case(cases[name], run, questions, limit, name, log)
        with lock:
            print(f"== {name}: {time.monotonic() - begin:.0f} s", flush=True)
            finished(name, answers)

    with ThreadPoolExecutor(at_once) as pool:
        for future in [pool.submit(try_one, name) for name in cases]:
            future.result()


def _enter(run: Run, case: Any, answers: Connection, log: Path | None) -> None:
    os.setsid()  # one group with all that vLLM starts
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(descriptor, stream.fileno())
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)  # it may be killed, with its answers given
    run(case, answers)
