"""lm_eval's tasks of the shipped model through a proxy, as users of a hand-over run it: two `vllm serve`.

    python -m benchmarks.handover_proxy toy_proxy_server.py [--cache nvfp4] [--devices 0 1] [--limit 32]

The proxy is a file of vLLM's repository (tests/v1/kv_connector/nixl_integration), of the installed
vLLM's tag. Every answer through it is compared with the prefill engine's own, which computes its prompt.
"""

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vllm_xlayer.bench.engines import end_when_told
from vllm_xlayer.bench.handover_pair import PORT
from vllm_xlayer.demo import model_path
from vllm_xlayer.demo.engine import evaluate
from vllm_xlayer.provenance import write

from . import RESULTS
from .faults import device
from .handover_answers import BATCH, CPU_BYTES, GPU_BYTES, Ask, Engines

START_SECONDS = 300.0
"""For all servers."""
ANSWER_SECONDS = 120.0
ROWS = "vllm:xlayer_handover_rows_total"


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextlib.contextmanager
def running(command: list[str], environment: Mapping[str, str]) -> Iterator[subprocess.Popen]:
    """A process group, which ends with the `with` block."""
    process = subprocess.Popen(command, env={**os.environ, **environment}, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


def wait_for(url: str, process: subprocess.Popen, until: float) -> None:
    """Until the server answers. Raises RuntimeError if it has ended, or it is too late."""
    while True:
        if process.poll() is not None:
            raise RuntimeError(
                f"expected a server at {url}, but it ended with exit code {process.returncode}"
            )
        if time.monotonic() > until:
            raise RuntimeError(f"expected an answer from {url} within {START_SECONDS:.0f} s, got none")
        with contextlib.suppress(OSError):
            get(url)
            return
        time.sleep(0.5)


def ask_at(port: int) -> Ask:
    """Asks for completions there, a batch at a time."""

    def one(prompt: list[int], tokens: int) -> list[int]:
        body = {
            "model": str(model_path()), "prompt": prompt, "max_tokens": tokens, "temperature": 0,
            "return_token_ids": True,
        }  # fmt: skip
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
            token_ids: list[int] = json.load(answer)["choices"][0]["token_ids"]
            return token_ids

    def ask(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        with ThreadPoolExecutor(BATCH) as pool:
            return list(pool.map(lambda prompt: one(prompt, tokens), prompts))

    return ask


def rows_read(metrics: str) -> int:
    """Of a decode engine's /metrics."""
    found = re.findall(rf"^{ROWS}(?:{{.*}})? (\S+)$", metrics, re.M)
    return int(sum(map(float, found)))


def serve(cache: str, port: int, on_gpu: bool) -> list[str]:
    """The command of one engine; they share a GPU, or have one each."""
    kv_bytes = GPU_BYTES if on_gpu else CPU_BYTES
    return [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model_path()), "--port", str(port),
        "--kv-cache-dtype", {"bf16": "auto"}.get(cache, cache), "--kv-connector", "XLayerNixlConnector",
        "--dtype", "bfloat16", "--max-model-len", "2560", "--max-num-seqs", str(BATCH), "--enforce-eager",
        "--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(kv_bytes),
    ]  # fmt: skip


def measure(proxy: Path, cache: str, devices: list[str] | None, limit: int, on_gpu: bool) -> dict[str, Any]:
    """Asks the prefill engine for all answers, then both through the proxy.

    Raises:
        RuntimeError: a server did not start.
    """
    until = time.monotonic() + START_SECONDS
    prefill, decode, front, *sides = free_ports(5)
    with contextlib.ExitStack() as stack:
        servers = []
        for i, (port, side) in enumerate(zip((prefill, decode), sides, strict=True)):
            environment = {PORT: str(side)} | ({"CUDA_VISIBLE_DEVICES": devices[i]} if devices else {})
            servers.append(stack.enter_context(running(serve(cache, port, on_gpu), environment)))
        command = [
            sys.executable, str(proxy), "--port", str(front), "--prefiller-hosts", "127.0.0.1",
            "--decoder-hosts", "127.0.0.1", "--prefiller-ports", str(prefill), "--decoder-ports", str(decode),
        ]  # fmt: skip
        servers.append(stack.enter_context(running(command, {})))
        for port, path, server in zip(
            (prefill, decode, front), ("health", "health", "healthcheck"), servers, strict=True
        ):
            wait_for(f"http://127.0.0.1:{port}/{path}", server, until)
        alone = evaluate(Engines(ask_at(prefill)), limit)
        before = rows_read(get(f"http://127.0.0.1:{decode}/metrics"))
        proxied = evaluate(Engines(ask_at(front)), limit)
        rows = rows_read(get(f"http://127.0.0.1:{decode}/metrics")) - before
    same = sum(proxied["answers"][key] == answer for key, answer in alone["answers"].items())
    scores = {"alone": alone["scores"], "through the proxy": proxied["scores"]}
    return {"cache": cache, "scores": scores, "same": same, "answers": len(alone["answers"]), "rows": rows}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.handover_proxy",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("proxy", type=Path, help="vLLM's toy_proxy_server.py")
    parser.add_argument("--cache", choices=("nvfp4", "fp8", "bf16"), default="nvfp4")
    parser.add_argument(
        "--devices", nargs=2, metavar=("PREFILL", "DECODE"), help="GPUs (default: one for both)"
    )
    parser.add_argument("--limit", type=int, default=32, help="documents of each task (default: 32)")
    parser.add_argument(
        "--json", type=Path, help="file to write (default: results/DEVICE-handover-proxy.json)"
    )
    args = parser.parse_args()
    end_when_told()
    where = device()
    found = measure(args.proxy, args.cache, args.devices, args.limit, where != "cpu")
    write(args.json or RESULTS / f"{where}-handover-proxy.json", found)
    print(f"{args.cache}: {found['same']} of {found['answers']} answers through the proxy are one engine's, "
          f"{found['rows']:,} rows were read")  # fmt: skip
    return int(found["same"] != found["answers"] or not found["rows"])


if __name__ == "__main__":
    sys.exit(main())
