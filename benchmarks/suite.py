"""The GPU tests' outcome as a results file: ``pytest -m gpu`` run once, counted file by file.

With ``--sanitizer`` under NVIDIA's compute-sanitizer, which makes an access or a race that it finds an error.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

from vllm_xlayer.provenance import write

from . import RESULTS, ROOT

TESTS = ROOT / "tests"
SANITIZER = "compute-sanitizer"
FOUND = 86
"""Exit code of a run in which the sanitizer found something."""
END_SECONDS = 20
"""For tests that are stopped to end, and to report what they have found."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mark", default="gpu", help="pytest -m (default: gpu)")
    parser.add_argument("-k", dest="select", help="pytest -k: the tests whose names match")
    parser.add_argument("--sanitizer", choices=["memcheck", "racecheck"], help="tool of compute-sanitizer")
    parser.add_argument("--json", type=Path, default=RESULTS / "suite.json", help="file to write")
    parser.add_argument("paths", nargs="*", default=["ops", "gpu"], help="below tests/ (default: ops gpu)")


def run(args: argparse.Namespace) -> int:
    """Runs the tests in the source tree; returns pytest's exit code, or FOUND."""
    if args.sanitizer and not shutil.which(SANITIZER):
        print(f"suite: --sanitizer expected {SANITIZER} on PATH (CUDA toolkit), found none", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-suite-") as folder:
        report = Path(folder) / "report.xml"
        paths = [str(TESTS / path) for path in args.paths]
        # With every test's name as it ends: what a run has found that is stopped is in its output.
        command = [sys.executable, "-m", "pytest", "-v", "-m", args.mark, f"--junitxml={report}", *paths]
        if args.select:
            command += ["-k", args.select]
        environment = dict(os.environ)
        if args.sanitizer:
            options = ["--tool", args.sanitizer, "--error-exitcode", str(FOUND), "--target-processes", "all"]
            command = [SANITIZER, *options, *command]
            # Every tensor an allocation of its own: what lies beside it is not another tensor's.
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        code = _run(command, environment)
        if not report.exists():
            print(f"suite: pytest ended with {code} and left no report", file=sys.stderr)
            return code or 1
        files, seconds = outcomes(report)
    asked = {"mark": args.mark, "select": args.select, "sanitizer": args.sanitizer}
    write(args.json, {**asked, "exit_code": code, "seconds": seconds, "files": files})
    return code


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Its exit code. Ctrl-C stops the tests, and what they have found is reported."""
    process = subprocess.Popen(command, cwd=TESTS.parent, env=environment, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        try:
            return process.wait(END_SECONDS)
        except (KeyboardInterrupt, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            return process.wait()


def outcomes(report: Path) -> tuple[dict[str, dict[str, int]], float]:
    """(test file -> outcome -> count, seconds) of a JUnit report."""
    files: dict[str, Counter[str]] = defaultdict(Counter)
    seconds = 0.0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        found = {child.tag for child in case} & {"failure", "error", "skipped"}
        files[case.get("classname", "?")][found.pop() if found else "passed"] += 1
        seconds += float(case.get("time", 0))
    return {name: dict(counts) for name, counts in sorted(files.items())}, round(seconds, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
