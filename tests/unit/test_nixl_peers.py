"""Peers whose rows cannot be read: each request begins a handshake with them, and none leaves anything."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from test_nixl_reshard import descriptor
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.pull_worker import NixlPullConnectorWorker

from vllm_xlayer.connector.nixl.record import PROTOCOL, Record, RecordsDiffer
from vllm_xlayer.connector.nixl.reshard import CannotReshard
from vllm_xlayer.connector.nixl.wire import BUFFERS, NixlWire, StagingTooSmall
from vllm_xlayer.connector.nixl.worker import RowNixlWorker

HEADS = 4
LINK = dict(host="h", ucx_tls="", rdma=True)


def record(tp_size=1, seals=0, blocks=4, **must_equal):
    layout = descriptor(max(1, HEADS // tp_size))
    return Record(must_equal, layout.to_dict(), tp_size, 0, blocks, seals, LINK)


@pytest.fixture
def prepared(monkeypatch):
    """Engines whose descriptors vLLM or we have given to NIXL."""
    made = []
    monkeypatch.setattr(
        NixlPullConnectorWorker,
        "add_remote_agent",
        lambda self, meta, *_: made.append(meta.engine_id) or "agent",
    )
    return made


@pytest.fixture
def worker(prepared):
    """As much of one as a handshake uses, whose ring has room for two rows of ours a buffer."""
    made = object.__new__(RowNixlWorker)
    made.layout, made.record = descriptor(HEADS), record()
    made.model_config = SimpleNamespace(get_total_num_kv_heads=lambda: HEADS)
    agent = SimpleNamespace(prep_xfer_dlist=lambda *_, **__: prepared.append("rows"))
    row = made.layout.row_bytes
    made.wire = NixlWire(
        agent, "DRAM", torch.zeros(4, row, dtype=torch.uint8),
        torch.zeros(BUFFERS, 2 * row, dtype=torch.uint8), lambda handle: None,
    )  # fmt: skip
    made.nixl_memory_type, made.nixl_backends, made.tp_rank = "DRAM", [], 0
    return made


def meet(worker, theirs):
    meta = SimpleNamespace(
        engine_id="p", region_members=[[PROTOCOL, theirs.encode()]], kv_caches_base_addr=[4096], device_id=0,
        block_lens=[theirs.layout["row_bytes"]],
    )  # fmt: skip
    worker.add_remote_agent(meta, 0, theirs.tp_size)


def test_a_peer_that_can_be_read(worker, prepared):
    meet(worker, record())
    assert prepared == ["p", "rows", "rows"] and ("p", 0) in worker.wire.peers


@pytest.mark.parametrize(
    ("theirs", "error"),
    [
        (record(weights="others"), RecordsDiffer),
        (record(tp_size=2 * HEADS), CannotReshard),
        (record(seals=4096, blocks=1 << 20), RecordsDiffer),
    ],
)
def test_peers_that_cannot(worker, prepared, theirs, error):
    for _ in range(3):
        with pytest.raises(error):
            meet(worker, theirs)
    assert not prepared and not worker.wire.peers


def test_a_peer_with_more_seals_than_the_ring_has_room_for(worker, prepared):
    worker.record = record(seals=4096)
    for _ in range(3):
        with pytest.raises(StagingTooSmall):
            meet(worker, record(seals=4096, blocks=1 << 20))
    assert not prepared and not worker.wire.peers
