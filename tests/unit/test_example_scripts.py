"""What docs/examples hand over to vLLM, lm_eval and docker, of those that are not run whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_xlayer.demo import tasks_path

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
SERVE = ["--kv-cache-dtype", "nvfp4", "--kv-connector", "XLayerConnector"]


@pytest.fixture
def called(tmp_path, monkeypatch):
    """called(script, *arguments): how a shell script calls vllm or lm_eval, which are not run."""
    for name in ("vllm", "lm_eval"):
        program = tmp_path / name
        lines = (f"#!{sys.executable}", "import json, sys", f"print(json.dumps(['{name}', *sys.argv[1:]]))")
        program.write_text("\n".join(lines))
        program.chmod(0o755)
    python = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{tmp_path}:{python}:{os.environ['PATH']}")

    def call(script, *arguments):
        command = ["sh", str(EXAMPLES / script), *arguments]
        return json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path).stdout
        )

    return call


def test_the_server_gets_both_flags_and_the_users(called):
    program, command, model, *flags = called("serve.sh", "a/model", "--port", "1")
    assert (program, command, model) == ("vllm", "serve", "a/model")
    assert flags[:4] == SERVE and flags[-2:] == ["--port", "1"]


def test_lm_eval_gets_a_cache_and_a_task(called):
    program, *flags = called("lm_eval.sh", "a/model", "--limit", "3")
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    assert program == "lm_eval" and given["--limit"] == "3"
    assert (Path(given["--include_path"]) / f"{given['--tasks']}.yaml").exists()
    assert Path(given["--include_path"]) == tasks_path()
    assert json.loads(given["--model_args"]) == {
        "pretrained": "a/model",
        "kv_cache_dtype": "nvfp4",
        "kv_transfer_config": {"kv_connector": "XLayerConnector", "kv_role": "kv_both"},
    }


def test_the_container_serves_with_both_flags():
    yaml = pytest.importorskip("yaml")
    (service,) = yaml.safe_load((EXAMPLES / "compose.yaml").read_text())["services"].values()
    (command,) = service["command"]
    assert service["image"].startswith("vllm/vllm-openai:v0.") and " ".join(SERVE) in command
    assert "MODEL" in service["environment"] and "$$MODEL" in command
