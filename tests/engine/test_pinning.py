"""The host tier while its memory is being pinned: not used, then used; or never; or stopped half way.

On the CPU platform there is nothing to pin, and functions that do nothing stand in for CUDA. On a GPU the
real ones are held up.
"""

import logging
import threading
import time

import pytest
from faults import (
    TALLY,
    check,
    core_of,
    live_connector,
    manager_of,
    scheduler_side,
    settle,
    without_connector,
)
from model_fixture import ON_GPU, random_prompts, vllm_greedy

from vllm_xlayer.connector.host import pinning
from vllm_xlayer.connector.worker import RowWorkerMetadata

NUM_TOKENS = 8
PROMPTS = random_prompts([5, 100, 16, 33, 200, 1])
ROW = 2 * 2 * 2 * 16 * 32 * 4
PIECES = 8
NONE, WHOLE_BLOCKS = [0] * len(PROMPTS), [(len(p) - 1) // 16 * 16 for p in PROMPTS]


class Gate:
    """Pins no further than it is open."""

    def __init__(self, monkeypatch):
        self.open = threading.Event()
        self.refuse_at = None
        self.pinned = []
        real = (pinning.pin, pinning.unpin) if ON_GPU else (lambda *_: None, lambda *_: None)
        self._pin, self._unpin = real
        if not ON_GPU:
            monkeypatch.setattr(pinning, "needed", lambda: True)
            monkeypatch.setattr(pinning, "enter", lambda device: None)
        monkeypatch.setattr(pinning, "PIECE_BYTES", 32 * ROW)
        monkeypatch.setattr(pinning, "pin", self.pin)
        monkeypatch.setattr(pinning, "unpin", self.unpin)

    def pin(self, address, size):
        assert len(self.pinned) < PIECES // 2 or self.open.wait(60)
        if len(self.pinned) == self.refuse_at:
            raise RuntimeError("cudaHostRegister: cudaErrorMemoryAllocation")
        self._pin(address, size)
        self.pinned.append(address)

    def unpin(self, address):
        self._unpin(address)
        self.pinned.remove(address)


@pytest.fixture
def gate(monkeypatch):
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


@pytest.fixture(scope="module")
def answers(make_llm, tiny_llama):
    return without_connector(make_llm, tiny_llama, PROMPTS, NUM_TOKENS)


def start(make_llm, model, **extra):
    extra = {"cpu_bytes_to_use": PIECES * 32 * ROW} | extra
    transfer = dict(kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=extra)
    llm = make_llm(model, wait_for_tier=False, kv_transfer_config=transfer)
    live_connector().pool.fill_(0xFF)
    return llm


def forget(llm):
    """As forget_device_cache, which waits for the pinning."""
    deadline = time.monotonic() + 300
    while not llm.reset_prefix_cache():  # the step in flight still holds blocks
        assert time.monotonic() < deadline
        llm.llm_engine.step()
    live_connector().pool.fill_(0xFF)


@pytest.mark.fault("host memory not pinned yet")
@pytest.mark.parametrize("disk", [False, True], ids=["host", "disk behind it"])
def test_requests_do_not_wait_for_the_tier(make_llm, tiny_llama, answers, gate, caplog_vllm, tmp_path, disk):
    extra = dict(disk_path=str(tmp_path), disk_bytes_to_use=1 << 30) if disk else {}
    if disk:
        gate.open.set()
        llm = start(make_llm, tiny_llama, **extra)
        settle(llm)  # pinned
        vllm_greedy(llm, PROMPTS, NUM_TOKENS)
        settle(llm)
        core_of(llm).shutdown()
        gate.open.clear()
    llm = start(make_llm, tiny_llama, **extra)
    worker = live_connector().connector_worker.worker
    for _ in range(2):
        assert check(llm, PROMPTS, answers) == NONE
        TALLY["tries"] += len(PROMPTS)
        forget(llm)
    assert worker.rows_stored == 0 and not worker.ready and not manager_of(llm).host.chunks()
    assert core_of(llm).scheduler.has_requests()  # so that the engine hears of it
    gate.open.set()
    settle(llm)
    assert worker.ready and len(gate.pinned) == PIECES
    assert check(llm, PROMPTS, answers) == (WHOLE_BLOCKS if disk else NONE)
    settle(llm)
    forget(llm)
    assert check(llm, PROMPTS, answers) == WHOLE_BLOCKS
    settle(llm)
    core_of(llm).shutdown()
    assert not gate.pinned and not worker.ready


@pytest.mark.fault("host memory not available")
def test_memory_that_cannot_be_pinned(make_llm, tiny_llama, answers, gate, caplog_vllm):
    gate.refuse_at = PIECES - 1
    llm = start(make_llm, tiny_llama)
    assert check(llm, PROMPTS, answers) == NONE
    gate.open.set()
    settle(llm)
    TALLY["tries"] += 1
    assert not gate.pinned
    forget(llm)
    for _ in range(2):
        assert check(llm, PROMPTS, answers) == NONE
        settle(llm)
        forget(llm)
    assert not manager_of(llm).chunks() and not core_of(llm).scheduler.has_requests()
    warnings = [r.getMessage() for r in caplog_vllm.records if r.levelno >= logging.WARNING]
    said = [text for text in warnings if "host tier" in text]
    assert any("cudaErrorMemoryAllocation" in text and "cpu_bytes_to_use" in text for text in said)
    assert len(said) <= 2


@pytest.mark.fault("engine stop during store")
def test_stopped_while_it_is_pinned(make_llm, tiny_llama, answers, gate):
    llm = start(make_llm, tiny_llama)
    check(llm, PROMPTS, answers)
    pins = live_connector().connector_worker.worker._pins
    threading.Timer(0.2, gate.open.set).start()
    core_of(llm).shutdown()
    TALLY["tries"] += 1
    assert not pins._thread.is_alive() and not gate.pinned and not pins.ready


@pytest.mark.anywhere
def test_a_tier_of_several_ranks_waits_for_all(make_llm, tiny_llama, gate):
    """One engine, told what two workers would say."""
    llm = start(make_llm, tiny_llama)
    host = manager_of(llm).host
    host.waits_for = 2
    both = RowWorkerMetadata(ready=1).aggregate(RowWorkerMetadata())
    host.ready(both.ready)
    assert not host.serves and scheduler_side(llm).has_pending_push_work()
    host.ready(RowWorkerMetadata(ready=0).aggregate(RowWorkerMetadata(ready=1)).ready)
    assert host.serves
    assert RowWorkerMetadata(ready=1).aggregate(RowWorkerMetadata(ready=1)).ready == 2


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.anywhere
def test_pinned_pieces_are_what_copies_take(make_llm, tiny_llama, answers, monkeypatch):
    """Real pieces, so small that neighbouring chunks lie in different ones."""
    monkeypatch.setattr(pinning, "PIECE_BYTES", ROW)
    llm = start(make_llm, tiny_llama)
    settle(llm)
    check(llm, PROMPTS, answers)
    settle(llm)
    forget(llm)
    assert check(llm, PROMPTS, answers) == WHOLE_BLOCKS
    host = live_connector().connector_worker.worker.host
    assert host.is_pinned() and host[-1].is_pinned()
