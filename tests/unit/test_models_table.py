"""The table of model families: what hangs or dies becomes a row, and each sentence is said once."""

import os
import time

import pytest

from benchmarks import models
from benchmarks.markdown_models import table

LLAMA = models.Family({"architectures": ["LlamaForCausalLM"]}, "n-gram drafts")


def hang(family, answers):
    answers.send(("NVFP4", "works"))
    time.sleep(600)


def die(family, answers):
    answers.send(("NVFP4", "works"))
    os._exit(9)


def answer_all(family, answers):
    for way in models.WAYS:
        answers.send((way, f"{family.label}, {way}"))


@pytest.mark.parametrize(
    ("run", "missing"), [(hang, "not known after 5 s"), (die, "the process died (exit code 9)")]
)
def test_a_family_that_does_not_answer_is_a_row(run, missing):
    begin = time.monotonic()
    found = models.try_family(LLAMA, 5, run)
    assert found == {"NVFP4": "works", "XLayerConnector": missing, "both": missing}
    assert time.monotonic() - begin < 60


def test_a_family_that_answers_says_what_it_said():
    label = "LlamaForCausalLM, n-gram drafts"
    assert models.try_family(LLAMA, 60, answer_all) == {way: f"{label}, {way}" for way in models.WAYS}


def test_an_error_is_one_sentence():
    assert models._sentence(ValueError("a | b\nc")) == "a | b"
    assert models._sentence(ValueError()) == ""
    listed = (
        "1 validation error for VllmConfig\n  Value error, no MLA [type=value_error, input_value=ArgsKwargs"
    )
    assert models._sentence(ValueError(listed)) == "no MLA"


def test_sentences_stand_below_the_table_once():
    refused = {way: "refused: no | such pages" for way in models.WAYS}
    mixed = {
        "NVFP4": "works (blocks of 16)",
        "XLayerConnector": "refused: CPU reference platform: no kernels",
        "both": "does not run: ValueError: Model architectures ['X'] are not supported for now. Supported: Y",
    }
    families = {"a": {"family": "A", **refused}, "b": {"family": "B", **mixed}}
    about = {"versions": {"vllm": "1", "torch": "2"}, "hardware": "a CPU", "date": "today", "commit": "abc"}
    lines = table({**about, "families": families}).splitlines()
    assert "| A | refused (1) | refused (1) | refused (1) |" in lines
    assert "| B | works (blocks of 16) | not here (2) | not in this vLLM |" in lines
    assert lines[-2:] == ["1. no / such pages", "2. no kernels"]
    assert "vLLM 1, torch 2, a CPU, today, commit abc." in lines
