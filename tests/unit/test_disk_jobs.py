"""The disk tier behind the host tier, as vLLM's TieringOffloadingManager drives it; no engine."""

import time

import numpy as np
import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import (
    LookupResult,
    OffloadKey,
    ReqContext,
    ScheduleEndContext,
    make_offload_key,
)
from vllm.v1.kv_offload.tiering.base import TransferJob

from vllm_xlayer.connector.disk import manager as tiering
from vllm_xlayer.connector.disk import tier as disk_tier
from vllm_xlayer.connector.disk.format import HEADER_BYTES, TierIdentity
from vllm_xlayer.connector.disk.jobs import Unused
from vllm_xlayer.connector.disk.manager import TieredManager
from vllm_xlayer.connector.disk.tier import DiskTier
from vllm_xlayer.connector.host.manager import HostTierManager

REQUEST = ReqContext("request")
KEYS = [OffloadKey(bytes([i]) * 8 + bytes(4)) for i in range(4)]
IDENTITY = TierIdentity("layout", "nvfp4", "model", "settings", "weights", 1, 16, 1)
HIT, PENDING, MISS = LookupResult.HIT, LookupResult.HIT_PENDING, LookupResult.MISS


@pytest.fixture
def start(tmp_path):
    """Makes a manager of 8 chunks over the test's folder; all are stopped at the end."""
    made = []

    def make():
        view = np.zeros((8, 64), dtype=np.uint8)
        host = HostTierManager(8)
        host.kv_view = view.data
        made.append(TieredManager(host, DiskTier(view, tmp_path, 1 << 20, IDENTITY, 8)))
        made[-1].on_new_request(REQUEST)
        return made[-1], view

    yield make
    for manager in made:
        manager.shutdown()


def store(manager, view):
    output = manager.prepare_store(KEYS, REQUEST)
    for chunk, key in zip(output.store_spec.block_ids, KEYS, strict=True):
        view[chunk] = key[0]
    manager.complete_store(KEYS, REQUEST)
    settle(manager)


def settle(manager):
    """Steps until nothing moves between the tiers."""
    end = time.monotonic() + 60
    while True:
        manager.on_schedule_end(ScheduleEndContext([], []))
        if not list(manager.transfers()):
            return
        assert time.monotonic() < end, "the disk did not answer"
        time.sleep(0.001)


def found(manager):
    return [manager.lookup(key, REQUEST) for key in KEYS]


def test_one_damaged_entry_does_not_spoil_its_batch(start, tmp_path):
    store(*start())
    path = next(tmp_path.rglob(f"{KEYS[2].hex()}.row"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    manager, view = start()
    assert found(manager) == [PENDING] * 4
    settle(manager)
    assert found(manager) == [HIT, HIT, MISS, HIT]
    chunks = manager.prepare_load([KEYS[0], KEYS[1], KEYS[3]], REQUEST).block_ids
    assert [int(view[chunk].max()) for chunk in chunks] == [0, 1, 3]
    assert manager.disk.counts["hit"] == 3 and manager.disk.counts["miss: damaged payload"] == 1


def test_a_request_that_waited_too_long_is_computed(start, monkeypatch):
    store(*start())
    manager, _ = start()
    monkeypatch.setattr(tiering, "DEADLINE_SECONDS", 0.0)
    monkeypatch.setattr(disk_tier.DiskStore, "read", lambda *_: time.sleep(0.05))
    assert manager.lookup(KEYS[0], REQUEST) is PENDING and not manager.is_late(ReqContext("another"))
    time.sleep(0.001)
    assert manager.is_late(REQUEST) and manager.lookup(KEYS[0], REQUEST) is MISS
    settle(manager)
    assert manager.lookup(KEYS[0], REQUEST) is HIT  # it came, and is not asked of the disk
    manager.prepare_load(KEYS[:1], REQUEST)
    assert not manager.is_late(REQUEST)


def test_what_is_used_in_host_memory_counts_as_used_on_the_disk(start, monkeypatch):
    manager, view = start()
    store(manager, view)
    touched = []
    monkeypatch.setattr(manager.disk._store, "touch", touched.extend)
    manager.prepare_load(KEYS[:2], REQUEST)
    assert touched == [KEYS[1], KEYS[0]]  # a prompt's end goes before its beginning
    manager.prepare_store(KEYS[2:], REQUEST)
    assert touched[2:] == [KEYS[3], KEYS[2]]


def test_nothing_is_read_from_the_disk_until_workers_have_reported(start):
    """After a reset a worker may still write to host memory; vLLM says when it does no more."""
    manager, view = start()
    store(manager, view)
    manager.reset_cache()
    store_again = manager.prepare_store(KEYS, REQUEST)
    manager.complete_store(store_again.keys_to_store, REQUEST)
    settle(manager)
    manager.host.reset_cache()
    if hasattr(manager, "on_reset_flushed"):  # vLLM 0.33 and newer
        assert found(manager) == [MISS] * 4
        manager.on_reset_flushed()
    assert found(manager) == [PENDING] * 4
    settle(manager)


def test_what_no_layer_has_of_a_row_is_not_on_the_disk(tmp_path):
    """It is the former owner's: of another prompt, perhaps of another user."""
    view = np.full((2, 64), 0xAB, dtype=np.uint8)
    unused = Unused(32, {1: [(8, 16), (24, 32)]})  # of rows of two ranks
    tier = DiskTier(view, tmp_path, 1 << 20, IDENTITY, 8, unused)
    keys = [make_offload_key(bytes(8), group) for group in range(2)]
    tier.submit_store(TransferJob(0, keys, np.arange(2), False, REQUEST))
    tier.shutdown()
    written = {path.stem: path.read_bytes()[HEADER_BYTES:] for path in tmp_path.rglob("*.row")}
    row = bytes([0xAB] * 8 + [0] * 8) * 2
    assert written == {keys[0].hex(): bytes([0xAB] * 64), keys[1].hex(): row * 2}
    assert (view == 0xAB).all()
