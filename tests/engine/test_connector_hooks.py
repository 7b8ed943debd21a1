"""What vLLM's runners and scheduler call, and what the connector makes of it. No engine runs here."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    TransferJob,
)
from vllm.v1.kv_offload.base import GPULoadStoreSpec, TransferResult
from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

from vllm_xlayer.compat.dependence import CONNECTOR_FEATURE
from vllm_xlayer.compat.private import require
from vllm_xlayer.connector import connector as connector_module
from vllm_xlayer.connector.connector import XLayerConnector
from vllm_xlayer.connector.offloading_worker import RowOffloadingWorker
from vllm_xlayer.connector.scheduler import RowConnectorScheduler
from vllm_xlayer.connector.worker import RowConnectorWorker, RowWorkerMetadata

NO_MODEL = SimpleNamespace(attn_metadata=None)


def rows(n, seed):
    return torch.randint(0, 256, (n, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def connector():
    """The worker's side, over a pool of 8 blocks and a tier of 8 rows."""
    made, worker = object.__new__(XLayerConnector), object.__new__(RowConnectorWorker)
    worker._is_store_writer, worker._unsubmitted_store_jobs = True, []
    worker._load_jobs, worker._failed_loads, worker._said_state = {}, set(), True
    worker._connector_worker_meta = RowWorkerMetadata()
    worker.worker = RowOffloadingWorker(rows(8, 0), rows(8, 1), blocks_per_chunk=1)
    made.connector_worker, made.connector_scheduler = worker, None
    return made


def device(*blocks):
    return GPULoadStoreSpec(list(blocks), group_sizes=[len(blocks)], block_indices=[0])


def step(connector, loads=(), stores=(), flush=(), **ran):
    """One step as runner V2 has it: results, and what is told to the scheduler."""
    metadata = OffloadingConnectorMetadata(
        load_jobs={i: TransferJob(f"request {i}", CPULoadStoreSpec(to), device(*at)) for i, to, at in loads},
        store_jobs={
            i: TransferJob(f"request {i}", device(*at), CPULoadStoreSpec(to)) for i, at, to in stores
        },
        jobs_to_flush=set(flush),
    )
    connector.handle_preemptions(metadata)
    connector.bind_connector_metadata(metadata)
    connector.start_load_kv(NO_MODEL, **ran)
    connector.wait_for_save()
    results = connector.get_transfer_results(set())
    told = connector.build_connector_worker_meta()
    connector.clear_connector_metadata()
    return results, told


def test_every_private_name_is_there():
    require(CONNECTOR_FEATURE)


def test_a_store_is_queued_in_its_step_and_copied_in_the_next(connector):
    pool, host = connector.connector_worker.worker._store.src, connector.connector_worker.worker.host
    _, told = step(connector, stores=[(1, [3, 5], [6, 0])])
    assert told is None
    results, told = step(connector)
    assert told.completed_jobs == {1: 1} and not told.failed_jobs and not results.finished_recving
    assert torch.equal(host[[6, 0]], pool[[3, 5]])
    assert told.transfer_stats.store.bytes == 128


def test_vllms_32_bit_ids_are_copied(connector):
    pool, host = connector.connector_worker.worker._store.src, connector.connector_worker.worker.host
    assert device(1).block_ids.dtype == np.int32  # else this test is about nothing
    results, told = step(connector, loads=[(1, [6, 0], [3, 5])])
    assert results.finished_recving == {"request 1"} and not results.failed_recving
    assert not told.failed_jobs and torch.equal(pool[[3, 5]], host[[6, 0]])
    assert told.transfer_stats.load.bytes == 128


def test_a_failed_load_is_told_as_a_request_and_as_a_job(connector):
    results, told = step(connector, loads=[(1, [99], [3]), (2, [1], [2])])
    assert results.finished_recving == {"request 1", "request 2"}
    assert results.failed_recving == {"request 1"} and told.failed_jobs == {1}
    assert told.completed_jobs == {1: 1, 2: 1}
    assert connector.get_block_ids_with_load_errors() == set()  # vLLM ends if there are several groups
    results, _ = step(connector)
    assert not results.failed_recving


def test_a_failed_store_is_told_as_a_job_only(connector):
    results, told = step(connector, stores=[(1, [3], [99])], flush=[1])
    assert told.completed_jobs == {1: 1} and told.failed_jobs == {1}
    assert results.finished_recving == results.failed_recving == set()


def test_every_job_that_a_reset_flushes_is_reported(connector):
    """Of both kinds, good and bad, queued before and in the same step; vLLM steps until it has them all."""
    step(connector, stores=[(1, [3], [0]), (2, [4], [99])])
    _, told = step(
        connector, stores=[(3, [5], [1]), (4, [6], [99])], loads=[(5, [2], [7])], flush=[1, 2, 3, 4, 5]
    )
    assert told.completed_jobs == {job: 1 for job in (1, 2, 3, 4, 5)} and told.failed_jobs == {2, 4}


def test_a_load_without_a_request_counts_as_a_load(connector):
    """As vLLM books loads that belong to the step itself."""
    worker = connector.connector_worker
    worker._load_jobs[1] = None
    assert worker._finish(TransferResult(1, True, 64, 0.5)) is None
    assert worker._connector_worker_meta.transfer_stats.load.bytes == 64
    assert worker._connector_worker_meta.transfer_stats.store.is_empty()
    assert worker.worker.submit_load(2, CPULoadStoreSpec([1]), device(2), expedited=True)


