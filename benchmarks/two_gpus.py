"""All that needs two GPUs, in one command for a machine that is lent for minutes.

Times of the hand-over are taken alone; answers, tests and faults run beside each other. Every part is a
process of its own with a limit, whose output goes to FOLDER/parts. FOLDER/DEVICE-x2-*.json are written anew
after each thing that a part has found: copied to benchmarks/results, the documents are made of them. A part
that FOLDER has already, from a call before, is not asked again, unless it had a problem.
"""

import argparse
import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm_xlayer.bench.engines import end_when_told
from vllm_xlayer.provenance import provenance

from .faults import device
from .handover import Running
from .two_gpus_parts import Part, combined, plan

AT_ONCE = 36
"""Engines: each wants a core, and some GiB of a GPU."""
SPARE_SECONDS = 8.0
"""At the end, for engines to end."""
SAID_LINES = 8
"""Of the output of a part that has failed."""


class Session:
    """One call: what is found so far, and where it is written."""

    def __init__(self, parts: list[Part], folder: Path) -> None:
        self.folder, self.own = folder, folder / "parts"
        self.own.mkdir(parents=True, exist_ok=True)
        self.parts, self.began = parts, time.monotonic()
        self.found: dict[str, dict[str, Any]] = {}
        """Part's name -> its JSON."""
        self.about, self.device = provenance(), device()
        for part in parts:
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                self.found[part.name] = json.loads(self._json(part).read_text())

    def say(self, part: Part, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.0f} s] {part.name}: {text}", flush=True)

    def start(self, part: Part, seconds: float) -> Running:
        self._json(part).unlink(missing_ok=True)
        with self._log(part).open("wb") as log:
            return Running(part.step, min(part.limit, seconds), self._json(part), log)

    def look(self, part: Part, running: Running) -> bool:
        """Writes what is new; whether the part has ended."""
        ended, more = running.look()
        if more:
            self.keep(part, running.found, own=ended)
        if ended:
            problem = running.found.get("problem")
            self.say(part, problem or f"done in {running.found['seconds']:.0f} s")
            if problem:
                lines = self._log(part).read_text(errors="replace").splitlines()[-SAID_LINES:]
                print("\n".join(f"    {line[:200]}" for line in lines), flush=True)
        return ended

    def keep(self, part: Part, found: dict[str, Any], own: bool = True) -> None:
        """In the results file, and where a later call sees it."""
        self.found[part.name] = found
        if own:
            _write(self._json(part), found)
        of_file = {
            other.step.name: self.found[other.name]
            for other in self.parts
            if other.file == part.file and other.name in self.found
        }
        contents = self.about | combined(part.file, part.devices, of_file)
        _write(self.folder / f"{self.device}-x2-{part.file}.json", contents)

    def done(self, part: Part) -> bool:
        return part.name in self.found and "problem" not in self.found[part.name]

    def _json(self, part: Part) -> Path:
        return self.own / f"{part.stem}.json"

    def _log(self, part: Part) -> Path:
        return self.own / f"{part.stem}.log"


def _write(path: Path, contents: dict[str, Any]) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(contents, indent=2) + "\n")
    new.replace(path)  # never half of it


def may_begin(part: Part, running: list[Part]) -> bool:
    """Whether it disturbs none of those that run, nor they it, and there is room for its engines."""
    if part.step.alone or any(other.step.alone for other in running):
        return not running
    return not running or sum(other.engines for other in running) + part.engines <= AT_ONCE


def run(parts: list[Part], folder: Path, seconds: float) -> int:
    """Asks what FOLDER does not have yet and the time is enough for; 0 if all of it is there now."""
    end_when_told()
    session = Session(parts, folder)
    end = session.began + seconds - SPARE_SECONDS
    waiting = []
    for part in parts:
        if session.done(part):
            session.say(part, "is there already")
        else:
            waiting.append(part)
    running: list[tuple[Part, Running]] = []
    try:
        while waiting or running:
            left = end - time.monotonic()
            if waiting and left < waiting[0].seconds:
                part = waiting.pop(0)
                problem = f"not begun: {left:.0f} s were left, and it takes about {part.seconds:.0f} s"
                session.say(part, problem)
                if part.name not in session.found:
                    session.keep(part, {"problem": problem})
            elif waiting and may_begin(waiting[0], [part for part, _ in running]):
                part = waiting.pop(0)
                session.say(part, f"begins, {left:.0f} s are left")
                running.append((part, session.start(part, left)))
            else:
                time.sleep(0.2)
                running = [(part, one) for part, one in running if not session.look(part, one)]
    finally:
        for _, one in running:
            one.end()
    return int(not all(session.done(part) for part in parts))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.two_gpus", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="for results and the parts' output")
    parser.add_argument("--seconds", type=float, default=555, help="for all (default: %(default)s)")
    args = parser.parse_args()
    return run(plan(), args.folder, args.seconds)


if __name__ == "__main__":
    sys.exit(main())
