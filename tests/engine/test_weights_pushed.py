"""Weights that a trainer sends to a running engine, of which vLLM tells a connector nothing.

The disk tier has KV of what the engine's files say, and of nothing else."""

import pytest
from disk_fixture import NUM_TOKENS, PROMPTS, WHOLE_BLOCKS, cached, cached_right, fill, start
from faults import core_of, without_connector

from vllm_xlayer.connector.disk.weights import loaded_weights


@pytest.fixture(scope="module")
def answers(make_llm, tiny_llama):
    return without_connector(make_llm, tiny_llama, PROMPTS, NUM_TOKENS)


def change_weights(worker):
    for parameter in worker.get_model().parameters():
        parameter.data.neg_()


def look(worker):
    return 1


def test_what_changed_weights_compute_is_not_found_by_others(make_llm, tiny_llama, answers, tmp_path):
    """Before the first request, too, when there is no cache that a user would reset."""
    llm = start(make_llm, tiny_llama, tmp_path)
    llm.collective_rpc(change_weights)
    changed, found = cached(llm)
    assert found == [0] * len(PROMPTS) and changed != answers
    core_of(llm).shutdown()
    assert cached_right(start(make_llm, tiny_llama, tmp_path), answers) == [0] * len(PROMPTS)


def test_changed_weights_find_nothing_of_the_files(make_llm, tiny_llama, answers, tmp_path):
    fill(make_llm, tiny_llama, tmp_path)
    llm = start(make_llm, tiny_llama, tmp_path)
    llm.collective_rpc(look)
    llm.collective_rpc(look)
    llm.collective_rpc(change_weights)
    changed, found = cached(llm)
    assert found == [0] * len(PROMPTS) and changed != answers


def test_calls_that_change_nothing_keep_the_disk(make_llm, tiny_llama, answers, tmp_path):
    fill(make_llm, tiny_llama, tmp_path)
    llm = start(make_llm, tiny_llama, tmp_path)
    llm.collective_rpc(look)
    llm.collective_rpc(look)
    assert cached_right(llm, answers) == WHOLE_BLOCKS


def test_a_second_sleep_looks_at_no_weights(make_llm, tiny_llama, answers, tmp_path, monkeypatch):
    """Their memory is not there; vLLM says that the engine sleeps already."""
    fill(make_llm, tiny_llama, tmp_path)
    llm = start(make_llm, tiny_llama, tmp_path)
    executor = core_of(llm).model_executor
    run, looks = executor.collective_rpc, []

    def seen(method, *args, **kwargs):
        if method is loaded_weights:
            looks.append(set(executor.sleeping_tags))
        return run(method, *args, **kwargs)

    monkeypatch.setattr(executor, "collective_rpc", seen)
    llm.sleep(1)
    llm.sleep(1)
    llm.wake_up()
    cached_right(llm, answers)
    assert looks and not any(looks)
