"""What Prometheus is told: exactly what happened."""

import pytest
from disk_fixture import BLOCKS, ROW, WHOLE_BLOCKS, cached, connector, fill
from faults import live_connector
from metrics_fixture import scrape

from vllm_xlayer.connector import tiering

COUNTING = dict(disable_log_stats=False)


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(tiering, "DEADLINE_SECONDS", 60)  # these tests wait for a slow disk


def start(make_llm, model, **transfer):
    llm = make_llm(model, kv_transfer_config=transfer, **COUNTING)
    live_connector().pool.fill_(0xFF)
    return llm


def test_vllms_own_metrics_go_on(make_llm, tiny_llama, tmp_path):
    """Also those of a second tier, which vLLM's front end dies of where it does not know them."""
    fill(make_llm, tiny_llama, tmp_path)
    llm = start(make_llm, tiny_llama, **connector(tmp_path))
    assert cached(llm)[1] == WHOLE_BLOCKS
    found = scrape("kv_offload")
    assert found["kv_offload_load_bytes_total"] == BLOCKS * ROW
    assert found["kv_offload_load_size_count"] == sum(n > 0 for n in WHOLE_BLOCKS)
    assert found["kv_offload_total_bytes_total{transfer_type=CPU_to_GPU}"] == BLOCKS * ROW
    assert found["kv_offload_tiering_lookup_sync_delay_seconds_count"] > 0
