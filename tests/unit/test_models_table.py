"""The table of model families: what hangs or dies becomes a row, and each sentence is said once."""

import contextlib
import json
import os
import time
import types
from pathlib import Path

import pytest

from benchmarks import cases, models, serving
from benchmarks.markdown_models import (
    counted,
    gpu_table,
    hybrids_soak_section,
    latents_table,
    soak_section,
    table,
)
from benchmarks.model_configs import configs
from vllm_xlayer import provenance

LLAMA = models.Family({"architectures": ["LlamaForCausalLM"]}, "n-gram drafts")
QUESTIONS = ("first", "second")
ABOUT = {"versions": {"vllm": "1", "torch": "2"}, "hardware": "a CPU", "date": "today", "commit": "abc"}


def hang(case, answers):
    answers.send(("first", "works"))
    time.sleep(600)


def die(case, answers):
    answers.send(("first", "works"))
    os._exit(9)


def answer_all(case, answers):
    print(f"said by {case}")
    for question in QUESTIONS:
        answers.send((question, f"{case}, {question}"))


def fail_on_the_device(case, answers):
    print("/src/native/Indexing.cu:15: lookup: block: [0,0,0], thread: [1,0,0] Assertion `i < n` failed.")
    answers.send(("first", "does not run: CUDA error: device-side assert triggered"))
    answers.send(("second", "works"))


def misbehave(case, answers):
    {"hang": hang, "die": die}.get(case, answer_all)(case, answers)


@pytest.mark.parametrize(
    ("run", "missing"), [(hang, "not known after 5 s"), (die, "the process died (exit code 9)")]
)
def test_a_case_that_does_not_answer_says_so(run, missing):
    begin = time.monotonic()
    assert cases.try_case("", run, QUESTIONS, 5) == {"first": "works", "second": missing}
    assert time.monotonic() - begin < 500


def test_several_at_once_and_the_others_go_on(tmp_path):
    found, begin = {}, time.monotonic()
    named = {name: name for name in ("hang", "die", "a", "b")}
    cases.try_all(
        named, misbehave, QUESTIONS, found.__setitem__, seconds=10, at_once=4, logs=tmp_path / "logs"
    )
    assert time.monotonic() - begin < 500
    assert list(found)[-1] == "hang" and found["hang"]["second"] == "not known after 10 s"
    assert found["die"]["second"] == "the process died (exit code 9)"
    assert found["a"] == {"first": "a, first", "second": "a, second"}
    assert (tmp_path / "logs" / "b.log").read_text() == "said by b\n"


def test_a_failed_assertion_on_the_device_is_told(tmp_path):
    found = cases.try_case("", fail_on_the_device, QUESTIONS, 20, log=tmp_path / "log")
    failed = (
        "does not run: CUDA error: device-side assert triggered; Indexing.cu:15: Assertion `i < n` failed."
    )
    assert found == {"first": failed, "second": "works"}


def test_what_is_not_begun_in_time_is_not_tried():
    found = {}
    cases.try_all({"a": "a"}, answer_all, QUESTIONS, found.__setitem__, seconds=20, total_seconds=0)
    assert found == {"a": dict.fromkeys(QUESTIONS, "not tried: no time left")}


def test_a_family_is_named_by_what_it_is():
    assert LLAMA.label == "LlamaForCausalLM, n-gram drafts"


def test_gpus_get_their_sizes_and_no_other_key():
    cpu, gpu = configs(gpu=False), configs(gpu=True)
    assert cpu["qwen3_next"]["head_dim"] == 64 and gpu["qwen3_next"]["head_dim"] == 256
    assert cpu["llama"]["dtype"] == "float32"
    assert {config["dtype"] for config in gpu.values()} == {"bfloat16"}
    assert all("gpu" not in config for config in [*cpu.values(), *gpu.values()])


