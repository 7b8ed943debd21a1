"""`benchmarks.handover`: steps in order of value, each with its limit, and what is found is kept."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import handover
from benchmarks.handover import Step

DONE = """
import json, os, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--json") + 1])
out.write_text(json.dumps({"asked": sys.argv[1:-2], "begun": time.monotonic(), "of": os.getpid()}))
"""
HANGS = """
import subprocess
from vllm_xlayer.bench.engines import end_when_told
end_when_told()
sleep = [sys.executable, "-c", "import time; time.sleep(60)"]
with subprocess.Popen(sleep, start_new_session=True) as engine:
    try:
        (out.parent.parent / "engine").write_text(str(engine.pid))
        engine.wait()
    finally:
        engine.kill()
"""
MODULES = {
    "step_done": DONE,
    "step_fails": DONE + "sys.exit(3)",
    "step_hangs": DONE + HANGS,
    "step_waits": DONE + "time.sleep(3)",
}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs steps of these modules; (exit code, what the JSON has of each)."""
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(handover.tempfile, "tempdir", str(tmp_path))

    def run(*modules, seconds=60.0, step_seconds=30.0, at_once=1, alone=True):
        named = [
            Step(f"{m} {i}" if modules.count(m) > 1 else m, m, ["x"], alone) for i, m in enumerate(modules)
        ]
        monkeypatch.setattr(handover, "steps", lambda args: iter(named))
        out = tmp_path / "out.json"
        args = dict(json=out, seconds=seconds, step_seconds=step_seconds, devices=None, at_once=at_once)
        return handover.run(argparse.Namespace(**args)), json.loads(out.read_text())["steps"]

    return run


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"


def test_what_fails_leaves_the_others(run):
    code, found = run("step_fails", "step_done")
    assert code == 1 and list(found) == ["step_fails", "step_done"]
    assert found["step_fails"]["problem"] == "ended with exit code 3, see above"
    assert found["step_done"].keys() == {"asked", "begun", "of", "seconds"}
    assert [found[name]["asked"] for name in found] == [["x"], ["x"]], "also of the one that failed"
    assert run("step_done")[0] == 0


def test_what_hangs_is_ended_with_its_engines(run, tmp_path):
    begin = time.monotonic()
    code, found = run("step_hangs", "step_done", step_seconds=8)
    assert time.monotonic() - begin < 40 and code == 1
    assert found["step_hangs"]["problem"] == "not done in 8 s" and found["step_hangs"]["asked"]
    assert gone(found["step_hangs"]["of"]) and gone(int((tmp_path / "engine").read_text()))
    assert "problem" not in found["step_done"]


def test_what_is_found_is_kept_at_once(run, monkeypatch, tmp_path):
    """Also where somebody ends the command while a step goes on."""
    script = f"""
import argparse, pathlib
from benchmarks import handover
handover.steps = lambda args: iter([handover.Step("s", "step_hangs", ["x"])])
out = pathlib.Path({str(tmp_path / "out.json")!r})
handover.run(argparse.Namespace(json=out, seconds=60, step_seconds=50, devices=None, at_once=1))
"""
    root = str(Path(handover.__file__).parents[1])
    path = os.pathsep.join([os.environ["PYTHONPATH"], root])
    process = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path})
    out, deadline = tmp_path / "out.json", time.monotonic() + 60
    while not (out.exists() and (tmp_path / "engine").exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = json.loads(out.read_text())["steps"]["s"]
    assert found["asked"] == ["x"] and "problem" not in found
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert gone(found["of"]) and gone(int((tmp_path / "engine").read_text()))


def test_answers_together_and_times_alone(run):
    _, found = run("step_waits", "step_waits", "step_waits", at_once=3, alone=False)
    begun = [one["begun"] for one in found.values()]
    assert max(begun) - min(begun) < 2.5
    _, found = run("step_waits", "step_waits", at_once=3)
    begun = [one["begun"] for one in found.values()]
    assert max(begun) - min(begun) > 2.9


def test_nothing_is_begun_that_cannot_end(run):
    code, found = run("step_done", seconds=handover.START_SECONDS - 1)
    assert code == 1
    assert found["step_done"] == {"problem": "not begun: 29 s were left of 29 s"}


def test_answers_come_first():
    args = dict(devices=["0", "1"], caches=["nvfp4", "bf16"], tokens=[16384, 65536], ways=["rows"], limit=32)
    steps = list(handover.steps(argparse.Namespace(shape=None, **args)))
    assert [step.name for step in steps] == ["answers, nvfp4", "answers, bf16", "times, nvfp4", "times, bf16"]
    assert [step.alone for step in steps] == [False, False, True, True]
    assert all(step.arguments[-3:] == ["--devices", "0", "1"] for step in steps)
    args |= dict(limit=0)
    assert len(list(handover.steps(argparse.Namespace(shape=None, **args)))) == 2
    args |= dict(limit=32, tokens=[])
    assert len(list(handover.steps(argparse.Namespace(shape=None, **args)))) == 2
