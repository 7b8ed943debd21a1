"""The demo's real engines: nothing of vLLM's log is seen of one that runs, and all of one that fails."""

import json

from rich.console import Console

from vllm_xlayer.demo import command as demo

SETUPS = {setup.name: setup for setup in demo.SETUPS}


def test_an_engine_that_runs_is_quiet(reference_platform, tmp_path, capfd):
    result = demo._run_engine(SETUPS["nvfp4"], 1, tmp_path, Console(width=demo.WIDTH))
    out, err = capfd.readouterr()
    assert result is not None, err
    assert len(out.splitlines()) == 1 and out.startswith("done in ") and err == ""
    assert result["restored_identical"] == [3, 3] and json.dumps(result)
    assert "WARNING" in (tmp_path / "nvfp4.log").read_text(), "there was something to keep out"


def test_an_engine_that_fails_says_why(reference_platform, tmp_path, capfd):
    """The CPU reference platform has no fp8 cache."""
    assert demo._run_engine(SETUPS["fp8"], 1, tmp_path, Console(width=demo.WIDTH)) is None
    err = capfd.readouterr().err
    assert "Traceback (most recent call last)" in err and "got fp8" in err
    assert "its log is above" in err.splitlines()[-1]
