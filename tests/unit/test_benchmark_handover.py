"""`benchmarks.handover`: steps in order of value, each with its limit, and what is found is kept."""

import argparse
import json
import time

import pytest

from benchmarks import handover
from benchmarks.handover import Step

DONE = """
import json, pathlib, sys
pathlib.Path(sys.argv[sys.argv.index("--json") + 1]).write_text(json.dumps({"asked": sys.argv[1:-2]}))
"""
MODULES = {
    "step_done": DONE,
    "step_fails": DONE + "sys.exit(3)",
    "step_hangs": DONE + "import time; time.sleep(60)",
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs steps of these modules; (exit code, what the JSON has of each)."""
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(*modules, seconds=60.0, step_seconds=30.0):
        monkeypatch.setattr(handover, "steps", lambda args: (Step(m, m, ["x"]) for m in modules))
        out = tmp_path / "out.json"
        args = dict(json=out, seconds=seconds, step_seconds=step_seconds, devices=None)
        return handover.run(argparse.Namespace(**args)), json.loads(out.read_text())["steps"]

    return run


def test_what_fails_leaves_the_others(run):
    code, found = run("step_fails", "step_done")
    assert code == 1 and list(found) == ["step_fails", "step_done"]
    assert found["step_fails"]["problem"] == "ended with exit code 3, see above"
    assert found["step_done"].keys() == {"asked", "seconds"}
    assert [found[name]["asked"] for name in found] == [["x"], ["x"]], "also of the one that failed"
    assert run("step_done")[0] == 0


def test_what_hangs_is_ended(run):
    begin = time.monotonic()
    code, found = run("step_hangs", "step_done", step_seconds=3)
    assert time.monotonic() - begin < 30 and code == 1
    assert found["step_hangs"]["problem"] == "not done in 3 s" and found["step_hangs"]["asked"]
    assert "problem" not in found["step_done"]


def test_nothing_is_begun_that_cannot_end(run):
    code, found = run("step_done", seconds=handover.START_SECONDS - 1)
    assert code == 1
    assert found["step_done"] == {"problem": "not begun: 39 s were left of 39 s"}


def test_answers_come_first():
    args = dict(devices=["0", "1"], caches=["nvfp4", "bf16"], tokens=[16384, 65536], ways=["rows"], limit=32)
    steps = list(handover.steps(argparse.Namespace(shape=None, **args)))
    assert [step.name for step in steps] == [
        "answers, nvfp4", "answers, bf16",
        "16384 tokens, nvfp4", "16384 tokens, bf16", "65536 tokens, nvfp4", "65536 tokens, bf16",
    ]  # fmt: skip
    assert all(step.arguments[-3:] == ["--devices", "0", "1"] for step in steps)
