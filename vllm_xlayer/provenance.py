"""What every results file says besides its numbers: when, where, and with what they were taken.

A copy of the source tree without its git history cannot say which commit it is: whoever makes the copy
sets VLLM_XLAYER_COMMIT there, to what `git rev-parse --short HEAD` says here.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("vllm", "torch", "flashinfer-python", "lm-eval", "transformers")


def provenance() -> dict[str, Any]:
    """Date (UTC), commit, hardware and versions. Looks at the GPU if there is one."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def hardware() -> str:
    """The first GPU's name with its architecture, or the CPU's."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name} (sm_{properties.major}{properties.minor})"
    name = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {torch.get_num_threads()} threads, no GPU (CPU reference platform)"


def write(path: Path, numbers: dict[str, Any]) -> None:
    """Writes ``numbers`` with their provenance as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**provenance(), **numbers}, indent=2) + "\n")


def rows_of(path: Path, key: str, **question: Any) -> dict[str, dict[str, Any]]:
    """The rows of a results file, each with the date and commit that it is of: some can be made again, and
    the others stay what they were. None if there is no file, or its fields are those of another question."""
    if not path.exists():
        return {}
    results = json.loads(path.read_text())
    if any(results.get(name) != value for name, value in question.items()):
        return {}
    about = {name: results[name] for name in ("date", "commit")}
    return {name: about | row for name, row in results[key].items()}


def kept(path: Path, key: str, asked: list[str], **question: Any) -> dict[str, dict[str, Any]]:
    """`rows_of` a file that was made on such hardware with the same versions, too. Says which rows stay in
    it though they are not asked for now, and of when they are."""
    now = provenance()
    rows = rows_of(path, key, hardware=now["hardware"], versions=now["versions"], **question)
    for name in sorted(rows.keys() - set(asked)):
        print(f"{name}: as {path} has it, {rows[name]['date']}, commit {rows[name]['commit']}")
    return rows


def stamped(row: dict[str, Any]) -> dict[str, Any]:
    """A row that is of now."""
    now = provenance()
    return row | {name: now[name] for name in ("date", "commit")}


def _commit() -> str:
    """VLLM_XLAYER_COMMIT where it is set; else the commit of the source tree that has this file, marked
    if the tree was changed; else "unknown", as where it is installed in somebody else's repository."""
    if told := os.environ.get("VLLM_XLAYER_COMMIT"):
        return told
    here = Path(__file__).parent
    try:
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True, check=True
        )
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
        # Results are not code: a benchmark that writes its file as it goes has not changed itself.
        code = [":/", ":(top,exclude)benchmarks/results"]
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no", "--", *code],
            cwd=here, capture_output=True, text=True,
        ).stdout.strip()  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit + ("+changes" if changed else "")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
