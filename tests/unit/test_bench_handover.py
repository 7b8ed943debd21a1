"""`bench handover`: what is asked of which engine, what is not taken for a hand-over, and its table."""

import json
import time
from typing import ClassVar

import pytest

from vllm_xlayer.bench import handover, handover_pair, handover_ways
from vllm_xlayer.bench.__main__ import main
from vllm_xlayer.bench.engines import Answer, Engine, EngineFailed
from vllm_xlayer.bench.handover_worker import Geometry, WorkerLink
from vllm_xlayer.compat.engine import come_to_rest, empty_device_cache, histogram_sum, shuffle_free_blocks

TOKENS = 512
THEIR_HITS = "remote_prefill_cached_tokens"
"""With which vLLM's decode engine reports what the other one had cached."""


class FakeEngine:
    """Knows what was asked; a prompt that comes with params, or again, is in its cache."""

    made: ClassVar[list["FakeEngine"]] = []
    running: ClassVar[list["FakeEngine"]] = []
    reads = True

    def __init__(self, model, cache, environment=None, limit=None, wait=True, **settings):
        assert limit is not None, "an engine that hangs must not hold the others up"
        assert not wait, "engines start at the same time"
        self.settings, self.environment, self.asked = settings, environment, []
        self.about, self.orders, self.known, self.due = {}, [], [], None
        self.tier, self.pinned, self.ended = [], False, False
        self.made.append(self)
        self.beside = len(self.running)

    def wait(self):
        self.about = {"vocabulary": 512}

    def generate(self, asked, tokens, params=None):
        assert time.monotonic() < self.due < time.monotonic() + 60
        (prompt,), params = asked, params and params[0]
        known = prompt in self.known
        restored = not known and "cpu_bytes_to_use" in str(self.settings) and prompt in self.tier
        self.asked.append((prompt, params))
        self.known.append(prompt)
        if self.pinned:
            self.tier.append(prompt)
        if params and params["do_remote_decode"]:
            return Answer(2.0, [0], [{"do_remote_decode": False, "of": prompt, THEIR_HITS: 0}])
        read = params is not None and THEIR_HITS not in params and not known and self.reads
        seconds = 0.5 if read else 0.3 if restored else 0.2 if known else 4.0
        return Answer(seconds, [len(prompt) - 1 if read or known or restored else 0], [None])

    def call(self, function, *args):
        assert self.environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        if function is shuffle_free_blocks:
            assert not self.asked
            return self.orders.append(args)
        if function is come_to_rest:
            self.pinned = True
            return None
        if function is empty_device_cache:
            return self.known.clear()
        assert (function, args) == (histogram_sum, ("vllm:nixl_num_descriptors",))
        return 33.0 * sum(params is not None for _, params in self.asked)

    def end(self):
        self.ended = True

    def __enter__(self):
        self.running.append(self)
        return self

    def __exit__(self, kind, *_):
        assert self.ended or kind, "not waited for"
        self.running.remove(self)


class FakeLink:
    """A tenth of a second, and a millisecond a piece."""

    missing: ClassVar[Exception | None] = None
    open: ClassVar[int] = 0

    def __init__(self, nbytes, devices):
        self.nbytes = nbytes
        FakeLink.open += 1

    def wait(self):
        if self.missing:
            raise self.missing

    def rate(self, nbytes, pieces):
        assert nbytes <= self.nbytes
        return nbytes / (0.1 + 0.001 * pieces)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        FakeLink.open = 0