def test_an_error_is_one_sentence():
    assert serving.sentence(ValueError("a | b\nc")) == "a | b"
    assert serving.sentence(ValueError()) == ""
    assert serving.sentence(ValueError("nobody agrees:\n  A refused by B\n  C refused by D")) == (
        "nobody agrees: A refused by B; C refused by D"
    )
    listed = (
        "1 validation error for VllmConfig\n  Value error, no MLA [type=value_error, input_value=ArgsKwargs"
    )
    assert serving.sentence(ValueError(listed)) == "no MLA"
    assert serving.cell_of(ValueError("no")) == "refused: no"
    assert serving.cell_of(RuntimeError("no")) == "does not run: RuntimeError: no"
    assert serving.cell_of(serving.Finding("WRONG: 1")) == "WRONG: 1"


def test_what_does_not_run_tells_where():
    torch = pytest.importorskip("torch")  # not above: the cases' processes import this module, too

    def fail():
        return torch.zeros(2)[3]

    with pytest.raises(IndexError) as caught:
        fail()
    found = serving.cell_of(caught.value)
    assert found.startswith("does not run: IndexError: ")
    assert found.endswith(f" ({Path(__file__).name}:{fail.__code__.co_firstlineno + 1}, fail)")
    with pytest.raises(TypeError) as caught:
        torch.nn.functional.linear(None, None)
    assert "test_what_does_not_run_tells_where)" in serving.cell_of(caught.value)


def test_memory_is_filled_with_large_numbers_of_every_dtype():
    torch = pytest.importorskip("torch")
    floats = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32)
    for dtype in floats:
        first, second = (
            torch.full((4,), byte, dtype=torch.uint8).view(dtype).float() for byte in serving.POISONS
        )
        assert first.isfinite().all() and second.isfinite().all()
        assert (first >= 240).all() and (second <= -240).all()


def test_an_answer_that_follows_unused_memory_is_wrong(monkeypatch):
    memory = []
    monkeypatch.setattr(serving, "empty", lambda llm, byte: memory.append(byte))
    for answers, raised in (
        (lambda *_: ([1], [0.5], 16), False),
        (lambda *_: ([memory[-1]], [0.5], 16), True),
    ):
        memory[:] = [serving.POISONS[0]]
        cached = serving.POISONS[0] if raised else 1
        monkeypatch.setattr(serving, "answer_to", answers)
        with pytest.raises(serving.Finding, match="WRONG") if raised else contextlib.nullcontext():
            serving.check_unread(None, [], ([cached], [0.5], 16))


def test_backends_that_keep_what_is_theirs_are_named():
    def layer(module, name, dtype):
        backend = type(name, (), {"__module__": module, "get_name": staticmethod(lambda: name)})
        return types.SimpleNamespace(kv_cache_dtype=dtype, attn_backend=backend)

    layers = {
        "a": layer("vllm_xlayer.attention.cpu", "CPU_ATTN", "nvfp4"), "b": layer("vllm.v1.x", "X", "nvfp4"),
        "c": layer("vllm.v1.y", "Y", "auto"), "d": object(),
    }  # fmt: skip
    compilation = types.SimpleNamespace(static_forward_context=layers)
    config = types.SimpleNamespace(compilation_config=compilation)
    llm = types.SimpleNamespace(llm_engine=types.SimpleNamespace(vllm_config=config))
    assert serving.other_nvfp4_backends(llm) == ["X"]


def test_a_row_of_an_earlier_commit_gets_its_remark_and_no_later_one():
    row = {"family": "MiMoV2FlashForCausalLM", **dict.fromkeys(models.WAYS, "refused: nobody agrees")}
    row["NVFP4"] = "works (blocks of 16)"
    lines = gpu_table({**ABOUT, "commit": "866e501", "families": {"a": row}}).splitlines()
    assert "| MiMoV2FlashForCausalLM | works (blocks of 16) (1) | refused (2) | refused (2) |" in lines
    assert "fp8" in lines[-2] and lines[-1] == "2. nobody agrees"
    later = gpu_table({**ABOUT, "families": {"a": row}})
    assert "| MiMoV2FlashForCausalLM | works (blocks of 16) |" in later and "fp8" not in later


