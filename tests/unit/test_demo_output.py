"""What the demo shows of an engine: what it says it is doing, and its log only where it failed."""

import json
import os
import stat
import sys
from io import StringIO

import pytest
from rich.console import Console

from vllm_xlayer.demo import command as demo

ENGINE = """#!/bin/sh
# Called as Python: -m module --out FILE ... --progress FD
while [ $# -gt 1 ]; do
  case $1 in --out) out=$2;; --progress) progress=$2;; esac
  shift
done
echo "WARNING 11-29 02:10:00 [somewhere.py:1] to stdout"
echo "Loading safetensors: 100%|####| 1/1" >&2
echo "answering documents" > /dev/fd/$progress
{end}
"""


@pytest.fixture
def run_engine(monkeypatch, tmp_path):
    """Runs an engine that ends with these commands; (result, what the console showed)."""

    def run(end: str):
        engine = tmp_path / "engine.sh"
        engine.write_text(ENGINE.replace("{end}", end))
        engine.chmod(engine.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(engine))
        shown = StringIO()
        console = Console(file=shown, force_terminal=True, width=demo.WIDTH)
        return demo._run_engine(demo.SETUPS[0], 1, tmp_path, console), shown.getvalue()

    return run


def test_an_engine_that_runs(run_engine, capfd):
    """It goes on for a while, so that what it says is seen."""
    result, shown = run_engine("""sleep 0.5; echo '{"answers": {}}' > "$out" """)
    assert result == {"answers": {}}
    assert "answering documents" in shown and "done in" in shown
    assert "WARNING" not in shown and "Loading" not in shown
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("end", ["exit 3", "exit 0"], ids=["fails", "writes nothing"])
def test_an_engine_that_fails_shows_its_log(run_engine, capfd, end):
    result, _ = run_engine(end)
    out, err = capfd.readouterr()
    assert result is None and out == ""
    assert "to stdout" in err and "Loading safetensors" in err
    assert f"ended with exit code {end.split()[1]}" in err.splitlines()[-1]


def test_ctrl_c_ends_the_engine(monkeypatch, tmp_path):
    class Interrupted(Console):
        def status(self, *args, **kwargs):
            status = super().status(*args, **kwargs)

            def update(*_):
                raise KeyboardInterrupt

            status.update = update
            return status

    pid = tmp_path / "pid"
    code = f"import os, sys, time; open({str(pid)!r}, 'w').write(json.dumps(os.getpid()))"
    code = f"import json; {code}; os.write(int(sys.argv[2]), b'on\\n'); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        demo._follow([sys.executable, "-c", code], {}, tmp_path / "log", Interrupted(file=StringIO()))
    with pytest.raises(ProcessLookupError):
        os.kill(json.loads(pid.read_text()), 0)
