"""What is shown of `bench copy`, `benchmarks.pacing` and `bench offload`, from made-up results."""

import json
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from benchmarks import markdown_tier, pacing, plot
from vllm_xlayer.bench import copy, first_token, offload, offload_peers, offload_tables, tier_worker
from vllm_xlayer.bench.copy_peers import TITLES
from vllm_xlayer.connector.copy.choice import Way
from vllm_xlayer.provenance import provenance


@pytest.fixture
def copies() -> dict:
    rates = {"ours": 50e9, "engine": 5e9, "kernel": 50e9, "vllm_dma": 5e9, "vllm_kernel": 40e9}
    some = {name: rates[name] for name in ("ours", "engine")}
    done = {"ours": 30e9, "engine": 2e9, "kernel": 30e9, "vllm_dma": 3e9, "vllm_kernel": 20e9}
    device = {"ours": 51e9, "engine": 45e9, "kernel": 51e9, "vllm_dma": 45e9, "vllm_kernel": 40e9}
    small = {"piece_bytes": 4608, "pieces": 16384, "stream": rates, "done": done, "device": device}
    large = {"piece_bytes": 2097152, "pieces": 64, "stream": some, "done": some, "device": some}
    lines = [{**small, "submit": {}, "failed": {}}, {**large, "submit": {}, "failed": {"kernel": "why"}}]
    return {
        **provenance(),
        "link": dict.fromkeys(copy.WAYS, 55e9),
        "ways": dict.fromkeys(copy.WAYS, lines),
    }


def test_copies_in_a_table(copies):
    console = Console(width=100, record=True)
    for way in copy.WAYS:
        console.print(copy._table(way, copies["ways"][way], copies["link"][way]))
    text = console.export_text()
    assert all(number in text for number in ("0.91", "1.25x", "1.50x", "1.13x"))
    assert "…" not in text and max(map(len, text.splitlines())) <= 100
    assert text.count("2,097,152") == text.count("alone") == len(copy.WAYS)
    made = markdown_tier.copy_section(copies)
    assert "| 4,608 | 50.0 | 5.0 | 50.0 | 5.0 | 40.0 | 0.91 | 1.25x | 1.50x | 1.13x |" in made
    assert "| 2,097,152 | 50.0 | 5.0 | - | - | - | 0.91 | - | - | - |" in made
    assert all(title in made for title in TITLES.values())


def test_bounds_of_copies(copies):
    """Those of the pieces that were measured, each with what it was asked for."""
    found = [str(bound) for bound in copy.bounds(copies)]
    assert found == [
        "host to device, 589,824 bytes and more, of the link: 0.909, at least 0.95: missed",
        "host to device, 4,608 bytes, ours / vLLM: 1.250, at least 1.2: kept",
        "device to host, 589,824 bytes and more, of the link: 0.909, at least 0.95: missed",
        "device to host, 4,608 bytes, ours / vLLM: 1.250, at least 1: kept",
        "inside the device, on the device alone, of its own copy: 0.909, at least 0.85: kept",
    ]
    assert all(f"- {bound}" in markdown_tier.copy_section(copies) for bound in found)


def test_each_rate_is_of_its_own_timing(monkeypatch):
    """8 pieces of 1,000 bytes: 4 ms in a stream, 2 ms a call, 1 ms on the device."""
    ids = torch.arange(8)
    buffers = SimpleNamespace(pick=lambda way, size: (None, None, ids, ids))
    monkeypatch.setattr(copy, "copies_right", lambda *_: True)
    for name, taken in (("streamed", 4e-3), ("called", 2e-3), ("queued", (1e-3, 5e-4))):
        monkeypatch.setattr(copy, f"{name}_seconds", lambda *_, taken=taken: taken)
    found = copy.measure(buffers, "H2D", 1000, {"ours": lambda *_: None}, 1)
    assert {rate: found[rate]["ours"] for rate in copy.MEASURES} == {
        "stream": 2e6,
        "done": 4e6,
        "device": 8e6,
    }
    assert found["submit"] == {"ours": 5e-4}


def test_copies_in_a_picture(copies, tmp_path):
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    results, png = tmp_path / "copy.json", tmp_path / "copy.png"
    results.write_text(json.dumps(copies))
    plot.copy_plot(results, png)
    assert image.open(png).text[plot.SOURCE] == plot.digest(results)