def test_a_long_refusal_is_cut_at_a_word():
    long = "refused: " + 100 * "some words " + "the end"
    last = gpu_table({**ABOUT, "families": {"a": {"family": "A", **dict.fromkeys(models.WAYS, long)}}})
    last = last.splitlines()[-1]
    assert last.startswith("1. some words ") and last.endswith(
        " ... (the whole sentence is in the results file)"
    )
    assert "the end" not in last and len(last) < 460


def test_kinds_of_drafts_are_no_families():
    works = dict.fromkeys(models.WAYS, "works (blocks of 16)")
    gpu = {n: {"family": n, **works} for n in ("A", "B", "A, drafts")}
    gpu["B"]["both"] = "refused: no"
    cpu = gpu | {n: {"family": n, **works} for n in ("C", "D", "D, drafts")}
    text = counted({"families": gpu}, {"families": cpu | {"D": gpu["B"] | {"family": "D"}}})
    assert "1 of 2 families work" in text and "2 more were" in text and text.endswith("of which 1 do")


def test_what_a_zero_is_worth_stands_before_it():
    numbers = dict(
        requests=1, answers=2, tries=3, rows_loaded=4, accepted_drafts=5, wrong=6, lost=7, leaked=8,
        seconds=60, preempted=9, noticed=12, noticed_of=20,
    )  # fmt: skip
    lines = soak_section(ABOUT | numbers).splitlines()
    head = next(line for line in lines if line.startswith("|  |")).split(" | ")
    cells = next(line for line in lines if line.startswith("| a CPU")).split(" | ")
    assert cells[head.index("wrong") - 1 : head.index("wrong") + 1] == ["12 of 20", "6"]
    assert head[head.index("wrong") - 1] == "planted wrong answers that are noticed" and len(head) == len(
        cells
    )


def test_hybrids_soaked_have_a_row_for_each_model_and_cache():
    numbers = dict(
        model="lfm2", requests=1000, answers=2, restored=3, preempted=4, tries=5, rows_loaded=6, wrong=7,
        lost=8, leaked=9, seconds=150,
        rounding=dict(answers=1234, preempted=34, by_batches=9.5e-07, by_preemption=0.11),
    )  # fmt: skip
    kinds = ("Mamba", "Mamba", "FullAttention")
    power = [{"group": kind, "layers": 2, "noticed": i, "of": 20} for i, kind in enumerate(kinds, 17)]
    soaks = {
        cache: numbers | {"cache": cache, "power": power, "commit": commit, "date": "today"}
        for cache, commit in (("auto", "abc"), ("nvfp4", "def"))
    }
    lines = hybrids_soak_section(ABOUT | {"soaks": soaks}).splitlines()
    head, _, auto, nvfp4 = (line.split(" | ") for line in lines if line.startswith("|"))
    assert [auto[0], nvfp4[0]] == ["| lfm2, auto, 2.5 minutes", "| lfm2, nvfp4, 2.5 minutes"]
    assert auto[1:7] == ["1,000", "2", "3", "4", "5", "6"] and len(head) == len(auto)
    assert auto[7:] == [
        "1e-06 (1,200 answers); preempted 0.1 (34)",
        "states 17 of 20, 18 of 20; attention 19 of 20",
        "7",
        "8",
        "9 |",
    ]
    assert head[-3:] == ["wrong", "lost", "leaked |"]
    assert lines[-1].endswith("commit abc; lfm2, nvfp4: today, commit def.")


