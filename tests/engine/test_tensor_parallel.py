"""Two ranks: each moves its own rows, and a transfer counts only when both have it.

Workers are processes of their own: on the CPU platform with gloo, else on two GPUs. The scheduler is here.
"""

import pytest
import torch
from disk_fixture import NUM_TOKENS, PROMPTS, WHOLE_BLOCKS, connector
from faults import (
    TALLY,
    Copies,
    check,
    live_connector,
    manager_of,
    settle,
    slow_direction,
    without_connector,
)
from model_fixture import ON_GPU

from vllm_xlayer.connector.disk import manager as tiering

BLOCKS, USABLE = sum(len(p) // 16 for p in PROMPTS), sum(WHOLE_BLOCKS) // 16
NONE = [0] * len(PROMPTS)
one_rank = pytest.mark.fault("copy error on one rank")
pytestmark = [
    pytest.mark.anywhere,
    pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

copies = None
"""In a worker: its Copies."""


# These run in the workers.


def set_faults(_, rank, loads=False, stores=False):
    """(copies that failed so far, rows stored, rows loaded) of this worker."""
    global copies
    from vllm.distributed import get_tensor_model_parallel_rank

    if copies is None:
        copies = Copies(pytest.MonkeyPatch(), lambda: live_connector().pool)
    mine = get_tensor_model_parallel_rank() == rank
    copies.fail_loads, copies.fail_stores = (lambda n: loads and mine), (lambda n: stores and mine)
    worker = live_connector().connector_worker.worker
    return copies.failed, worker.rows_stored, worker.rows_loaded


def spoil_pool(_):
    live_connector().pool.fill_(0xFF)


def slow_loads(_, rank):
    from vllm.distributed import get_tensor_model_parallel_rank

    if get_tensor_model_parallel_rank() == rank:
        worker, pool = live_connector().connector_worker.worker, live_connector().pool
        worker._load = slow_direction(6)(worker.host, pool, pool.device)


# These here.


@pytest.fixture(scope="module")
def answers(make_llm, tiny_llama):
    # Of two ranks as well: in bfloat16 they add up in another order than one.
    return without_connector(make_llm, tiny_llama, PROMPTS, NUM_TOKENS, tensor_parallel_size=2)


@pytest.fixture(scope="module")
def engine(make_llm, tiny_llama, answers, tmp_path_factory):
    """Two ranks; the disk has what another such engine stored."""
    transfer = connector(tmp_path_factory.mktemp("tier"))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_XLAYER_DEBUG", "OMP_NUM_THREADS"):
            patch.setenv(name, "1")
        patch.delenv("PYTHONHASHSEED", raising=False)
        patch.setattr(tiering, "DEADLINE_SECONDS", 60)
        llm = make_llm(tiny_llama, tensor_parallel_size=2, kv_transfer_config=transfer)
        check(llm, PROMPTS, answers)
        settle(llm)
        yield make_llm(tiny_llama, tensor_parallel_size=2, kv_transfer_config=transfer)


@pytest.fixture
def llm(engine, answers):
    """With all of PROMPTS in the tier, and nothing on the device."""
    counts(engine)
    settle(engine)
    assert engine.reset_prefix_cache(reset_connector=True)
    check(engine, PROMPTS, answers)
    forget(engine)
    return engine


def forget(llm):
    settle(llm)
    assert llm.reset_prefix_cache()
    llm.collective_rpc(spoil_pool)


def counts(llm, rank=None, **faults):
    """(failed, stored, loaded) of both workers, which from now on have these faults."""
    return llm.collective_rpc(set_faults, args=(rank,), kwargs=faults)


def test_the_disk_has_the_rows_of_both(engine, answers):
    engine.collective_rpc(spoil_pool)
    assert check(engine, PROMPTS, answers) == WHOLE_BLOCKS
    settle(engine)
    assert manager_of(engine).disk.counts["hit"] == USABLE


def test_each_rank_moves_its_rows(llm, answers):
    before = counts(llm)
    assert check(llm, PROMPTS, answers) == WHOLE_BLOCKS
    forget(llm)
    assert check(llm, PROMPTS, answers) == WHOLE_BLOCKS
    settle(llm)
    assert [now[2] - then[2] for now, then in zip(counts(llm), before, strict=True)] == [2 * USABLE] * 2
    assert len({now[1] for now in counts(llm)}) == 1 and len(manager_of(llm).host.chunks()) == BLOCKS


@one_rank
@pytest.mark.parametrize("rank", [0, 1])
def test_a_load_that_fails_on_one_rank(llm, answers, rank):
    before = counts(llm, rank, loads=True)
    check(llm, PROMPTS, answers)
    settle(llm)
    failed = [now[0] - then[0] for now, then in zip(counts(llm), before, strict=True)]
    assert failed[rank] > 0 and failed[1 - rank] == 0
    TALLY["tries"] += sum(failed)
    # What was computed instead has been stored again, on both.
    forget(llm)
    assert check(llm, PROMPTS, answers) == WHOLE_BLOCKS
    settle(llm)


@one_rank
@pytest.mark.parametrize("rank", [0, 1])
def test_a_store_that_fails_on_one_rank(llm, answers, rank):
    assert llm.reset_prefix_cache(reset_connector=True)
    before = counts(llm, rank, stores=True)
    check(llm, PROMPTS, answers)
    settle(llm)
    failed = [now[0] - then[0] for now, then in zip(counts(llm), before, strict=True)]
    assert failed[rank] > 0 and failed[1 - rank] == 0
    TALLY["tries"] += sum(failed)
    assert not manager_of(llm).host.chunks()
    forget(llm)
    assert check(llm, PROMPTS, answers) == NONE
    settle(llm)


def test_a_load_waits_for_the_slow_rank(llm, answers):
    """A request that went on when the fast rank had its rows would read what spoil_pool left on the other."""
    llm.collective_rpc(slow_loads, args=(1,))
    assert check(llm, PROMPTS, answers) == WHOLE_BLOCKS
    settle(llm)