@pytest.fixture
def offloads() -> dict:
    def decode(alone, **beside):
        rows = {"alone": (alone, 0.0), **beside}
        return {k: {"seconds": [s, s, 9.0], "copied_per_second": [c, c, 0.0]} for k, (s, c) in rows.items()}

    restore = {"cold": [0.5], "cached": [0.020, 0.040, 0.021], "restored": [0.031, 0.052, 0.034],
               "rows_restored": 3069, "links": [54e9, 55e9, 38e9],
               "spans": {"cached": [{"launch": 4e-3, "token": 16e-3}],
                         "restored": [{"asked": 3e-3, "launch": 7.4e-3, "token": 21e-3}]}}  # fmt: skip
    ours = {"runner": "V2", "row_bytes": 589824, "link": 55e9, "restore": restore,
            "decode": decode(
                0.0101, stores=(0.0102, 50e9), loads=(0.0104, 52e9), large=(0.0105, 55e9))}  # fmt: skip
    ours["decode"]["rows_stored"] = 1728
    asked = dict(dtype="nvfp4", prompt=16384, repeats=3, requests=64, tokens=8192, steps=32, rounds=3)
    engines = {"with": ours, "without": {"runner": "V2", "decode": decode(0.0100)}}
    return {**provenance(), "shape": "llama-3.1-8b", **asked, "engines": engines}


def test_offload_in_tables(offloads):
    """Medians, also of what each prompt waits longer; the floor is 1,023 rows x 589,824 bytes at 55 GB/s."""
    engines = offloads["engines"]
    assert first_token.added(engines["with"]["restore"]) == pytest.approx(0.012)
    assert first_token.floor(engines["with"]) == pytest.approx(1023 * 589824 / 55e9)
    console = Console(width=100, record=True)
    console.print(first_token.restore_table(engines["with"]))
    console.print(first_token.span_table(engines["with"]["restore"]["spans"]))
    console.print(offload_tables.decode_table(engines, "64 x 8,192"))
    text = console.export_text()
    assert "…" not in text and max(map(len, text.splitlines())) <= 100
    assert "38.0 to 55.0" in text and text.count("7.4") == 1
    made = markdown_tier.offload_section(offloads)
    assert "of 3 prompts just short of 16,384 tokens (1,023 rows, 603 MB), restored 1 times, median" in made
    assert "Decoding stored 1,728 rows" in made
    assert "| until its rows are asked for |  | 3.0 |\n" in made
    assert "| until the model's step begins | 4.0 | 7.4 |\n" in made
    for found in (text, made):
        assert "12.0" in found and "11.0" in found
        assert "+1.0 %" in found and "+3.0 %" in found and "52.0" in found and "+4.0 %" in found


def test_what_a_first_token_waits_for():
    """All of the time, and nothing of the request before it."""
    events = [
        ("launch", 0.5),
        ("asked", 1.5),
        ("told", 2.0),
        ("launch", 3.0),
        ("launch", 4.0),
        ("asked", 9.0),
    ]
    assert first_token.spans(1.0, events, 8.0) == {"asked": 0.5, "told": 0.5, "launch": 2.0, "token": 4.0}
    assert set(first_token.spans(1.0, events, 8.0)) <= set(first_token.SPANS)


def test_bounds_of_offload(offloads):
    """Only of what they were asked for: 12 ms; 1 % and 3 % of a step."""
    assert offload_tables.bounds({**offloads, "tokens": 4096}) == []
    found = [str(bound) for bound in offload_tables.bounds(offloads)]
    assert found == [
        "host tier - device: 12.000 ms, at most 12.5 ms: kept",
        "decode step with the connector, storing what it decodes: 1.000 %, at most 2 %: kept",
        "decode step beside rows from the host: 2.970 %, at most 3 %: kept",
    ]
    assert all(f"- {bound}" in markdown_tier.offload_section(offloads) for bound in found)
    assert [str(bound) for bound in offload_tables.bounds({**offloads, "prompt": 8192})] == found[1:]