@pytest.mark.parametrize(
    ("ran", "context", "model_ran"),
    [
        ({}, NO_MODEL, False),
        ({"num_tokens": 3}, NO_MODEL, True),  # runner V2
        ({}, SimpleNamespace(attn_metadata={}), True),  # runner V1
    ],
)
def test_whether_a_model_ran(connector, monkeypatch, ran, context, model_ran):
    asked = []
    monkeypatch.setattr(
        connector.connector_worker.worker, "get_finished", lambda ran: asked.append(ran) or []
    )
    connector.bind_connector_metadata(OffloadingConnectorMetadata({}, {}))
    connector.start_load_kv(context, **ran)
    connector.wait_for_save()  # runners call it in every step
    connector.get_transfer_results(set())
    assert asked == [model_ran]


def test_loads_are_told_of_the_launch_that_comes(connector, monkeypatch):
    marked = []
    monkeypatch.setattr(connector.connector_worker.worker._load, "before_launch", lambda: marked.append(1))
    step(connector)
    assert not marked
    step(connector, loads=[(1, [6], [3])])
    assert marked == [1]


def test_another_spec_is_told_what_is_lost(monkeypatch, caplog_vllm):
    extra = {"spec_name": "TieringOffloadingSpec", "no_key_of_ours": 1}
    config = SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector_extra_config=extra))
    monkeypatch.setattr(connector_module, "build_offloading_config", lambda *_: "theirs")
    monkeypatch.setattr(connector_module.OffloadingSpecFactory, "create_spec", lambda config: config)
    spec = connector_module._offloading_spec(config, None, None, KVConnectorRole.SCHEDULER)
    assert spec == "theirs"
    (said,) = [r.getMessage() for r in caplog_vllm.records]
    assert "TieringOffloadingSpec" in said and "Without spec_name they are on" in said


def scheduler(monkeypatch, *groups, states=None):
    """With the scheduler's side of vLLM found to be asked for `asked[-1]` tokens at most.

    states: tokens to which vLLM rounds hits of hybrid models.
    """
    made, asked = object.__new__(RowConnectorScheduler), []
    made._load_failed, made._mamba_align_size = set(), states
    made.config = SimpleNamespace(
        kv_group_configs=[
            SimpleNamespace(tokens_per_chunk=size, sliding_window_size_in_chunks=window)
            for size, window in groups
        ]
    )

    def theirs(self, request, computed, max_num_new_tokens=None):
        asked.append(max_num_new_tokens)
        return None, False

    monkeypatch.setattr(RowConnectorScheduler.__base__, "get_num_new_matched_tokens", theirs)
    return made, asked


@pytest.mark.parametrize(
    ("groups", "tokens", "computed", "limit", "expected"),
    [
        ([(16, None)], 33, 0, None, 32),
        ([(16, None)], 32, 0, None, 16),  # not the block that ends with the last token
        ([(16, None)], 32, 16, None, 0),
        ([(48, None)], 100, 16, None, 80),
        ([(16, None), (32, None)], 64, 0, None, 32),
        ([(16, None), (16, 3)], 33, 0, None, 33),  # vLLM takes one off for the window, and then whole blocks
        ([(16, None), (16, 3)], 32, 0, None, 17),
        ([(16, None)], 100, 0, 20, 20),
        ([(16, None)], 33, 0, 200, 32),
    ],
)
def test_how_much_may_be_loaded(monkeypatch, groups, tokens, computed, limit, expected):
    made, asked = scheduler(monkeypatch, *groups)
    request = SimpleNamespace(num_tokens=tokens, request_id="r", skip_reading_prefix_cache=False)
    made.get_num_new_matched_tokens(request, computed, max_num_new_tokens=limit)  # as vLLM's connector calls
    assert asked == [expected]
    made._load_failed.add("r")
    made.get_num_new_matched_tokens(request, computed)
    assert asked == [expected, 0]


@pytest.mark.parametrize("tokens", [20, 32, 33])
def test_where_groups_hold_states_vllm_cuts_hits_by_itself(monkeypatch, tokens):
    """It leaves out the last token, rounds down to whole blocks, and looks for parts of a block after that: a
    bound of ours would hide those."""
    made, asked = scheduler(monkeypatch, (16, None), (16, 1), states=16)
    request = SimpleNamespace(num_tokens=tokens, request_id="r", skip_reading_prefix_cache=False)
    made.get_num_new_matched_tokens(request, 16)
    assert asked == [tokens - 16]


def test_what_any_rank_says_is_kept():
    """A job that failed on one rank only is not what the others say of it, in whatever order they come."""
    ranks = [
        RowWorkerMetadata({1: 1}, failed_jobs={1}, rows_stored=2, ready=1),
        RowWorkerMetadata({1: 1, 2: 1}, failed_jobs={2}, problem="no memory", rows_loaded=3, ready=1),
    ]
    for first, second in (ranks, ranks[::-1]):
        both = first.aggregate(second)
        assert both.completed_jobs == {1: 2, 2: 1} and both.failed_jobs == {1, 2}
        assert (both.problem, both.rows_stored, both.rows_loaded, both.ready) == ("no memory", 2, 3, 2)
