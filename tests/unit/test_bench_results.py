"""What the documents and the printed tables make of results files of every kind: old, new, with and without
what is optional."""

import json
import types

import pytest
from rich.console import Console

from benchmarks import markdown, markdown_engine, readme
from vllm_xlayer.bench import bounds, engine, engines, load, prefill, traffic
from vllm_xlayer.bench.lengths import ragged
from vllm_xlayer.demo import TASKS
from vllm_xlayer.demo import command as demo

ABOUT = {
    "hardware": "some GPU", "date": "today", "commit": "abc", "runner": "V2",
    "versions": {"vllm": "1", "torch": "2"},
}  # fmt: skip
PREFILL = {
    **ABOUT, "shape": "llama-3.1-8b", "requests": 64, "tokens": 8192, "long": 16384,
    "caches": {
        "bf16": {
            "runner": "V2", "batch_seconds": [13.0, 13.2], "half_seconds": [0.20, 0.9, 0.20],
            "cached_seconds": [0.02],
        },
        "fp8": {
            "runner": "V2", "batch_seconds": [10.0, 10.0], "half_seconds": [0.21], "cached_seconds": [0.02],
        },
        "nvfp4": {
            "runner": "V2", "batch_seconds": [10.2, 10.3], "half_seconds": [0.22], "cached_seconds": [0.03],
        },
    },
}  # fmt: skip
LOAD = {
    **ABOUT, "shape": "llama-3.1-8b", "requests": 352, "tokens": 8192,
    "output": 64, "kv_bytes": 27_000_000_000,
    "caches": {
        "nvfp4": {
            "runner": "V2", "capacity": 2_900_000, "fit": 352, "step_seconds": 0.01,
            "new": {"seconds": 20.0, "cached": 0}, "again": {"seconds": 1.0, "cached": 352 * 4096},
        },
    },
}  # fmt: skip


TRAFFIC = {
    **ABOUT, "shape": "llama-3.1-8b", "layers": 32, "requests": 256, "prompt_tokens": 1_000_000,
    "output_tokens": 90_000, "longest_prompt": 30_000, "longest_output": 1500,
    "caches": {
        "nvfp4": {
            "runner": "V2", "capacity": 2_900_000, "start_seconds": 99.6,
            "new": {"seconds": 40.0, "cached": 0}, "again": {"seconds": 10.0, "cached": 990_000},
        },
    },
}  # fmt: skip


def engine_results(shape="llama-3.1-8b", second=(1, 16384), **steps):
    """Results of `bench engine` with these steps (64 x 8192, then second) and warm starts, in seconds."""
    caches = {
        name: {
            "runner": "V2", "block_size": 16, "start_seconds": 40.0, "start_again_seconds": start,
            "decodes": [
                {"requests": 64, "tokens": 8192, "step_seconds": batch},
                {"requests": second[0], "tokens": second[1], "step_seconds": one},
            ],
        }
        for name, (batch, one, start) in steps.items()
    }  # fmt: skip
    return {**ABOUT, "shape": shape, "same_answers": True, "caches": caches}


@pytest.mark.parametrize(
    ("module", "results", "kept"),
    [
        (prefill, PREFILL, [True, False]),
        (
            engine,
            engine_results(fp8=(0.0165, 0.005, 7.0), nvfp4=(0.0115, 0.005, 10.0)),
            [True, True, True, True],
        ),
        (engine, engine_results(fp8=(0.0160, 0.005, 7.0), nvfp4=(0.0116, 0.0051, 10.1)), [False] * 4),
    ],
    ids=["prefill", "engine, kept", "engine, missed"],
)
def test_bounds(module, results, kept):
    found = module.bounds(results)
    assert [b.kept for b in found] == kept
    assert [str(b).rpartition(": ")[2] for b in found] == ["kept" if k else "missed" for k in kept]


@pytest.mark.parametrize("shape", ["qwen3-next", "gpt-oss-20b"])
def test_other_shapes_may_not_be_slower_than_fp8(shape):
    results = engine_results(shape, (16, 65536), fp8=(0.01, 0.02, 7.0), nvfp4=(0.0099, 0.0201, 8.0))
    assert [bound.kept for bound in engine.bounds(results)] == [True, False, True]
    shown = markdown_engine.engine_section(results)
    assert (
        markdown_engine.SHAPES_SAID[shape] in shown
        and "| decode step 16 x 65,536, ms | 20.00 | 20.10 |" in shown
    )
    assert markdown_engine.ANSWERS_SAID[True] in shown and "another commit" not in shown
    results["caches"]["fp8"] |= {"date": "then", "commit": "other"}
    assert "Of another commit: fp8: then, commit other." in markdown_engine.engine_section(results)


