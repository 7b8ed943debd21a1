"""What the tiers did, as increments and as a line: nothing twice, nothing lost, nothing said when idle."""

from collections import Counter
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import TransferStats

from vllm_xlayer.connector.stats import activity
from vllm_xlayer.connector.stats.activity import TierActivity, queues
from vllm_xlayer.connector.stats.metrics import HITS, QUEUE, RowConnectorStats
from vllm_xlayer.connector.worker import RowWorkerMetadata

ROW = 1000
NO_QUEUES = queues([], [])


@pytest.fixture
def clock(monkeypatch):
    """now: seconds; lines: what was logged."""
    clock = SimpleNamespace(now=1e6, lines=[])
    monkeypatch.setattr(activity, "time", SimpleNamespace(monotonic=lambda: clock.now))
    logger = SimpleNamespace(info=lambda text, *args: clock.lines.append(text % args))
    monkeypatch.setattr(activity, "logger", logger)
    return clock


@pytest.fixture
def tiers():
    return SimpleNamespace(
        host=SimpleNamespace(stores_failed=0, loads_failed=0),
        disk=SimpleNamespace(
            counts=Counter(), seconds=dict(store=0.0, load=0.0), used=0, limit=5 * 10**9, chunk_bytes=4 * ROW
        ),
    )


@pytest.fixture
def tier(clock, tiers):
    return TierActivity(tiers.host, tiers.disk, ROW)


def moved(stores=(), loads=()):
    stats = TransferStats()
    for size, seconds in stores:
        stats.store.record(size, seconds)
    for size, seconds in loads:
        stats.load.record(size, seconds)
    return stats


def values(stats):
    return {
        (name.removeprefix("vllm:xlayer_"), *labels): value
        for name, by_labels in stats.data["data"].items()
        for labels, value in by_labels.items()
    }


def test_everything_once_and_then_what_changed(tier, tiers):
    first = values(tier.report(NO_QUEUES))
    assert first["transfer_bytes", "load", "disk"] == 0 and first["queue_depth", "store", "host"] == 0
    assert {value for key, value in first.items() if key[0] != "disk_limit_bytes"} == {0}
    assert not values(tier.report(NO_QUEUES))
    tier.moved(moved(loads=[(5 * ROW, 0.5), (ROW, 0.5)]), 0, 6)
    tiers.disk.counts["miss: short"] += 2
    tiers.host.loads_failed += 3
    assert values(tier.report(NO_QUEUES)) == {
        ("transfer_bytes", "load", "host"): 6 * ROW,
        ("transfer_rows", "load", "host"): 6,
        ("transfer_seconds", "load", "host"): 1.0,
        ("misses", "disk", "short"): 2,
        ("failures", "load", "host", "copy"): 3,
    }
    assert not values(tier.report(NO_QUEUES))
    tiers.disk.counts["miss: short"] += 1
    assert values(tier.report(NO_QUEUES)) == {("misses", "disk", "short"): 1}


def test_the_disks_counts_become_rows_and_bytes(tier, tiers):
    tier.report(NO_QUEUES)
    tiers.disk.counts.update({"stored": 3, "hit": 2, "not stored: no room": 1, "not loaded: disk error": 1})
    tiers.disk.used = 7
    assert values(tier.report(NO_QUEUES)) == {
        ("transfer_bytes", "store", "disk"): 12 * ROW,
        ("transfer_rows", "store", "disk"): 12,
        ("transfer_bytes", "load", "disk"): 8 * ROW,
        ("transfer_rows", "load", "disk"): 8,
        ("hits", "disk"): 2,
        ("failures", "store", "disk", "no room"): 1,
        ("failures", "load", "disk", "disk error"): 1,
        ("disk_used_bytes",): 7,
    }


def test_ranks_add_up(tier):
    """As vLLM does it: the ranks' metadata of a step are merged before the scheduler sees them."""
    ranks = [
        RowWorkerMetadata({7: 1}, moved(stores=[(2 * ROW, seconds)]), rows_stored=2)
        for seconds in (0.25, 0.5)
    ]
    merged = ranks[0].aggregate(ranks[1])
    tier.moved(merged.transfer_stats, merged.rows_stored, merged.rows_loaded)
    found = values(tier.report(NO_QUEUES))
    assert found["transfer_rows", "store", "host"] == 4 and found["transfer_seconds", "store", "host"] == 0.75


