"""What `benchmarks.two_gpus` asks, in order of value, and how the results of several parts make one file."""

import argparse
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from . import handover
from .faults import FAULTS
from .handover import Step

CACHES = ("nvfp4", "bf16", "fp8")
LENGTHS = (16384, 65536)
WAYS = ("rows", "pages", "computed")
REPEATS = 5
PLACES = {
    "handover-answers": (["0", "1"], CACHES, 32),
    "handover-2to1": (["0,1", "0"], ("nvfp4", "bf16"), 16),
    "handover-1to2": (["0", "0,1"], ("nvfp4", "bf16"), 16),
}
"""Results file of answers -> (GPUs of both engines, caches, documents a task)."""
TESTS = {
    "two ranks, full graphs": ("gpu/test_two_ranks_gpu.py",),
    "hand-over, 2 to 1 and 1 to 2": ("engine/test_nixl_tp.py",),
    "equal latents": ("engine/test_latents_tp.py",),
    "two ranks": ("engine/test_tensor_parallel.py",),
}
FAULT_TESTS = {
    "hand-over": ("engine/test_nixl.py",),
    "one rank": ("engine/test_tensor_parallel.py",),
    "one rank, equal latents": ("engine/test_latents_tp.py",),
    "several hosts": ("engine/test_several_hosts.py",),
    "hand-over with tiers": ("engine/test_nixl_tiers.py",),
}
ASKED = tuple(
    name
    for name in FAULTS
    if name.startswith("hand-over") or name in ("copy error on one rank", "ranks on several hosts")
)
"""Faults that FAULT_TESTS try."""


@dataclass(frozen=True)
class Part:
    """A process, and what its results are part of.

    Args:
        file: of the results, without the device's name and ".json".
        step: what is run. ``alone``: nothing else may run meanwhile.
        seconds: that it takes, as far as is known; it is not begun with less.
        limit: seconds after which it is ended.
        engines: that it runs at once, each of them a process with a GPU.
        devices: of both engines, where it hands over.
    """

    file: str
    step: Step
    seconds: float
    limit: float
    engines: int
    devices: list[str] | None = None

    @property
    def name(self) -> str:
        return f"{self.file}: {self.step.name}"

    @property
    def stem(self) -> str:
        """Of its own files."""
        return re.sub("[^a-z0-9]+", "-", self.name.lower())


def plan(lengths: tuple[int, ...] = LENGTHS) -> list[Part]:
    """The parts, the most valuable first; those that may run beside each other follow each other."""
    times = list(_times(lengths))
    return [*times[:1], *_answers(), *_tests(), *times[1:]]


def _times(lengths: tuple[int, ...]) -> Iterator[Part]:
    devices = ["0", "1"]
    for step in handover.steps(_asked(devices, CACHES, 0, lengths)):
        arguments = [*step.arguments, "--repeats", str(REPEATS)]
        yield Part("handover", Step(step.name, step.module, arguments), 90, 170, 5, devices)


def _answers() -> Iterator[Part]:
    for file, (devices, caches, limit) in PLACES.items():
        ranks = sum(len(device.split(",")) for device in devices)
        for step in handover.steps(_asked(devices, caches, limit, ())):
            yield Part(file, step, 60, 220, ranks, devices)


def _asked(
    devices: list[str], caches: tuple[str, ...], limit: int, lengths: tuple[int, ...]
) -> argparse.Namespace:
    return argparse.Namespace(
        devices=devices, caches=caches, limit=limit, tokens=lengths, ways=WAYS, shape=None
    )


def _tests() -> Iterator[Part]:
    mark = "(gpu or anywhere) and not fault"
    first, *others = (
        Part("faults", Step(name, "benchmarks.faults", [*paths], alone=False), 60, 220, 2)
        for name, paths in FAULT_TESTS.items()
    )
    yield first
    for name, paths in TESTS.items():
        engines = 3 if "hand-over" in name else 2
        step = Step(name, "benchmarks.suite", [*paths, "--mark", mark], alone=False)
        yield Part("suite", step, 40, 220, engines)
    yield from others


def combined(file: str, devices: list[str] | None, found: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The results file's contents, without provenance, of what its parts have found.

    found: name of a step -> its JSON.
    """
    if file.startswith("handover"):
        return {"devices": devices, "steps": dict(found)}
    whole = [one for one in found.values() if "exit_code" in one]
    problems = {name: one["problem"] for name, one in found.items() if "problem" in one}
    result: dict[str, Any] = {
        "exit_code": max((one["exit_code"] for one in whole), default=1),
        "seconds": round(sum(one["seconds"] for one in whole), 1),
        "problems": problems,
    }
    if file == "suite":
        mark = next((one["mark"] for one in whole), None)
        files = {name: counts for one in whole for name, counts in one["files"].items()}
        return result | {"mark": mark, "select": None, "sanitizer": None, "files": files}
    counts: dict[str, Counter[str]] = {name: Counter() for name in ASKED}
    for one in whole:
        for name in ASKED:
            counts[name].update(one["faults"][name])
    columns = ("tests", "failed", "tries", "requests", "wrong", "lost", "leaked")
    faults = {name: {column: row[column] for column in columns} for name, row in counts.items()}
    return result | {"soak_seconds": 0.0, "asked": list(ASKED), "faults": faults}
