"""The GPU tests' outcome as a results file: ``pytest -m gpu`` run once, counted file by file."""

import argparse
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path

from .record import RESULTS, write

TESTS = Path(__file__).parents[2] / "tests"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mark", default="gpu", help="pytest -m (default: gpu)")
    parser.add_argument("--json", type=Path, default=RESULTS / "suite.json", help="file to write")
    parser.add_argument("paths", nargs="*", default=["ops", "gpu"], help="below tests/ (default: ops gpu)")


def run(args: argparse.Namespace) -> int:
    """Runs the tests in the source tree; returns pytest's exit code."""
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-suite-") as folder:
        report = Path(folder) / "report.xml"
        paths = [str(TESTS / path) for path in args.paths]
        command = [sys.executable, "-m", "pytest", "-q", "-m", args.mark, f"--junitxml={report}", *paths]
        code = subprocess.run(command, cwd=TESTS.parent, check=False).returncode
        if not report.exists():
            print(f"suite: pytest ended with {code} and left no report", file=sys.stderr)
            return code or 1
        files, seconds = outcomes(report)
    write(args.json, {"mark": args.mark, "exit_code": code, "seconds": seconds, "files": files})
    return code


def outcomes(report: Path) -> tuple[dict[str, dict[str, int]], float]:
    """(test file -> outcome -> count, seconds) of a JUnit report."""
    files: dict[str, Counter[str]] = defaultdict(Counter)
    seconds = 0.0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        found = {child.tag for child in case} & {"failure", "error", "skipped"}
        files[case.get("classname", "?")][found.pop() if found else "passed"] += 1
        seconds += float(case.get("time", 0))
    return {name: dict(counts) for name, counts in sorted(files.items())}, round(seconds, 1)