def test_queues_by_direction_and_tier():
    depth = queues([({1, 2}, True), ({3}, True), ({4}, False)], [([5, 6, 7], False)])
    assert depth == {("load", "host"): 3, ("store", "host"): 1, ("load", "disk"): 0, ("store", "disk"): 3}


def test_lookups_count_when_admitted(tier):
    tier.report(NO_QUEUES)
    for _ in range(3):  # asked in every step, for want of device memory
        tier.lookups.answered("a", 2, 1, "absent")
    tier.lookups.answered("b", 5, 5, "late")
    tier.lookups.forget("b")  # aborted
    assert not values(tier.report(NO_QUEUES))
    for request in ("a", "a", "b", "unknown"):
        tier.lookups.admitted(request)
    assert values(tier.report(NO_QUEUES)) == {("hit_tokens",): 2, ("miss_tokens", "absent"): 1}


def test_a_line_a_minute_while_there_is_something_to_say(tier, tiers, clock):
    tier.report(NO_QUEUES)
    clock.now += 1000
    tier.report(NO_QUEUES)
    assert not clock.lines  # idle since the start
    tier.moved(moved(stores=[(10**9, 0.5)]), 10**6, 0)
    for _ in range(60):
        tier.report(NO_QUEUES)
        clock.now += 1
        assert not clock.lines
    tier.report(NO_QUEUES)
    assert clock.lines == [
        "XLayerConnector: in 60 s stored 1000000 rows, 1.00 GB at 2.0 GB/s; disk 0.00 of 5.00 GB"
    ]
    for _ in range(1000):
        tier.report(NO_QUEUES)
        clock.now += 1
    assert len(clock.lines) == 1  # idle again
    for _ in range(300):
        tiers.disk.counts["stored"] += 1
        tier.report(NO_QUEUES)
        clock.now += 1
    assert len(clock.lines) == 5


def test_the_line(tier, tiers, clock):
    tier.report(NO_QUEUES)
    tier.moved(moved([(2 * 10**9, 0.5)], [(10**9, 0.02)]), 2 * 10**6, 10**6)
    tier.lookups.answered("a", 3, 1, "absent")
    tier.lookups.admitted("a")
    tiers.disk.counts.update({"hit": 250_000, "miss: damaged payload": 2, "not stored: disk too slow": 4})
    tiers.disk.seconds["load"] = 0.5
    tiers.disk.used = 3 * 10**9
    tiers.host.loads_failed = 1
    tier.report(NO_QUEUES)
    clock.now += 61
    tier.report(NO_QUEUES)
    assert clock.lines == [
        "XLayerConnector: in 61 s stored 2000000 rows, 2.00 GB at 4.0 GB/s; loaded 1000000 rows, 1.00 GB at "
        "50.0 GB/s; read from disk 1000000 rows, 1.00 GB at 2.0 GB/s; hits 75 % of 4 tokens; tokens missed: "
        "(absent) 1; misses: disk (damaged payload) 2; failures: load host (copy) 1, store disk "
        "(disk too slow) 4; disk 3.00 of 5.00 GB"
    ]


def test_the_rest_is_said_at_the_end(tier, clock):
    tier.log()
    assert not clock.lines
    tier.lookups.answered("a", 0, 1, "absent")
    tier.lookups.admitted("a")
    tier.report(NO_QUEUES)
    clock.now += 5
    tier.log()
    tier.log()
    assert [line.split(";")[0] for line in clock.lines] == ["XLayerConnector: in 5 s hits 0 % of 1 tokens"]


def test_vllms_line_is_without_ours():
    stats = RowConnectorStats()
    stats.increase_counter(HITS, 1, ("disk",))
    stats.set_gauge(QUEUE, 1, ("load", "host"))
    stats.increase_counter("vllm:kv_offload_load_bytes", 3)
    assert stats.reduce() == {"vllm:kv_offload_load_bytes": 3}
