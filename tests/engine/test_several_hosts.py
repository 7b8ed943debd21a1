"""Ranks that do not share the scheduler's memory, as on several hosts: no disk tier, and no wrong token.

Both ranks run on this machine; the second one has a memory of its own, as on another host (own_host.py).
"""

import pytest
import torch
from disk_fixture import NUM_TOKENS, PROMPTS, connector, entries
from faults import TALLY, check, core_of, manager_of, settle, without_connector
from model_fixture import ON_GPU, transformers_greedy
from test_tensor_parallel import spoil_pool

from vllm_xlayer.connector.disk import manager as tiering

pytestmark = [
    pytest.mark.fault("ranks on several hosts"),
    pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.fixture
def environment(monkeypatch):
    for name in ("VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_XLAYER_DEBUG", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    monkeypatch.setattr(tiering, "DEADLINE_SECONDS", 60)


def reference(make_llm, model):
    if not ON_GPU:
        return transformers_greedy(model, PROMPTS, NUM_TOKENS)
    return without_connector(make_llm, model, PROMPTS, NUM_TOKENS, tensor_parallel_size=2)


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


def test_nothing_wrong_is_served_or_kept(make_llm, tiny_llama, environment, tmp_path, caplog_vllm):
    answers = reference(make_llm, tiny_llama)
    settings = dict(tensor_parallel_size=2, kv_transfer_config=connector(tmp_path))
    with_disk = []
    for _ in range(2):  # and after a restart
        llm = make_llm(tiny_llama, worker_extension_cls="own_host.Worker", **settings)
        TALLY["tries"] += 1
        assert any(answered_right(llm, answers)), "the host tier works all the same"
        with_disk.append(hasattr(manager_of(llm), "disk"))
        core_of(llm).shutdown()
    assert "does not share memory with rank 1" in caplog_vllm.text
    assert not any(with_disk) and not entries(tmp_path)
    llm = make_llm(tiny_llama, **settings)  # one host, the same folder
    assert any(answered_right(llm, answers))
    assert manager_of(llm).disk.counts["stored"] == len(entries(tmp_path)) > 0
