"""What became of requests where something failed: the tests marked `fault`, run once, and what they counted.

Each compares answers with those of a run without the connector, and checks the accounts of the tiers. Runs on
a GPU where there is one, else on the CPU reference platform.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_xlayer.provenance import write

from . import RESULTS
from .suite import TESTS

FAULTS = (
    "copy error",
    "copy error on one rank",
    "ranks on several hosts",
    "images named by a counter",
    "read error",
    "short read",
    "flipped bits",
    "write error",
    "disk full",
    "folder removed",
    "folder read-only",
    "slow disk",
    "hung disk",
    "abort during load",
    "abort during store",
    "preemption",
    "reset_prefix_cache during load",
    "reset_prefix_cache during store",
    "engine stop during load",
    "engine stop during store",
    "engine killed while writing",
    "host memory not available",
    "host memory not pinned yet",
    "newest tokens: copy error",
    "newest tokens: abort during load",
    "newest tokens: reset_prefix_cache during load",
    "newest tokens: preemption",
    "hand-over: torn row",
    "hand-over: stale row",
    "hand-over: prefill engine killed",
    "hand-over: prefill engine hung",
    "hand-over: prefill engine restarted with other weights",
    "hand-over: link down",
    "hand-over: TCP only",
    "hand-over: abort while reading",
    "hand-over: reset_prefix_cache while reading",
    "hand-over: decode engine killed while reading",
    "hand-over: abort in the prefill engine",
    "hand-over: failed, with tiers",
    "soak",
)
"""Rows of the table: what tests are marked with."""
COUNTS = ("tries", "requests", "wrong", "lost", "leaked")
MUST_BE_ZERO = ("wrong", "lost", "leaked", "failed")
SOAKS = 3
"""Tests of it, one after the other."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--soak", type=float, default=24, help="seconds of the soak, in all (default: 24)")
    parser.add_argument("--json", type=Path, help="file to write (default: results/DEVICE-faults.json)")
    parser.add_argument("paths", nargs="*", default=["engine"], help="below tests/ (default: engine)")


def run(args: argparse.Namespace) -> int:
    """Runs the tests in the source tree; 0 if every fault was tried and all was well."""
    environment = os.environ | {"SOAK_SECONDS": str(args.soak / SOAKS)}
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-faults-") as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "fault", f"--junitxml={report}"]
        command += ["-o", "junit_family=xunit1"]  # xunit2 has no properties of a test
        command += [str(TESTS / path) for path in args.paths]
        code = subprocess.run(command, cwd=TESTS.parent, env=environment, check=False).returncode
        if not report.exists():
            print(f"faults: pytest ended with {code} and left no report", file=sys.stderr)
            return code or 1
        found, seconds = counted(report)
    Console(width=110).print(_table(found))
    write(
        args.json or RESULTS / f"{device()}-faults.json",
        {"exit_code": code, "seconds": seconds, "soak_seconds": args.soak, "faults": found},
    )
    bad = [name for name, row in found.items() if any(row[count] for count in MUST_BE_ZERO)]
    untried = [name for name in FAULTS if not found[name]["tries"]]
    for what, names in (("not zero", bad), ("not tried", untried)):
        if names:
            print(f"faults: {what}: {', '.join(names)}", file=sys.stderr)
    return code or int(bool(bad))


def counted(report: Path) -> tuple[dict[str, dict[str, int]], float]:
    """(fault -> tests, failed, skipped and what COUNTS names, seconds) of a JUnit report.

    Raises:
        ValueError: a test is marked with a fault that has no row.
    """
    found: dict[str, Counter[str]] = {name: Counter() for name in FAULTS}
    seconds = 0.0
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        seconds += float(case.get("time", 0))
        properties = {p.get("name"): p.get("value", "") for p in case.iter("property")}
        fault = properties.get("fault")
        if fault is None:  # skipped before it began
            continue
        if fault not in found:
            raise ValueError(f"{case.get('name')}: expected one of {', '.join(FAULTS)}, got {fault!r}")
        outcomes = {child.tag for child in case}
        found[fault]["tests"] += 1
        found[fault]["failed"] += bool(outcomes & {"failure", "error"})
        for count in COUNTS:
            found[fault][count] += int(properties[count])
    columns = ("tests", "failed", *COUNTS)
    return {name: {c: counts[c] for c in columns} for name, counts in found.items()}, round(seconds, 1)


def device() -> str:
    """ "h200" on an NVIDIA H200, "h100" on an NVIDIA H100 80GB HBM3, "cpu" where there is no GPU."""
    import torch

    return torch.cuda.get_device_name(0).split()[1].lower() if torch.cuda.is_available() else "cpu"


def _table(found: dict[str, dict[str, Any]]) -> Table:
    grid = Table()
    grid.add_column("fault")
    for name in ("tests", "failed", *COUNTS):
        grid.add_column(name, justify="right")
    for fault, row in found.items():
        grid.add_row(fault, *(str(row[name]) for name in ("tests", "failed", *COUNTS)))
    return grid


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    add_arguments(parser)
    sys.exit(run(parser.parse_args()))
