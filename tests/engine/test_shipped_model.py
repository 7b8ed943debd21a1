"""The shipped model behind the command lines that users type: lm_eval and vllm serve, on the CPU platform."""

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from vllm_xlayer.demo import model_path, tasks_path

BIN = Path(sys.executable).parent
EXAMPLES = Path(__file__).parents[2] / "docs/examples"
ENVIRONMENT = os.environ | {
    "PATH": f"{BIN}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
CONNECTOR = {
    "kv_connector": "XLayerConnector",
    "kv_role": "kv_both",
    "kv_connector_extra_config": {"cpu_bytes_to_use": 64 << 20},
}


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "nvfp4"])
def test_lm_eval_command_line(reference_platform, tmp_path, kv_cache_dtype):
    """First documents of the recall task: the shared prefixes are cached, and every answer is right."""
    settings = {
        "pretrained": str(model_path()),
        "dtype": "bfloat16",
        "max_model_len": 2560,
        "kv_cache_memory_bytes": 64 << 20,
        "kv_cache_dtype": kv_cache_dtype,
        "kv_transfer_config": CONNECTOR,
    }
    command = [
        str(BIN / "lm_eval"), "--model", "vllm", "--model_args", json.dumps(settings), "--limit", "12",
        "--tasks", "xlayer_recall", "--include_path", str(tasks_path()), "--batch_size", "auto",
        "--output_path", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    report = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    assert report["results"]["xlayer_recall"]["exact_match,none"] == 1.0
    assert report["n-samples"]["xlayer_recall"]["effective"] == 12


@pytest.fixture
def server(reference_platform, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [
        "sh", str(EXAMPLES / "serve.sh"), str(model_path()), "--kv-transfer-config",
        json.dumps({"kv_connector_extra_config": CONNECTOR["kv_connector_extra_config"]}),
        "--max-model-len", "2560", "--kv-cache-memory-bytes", str(64 << 20), "--port", str(port),
        "--host", "127.0.0.1", "--served-model-name", "small",
    ]  # fmt: skip
    log = (tmp_path / "serve.log").open("w+")
    process = subprocess.Popen(
        command, env=ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path, start_new_session=True
    )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + 300
    try:
        while True:
            try:
                urllib.request.urlopen(url + "/health", timeout=2).close()
                break
            except (urllib.error.URLError, OSError):
                log.seek(0)
                assert process.poll() is None and time.monotonic() < deadline, log.read()[-4000:]
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)
        log.close()


def test_vllm_serve_with_two_flags(server):
    table = [
        f"{a}{b}{c}={n:04d}" for n, (a, b, c) in enumerate(zip("kqzmab", "xywpls", "trvnhj", strict=True))
    ]
    prompt = "R\n" + "\n".join(table) + "\n?\n" + table[1] + "\n" + table[4][:4]
    ask = runpy.run_path(str(EXAMPLES / "client.py"))["ask"]
    texts, hits = zip(*(ask(server, "small", prompt) for _ in range(3)), strict=True)
    assert hits == (0, *[(len(prompt) - 1) // 16 * 16] * 2)
    # A prompt that is computed has newest tokens in 16 bits, one that was found has not.
    assert texts[1] == texts[2] and all(text.startswith(table[4][4:]) for text in texts)
    metrics = urllib.request.urlopen(server + "/metrics", timeout=60).read().decode()
    assert 'cache_dtype="nvfp4"' in metrics