def test_what_is_just_over_a_bound_does_not_read_as_kept():
    assert "1.034" in str(bounds.Bound("ratio", 1.034, 1.03))


def test_bounds_are_for_the_full_size_only():
    assert not prefill.bounds({**PREFILL, "tokens": 256})
    assert not engine.bounds({**engine_results(fp8=(1, 1, 1), nvfp4=(1, 1, 1)), "shape": "tiny"})
    assert not engine.bounds(engine_results(bf16=(1, 1, 1), nvfp4=(1, 1, 1)))


def test_prefill_shows_medians_and_ratios():
    text = markdown_engine.prefill_section(PREFILL)
    assert "| first token of 16,384, half cached, ms | 200.0 | 210.0 | 220.0 |" in text
    assert "- nvfp4 / fp8, prefill 64 x 8,192: 1.025, at most 1.03: kept" in text
    assert "- nvfp4 / bf16, first token of 16,384, half cached: 1.100, at most 1.05: missed" in text
    assert "some GPU; vLLM 1, torch 2, model runner V2, today, commit abc." in text


def test_load_shows_the_memory_and_what_was_kept():
    text = markdown_engine.load_section(LOAD)
    assert "352 x 8,192 tokens (2.88 million)" in text and "27.0 GB" in text
    assert "| - of their tokens still cached | 50 % |" in text
    assert "| - output tokens a second | 22,528 |" in text  # 352 x 64 in a second
    assert "| - output tokens a second | 35,200 |" in text  # 352 in a step of 10 ms


def test_traffic_shows_both_passes():
    text = markdown_engine.traffic_section(TRAFFIC)
    assert "256 requests, 1,000,000 prompt tokens (at most 30,000), 90,000 of answers (at most 1,500)" in text
    assert "| all is computed, s | 40.0 |\n| - of prompt tokens cached | 0 % |" in text
    assert "| - output tokens a second | 2,250 |" in text and "| - output tokens a second | 9,000 |" in text
    assert "| - of prompt tokens cached | 99 % |" in text and "| start, s | 100 |" in text


def test_ragged_lengths_are_the_same_every_time():
    lengths = ragged("prompts", 256, median=3000, most=30000)
    assert lengths == ragged("prompts", 256, median=3000, most=30000) != ragged("x", 256, 3000, 30000)
    assert 2000 < sorted(lengths)[128] < 4000 and max(lengths) == 30000 and min(lengths) < 500
    assert sum(lengths) == 1_281_437  # a change would make old results files another question's


class FakeEngine:
    """Answers at once; the second time all is cached."""

    about = types.MappingProxyType(dict(vocabulary=50, start_seconds=1.0, runner="V2", capacity=7))

    def __init__(self):
        self.asked = []

    def generate(self, asked, tokens):
        self.asked.append(([len(prompt) for prompt in asked], tokens))
        again = len(self.asked) == 3
        return engines.Answer(2.0, [len(prompt) if again else 0 for prompt in asked])


def test_traffic_asks_for_ragged_answers():
    engine = FakeEngine()
    report = traffic.measure(engine, [5, 9, 7], [2, 3, 4])
    assert engine.asked[1:] == [([5, 9, 7], [2, 3, 4])] * 2
    assert report["new"] == {"seconds": 2.0, "cached": 0} and report["again"]["cached"] == 21


def test_vllms_own_nvfp4_is_the_same_cache_by_another_backend():
    ours, stock = engines.CACHES["nvfp4"], engines.CACHES["stock-nvfp4"]
    assert stock == {**ours, "attention_config": {"backend": "FLASHINFER"}}


