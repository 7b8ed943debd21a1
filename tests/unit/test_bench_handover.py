"""`bench handover`: what is asked of which engine, what is not taken for a hand-over, and its table."""

import contextlib
import json
from typing import ClassVar

import pytest

from vllm_xlayer.bench import handover
from vllm_xlayer.bench.__main__ import main
from vllm_xlayer.bench.engines import Answer, EngineFailed

TOKENS = 512
THEIR_HITS = "remote_prefill_cached_tokens"
"""With which vLLM's decode engine reports what the other one had cached."""


class FakeEngine:
    """Knows what was asked; a prompt that comes with params, or again, is in its cache."""

    made: ClassVar[list["FakeEngine"]] = []
    reads = True

    def __init__(self, model, cache, environment=None, **settings):
        self.settings, self.environment, self.asked = settings, environment, []
        self.about = {"vocabulary": 512}
        self.made.append(self)

    def generate(self, asked, tokens, params=None):
        (prompt,), params = asked, params and params[0]
        known = prompt in [old for old, _ in self.asked]
        self.asked.append((prompt, params))
        if params and params["do_remote_decode"]:
            return Answer(2.0, [0], [{"do_remote_decode": False, "of": prompt, THEIR_HITS: 0}])
        read = params is not None and THEIR_HITS not in params and self.reads
        return Answer(0.5 if read else 1.0 if known else 4.0, [TOKENS - 1 if read or known else 0], [None])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs it; (exit code, results, engines)."""
    monkeypatch.setattr(handover, "Engine", FakeEngine)
    monkeypatch.setattr(handover, "read_rate", lambda piece: piece / 0.25)
    monkeypatch.setattr(FakeEngine, "made", [])

    def run(*options):
        out = tmp_path / "handover.json"
        code = main(["handover", "--shape", "tiny", "--tokens", str(TOKENS), "--json", str(out), *options])
        return code, json.loads(out.read_text()), FakeEngine.made

    return run


def test_all_ways(bench, capsys):
    code, results, engines = bench("--repeats", "2", "--cache", "bf16")
    assert code == 0
    assert results["kv_bytes"] == TOKENS * 4 * 2 * 128 * 2 * 2
    assert results["descriptors"] == {"rows": 32, "pages": 128}
    ways = results["ways"]
    assert ways["rows"] == ways["pages"] == {"seconds": [0.5] * 2, "prefill_seconds": [2.0] * 2}
    assert (ways["computed"], ways["host"]) == ({"seconds": [4.0] * 2}, {"seconds": [1.0] * 2})
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    assert [line.split("│")[2].strip() for line in lines] == ["250.0", "500.0", "500.0", "4000.0", "1000.0"]
    names = [e.settings.get("kv_transfer_config", {}).get("kv_connector") for e in engines]
    assert names == ["XLayerNixlConnector"] * 2 + ["NixlConnector"] * 2 + [None, "XLayerConnector"]
    prefill, decode = engines[:2]
    assert prefill.environment != decode.environment, "each has its own port"
    assert [params["of"] for _, params in decode.asked] == [prompt for prompt, _ in prefill.asked]


def test_a_prompt_is_not_on_the_device_when_it_is_restored(bench):
    _, results, (engine,) = bench("--ways", "host", "--repeats", "1")
    assert engine.settings["kv_cache_memory_bytes"] == 2 * results["kv_bytes"]
    asked = [prompt for prompt, _ in engine.asked]
    for i, prompt in enumerate(asked):
        if prompt in asked[:i]:
            since = asked[asked.index(prompt) + 1 : i]
            assert len({tuple(other) for other in since}) >= 2


def test_a_prompt_that_was_computed_is_no_hand_over(bench, monkeypatch, capsys):
    monkeypatch.setattr(FakeEngine, "reads", False)
    code, results, _ = bench("--ways", "rows", "computed")
    assert code == 1 and list(results["ways"]) == ["computed"]
    assert "expected 512 tokens to be read, got 0" in capsys.readouterr().out


def test_an_engine_that_does_not_start_leaves_the_others(bench, monkeypatch):
    @contextlib.contextmanager
    def fail(*_, **__):
        raise EngineFailed("the engine ended with exit code 1")
        yield

    monkeypatch.setattr(handover, "_pair", fail)
    code, results, _ = bench("--ways", "pages", "computed")
    assert code == 1 and list(results["ways"]) == ["computed"]


def test_without_nixl(bench, monkeypatch, capsys):
    def missing(piece):
        raise ImportError("No module named 'nixl'")

    monkeypatch.setattr(handover, "read_rate", missing)
    assert main(["handover", "--shape", "tiny"]) == 1
    assert "No module named 'nixl'" in capsys.readouterr().out
