"""Blocks of a hybrid that are given to another request, and zeroed, while their stores wait to be sent.

Model runner V2 zeroes new blocks before it calls handle_preemptions (connector/flushes.py). On a GPU that is
the runner; on the CPU reference platform, whose runner is V1, its order is made here.
"""

import pytest
from hybrid_fixture import answers_and_hits, save_hybrid
from model_fixture import ON_GPU, random_prompts
from test_hybrid_connector import empty_device, one_by_one, rows_loaded, start

from vllm_xlayer.connector.connector import XLayerConnector
from vllm_xlayer.connector.copy import directions
from vllm_xlayer.patches.flushes import flush_first
from vllm_xlayer.patches.wrapping import wrap

pytestmark = pytest.mark.anywhere
PROMPTS = random_prompts([97, 113, 129, 145, 161, 177, 193, 200], seed=5)
NUM_TOKENS, STEPS = 8, 6
SMALL = dict(num_gpu_blocks_override=22, max_model_len=256, max_num_batched_tokens=256, max_num_seqs=4)
"""Requests take each other's blocks."""


def unsent(direction):
    """A direction whose transfers begin some steps after they were submitted, or once they are waited for."""
    queue, submit = [], direction.submit
    take, wait = direction.advance, direction.wait

    def later(*transfer):
        queue.append([STEPS, transfer])

    def send(when):
        for entry in [entry for entry in queue if when(entry)]:
            queue.remove(entry)
            submit(*entry[1])

    def finished(*args, **kwargs):
        for entry in queue:
            entry[0] -= 1
        send(lambda entry: entry[0] <= 0)
        return take(*args, **kwargs)

    def waits(job_ids):
        send(lambda entry: entry[1][0] in job_ids)
        wait(job_ids)

    direction.submit, direction.advance, direction.wait = later, finished, waits
    return direction


def stores_wait(patch):
    """Of each worker the direction that is made first, that of stores."""
    make, made = directions.make_direction, []

    def first_waits(*args, **kwargs):
        made.append(make(*args, **kwargs))
        return unsent(made[-1]) if len(made) == 1 else made[-1]

    patch.setattr(directions, "make_direction", first_waits)


def order_of_runner_v2(patch):
    """handle_preemptions comes after zeroing, with what the launch needs."""
    handle, bind = XLayerConnector.handle_preemptions, XLayerConnector.bind_connector_metadata

    def bind_late(connector, metadata):
        handle(connector, metadata)
        bind(connector, metadata)

    patch.setattr(XLayerConnector, "handle_preemptions", lambda connector, metadata: None)
    patch.setattr(XLayerConnector, "bind_connector_metadata", bind_late)


def wrong_answers(make_llm, folder, expected, patch):
    stores_wait(patch)
    llm = start(make_llm, folder, "auto", {}, **SMALL)
    answers_and_hits(llm, PROMPTS, 1)
    answers_and_hits(llm, PROMPTS[::-1], 1)
    empty_device(llm)
    before = rows_loaded()
    found = one_by_one(llm, PROMPTS, NUM_TOKENS)
    assert rows_loaded() > before
    return sum(ours[0] != theirs[0] for ours, theirs in zip(found, expected, strict=True))


@pytest.fixture(scope="module", autouse=True)
def in_any_batches():
    """vLLM's batch invariance does not know short convolutions; requests are compared one by one here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_BATCH_INVARIANT", "0")
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_hybrid("lfm2", tmp_path_factory.mktemp("lfm2"))


@pytest.fixture(scope="module")
def expected(make_llm, folder):
    return one_by_one(start(make_llm, folder, "auto", enable_prefix_caching=False), PROMPTS, NUM_TOKENS)


def test_stores_are_waited_for_before_their_blocks_are_zeroed(make_llm, folder, expected, monkeypatch):
    if not ON_GPU:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        order_of_runner_v2(monkeypatch)
        monkeypatch.setattr(GPUModelRunner, "_update_states", GPUModelRunner._update_states)  # to be undone
        wrap(GPUModelRunner, "_update_states", flush_first, "vllm")
    assert wrong_answers(make_llm, folder, expected, monkeypatch) == 0


@pytest.mark.skipif(ON_GPU, reason="the order of runner V2 is made on runner V1")
def test_else_zeros_would_be_restored(make_llm, folder, expected, monkeypatch):
    """What the test above would see."""
    order_of_runner_v2(monkeypatch)
    assert wrong_answers(make_llm, folder, expected, monkeypatch) > 0
