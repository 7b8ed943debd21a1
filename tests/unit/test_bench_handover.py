"""`bench handover`: what is asked of which engine, what is not taken for a hand-over, and its table."""

import contextlib
import json
from typing import ClassVar

import pytest

from vllm_xlayer.bench import handover, handover_pair
from vllm_xlayer.bench.__main__ import main
from vllm_xlayer.bench.engines import Answer, EngineFailed
from vllm_xlayer.compat.engine import histogram_sum, shuffle_free_blocks

TOKENS = 512
THEIR_HITS = "remote_prefill_cached_tokens"
"""With which vLLM's decode engine reports what the other one had cached."""


class FakeEngine:
    """Knows what was asked; a prompt that comes with params, or again, is in its cache."""

    made: ClassVar[list["FakeEngine"]] = []
    reads = True

    def __init__(self, model, cache, environment=None, limit=None, **settings):
        assert limit is not None, "an engine that hangs must not hold the others up"
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
        return Answer(0.5 if read else 0.2 if known else 4.0, [TOKENS - 1 if read or known else 0], [None])

    def call(self, function, *args):
        assert self.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        if function is shuffle_free_blocks:
            assert not self.asked
            return None
        assert (function, args) == (histogram_sum, ("vllm:nixl_num_descriptors",))
        return 33.0 * sum(params is not None for _, params in self.asked)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs it; (exit code, results, engines)."""
    for module in (handover, handover_pair):
        monkeypatch.setattr(module, "Engine", FakeEngine)

    def read_rates(nbytes, pieces, devices):
        """A tenth of a second, and a millisecond a piece."""
        return [nbytes / (0.1 + 0.001 * count) for count in pieces]

    monkeypatch.setattr(handover, "read_rates", read_rates)
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
    ways = results["ways"]
    handed_over = {"seconds": [0.5] * 2, "prefill_seconds": [2.0] * 2, "cached_seconds": [0.2] * 2}
    assert ways["rows"] == ways["pages"] == handed_over | {"descriptors": 33.0}
    assert (ways["computed"], ways["host"]) == ({"seconds": [4.0] * 2}, {"seconds": [0.2] * 2})
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.split("│")[2:6]] for line in lines]
    assert cells == [
        ["101.0", "", "", "1.0"],
        ["132.0", "", "", "1.3"],
        ["228.0", "", "", "2.3"],
        ["500.0", "200.0", "33", "3.0"],
        ["500.0", "200.0", "33", "3.0"],
        ["4000.0", "", "", ""],
        ["200.0", "", "", ""],
    ]
    names = [e.settings.get("kv_transfer_config", {}).get("kv_connector") for e in engines]
    assert names == ["XLayerNixlConnector"] * 2 + ["NixlConnector"] * 2 + [None, "XLayerConnector"]
    prefill, decode = engines[:2]
    assert prefill.environment != decode.environment, "each has its own port"
    read = [params["of"] for _, params in decode.asked if params]
    assert read == [prompt for prompt, _ in prefill.asked]


def test_each_engine_has_its_devices_and_a_rank_on_each(bench):
    _, results, engines = bench("--devices", "0,1", "2", "--ways", "rows", "computed", "--repeats", "1")
    assert results["devices"] == ["0,1", "2"]
    assert [engine.environment["CUDA_VISIBLE_DEVICES"] for engine in engines] == ["0,1", "2", "2"]
    assert [engine.settings["tensor_parallel_size"] for engine in engines] == [2, 1, 1]
    pools = [engine.settings["kv_cache_memory_bytes"] for engine in engines]
    assert 2 * pools[0] == pools[1] == 4 * results["kv_bytes"], "of each rank"


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

    monkeypatch.setattr(handover, "start_pair", fail)
    code, results, _ = bench("--ways", "pages", "computed")
    assert code == 1 and list(results["ways"]) == ["computed"]


def test_without_nixl(bench, monkeypatch, capsys):
    def missing(*_):
        raise ImportError("No module named 'nixl'")

    monkeypatch.setattr(handover, "read_rates", missing)
    assert main(["handover", "--shape", "tiny"]) == 1
    assert "No module named 'nixl'" in capsys.readouterr().out
