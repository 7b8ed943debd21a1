"""NIXL's agent for rows: one thread of UCX's takes all transfers, small ones too."""

import uuid

import numpy as np
import pytest
import torch

from vllm_xlayer.connector.nixl.agent import ONE_THREAD, vllm_makes_such, with_thread

ROW, ROWS = 4096, 64


class Agent:
    def __init__(self):
        self.made = []

    def create_backend(self, backend, params):
        self.made.append((backend, params))


@pytest.mark.parametrize(
    ("backend", "params", "expected"),
    [
        ("UCX", {"num_threads": "4", "engine_config": "TLS=tcp"}, {"engine_config": "TLS=tcp", **ONE_THREAD}),
        ("UCX", {}, {}),
        ("LIBFABRIC", {"num_threads": "4"}, {"num_threads": "4"}),
    ],
)
def test_only_the_threads_of_ucx_are_ours(backend, params, expected):
    given = dict(params)
    agent = with_thread(Agent)()
    agent.create_backend(backend, params)
    assert agent.made == [(backend, expected)] and params == given


def test_vllms_worker_gets_such_an_agent_while_ours_is_made(monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import base_worker

    monkeypatch.setattr(base_worker, "NixlWrapper", Agent)
    with pytest.raises(KeyError), vllm_makes_such():
        agent = base_worker.NixlWrapper()
        agent.create_backend("UCX", {"num_threads": "4"})
        assert isinstance(agent, Agent) and agent.made == [("UCX", ONE_THREAD)]
        raise KeyError
    assert base_worker.NixlWrapper is Agent


@pytest.mark.parametrize("threads", [4, 0])
def test_a_few_rows_are_read_by_nixls_own_thread(threads):
    """As a chunk is: several rows that are no neighbours. Without threads, by the caller, as before."""
    api = pytest.importorskip("nixl._api")
    config = api.nixl_agent_config(num_threads=threads)
    theirs = api.nixl_agent(str(uuid.uuid4()), config)
    ours = with_thread(api.nixl_agent)(str(uuid.uuid4()), config)
    assert ours.backend_options["UCX"] == (ONE_THREAD if threads else {})  # as UCX's backend has it
    source = torch.randint(0, 256, (ROWS, ROW), dtype=torch.uint8)
    target = torch.zeros(ROWS, ROW, dtype=torch.uint8)
    theirs.register_memory(source)
    ours.register_memory(target)
    name = ours.add_remote_agent(theirs.get_agent_metadata())

    def rows(agent, pool):
        return ours.prep_xfer_dlist(
            agent, np.array([(pool.data_ptr(), ROW, 0, ROW, ROWS)], np.uint64), mem_type="DRAM"
        )

    ids = np.arange(0, ROWS, 2, dtype=np.int32)
    handle = ours.make_prepped_xfer(
        "READ", rows("NIXL_INIT_AGENT", target), ids, rows(name, source), ids[::-1].copy()
    )
    state = ours.transfer(handle)
    while state == "PROC":
        state = ours.check_xfer_state(handle)
    assert state == "DONE"
    ours.release_xfer_handle(handle)
    assert target[ids].equal(source[ids[::-1].copy()]) and not target[ids + 1].any()
