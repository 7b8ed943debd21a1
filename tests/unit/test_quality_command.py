"""The quality command without engines: its arguments, and what it makes of the engines' files."""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import constants as hub
from rich.console import Console

from benchmarks import quality as quality_benchmark
from benchmarks.quality import table as markdown
from vllm_xlayer import cli
from vllm_xlayer.quality import command, measures, plot, report, results
from vllm_xlayer.quality.command import Cache

FIRST, LENGTH, WINDOWS, TOP = 8, 16, 5, 4


def arguments(*argv, model="demo"):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    args = parser.parse_args(["quality", str(model), *argv])
    args.first = args.length // 2 if args.first is None else args.first
    return args


def test_caches_with_arguments_and_variables():
    assert Cache.parse("fp8") == Cache("fp8", "fp8")
    spec = "nvfp4,block_size=32,attention_backend=CUSTOM,VLLM_PLUGINS=,A_B=1"
    found = Cache.parse(spec)
    assert found.title == spec and found.kv_cache_dtype == "nvfp4"
    assert found.options == {"block_size": 32, "attention_backend": "CUSTOM"}
    assert found.environment == {"VLLM_PLUGINS": "", "A_B": "1"}


@pytest.mark.parametrize("spec", ["nvfp4,block_size", "nvfp4,4=5", ",a=1", "nvfp4,=1"])
def test_bad_caches_are_refused(spec):
    with pytest.raises(ValueError, match=r"expected DTYPE\[,NAME=VALUE...\], got"):
        Cache.parse(spec)


def test_defaults_are_fine():
    assert command.problem(arguments()) is None


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--windows", "0"], "--windows: expected at least 1, got 0"),
        (["--first", "1"], "--first: expected 2 to 2047 (--length less one), got 1"),
        (["--answer", "1025"], "--answer: expected at most 1024 (--length less --first), got 1025"),
        (["--extra", "[1]"], "--extra: expected a JSON object, got [1]"),
        (["--text", "no/such.txt"], "--text: expected a file, found none: no/such.txt"),
        (["--json", "no/a.json"], "--json: expected a file in a folder that exists, got no/a.json"),
    ],
)
def test_bad_arguments_are_said(argv, message):
    assert command.problem(arguments(*argv)) == message


def test_a_model_that_is_not_there_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    for model, why in (
        ("/no/such/model", "there is no such folder"),
        (tmp_path, "the folder has no config.json"),
        ("nobody/has-such-a-model", "neither a folder nor in the local cache"),
    ):
        found = command.problem(arguments(model=model))
        assert found.startswith(f"model: expected a folder or a name, got {str(model)!r}: {why}")
        assert "\n" not in found


def test_a_model_that_is_there_is_fine(tmp_path):
    (tmp_path / "config.json").touch()
    assert command.problem(arguments(model=tmp_path)) is None


def test_no_engine_is_started_for_a_model_that_is_not_there(monkeypatch, capsys):
    monkeypatch.setattr(command, "_run_engine", lambda *_: pytest.fail("an engine was started"))
    args = arguments("--cache", "nvfp4", model="/no/such/model")
    assert command.run(args) == 2 and "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize(("argv", "code"), [([], 2), (["--help"], 0), (["run", "demo"], 2), (["table"], 2)])
def test_the_benchmark_says_how_it_is_called(argv, code, capsys):
    with pytest.raises(SystemExit) as end:
        quality_benchmark.main(argv)
    said = capsys.readouterr()
    assert end.value.code == code and "usage: python -m benchmarks.quality" in said.out + said.err


