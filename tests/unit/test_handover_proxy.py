"""benchmarks.handover_proxy: servers that do not start are told, and what a decode engine's metrics say."""

import subprocess
import sys

import pytest

from benchmarks.handover_proxy import ask_at, free_ports, rows_read, running, wait_for

METRICS = """\
# HELP vllm:xlayer_handover_rows_total Rows.
# TYPE vllm:xlayer_handover_rows_total counter
vllm:xlayer_handover_rows_total{engine="0",model_name="m"} 12.0
vllm:xlayer_handover_rows_total{engine="1",model_name="m"} 3.0
vllm:xlayer_handover_rows_created{engine="0",model_name="m"} 1.7e+09
"""
SERVER = """
import http.server, json, sys

class Answers(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        body = json.dumps({"choices": [{"token_ids": asked["prompt"][: asked["max_tokens"]]}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Answers).serve_forever()
"""


def test_rows_of_all_engines():
    assert rows_read(METRICS) == 15 and rows_read("") == 0


def test_a_server_that_ends_is_told():
    with running([sys.executable, "-c", "raise SystemExit(3)"], {}) as server:
        server.wait()
        with pytest.raises(RuntimeError, match="ended with exit code 3"):
            wait_for("http://127.0.0.1:1/health", server, float("inf"))


def test_a_server_that_never_answers_is_told_and_ended():
    with running([sys.executable, "-c", "import time; time.sleep(600)"], {}) as server:
        with pytest.raises(RuntimeError, match="got none"):
            wait_for("http://127.0.0.1:1/health", server, 0.0)
        assert server.poll() is None
    assert server.poll() is not None


def test_answers_come_in_the_order_of_the_prompts():
    (port,) = free_ports(1)
    prompts = [[i, i + 1, i + 2] for i in range(40)]
    with running([sys.executable, "-c", SERVER, str(port)], {}) as server:
        ask = ask_at(port)
        for _ in range(100):
            try:
                answers = ask(prompts, 2)
                break
            except OSError:
                with pytest.raises(subprocess.TimeoutExpired):
                    server.wait(0.1)
        else:
            pytest.fail("the server did not start")
    assert answers == [prompt[:2] for prompt in prompts]
