"""The examples in docs/examples run: here the offline one. serve.sh and client.py: test_shipped_model.py."""

import runpy
import sys
from pathlib import Path

import pytest
import vllm

from vllm_xlayer.demo import model_path

EXAMPLE = Path(__file__).parents[2] / "docs/examples/offline.py"


def test_an_engine_process_that_imports_the_script_starts_no_engine(monkeypatch):
    """As multiprocessing's spawn does, where vLLM cannot fork: without a GPU, and where CUDA is in use."""
    monkeypatch.setattr(vllm, "LLM", lambda *args, **given: pytest.fail("an engine starts an engine"))
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(model_path())])
    runpy.run_path(str(EXAMPLE), run_name="__mp_main__")


def test_a_prompt_comes_back_from_host_memory(make_llm, monkeypatch, capfd):
    monkeypatch.setattr(vllm, "LLM", lambda model, **given: make_llm(model, **small, **given))
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(model_path())])
    small = dict(dtype="bfloat16", max_model_len=2048, skip_tokenizer_init=False)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    computed, restored = capfd.readouterr().out.splitlines()[-2:]
    answer, cached = computed.rsplit(", ", 1)
    assert cached == "0 tokens cached"
    assert restored.rsplit(", ", 1)[0] == answer
    assert int(restored.rsplit(", ", 1)[1].split()[0]) > 1000