def test_the_benchmark_passes_arguments_on(monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(cli, "main", lambda argv: given.append(argv) or 0)
    out = tmp_path / "out.json"
    assert quality_benchmark.main(["run", "MODEL", str(out), "--windows", "3"]) == 0
    assert given[0][:2] == ["quality", "MODEL"] and given[0][-2:] == ["--windows", "3"]
    assert given[0][given[0].index("--json") + 1] == str(out)


def engine_file(path, loss, layers=None, again=False, more=0.0):
    """As an engine writes it: every token has probability exp(-1 - loss), and is the most probable one.

    more: What some positions lose besides, [LENGTH - FIRST].
    """
    rng = np.random.default_rng(0)
    shape = (WINDOWS, LENGTH - FIRST)
    arrays = {"answers": np.arange(WINDOWS * 4).reshape(WINDOWS, 4) + round(loss)}
    for way in ("decode", "prefill", *(["again"] if again else [])):
        noise = 0.01 * rng.standard_normal((WINDOWS, 1)) if loss else 0
        text = np.full(shape, -1.0) - loss - more + noise
        arrays[f"{way}.text"] = text.astype(np.float32)
        arrays[f"{way}.top_ids"] = np.tile(np.arange(TOP, dtype=np.int32), (*shape, 1))
        arrays[f"{way}.top"] = np.stack([text, text - 2, text - 3, text - 4], -1).astype(np.float32)
    if again:
        arrays["again.answers"] = arrays["answers"]
    facts = {"hardware": "a GPU", "versions": {"vllm": "1", "torch": "2"}, "date": "today", "runner": "V2",
             "commit": "abc"}  # fmt: skip
    np.savez(path, **arrays, facts=json.dumps(facts | ({"layers": layers} if layers is not None else {})))
    return path


@pytest.fixture
def result(tmp_path):
    part = dict(largest=9.0, std=1.0, mean_share=0.5, groups=100, saturated=1, underflowed=0, rmse=0.09,
                best_exponent=-3, best_rmse=0.08)  # fmt: skip
    layers = {
        f"model.layers.{i}.self_attn.attn": {"K": part, "V": part | {"rmse": 0.01 * i}} for i in range(6)
    }
    base = engine_file(tmp_path / "base.npz", 0, layers, again=True)
    others = {f"nvfp4,loss={x}": engine_file(tmp_path / f"{x}.npz", x) for x in (0.05, 0.0)}
    return results.compare(base, others, FIRST, LENGTH)


def test_numbers_of_a_known_loss(result):
    row = result["caches"][2]
    mean, low, high = row["decode"]["perplexity_change"]
    assert mean == pytest.approx(np.exp(0.05) - 1, abs=0.01) and low < mean < high
    assert row["decode"]["same_first"][0] == 1 and row["answers"][0] == 4
    assert len(row["decode"]["by_position"]) == len(result["spans"]) == 4
    assert result["caches"][1]["decode"]["perplexity_change"] == [0, 0, 0]
    assert json.loads(json.dumps(result)) is not None


def test_a_loss_is_counted_where_it_is(tmp_path):
    more = np.zeros(LENGTH - FIRST)
    for k, (begin, end) in enumerate(measures.spans(FIRST, LENGTH)):
        more[begin - FIRST : end - FIRST] = 0.01 * k
    base = engine_file(tmp_path / "base.npz", 0, layers={}, again=True)
    rising = {"nvfp4": engine_file(tmp_path / "rising.npz", 0, more=more)}
    found = results.compare(base, rising, FIRST, LENGTH)["caches"][-1]["decode"]["by_position"]
    assert [mean for mean, *_ in found] == pytest.approx(np.expm1(0.01 * np.arange(4)), abs=1e-6)


def test_the_verdict_tells_a_loss_from_none(result):
    mean = result["caches"][2]["decode"]["perplexity_change"][0]
    assert report.verdict(result) == (
        f"nvfp4,loss=0.05 costs {100 * mean:.2f} % of perplexity in decode; "
        "nvfp4,loss=0.0 costs nothing that this text can show (+0.00 % (0.00..0.00))."
    )


def test_tables_fit_and_show_the_worst_layers(result):
    console = Console(width=report.WIDTH, record=True, highlight=False)
    for part in (report.table(result), report.by_position(result), report.layers(result)):
        console.print(part)
    shown = console.export_text()
    assert max(len(line) for line in shown.splitlines()) <= 100
    assert shown.count("model.layers.") == report.WORST and "1 %" in shown and "2^-3" in shown


def test_markdown_has_a_row_a_cache(result):
    lines = markdown(result).splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 1 + 3
    assert "a GPU; vLLM 1, torch 2, today, commit abc." in lines[-1]


@pytest.mark.parametrize(
    ("fp8", "overlap"), [([37.0, 17.8, 56.3], True), ([70.0, 60.0, 80.0], False), ([37.0, None, None], False)]
)
def test_greedy_tokens_have_an_interval_and_say_whether_they_tell(result, fp8, overlap):
    first, row = result["caches"][0], result["caches"][1]
    caches = [first, row | {"title": "fp8", "answers": fp8}]
    caches.append(row | {"title": "nvfp4", "answers": [32.0, 15.6, 48.7]})
    text = markdown(result | {"caches": caches, "answer": 200})
    assert "| 32 (16 .. 49) of 200 |" in text
    assert ("Greedy tokens do not tell NVFP4 and fp8 apart" in text) == overlap
    assert ("| 37 of 200 |" in text) == (fp8[1] is None)


def test_a_cache_that_gives_nan_is_said_to(result, tmp_path):
    row = result["caches"][2]
    row["decode"] |= {"perplexity_change": [None] * 3, "divergence": [None] * 3}
    row["decode"]["by_position"][-1] = [None] * 3
    assert "nvfp4,loss=0.05 gives NaN in decode: it does not serve this model; " in report.verdict(result)
    console = Console(width=report.WIDTH, record=True, highlight=False)
    console.print(report.table(result), report.by_position(result))
    assert console.export_text().count("NaN") == 3 and markdown(result).count("NaN") == 2
    if importlib.util.find_spec("matplotlib"):
        plot.draw(result, tmp_path / "plot.png")


def test_calibrated_scales_are_the_best(result):
    scales = results.calibrated(result)
    assert len(scales) == 6 and set(scales.values()) == {(0.125, 0.125)}


def test_plot_is_written(result, tmp_path):
    pytest.importorskip("matplotlib")
    plot.draw(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_ctrl_c_ends_an_engine_without_a_traceback(tmp_path):
    """The process waits for its job in a pipe when it is interrupted."""
    pipe = tmp_path / "job.json"
    os.mkfifo(pipe)
    engine = [sys.executable, "-m", "vllm_xlayer.quality", str(pipe)]
    # Whoever runs the tests in the background may have them ignore the signal, and children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(engine, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        with pipe.open("w"):  # returns when the process has opened it, too
            process.send_signal(signal.SIGINT)
            assert process.wait(600) == 130
        assert process.stderr.read() == ""


def test_an_interrupted_engine_interrupts_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: subprocess.CompletedProcess(args, 130))
    with pytest.raises(KeyboardInterrupt):
        command._run_engine(
            argparse.Namespace(write=lambda file: None, out="", title=""), {}, tmp_path / "job.json"
        )


def test_an_engine_that_fails_is_left_out_aloud(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: subprocess.CompletedProcess(args, 3))
    job = argparse.Namespace(write=lambda file: None, out=str(tmp_path / "none"), title="fp8")
    assert not command._run_engine(job, {}, tmp_path / "job.json")
    assert "left out: the engine with fp8 ended with exit code 3" in capsys.readouterr().err