def test_offload_of_a_shape_with_states(offloads):
    """Its steps may be slower by 5 %, and its table has a heading of its own."""
    results = {**offloads, "shape": "qwen3-next", "prompt": 32768}
    (found,) = map(str, offload_tables.bounds(results))
    assert found == "decode step with the connector, storing what it decodes: 1.000 %, at most 5 %: kept"
    made = markdown_tier.offload_section(results)
    assert made.startswith("### On Qwen3-Next's shape: ") and f"- {found}" not in made
    assert "what was said chose the experts that a step reads, and steps without a connector took" in made
    assert "`vllm-xlayer bench offload --shape qwen3-next --prompt 32768 --steps 32`" in made
    results["engines"]["with"]["decode"]["same_answers"] = True
    assert "not shown" in markdown_tier.offload_section(results)  # without it, answers were the model's
    results["engines"]["without"]["decode"]["same_answers"] = True
    made = markdown_tier.offload_section(results)
    assert f"- {found}" in made and "not shown" not in made and "every answer is one token" in made


def test_engines_of_another_commit_are_named(offloads):
    """Those that a run was not asked for."""
    offloads["engines"]["without"] |= {"date": "2026-01-01 00:00 UTC", "commit": "abc"}
    offloads["engines"]["with"] |= {"date": offloads["date"], "commit": offloads["commit"]}
    made = markdown_tier.offload_section(offloads)
    assert "Of another commit: without: 2026-01-01 00:00 UTC, commit abc." in made


def test_rows_that_the_host_tier_must_hold():
    """15 blocks of 256 - 7 tokens, and two more in each of five runs of 24 tokens; 7 of a restored prompt."""
    job = dict(requests=2, tokens=256, steps=16, rounds=1, repeats=1, prompt=128)
    assert offload.rows_needed(job, 16) == 2 * (15 + 5 * 2) + 7


