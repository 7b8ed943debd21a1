"""A prompt's keys are looked up at once: what vLLM finds that asks for each, and what that leaves behind."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from vllm_xlayer.connector.disk.manager import TieredManager
from vllm_xlayer.connector.disk.tier import DiskTier
from vllm_xlayer.connector.host.manager import HostTierManager
from vllm_xlayer.connector.scheduler import RowConnectorScheduler

REQUEST = ReqContext("request")
KEYS = [OffloadKey(bytes([i]) * 8) for i in range(8)]
UNKNOWN = [OffloadKey(bytes([i]) * 8) for i in range(20, 25)]
NOT_KNOWN = [*UNKNOWN, *KEYS[:5], KEYS[6]]
"""To the disk tier; some of it is in host memory."""


class Disk(SecondaryTierManager):
    """Has KEYS[5], and has to look for UNKNOWN; `done` are the jobs that ended since it was asked last."""

    tier_type, done = "disk", ()
    _bp_detector = locality = None

    def __init__(self):
        self.asked = []

    def lookup(self, key, req_context):
        if key in UNKNOWN:
            self.asked.append(key)
            return LookupResult.RETRY
        return LookupResult.HIT if key == KEYS[5] else LookupResult.MISS

    ask = DiskTier.ask

    @property
    def _store(self):
        return SimpleNamespace(known=lambda key: None if key in NOT_KNOWN else key == KEYS[5])

    @property
    def _finder(self):
        return SimpleNamespace(ask=lambda key, request: self.asked.append(key) or True)

    def get_finished_jobs(self):
        done, self.done = self.done, ()
        return done

    def on_new_request(self, req_context):
        return SimpleNamespace(policy=None)

    submit_store = submit_load = drain_jobs = None


def make(kind):
    """Eight chunks. KEYS[:5] are ready, KEYS[1] is being read, KEYS[6] is being written."""
    host = HostTierManager(8, cache_policy=kind[:3])
    host.kv_view = memoryview(bytearray(8)).cast("B", (8, 1))
    made = TieredManager(host, Disk()) if "disk" in kind else host
    made.on_new_request(REQUEST)
    host.prepare_store(KEYS[:5], REQUEST)
    host.complete_store(KEYS[:5], REQUEST)
    host.prepare_load(KEYS[1:2], REQUEST)
    host.prepare_store(KEYS[6:7], REQUEST)
    return made


@pytest.fixture(params=["lru", "arc", "lru, with a disk"])
def kind(request):
    return request.param


@pytest.fixture
def manager(kind):
    return make(kind)


def connector(manager):
    scheduler = object.__new__(RowConnectorScheduler)
    scheduler.manager = manager
    scheduler._describes_events = False
    scheduler._events_tracker = SimpleNamespace(record_lookup=lambda *what: None)
    return scheduler


def as_found(keys, manager):
    return connector(manager)._maximal_prefix_lookup(keys, REQUEST, None, None, 0)


def one_by_one(keys, manager):
    scheduler = connector(manager)
    return OffloadingConnectorScheduler._maximal_prefix_lookup(scheduler, keys, REQUEST, None, None, 0)


ASKED = {
    "all ready": KEYS[:5],
    "none": [],
    "the first is missing": [KEYS[7], KEYS[0]],
    "then missing": [*KEYS[:3], KEYS[7], KEYS[3]],
    "then written, then ready": [*KEYS[:3], KEYS[6], KEYS[3]],
    "then perhaps on the disk": [KEYS[0], KEYS[5], KEYS[1]],
    "then unknown": [KEYS[0], *UNKNOWN],
    "unknown, then ready": [*UNKNOWN[:3], KEYS[0], UNKNOWN[3]],
    "unknown, then perhaps on the disk": [*UNKNOWN[:2], KEYS[5], UNKNOWN[2]],
    "unknown, then missing": [*UNKNOWN[:2], KEYS[7], UNKNOWN[2]],
    "unknown, then written": [*UNKNOWN[:2], KEYS[6], UNKNOWN[2]],
}


@pytest.mark.parametrize("failed", [[], KEYS[2:3], KEYS[6:7]], ids=["", "a load failed", "a store failed"])
@pytest.mark.parametrize("keys", ASKED.values(), ids=ASKED)
def test_what_is_found(kind, keys, failed):
    ours, reference = make(kind), make(kind)
    for manager in (ours, reference):
        manager.fail(failed)
    assert as_found(keys, ours) == one_by_one(keys, reference)
    # What was on the disk is on its way.
    assert [*ours.host.chunks()] == [*reference.host.chunks()]
    assert [*ours.transfers()] == [*reference.transfers()]
    if "disk" in kind:
        assert ours.disk.asked == reference.disk.asked


def test_expected_numbers(manager):
    assert as_found(KEYS[:5], manager) == 5
    assert as_found([*KEYS[:3], KEYS[7], KEYS[3]], manager) == 3
    assert as_found([*KEYS[:3], KEYS[6]], manager) is None  # being written: asked again later
    manager.turn_off("for this test")
    assert as_found(KEYS[:5], manager) == 0


def test_events_say_that_all_is_gone_from_a_tier_that_is_off():
    manager = HostTierManager(8, enable_events=True)
    manager.prepare_store(KEYS[:5], REQUEST)
    manager.complete_store(KEYS[:3], REQUEST)
    (stored,) = manager.take_events()
    manager.turn_off("for this test")
    manager.turn_off("again")
    manager.complete_store(KEYS[3:5], REQUEST)  # was under way
    gone, *others = manager.take_events()
    assert [*stored.keys] == KEYS[:3] and not stored.removed
    assert [*gone.keys] == KEYS[:3] and gone.removed
    assert all(event.removed for event in others) and len(manager.chunks()) == 3


def test_nothing_is_found_before_the_memory_may_be_used():
    manager = HostTierManager(8, workers_to_wait_for=1)
    manager.ready(1)
    manager.prepare_store(KEYS[:5], REQUEST)
    manager.complete_store(KEYS[:5], REQUEST)
    manager.waits_for = 1
    assert as_found(KEYS[:5], manager) == 0
    manager.ready(1)
    assert as_found(KEYS[:5], manager) == 5


def test_ready_keys_are_not_asked_for_one_by_one(manager, monkeypatch):
    asked = []
    monkeypatch.setattr(manager, "lookup", lambda key, req_context: asked.append(key) or LookupResult.MISS)
    assert as_found([*KEYS[:5], KEYS[7]], manager) == 5
    assert {*asked} == {KEYS[7]}


def test_events_that_carry_tokens_are_told_of_every_key(manager, monkeypatch):
    scheduler, described = connector(manager), []
    scheduler._describes_events = True
    monkeypatch.setattr(scheduler._events_tracker, "record_lookup", lambda *what: described.append(what))
    assert scheduler._maximal_prefix_lookup(KEYS[:5], REQUEST, "request", "group", 7) == 5
    assert described == [("request", "group", 7 + i, key) for i, key in enumerate(KEYS[:5])]


def test_the_disks_finished_jobs_are_seen():
    manager = make("lru, with a disk")
    job = manager.create_store_job([KEYS[0]], REQUEST)
    manager.disk.done = [JobResult(job.job_id, True)]
    assert as_found(KEYS[:1], manager) == 1
    assert not list(manager.transfers())
