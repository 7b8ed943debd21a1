"""The quality command's engines on the shipped model, and what is made of what they write."""

import json

import numpy as np
import pytest
import torch

from vllm_xlayer.demo import model_path
from vllm_xlayer.quality import report, results
from vllm_xlayer.quality.engine import Engine, run
from vllm_xlayer.quality.job import Job

WINDOWS, LENGTH, FIRST, ANSWER = 2, 96, 64, 8


def job(folder, kv_cache_dtype, is_reference=False):
    return Job(
        title=kv_cache_dtype, model=str(model_path()), is_demo=True, kv_cache_dtype=kv_cache_dtype,
        out=str(folder / f"{kv_cache_dtype}.npz"), windows_file=str(folder / "windows.json"),
        windows=WINDOWS, length=LENGTH, first=FIRST, answer=ANSWER, chunk=32, batch=WINDOWS,
        is_reference=is_reference, options={"kv_cache_memory_bytes": 16 << 20},
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(reference_platform, make_llm, tmp_path_factory):
    """With the files of two engines."""
    make_llm.shut_down()  # another test's engine would lend its connector to ours
    folder = tmp_path_factory.mktemp("quality")
    run(job(folder, "auto", is_reference=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_XLAYER_NEWEST_TOKENS", "0")  # else hardly anything is read from pages so short
        run(job(folder, "nvfp4"))
    return folder


@pytest.fixture(scope="module")
def exact(folder):
    """Log-probabilities [W, LENGTH, vocabulary] of the token after each, by transformers in one go."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.bfloat16).eval()
    windows = torch.tensor(json.loads((folder / "windows.json").read_text()))
    with torch.no_grad():
        return windows, model(windows).logits.float().log_softmax(-1)


@pytest.mark.parametrize("way", ["decode", "prefill", "again"])
def test_16_bit_cache_thinks_what_transformers_does(folder, exact, way):
    windows, logprobs = exact
    found = results.read(folder / "auto.npz")[0][way]
    wanted = logprobs[:, FIRST - 1 : -1]
    assert found.text.shape == (WINDOWS, LENGTH - FIRST)
    of_text = wanted.gather(-1, windows[:, FIRST:, None])[..., 0].numpy()
    # The model is sure of most tokens; where it is not, bfloat16 makes a difference of a few hundredths.
    assert np.abs(found.text - of_text).mean() < 0.02
    first = wanted.argmax(-1).numpy()
    assert (found.top_ids[..., 0] == first).mean() > 0.9
    by_id = np.take_along_axis(wanted.numpy(), found.top_ids, -1)
    likely = found.top > -8
    assert np.abs(found.top - by_id)[likely].mean() < 0.1


def test_decode_reads_every_key_from_the_cache(folder):
    """In chunked prefill the tokens of a chunk see each other unquantised: the two ways must differ."""
    found, _ = results.read(folder / "nvfp4.npz")
    base, _ = results.read(folder / "auto.npz")
    error = {way: np.abs(found[way].top - base[way].top).mean() for way in ("decode", "prefill")}
    assert error["decode"] > error["prefill"] > 0
    again = np.abs(base["again"].top - base["decode"].top).mean()
    assert again < error["prefill"] / 2


def test_greedy_answers_are_the_prompts(folder, exact):
    """The reference's text after FIRST was drawn, its answers are the most probable tokens."""
    _, logprobs = exact
    answers = results.read(folder / "auto.npz")[0]["answers"]
    assert answers.shape == (WINDOWS, ANSWER)
    assert (answers[:, 0] == logprobs[:, FIRST - 1].argmax(-1).numpy()).all()


def test_statistics_see_every_layer(folder):
    _, facts = results.read(folder / "auto.npz")
    config = json.loads((model_path() / "config.json").read_text())
    assert len(facts["layers"]) == config["num_hidden_layers"]
    for layer in facts["layers"].values():
        heads = config["num_key_value_heads"] * config["head_dim"]
        assert layer["K"]["groups"] == layer["V"]["groups"] == WINDOWS * LENGTH * heads // 16
        assert 0.07 < layer["K"]["rmse"] < 0.1 and layer["K"]["std"] > 0


def test_report_fits_and_says_it(folder):
    from rich.console import Console

    result = results.compare(folder / "auto.npz", {"nvfp4": folder / "nvfp4.npz"}, FIRST, LENGTH)
    assert json.loads(json.dumps(result))["windows"] == WINDOWS
    console = Console(width=report.WIDTH, record=True, file=None, highlight=False)
    for part in (report.table(result), report.by_position(result), report.layers(result)):
        console.print(part)
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= 100
    assert "nvfp4" in shown and "16 bits, other" in shown and "model.layers.0" in shown
    assert report.verdict(result).startswith("nvfp4 costs")


def test_a_cache_too_small_is_said(reference_platform, tmp_path):
    from rich.progress import Progress

    small = job(tmp_path, "nvfp4")
    small.options["kv_cache_memory_bytes"] = 1 << 16
    with pytest.raises(ValueError, match=r"KV cache|memory"), Progress(disable=True) as progress:
        Engine(small, progress)