@pytest.mark.parametrize("block, steps, ends", [(16, 32, 128), (784, 32, 2), (2816, 128, 2)])
def test_blocks_end_while_steps_are_timed(block, steps, ends):
    """As many as in the long run: a block's tokens are decoded, of all requests together, for each."""
    job = dict(tokens=8192, steps=steps, requests=64)
    lengths = offload.batch_tokens(job, block)
    assert abs(sum(lengths) / 64 - 8192) <= block / 64 + offload.LAST
    for lead in (0, 17):  # of a request before the last
        begin = steps // 4 + lead
        ended = sum((length + begin + steps) // block - (length + begin) // block for length in lengths)
        assert ends <= ended <= ends + 1


def test_too_few_steps_for_a_large_block():
    with pytest.raises(ValueError, match=r"--steps: expected at least 88, .* of 2816 tokens .* got 32"):
        offload.batch_tokens(dict(tokens=8192, steps=32, requests=64), 2816)


def test_bytes_copied_until_a_moment():
    samples = [(1.0, 0), (2.0, 100), (3.0, 300)]
    expected = {0.5: 0, 1.0: 0, 2.0: 100, 2.9: 100, 9.0: 300}
    assert {when: offload.copied_until(samples, when) for when in expected} == expected


def test_pacing_in_tables():
    """603 MB in 11.2 ms, and the batch size that transfers use is marked, where it is paced."""
    waits = {kind: {"mean": 1.5e-3, "most": 2e-3, "tries": 3} for kind in list(pacing.SMALL)[:2]}
    line = {"submit_seconds": 1.3e-3, "copy_seconds": 11.2e-3, "waits": waits}
    lines = [{"batch_bytes": mib << 20, "how": how, **line} for mib in (8, 32) for how in pacing.HOW]
    results = dict(
        row_bytes=589824, rows=1023, link={"H2D": 55e9}, batch_bytes={"H2D": 32 << 20}, ways={"H2D": lines}
    )
    console = Console(width=100, record=True)
    console.print(pacing._table(Way.H2D, results))
    text = console.export_text()
    assert "…" not in text and "53.9" in text and text.count(" * ") == 1 and text.count(" - ") == 4
    assert next(line for line in text.splitlines() if " * " in line).split()[1:5] == ["32", "*", "│", "paced"]
    made = markdown_tier.pacing_section({**results, "hardware": "x", "versions": {"vllm": "1", "torch": "2"},
                                         "date": "today", "commit": "c"})  # fmt: skip
    bold = [line for line in made.splitlines() if line.startswith("| **")]
    assert bold == ["| **32, paced** | 1.3 | 53.9 | 1.50 | 1.50 | - |"]


def test_stock_connectors_are_shown_where_they_ran(offloads):
    """In the order of their titles; one that failed is left out."""
    assert "OffloadingConnector" not in markdown_tier.offload_section(offloads)
    stock = {"cold": [0.5], "cached": [0.02, 0.02], "restored": [0.10, 0.14]}
    offloads["engines"]["stock-rows"] = {"runner": "V2", "restore": stock}
    made = markdown_tier.offload_section(offloads)
    assert "| XLayerConnector | 500.0 | 21.0 | 34.0 | 12.0 |" in made
    assert "| OffloadingConnector, in rows | 500.0 | 20.0 | 120.0 | 100.0 |" in made
    assert "| OffloadingConnector |" not in made
    console = Console(width=100, record=True)
    console.print(offload_peers.peer_table(offloads["engines"]))
    assert "120.0" in console.export_text()


class FakeLLM:
    """A prompt is computed, restored or on the device; a cache is emptied at the second try."""

    class llm_engine:
        model_config = SimpleNamespace(get_vocab_size=lambda: 1000)
        vllm_config = SimpleNamespace(cache_config=SimpleNamespace(block_size=16))

    def __init__(self, stores):
        self.stores, self.host, self.device, self.refusals = stores, set(), set(), 0

    def generate(self, prompts, sampling, use_tqdm):
        prompt = tuple(prompts[0]["prompt_token_ids"])
        cached = len(prompt) // 16 * 16 if prompt in self.host | self.device else 0
        self.device.add(prompt)
        if self.stores:
            self.host.add(prompt)
        return [SimpleNamespace(num_cached_tokens=cached)]

    def reset_prefix_cache(self):
        self.refusals += 1
        if self.refusals % 2:
            return False
        self.device.clear()
        return True


def test_a_stock_connectors_restored_prompts_were_restored(monkeypatch):
    monkeypatch.setattr(offload_peers, "PAUSE_SECONDS", 0.0)
    found = offload_peers.restores(FakeLLM(stores=True), 41, 2)
    assert {kind: len(times) for kind, times in found.items()} == {
        "cold": 2, "restored": 2 * first_token.TURNS, "cached": 2 * first_token.TURNS,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match="restored: expected 32 to 41 tokens to be there, got 0"):
        offload_peers.restores(FakeLLM(stores=False), 41, 2)


@pytest.mark.parametrize("load", [True, False], ids=["loads", "stores"])
def test_copies_are_submitted_when_the_connectors_are(load, monkeypatch):
    """Stores before the launch, loads after it and told before it that they come."""
    seen = []
    result = SimpleNamespace(success=True, transfer_size=100)
    direction = SimpleNamespace(
        submit=lambda job, src, dst: seen.append("submit"), before_launch=lambda: seen.append("announce"),
        advance=lambda: [seen.append("finished"), result][1:], drain=lambda: seen.append("drain"),
    )  # fmt: skip
    monkeypatch.setattr("vllm_xlayer.connector.copy.directions.make_direction", lambda *_: direction)

    class Connector:
        pool = torch.empty(0)

        def bind_connector_metadata(self, metadata):
            seen.append("bind")

        def start_load_kv(self, context):
            seen.append("start")

        def get_finished(self, requests):
            seen.append("asked")
            return set(), set()

    connector, worker = Connector(), tier_worker.TierWorker()
    monkeypatch.setattr(tier_worker, "connector_of_worker", lambda: connector)
    tier_worker.row_copies.cache_clear()

    def step():
        connector.bind_connector_metadata(None)
        connector.start_load_kv(None)
        connector.get_finished(set())

    worker.begin_copies(load, 1 << 20)
    step()
    before, after = (["announce"], ["submit"]) if load else (["submit"], [])
    assert seen == [*before, "bind", *after, "start", "finished", "asked"]
    assert [copied for _, copied in worker.end_copies()] == [100]
    seen.clear()
    step()
    assert seen == ["bind", "start", "asked"]
    tier_worker.row_copies.cache_clear()