def test_sentences_stand_below_the_table_once():
    refused = {way: "refused: no | such pages" for way in models.WAYS}
    mixed = {
        "NVFP4": "works (blocks of 16)",
        "XLayerConnector": "refused: CPU reference platform: no kernels",
        "both": "does not run: ValueError: Model architectures ['X'] are not supported for now. Supported: Y",
    }
    families = {"a": {"family": "A", **refused}, "b": {"family": "B", **mixed}}
    lines = table({**ABOUT, "families": families}).splitlines()
    assert "| | NVFP4 | XLayerConnector | both |" in lines
    assert "| A | refused (1) | refused (1) | refused (1) |" in lines
    assert "| B | works (blocks of 16) | not here (2) | not in this vLLM |" in lines
    assert lines[-2:] == ["1. no / such pages", "2. no kernels"]
    assert "vLLM 1, torch 2, a CPU, today, commit abc." in lines


def test_rows_that_were_tried_again_say_of_which_commit_they_are(tmp_path, monkeypatch):
    """Others keep theirs."""
    equal = {"in rows": "equal", "restored": "equal"}
    path = tmp_path / "latents.json"
    path.write_text(json.dumps(ABOUT | {"cases": {name: {"case": name} | equal for name in "abc"}}))
    rows = provenance.rows_of(path, "cases")
    monkeypatch.setattr(provenance, "provenance", lambda: ABOUT | {"commit": "def", "date": "tomorrow"})
    rows["b"] = provenance.stamped({"case": "b"} | equal)
    last = latents_table(ABOUT | {"commit": "def", "date": "tomorrow", "cases": rows}).splitlines()[-1]
    assert last == "vLLM 1, torch 2, a CPU, today, commit abc; b: tomorrow, commit def."
    assert provenance.rows_of(tmp_path / "none.json", "cases") == {}


def test_rows_of_another_question_are_not_taken(tmp_path):
    path = tmp_path / "traffic.json"
    path.write_text(json.dumps(ABOUT | {"layers": 2, "requests": 8, "caches": {"fp8": {}}}))
    assert provenance.rows_of(path, "caches", layers=2, requests=8).keys() == {"fp8"}
    assert provenance.rows_of(path, "caches", layers=2, requests=9) == {}
    assert provenance.rows_of(path, "caches", shape="other") == {}


def test_rows_of_another_machine_are_not_kept(tmp_path, monkeypatch, capsys):
    path = tmp_path / "traffic.json"
    path.write_text(json.dumps(ABOUT | {"layers": 2, "caches": {"fp8": {}, "nvfp4": {}}}))
    monkeypatch.setattr(provenance, "provenance", lambda: ABOUT)
    assert provenance.kept(path, "caches", ["nvfp4"], layers=2).keys() == {"fp8", "nvfp4"}
    assert capsys.readouterr().out == f"fp8: as {path} has it, today, commit abc\n"
    for other in ({"hardware": "another"}, {"versions": {"vllm": "2"}}):
        monkeypatch.setattr(provenance, "provenance", lambda other=other: ABOUT | other)
        assert provenance.kept(path, "caches", ["nvfp4"], layers=2) == {}


def test_a_gpus_tables_are_shown_once_there_are_results(tmp_path, monkeypatch):
    from benchmarks import readme

    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    text = "".join(f"<!-- {name}: begin -->\n<!-- {name}: end -->\n" for name in ("models_gpu", "latents"))
    assert readme.rendered(text) == text
    models_found = ABOUT | {"families": {"a": {"family": "A", **dict.fromkeys(models.WAYS, "works")}}}
    equal = {"case": "FLASHMLA, auto", "in rows": "equal", "restored": "equal"}
    latents_found = ABOUT | {"cases": {"a": equal}}
    (tmp_path / "gpu-models.json").write_text(json.dumps(models_found))
    (tmp_path / "gpu-latents.json").write_text(json.dumps(latents_found))
    shown = readme.rendered(text)
    assert gpu_table(models_found) in shown and latents_table(latents_found) in shown
    assert "| FLASHMLA, auto | equal | equal |" in shown and readme.rendered(shown) == shown
