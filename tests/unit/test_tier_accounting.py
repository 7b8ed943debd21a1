"""The checker of the host tier's accounts must see every kind of imbalance."""

from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.v1.kv_offload.base import LookupResult, OffloadKey, ReqContext
from vllm.v1.kv_offload.cpu.policies.base import CachePolicy

from vllm_xlayer.connector.host.accounts import AccountingError, check_accounts
from vllm_xlayer.connector.host.manager import HostTierManager

REQUEST = ReqContext("request")
KEYS = [OffloadKey(bytes([i]) * 8) for i in range(6)]


def job(keys, is_store):
    return SimpleNamespace(keys=set(keys), is_store=is_store)


@pytest.fixture(params=["lru", "arc"])
def tier(request):
    """Four chunks: two ready, one of them being read twice, one being written, one free."""
    manager = HostTierManager(4, cache_policy=request.param)
    scheduler = SimpleNamespace(
        manager=manager, _jobs={}, _req_status={}, _block_id_to_pending_jobs={}, _chunks_being_loaded=set(),
        _load_failed=set(),
    )  # fmt: skip
    manager.prepare_store(KEYS[:2], REQUEST)
    manager.complete_store(KEYS[:2], REQUEST)
    manager.prepare_store(KEYS[2:3], REQUEST)
    manager.prepare_load(KEYS[:1], REQUEST)
    manager.prepare_load(KEYS[:1], REQUEST)
    scheduler._jobs = {1: job(KEYS[:1], False), 2: job(KEYS[:1], False), 3: job(KEYS[2:3], True)}
    return scheduler


def test_balanced_accounts_pass(tier):
    check_accounts(tier)


def test_a_failed_store_is_dropped(tier):
    tier.manager.fail(KEYS[2:3])
    tier.manager.complete_store(KEYS[2:3], REQUEST)
    del tier._jobs[3]
    check_accounts(tier)
    assert tier.manager.lookup(KEYS[2], REQUEST) is LookupResult.MISS
    assert tier.manager.stores_failed == 1 and len(tier.manager.chunks()) == 2


def test_a_failed_load_is_dropped_when_nobody_reads_it(tier):
    tier.manager.fail(KEYS[:1])
    tier.manager.complete_load(KEYS[:1], REQUEST)
    del tier._jobs[1]
    check_accounts(tier)
    assert KEYS[0] in tier.manager.chunks()  # the other one still reads it
    assert tier.manager.lookup(KEYS[0], REQUEST) is LookupResult.MISS
    tier.manager.complete_load(KEYS[:1], REQUEST)
    del tier._jobs[2]
    check_accounts(tier)
    assert KEYS[0] not in tier.manager.chunks()
    assert tier.manager.loads_failed == 1


def test_all_chunks_can_be_used_after_failures(tier):
    manager = tier.manager
    manager.fail(KEYS[:3])
    manager.complete_store(KEYS[2:3], REQUEST)
    manager.complete_load(KEYS[:1], REQUEST)
    manager.complete_load(KEYS[:1], REQUEST)
    tier._jobs.clear()
    assert len(manager.prepare_store(KEYS[2:6], REQUEST).keys_to_store) == 4
    tier._jobs[9] = job(KEYS[2:6], True)
    check_accounts(tier)


def test_a_tier_that_is_off_finds_and_stores_nothing(tier):
    tier.manager.turn_off("for this test")
    assert tier.manager.lookup(KEYS[0], REQUEST) is LookupResult.MISS
    assert tier.manager.prepare_store(KEYS[4:], REQUEST).keys_to_store == []
    tier.manager.complete_store(KEYS[2:3], REQUEST)
    tier.manager.complete_load(KEYS[:1], REQUEST)
    tier.manager.complete_load(KEYS[:1], REQUEST)
    tier._jobs.clear()
    check_accounts(tier, idle=True)


def leak(tier):
    tier.manager._policy.remove(KEYS[1])
    tier.manager._num_evictable_cache_chunks -= 1


def free_twice(tier):
    tier.manager._free_list.append(tier.manager.chunks()[KEYS[1]].chunk_id)


def lose_a_reader(tier):
    del tier._jobs[2]


def lose_a_writer(tier):
    del tier._jobs[3]


def write_twice(tier):
    tier._jobs[4] = job(KEYS[2:3], True)


def read_what_is_not_there(tier):
    tier._jobs[4] = job(KEYS[5:], False)


def miscount(tier):
    tier.manager._num_evictable_cache_chunks += 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (leak, "chunk 1: expected one owner"),
        (free_twice, "chunk 1: expected one owner .* got 2"),
        (lose_a_reader, "expected 1 references, got 2"),
        (lose_a_writer, "expected 0 references, got -1"),
        (write_twice, "expected one writer"),
        (read_what_is_not_there, "expected a chunk for a transfer under way"),
        (miscount, "evictable chunks: expected 1, got 2"),
    ],
)
def test_imbalances_are_found(tier, damage, message):
    damage(tier)
    with pytest.raises(AccountingError, match=message):
        check_accounts(tier)


def test_leftovers_are_found_when_idle(tier):
    with pytest.raises(AccountingError, match="_jobs: expected nothing when idle"):
        check_accounts(tier, idle=True)


class UsersPolicy(CachePolicy):
    """With vLLM's interface, and none of its names."""

    def __init__(self, cache_capacity):
        self.held = {}

    def get(self, key):
        return self.held.get(key)

    def insert(self, key, chunk, req_context=None):
        self.held[key] = chunk

    def remove(self, key):
        del self.held[key]

    def touch(self, keys, req_context):
        pass

    def evict(self, n, protected):
        return None

    def clear(self):
        self.held.clear()


@pytest.mark.parametrize("chunks", [0, 4])
def test_a_users_policy_need_not_list_its_chunks(chunks):
    """The tier is turned off where there is no room, or memory cannot be pinned."""
    manager = HostTierManager(
        chunks, cache_policy="UsersPolicy", cache_policy_module_path=__name__, enable_events=True
    )
    if chunks:
        manager.prepare_store(KEYS[:2], REQUEST)
        manager.complete_store(KEYS[:2], REQUEST)
        check_accounts(SimpleNamespace(manager=manager, _jobs={}))
        manager.turn_off("no memory")
    assert manager.problem and not manager.serves
