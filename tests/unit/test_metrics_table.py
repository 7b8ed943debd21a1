"""docs/metrics.md against what the package defines: every metric, with its labels, and no other."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from vllm.v1.kv_offload.base import OffloadingCounterMetadata

from vllm_xlayer.connector.nixl.reads import REASONS
from vllm_xlayer.connector.nixl.stats import PREFIX, RowNixlPromMetrics
from vllm_xlayer.connector.stats.metrics import DEFINITIONS

TEXT = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
LABEL = "engine"
"""As vLLM's own labels, which come first in each metric."""


def table(column: str) -> dict[str, list[str]]:
    """Name -> cells after it, of the table whose first column is called so."""
    _, _, rest = TEXT.partition(f"\n| {column} |")
    lines = rest.partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return {name.strip("`"): cells for name, *cells in rows}


def labels(cell: str) -> set[str]:
    return {label for label in re.split(r"[,\s`]+", cell) if label}


def test_the_tiers_metrics():
    # Prometheus' client adds _total to the names of counters.
    defined = {
        name + "_total" * isinstance(metric, OffloadingCounterMetadata): set(metric.labelnames)
        for name, metric in DEFINITIONS.items()
    }
    assert {name: labels(cells[0]) for name, cells in table("name").items()} == defined


def test_the_hand_overs_metrics():
    registry = CollectorRegistry()

    def on(kind):
        return lambda name, documentation, labelnames=(), **more: kind(
            name, documentation, labelnames, registry=registry, **more
        )

    types = {kind: on(kind) for kind in (Counter, Gauge, Histogram)}
    RowNixlPromMetrics(SimpleNamespace(kv_transfer_config=None), types, [LABEL], {0: ["0"]})
    defined = {
        f"{family.name.removeprefix(PREFIX)}_total": set().union(*(s.labels for s in family.samples))
        - {LABEL}
        for family in registry.collect()
        if family.name.startswith(PREFIX)
    }
    found = table("name (`vllm:xlayer_handover_...`)")
    assert {name: labels(cells[0]) for name, cells in found.items()} == defined
    assert set(re.findall(r"`(\w+)` \(", found["failures_total"][1])) == set(REASONS)
