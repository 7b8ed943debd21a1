"""Ranks that do not share the scheduler's memory, as on several hosts: no disk tier, and no wrong token.

Both ranks run on this machine; the second one's memory is a memory of its own, as another host's would be.
"""

import pytest
from disk_fixture import NUM_TOKENS, PROMPTS, connector, entries
from faults import TALLY, check, core_of, manager_of, settle, without_connector
from test_tensor_parallel import spoil_pool

from vllm_xlayer.connector import shared_memory, tiering

pytestmark = pytest.mark.fault("ranks on several hosts")


@pytest.fixture
def two_hosts(monkeypatch):
    """Workers started from now on are on one host each; they are forked from this process."""
    join = shared_memory.join

    def join_on_own_host(engine, rank, make):
        return join(f"{engine} host {rank}" if rank else engine, rank, make)

    monkeypatch.setattr(shared_memory, "join", join_on_own_host)
    for name in ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_XLAYER_DEBUG", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    monkeypatch.setattr(tiering, "DEADLINE_SECONDS", 60)
    return monkeypatch


def answered_right(llm, answers):
    """Twice, the second time with what the tiers have only: tokens found in a cache then."""
    llm.collective_rpc(spoil_pool)
    check(llm, PROMPTS, answers)
    settle(llm)
    assert llm.reset_prefix_cache()
    llm.collective_rpc(spoil_pool)
    found = check(llm, PROMPTS, answers)
    settle(llm)
    return found


def test_nothing_wrong_is_served_or_kept(make_llm, tiny_llama, two_hosts, tmp_path, caplog_vllm):
    answers = without_connector(make_llm, tiny_llama, PROMPTS, NUM_TOKENS, tensor_parallel_size=2)
    settings = dict(tensor_parallel_size=2, kv_transfer_config=connector(tmp_path))
    for _ in range(2):  # and after a restart
        llm = make_llm(tiny_llama, **settings)
        TALLY["tries"] += 1
        assert any(answered_right(llm, answers)), "the host tier works all the same"
        assert not hasattr(manager_of(llm), "disk")
        core_of(llm).shutdown()
    assert "does not share memory with rank 1" in caplog_vllm.text
    assert not entries(tmp_path)
    two_hosts.undo()
    llm = make_llm(tiny_llama, **settings)  # one host, the same folder
    assert any(answered_right(llm, answers))
    assert manager_of(llm).disk.counts["stored"] == len(entries(tmp_path)) > 0