def test_the_first_screen_names_vllms_own_nvfp4():
    files = readme.TABLES["gain"][0]
    *others, stock = (json.loads((readme.RESULTS / file).read_text()) for file in files)
    steps_in_engines = others[1]
    steps_in_engines["caches"].pop("stock-nvfp4", None)
    stock["shapes"][0]["seconds"]["flashinfer_nvfp4"] = 703e-6
    text = markdown.gain(*others, stock)
    assert "with bf16; FlashInfer's NVFP4, which is vLLM's own, 703 us in an earlier run." in text
    assert "ms, with vLLM's own NVFP4" not in text
    steps = [{"requests": 64, "tokens": 8192, "step_seconds": 0.0271}]
    steps_in_engines["caches"]["stock-nvfp4"] = {"runner": "V2", "decodes": steps}
    text = markdown.gain(*others, stock)
    assert "ms, with vLLM's own NVFP4 27.1 ms (llama-3.1-8b shape)." in text


def test_the_first_screen_says_what_is_of_another_vllm():
    """Each number, with the version it is of; decode's is the present one."""
    files = readme.TABLES["gain"][0]
    results = [json.loads((readme.RESULTS / file).read_text()) for file in files]
    for contents in results:
        contents["versions"]["vllm"] = "0.33.0"
    assert "with vLLM 0" not in markdown.gain(*results)
    lines = [0, 2, 3, 5, 0, 4, 6]  # where decode's is the second, with nothing to say
    for number, contents in list(enumerate(results[:-1]))[1:]:  # the last is another peer's time
        contents["versions"]["vllm"] = "0.26.0"
        said = [" (with vLLM 0.26)." in line for line in markdown.gain(*results).splitlines()]
        assert [i for i, it in enumerate(said) if it] == [lines[number]]
        contents["versions"]["vllm"] = "0.33.1"