class FakeWorkerLink(FakeLink):
    """A millisecond more a row, unless they are neighbours."""

    def __init__(self, geometry, devices):
        super().__init__(0, devices)
        self.geometry = geometry

    def rows_rate(self, rows, staging_bytes, neighbours):
        assert rows <= self.geometry.blocks and staging_bytes <= self.geometry.staging_bytes
        return rows * self.geometry.row_bytes / (0.1 + (0.001 if neighbours else 0.002) * rows)


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs it; (exit code, results, engines)."""
    for module in (handover_ways, handover_pair):
        monkeypatch.setattr(module, "Engine", FakeEngine)
    monkeypatch.setattr(handover, "Link", FakeLink)
    monkeypatch.setattr(handover, "WorkerLink", FakeWorkerLink)
    monkeypatch.setattr(FakeEngine, "made", [])
    monkeypatch.setattr(FakeLink, "missing", None)

    def run(*options, tokens=(TOKENS,)):
        out, numbers = tmp_path / "handover.json", [str(n) for n in tokens]
        code = main(["handover", "--shape", "tiny", "--tokens", *numbers, "--json", str(out), *options])
        assert not FakeEngine.running and not FakeLink.open
        return code, json.loads(out.read_text()), FakeEngine.made

    return run


def test_all_ways(bench, capsys):
    ways = ["rows", "pages", "computed", "host"]
    code, results, engines = bench("--repeats", "2", "--cache", "bf16", "--ways", *ways)
    assert code == 0 and results["problems"] == {}
    (length,) = results["lengths"]
    assert length["kv_bytes"] == TOKENS * 4 * 2 * 128 * 2 * 2
    ways = length["ways"]
    handed_over = {"seconds": [0.5] * 2, "prefill_seconds": 2.0, "cached_seconds": [0.2] * 2}
    assert ways["rows"] == ways["pages"] == handed_over | {"descriptors": 33.0}
    assert (ways["computed"], ways["host"]) == ({"seconds": [4.0] * 2}, {"seconds": [0.3] * 2})
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line.split("│")[2:6]] for line in lines]
    assert cells == [
        ["101.0", "", "", "1.00"],
        ["132.0", "", "", "1.31"],
        ["228.0", "", "", "2.26"],
        ["132.0", "", "", "1.31"],
        ["164.0", "", "", "1.62"],
        ["500.0", "200.0", "33", "2.97"],
        ["500.0", "200.0", "33", "2.97"],
        ["4000.0", "", "", ""],
        ["300.0", "", "", ""],
    ]
    names = [e.settings.get("kv_transfer_config", {}).get("kv_connector") for e in engines]
    assert names == ["XLayerNixlConnector"] * 2 + ["NixlConnector"] * 2 + [None, "XLayerConnector"]
    prefill, decode = engines[:2]
    assert prefill.environment != decode.environment, "each has its own port"
    assert prefill.orders != decode.orders, "blocks side by side there are not side by side here"
    read = [params["of"] for _, params in decode.asked if params]
    assert read == [prompt for prompt, _ in prefill.asked]


def test_the_ring_of_each_way(bench):
    _, _, engines = bench("--ways", "rows", "rows-large", "pages", "--repeats", "1")
    rings = [engine.settings["kv_transfer_config"]["kv_connector_extra_config"] for engine in engines]
    assert rings == [{}] * 2 + [{"staging_bytes": 1 << 30}] * 2 + [{}] * 2


def test_one_start_for_all_lengths(bench):
    _, results, engines = bench("--ways", "rows", "--repeats", "1", tokens=(2 * TOKENS, TOKENS))
    assert len(engines) == 2
    assert [length["tokens"] for length in results["lengths"]] == [TOKENS, 2 * TOKENS]
    assert all(length["ways"]["rows"]["seconds"] == [0.5] for length in results["lengths"])
    decode = engines[1]
    lengths = [len(prompt) for prompt, params in decode.asked if params]
    assert lengths == [TOKENS, TOKENS, 2 * TOKENS], "the first one of all is not counted"
    assert decode.settings["max_model_len"] > 2 * TOKENS
    starts = {tuple(prompt[:16]) for prompt, params in decode.asked if params}
    assert len(starts) == 3, "nothing of a prompt is another's, which the prefill engine may still have"
    of_a_token = results["lengths"][0]["kv_bytes"] / TOKENS
    assert decode.settings["kv_cache_memory_bytes"] >= sum(lengths) * of_a_token


@pytest.mark.parametrize("devices, beside", [(["0", "1"], 2), (["0,1", "1"], 0), (None, 0)])
def test_all_start_at_once_where_no_gpu_is_both_engines(bench, devices, beside):
    where = ["--devices", *devices] if devices else []
    _, _, engines = bench("--ways", "rows", "pages", "--repeats", "1", *where)
    assert engines[2].beside == beside


def test_each_engine_has_its_devices_and_a_rank_on_each(bench):
    _, results, engines = bench("--devices", "0,1", "2", "--ways", "rows", "computed", "--repeats", "1")
    assert results["devices"] == ["0,1", "2"]
    assert [engine.environment["CUDA_VISIBLE_DEVICES"] for engine in engines] == ["0,1", "2", "2"]
    assert [engine.settings["tensor_parallel_size"] for engine in engines] == [2, 1, 1]
    pools = [engine.settings["kv_cache_memory_bytes"] for engine in engines]
    assert pools[0] == pools[1] // 2 and pools[1] > 2 * results["lengths"][0]["kv_bytes"], "of each rank"


def test_a_prompt_that_was_computed_is_no_hand_over(bench, monkeypatch):
    monkeypatch.setattr(FakeEngine, "reads", False)
    code, results, _ = bench("--ways", "rows", "computed")
    assert code == 1 and list(results["lengths"][0]["ways"]) == ["computed"]
    assert results["problems"] == {"rows": "expected 512 tokens to be read, got 0: the others were computed"}


def test_what_is_measured_before_an_engine_fails_is_kept(bench, monkeypatch):
    def fail(self, asked, *rest):
        if len(asked[0]) == 2 * TOKENS:
            raise EngineFailed("the engine ended with exit code 1")
        return generate(self, asked, *rest)

    generate = FakeEngine.generate
    monkeypatch.setattr(FakeEngine, "generate", fail)
    code, results, _ = bench("--ways", "rows", "pages", tokens=(TOKENS, 2 * TOKENS))
    assert code == 1 and list(results["problems"]) == ["rows", "pages"]
    assert [list(length["ways"]) for length in results["lengths"]] == [["rows", "pages"], []]


def test_an_engine_that_does_not_start_leaves_the_others(bench, monkeypatch):
    def fail(self):
        if "NixlConnector" in str(self.settings):
            raise EngineFailed("the engine ended with exit code 1")
        wait(self)

    wait = FakeEngine.wait
    monkeypatch.setattr(FakeEngine, "wait", fail)
    code, results, _ = bench("--ways", "pages", "computed", "--devices", "0", "1")
    assert code == 1 and list(results["lengths"][0]["ways"]) == ["computed"]


def test_a_link_that_fails_leaves_the_ways(bench, monkeypatch, capsys):
    monkeypatch.setattr(FakeLink, "missing", RuntimeError("NIXL_ERR_BACKEND"))
    code, results, _ = bench("--ways", "rows")
    both = ("NIXL alone", "a worker alone")
    assert code == 1 and results["problems"] == dict.fromkeys(both, "NIXL_ERR_BACKEND")
    assert list(results["lengths"][0]["ways"]) == ["rows"] and "500.0" in capsys.readouterr().out


def test_without_nixl(bench, monkeypatch, capsys):
    monkeypatch.setattr(FakeLink, "missing", ImportError("No module named 'nixl'"))
    assert bench()[0] == 1
    assert "No module named 'nixl'" in capsys.readouterr().out


def test_an_engine_is_given_up_when_its_answers_are_due(monkeypatch):
    """Whatever the limit of each answer."""

    class Silent:
        sentinel, pid, exitcode = None, None, None

        def kill(self):
            pass

        join = kill

    waited = []
    monkeypatch.setattr("vllm_xlayer.bench.engines.wait", lambda what, seconds: waited.append(seconds))
    engine = object.__new__(Engine)
    engine._pipe, engine._process, engine._pid, engine._limit = None, Silent(), None, 100.0
    engine.due = None
    with pytest.raises(EngineFailed, match="within 100 s"):
        engine._receive()
    engine.due = time.monotonic() + 7
    with pytest.raises(EngineFailed, match="within 7 s"):
        engine._receive()
    assert waited[0] == 100 and 6 < waited[1] <= 7


def test_a_worker_reads_sealed_rows_without_an_engine():
    """Two real processes: what they check themselves, rows and that a wrong seal is found, they raise."""
    pytest.importorskip("nixl", reason="needs nixl: pip install vllm-xlayer[nixl]")
    seals = 2 * 100 * 16
    with WorkerLink(Geometry(1024, 100, 4 * (12 * 1024 + seals))) as link:
        link.wait()
        assert link.rows_rate(100, 4 * (12 * 1024 + seals), neighbours=False) > 0
        assert link.rows_rate(100, 4 * (12 * 1024 + seals), neighbours=True) > 0
        assert link.rows_rate(7, 4 * (2 * 1024 + seals), neighbours=False) > 0
        with pytest.raises(RuntimeError, match="staging_bytes: expected at least"):
            link.rows_rate(7, 4 * seals, neighbours=False)
