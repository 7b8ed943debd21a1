"""What the hand-over counts reaches Prometheus, of all ranks."""

import functools
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from vllm_xlayer.connector.nixl.stats import RowNixlPromMetrics, RowNixlStats

CONFIG = SimpleNamespace(kv_transfer_config=None)
"""Of vLLM's; its metrics keep what is in it."""


def test_two_ranks_add_up_and_reach_prometheus():
    ranks = [RowNixlStats(), RowNixlStats()]
    assert all(rank.is_empty() for rank in ranks)
    ranks[0].record_rows(7)
    ranks[1].record_rows(5)
    ranks[1].record_failure("seal")
    ranks[1].record_failure("late")
    ranks[1].record_failure("late")
    assert not any(rank.is_empty() for rank in ranks)
    sent = [rank.clone_and_reset() for rank in ranks]
    assert all(rank.is_empty() for rank in ranks)
    data = RowNixlStats().aggregate(sent[0]).aggregate(sent[1]).data
    registry = CollectorRegistry()  # an engine of this process may have registered its own
    kinds = {kind: functools.partial(kind, registry=registry) for kind in (Counter, Gauge, Histogram)}
    metrics = RowNixlPromMetrics(CONFIG, kinds, ["model_name", "engine"], {0: ["m", "0"], 1: ["m", "1"]})
    metrics.observe(data, 1)

    def value(name, **labels):
        return registry.get_sample_value(f"vllm:xlayer_handover_{name}_total", {"model_name": "m", **labels})

    assert value("rows", engine="1") == 12 and value("rows", engine="0") == 0
    counted = {"seal": 1, "late": 2, "lost": 0, "busy": 0, "params": 0}
    assert {reason: value("failures", engine="1", reason=reason) for reason in counted} == counted


def test_what_a_front_end_builds_from_what_was_sent_is_the_same():
    stats = RowNixlStats()
    stats.record_rows(3)
    assert RowNixlStats(stats.data).data == stats.data