@pytest.mark.parametrize(("name", "results"), [("prefill", PREFILL), ("load", LOAD), ("traffic", TRAFFIC)])
def test_a_section_is_there_when_its_results_are(name, results, tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    empty = f"before\n\n<!-- {name}: begin -->\n<!-- {name}: end -->\n\nafter\n"
    assert readme.rendered(empty) == empty
    (tmp_path / f"h200-{name}.json").write_text(json.dumps(results))
    full = readme.rendered(empty)
    assert "\n### " in full and readme.rendered(full) == full
    (tmp_path / f"h200-{name}.json").unlink()
    assert readme.rendered(full) == empty


def test_a_table_that_is_not_optional_needs_its_results(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    with pytest.raises(FileNotFoundError):
        readme.rendered("<!-- write: begin -->\n<!-- write: end -->\n")


def test_flashinfer_has_a_column_where_it_was_measured():
    shape = {
        "name": "64 x 8192", "seconds": {"nvfp4_newest": 1e-4, "fa3_fp8": 2e-4},
        "bytes": {"nvfp4": 1, "nvfp4_newest": 1, "fa3_fp8": 1},
    }  # fmt: skip
    without = {**ABOUT, "copy_rate": 1e12, "shapes": [shape]}
    assert "FlashInfer" not in markdown.decode_table(without)
    for key, value in (("seconds", 7e-4), ("bytes", 1)):
        shape[key]["flashinfer_nvfp4"] = value
    with_it = markdown.decode_table(without)
    assert "FlashInfer NVFP4" in with_it and "| 700 (" in with_it


def demo_results(*names):
    column = {
        **ABOUT, "bytes_per_token": 4096, "tokens_per_256_mib": 65536, "copies": 4, "copy_bytes": 16384,
        "scores": {task: {"exact_match": 1.0, "stderr": 0.0} for task in TASKS}, "ttft": {"cold": 0.1},
        "answers": {"a": "1", "b": "2"},
    }  # fmt: skip
    return {name: dict(column) for name in names}


@pytest.mark.parametrize("names", [("stock", "rows", "nvfp4"), ("stock", "fp8", "rows", "nvfp4")])
def test_the_demo_has_fp8_beside_it_where_it_ran(names):
    results = demo_results(*names)
    results[names[1]]["answers"] = {"a": "1", "b": "x"}
    demo.add_identical(results)
    assert results[names[1]]["identical"] == [1, 2]
    assert ("stock, fp8" in markdown.demo_table(results)) == ("fp8" in names)
    console = Console(width=demo.WIDTH)
    with console.capture() as printed:
        console.print(demo.table(results))
    assert printed.get().count("layer by layer") == names.count("stock") + names.count("fp8")
    assert "…" not in printed.get()


def test_the_demo_leaves_fp8_out_without_a_gpu(monkeypatch, capsys):
    ran = []

    def engine_of(setup, *_):
        ran.append(setup.name)
        return demo_results(setup.name)[setup.name]

    monkeypatch.setattr(demo, "_run_engine", engine_of)
    monkeypatch.setattr(demo, "footer", lambda results: "")
    monkeypatch.setattr(demo.torch.cuda, "is_available", lambda: False)
    args = type("Arguments", (), {"limit": 1, "json": None})
    assert demo.run(args) == 0
    assert ran == ["stock", "rows", "nvfp4"] and "left out" in capsys.readouterr().out


def test_the_demo_goes_on_where_fp8_does_not_run(monkeypatch, capsys):
    monkeypatch.setattr(
        demo, "_run_engine", lambda setup, *_: demo_results("x")["x"] if setup.name != "fp8" else None
    )
    monkeypatch.setattr(demo, "footer", lambda results: "")
    monkeypatch.setattr(demo.torch.cuda, "is_available", lambda: True)
    args = type("Arguments", (), {"limit": 1, "json": None})
    assert demo.run(args) == 0 and "left out" in capsys.readouterr().out


def test_rows_of_load_and_engine_have_a_cell_for_each_cache():
    for lines in (
        load.rows(LOAD),
        traffic.rows(TRAFFIC),
        engine.rows(engine_results(fp8=(1, 1, 1), nvfp4=(1, 1, 1))),
    ):
        assert len({len(cells) for _, cells in lines}) == 1


class Turns(engines.Engine):
    """Says when first tokens came, in place of a process."""

    def __init__(self, *first_at):
        self.first_at, self.asked = list(first_at), []
        self.about = dict(vocabulary=50, step_tokens=300)

    def generate(self, asked, tokens, *_):
        self.asked.append([len(prompt) for prompt in asked])
        return engines.Answer(1.0, [], first_at=self.first_at.pop(0) if len(self.asked) > 1 else [])


def test_a_turn_is_one_step_of_all_that_go_on():
    """Timed from the end of the step before: of a prompt that no other request is in a step with."""
    fresh = [0.25, 0.5, 0.75, 1.0]
    turns = Turns([*fresh, 1.25, 1.25], [*fresh, 1.25, 1.5], [*fresh, 1.5, 1.5])
    turn = engine.measure_turn(turns, "llama-3.1-8b", 32)
    assert turn == {"requests": 2, "tokens": 256, "new": 100, "step_seconds": 0.375}
    assert turns.asked == [[256, 256], *[[300] * 4 + [356, 356]] * 3]


@pytest.mark.parametrize("ends", [(1.25, 1.5), (1.0, 1.0), (0.75, 0.75)])
def test_a_turn_of_several_steps_has_no_time(ends):
    turns = Turns(*[[0.25, 0.5, 0.75, 1.0, *ends]] * 3)
    assert engine.measure_turn(turns, "llama-3.1-8b", 32)["step_seconds"] is None
    results = engine_results(fp8=(1, 1, 1), nvfp4=(1, 1, 1))
    turn = {"requests": 64, "tokens": 8192, "new": 100}
    results["caches"]["nvfp4"]["turn"] = {**turn, "step_seconds": None}
    assert not any("new tokens" in label for label, _ in engine.rows(results))
    results["caches"]["fp8"]["turn"] = {**turn, "step_seconds": 0.2}
    assert ("step of 64 x 100 new tokens after 8,192, ms", ["200.00", "-"]) in engine.rows(results)
    assert not any("after" in bound.what for bound in engine.bounds(results))
    results["caches"]["nvfp4"]["turn"]["step_seconds"] = 0.205
    (bound,) = [bound for bound in engine.bounds(results) if "after" in bound.what]
    assert bound.kept and bound.limit == 1.03 and round(bound.value, 3) == 1.025


def test_a_step_is_between_tokens_of_the_request_that_began_last():
    """Those before it saw prompts computed between their tokens."""

    def output(first: float, last: float, tokens: int):
        metrics = types.SimpleNamespace(first_token_ts=first, last_token_ts=last)
        return types.SimpleNamespace(metrics=metrics, outputs=[types.SimpleNamespace(token_ids=[0] * tokens)])

    early, late = output(10.0, 13.0, 5), output(12.0, 14.0, 5)
    assert engines._token_seconds([early, late]) == engines._token_seconds([late, early]) == 0.5
    assert engines._token_seconds([output(1.0, 1.0, 1)]) == 0.0
