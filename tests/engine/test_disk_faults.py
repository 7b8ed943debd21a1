"""A disk that is bad, slow or in the way: requests get the tokens they get without a connector."""

import errno
import os
import shutil
import time

import pytest
from disk_fixture import (
    BLOCKS,
    NUM_TOKENS,
    PROMPTS,
    ROW,
    WHOLE_BLOCKS,
    cached,
    connector,
    entries,
    fill,
    start,
)
from faults import Copies, core_of, forget_device_cache, live_connector, manager_of, settle, slow_down
from model_fixture import random_prompts, transformers_greedy, vllm_greedy
from vllm import SamplingParams

from vllm_xlayer.connector import disk_tier, tiering
from vllm_xlayer.connector.disk_format import HEADER_BYTES
from vllm_xlayer.connector.tiering import TieredManager


@pytest.fixture(autouse=True)
def debug(monkeypatch):
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


@pytest.fixture(scope="module")
def answers(tiny_llama):
    return transformers_greedy(tiny_llama, PROMPTS, NUM_TOKENS)


@pytest.fixture
def copies(monkeypatch):
    return Copies(monkeypatch, lambda: live_connector().pool)


@pytest.mark.parametrize("when", ["before loads", "before stores"])
@pytest.mark.parametrize("fault", ["removed", "full", "read-only", "broken"])
def test_a_bad_disk_turns_the_tier_off(
    make_llm, tiny_llama, answers, tmp_path, monkeypatch, caplog_vllm, fault, when
):
    folder = tmp_path / "tier"
    if when == "before loads":
        fill(make_llm, tiny_llama, folder)
    llm = start(make_llm, tiny_llama, folder)
    if fault == "removed":
        shutil.rmtree(folder)
    else:
        code = {"full": errno.ENOSPC, "read-only": errno.EROFS, "broken": errno.EIO}[fault]

        def fail(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(disk_tier.DiskStore, "_create", fail)
        monkeypatch.setattr(disk_tier.DiskStore, "_read", fail)
    assert cached(llm)[0] == answers
    assert manager_of(llm).disk.problem
    forget_device_cache(llm)
    assert cached(llm) == (answers, WHOLE_BLOCKS)  # the host tier goes on
    assert sum("disk tier is off" in record.getMessage() for record in caplog_vllm.records) == 1


def test_a_folder_that_cannot_be_used(make_llm, tiny_llama, answers, tmp_path, caplog_vllm):
    (tmp_path / "file").write_text("not a folder")
    llm = start(make_llm, tiny_llama, tmp_path / "file")
    assert cached(llm)[0] == answers
    assert not isinstance(manager_of(llm), TieredManager)
    assert any("without its disk tier" in record.getMessage() for record in caplog_vllm.records)


def test_a_slow_disk_does_not_hold_a_request_up(make_llm, tiny_llama, answers, tmp_path, monkeypatch):
    fill(make_llm, tiny_llama, tmp_path)
    monkeypatch.setattr(tiering, "DEADLINE_SECONDS", 0.2)
    read = disk_tier.DiskStore.read
    monkeypatch.setattr(
        disk_tier.DiskStore, "read", lambda self, *args: (time.sleep(0.3), read(self, *args))[1]
    )
    llm = start(make_llm, tiny_llama, tmp_path)
    started = time.monotonic()
    tokens = vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    assert tokens == answers and time.monotonic() - started < 0.3 * BLOCKS
    settle(llm)


def test_a_slow_disk_does_not_pin_the_host_tier(make_llm, tiny_llama, answers, tmp_path, monkeypatch):
    write = disk_tier.DiskStore.write
    monkeypatch.setattr(
        disk_tier.DiskStore, "write", lambda self, *args: (time.sleep(0.05), write(self, *args))[1]
    )
    llm = start(make_llm, tiny_llama, tmp_path, cpu_bytes_to_use=24 * ROW)
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    assert manager_of(llm).disk.counts["not stored: disk too slow"] > 0
    assert manager_of(llm).disk._waiting < 24 // 4 + 12  # the largest prompt's job may come on top
    settle(llm)


def test_failed_copies_do_not_loop(make_llm, tiny_llama, answers, tmp_path, copies):
    """The disk has every row, and no copy to the device succeeds: the request must not try for ever."""
    fill(make_llm, tiny_llama, tmp_path)
    llm = start(make_llm, tiny_llama, tmp_path)
    copies.fail_loads = lambda n: True
    assert cached(llm)[0] == answers
    assert 0 < copies.failed <= len(PROMPTS)


def test_a_store_after_the_request_has_finished(make_llm, tiny_llama, tmp_path, monkeypatch):
    """The host tier had no room while it ran. vLLM 0.26 does not know the request any more (KeyError)."""
    llm = start(make_llm, tiny_llama, tmp_path)
    host = manager_of(llm).host
    with monkeypatch.context() as patch:
        patch.setattr(host, "prepare_store", lambda *_: None)
        vllm_greedy(llm, PROMPTS[1:2], 1)
    settle(llm)
    assert len(host.chunks()) == len(entries(tmp_path)) == len(PROMPTS[1]) // 16
    assert not manager_of(llm)._req_state


@pytest.mark.parametrize("faulty", [False, True], ids=["good copies", "failing copies"])
def test_a_tiny_host_tier_in_between(make_llm, tiny_llama, tmp_path, copies, monkeypatch, faulty):
    """Neither the device nor the host holds all prompts; everything moves all the time, late."""
    slow_down(monkeypatch, 2)
    prompts = random_prompts([60, 61, 62, 63, 90, 91, 92, 93])
    answers = transformers_greedy(tiny_llama, prompts, 24)
    extra = connector(tmp_path, cpu_bytes_to_use=10 * ROW, disk_bytes_to_use=30 * (ROW + HEADER_BYTES))
    settings = dict(num_gpu_blocks_override=24, max_model_len=128)
    llm = make_llm(tiny_llama, kv_transfer_config=extra, **settings)
    if faulty:
        copies.fail_loads = lambda n: n % 2 == 0
        copies.fail_stores = lambda n: n % 5 == 0
    for order in ([*range(8)], [7, 0, 6, 1, 5, 2, 4, 3], [*reversed(range(8))]):
        assert vllm_greedy(llm, [prompts[i] for i in order], 24) == [answers[i] for i in order]
        settle(llm)
        assert llm.reset_prefix_cache()
    assert manager_of(llm).disk.counts["hit"] > 0


def test_aborts_meet_promotions(make_llm, tiny_llama, answers, tmp_path, copies, monkeypatch):
    slow_down(monkeypatch, 2)
    fill(make_llm, tiny_llama, tmp_path)
    llm = make_llm(tiny_llama, max_num_batched_tokens=64, kv_transfer_config=connector(tmp_path))
    sampling = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True, detokenize=False)
    for steps in range(5):
        for i, prompt in enumerate(PROMPTS):
            llm.llm_engine.add_request(f"{steps}-{i}", {"prompt_token_ids": prompt}, sampling)
        for _ in range(steps):
            llm.llm_engine.step()
        llm.llm_engine.abort_request([f"{steps}-{i}" for i in range(len(PROMPTS))])
        if steps % 2:
            assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
        settle(llm)
        manager_of(llm).host.reset_cache()
        assert llm.reset_prefix_cache()


@pytest.mark.parametrize("tier_too", [False, True], ids=["device cache", "tiers too"])
def test_reset_during_promotions(make_llm, tiny_llama, answers, tmp_path, monkeypatch, tier_too):
    fill(make_llm, tiny_llama, tmp_path)
    slow_down(monkeypatch, 2)
    read = disk_tier.DiskStore.read
    monkeypatch.setattr(
        disk_tier.DiskStore, "read", lambda self, *args: (time.sleep(0.01), read(self, *args))[1]
    )
    for steps in (1, 2, 5):
        llm = start(make_llm, tiny_llama, tmp_path)
        sampling = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False)
        for i, prompt in enumerate(PROMPTS):
            llm.llm_engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
        outputs = [output for _ in range(steps) for output in llm.llm_engine.step()]
        llm.reset_prefix_cache(reset_connector=tier_too)
        while llm.llm_engine.has_unfinished_requests():
            outputs += llm.llm_engine.step()
        got = {o.request_id: list(o.outputs[0].token_ids) for o in outputs if o.finished}
        assert [got[str(i)] for i in range(len(PROMPTS))] == answers
        settle(llm)


def test_stop_during_promotions_and_stores(make_llm, tiny_llama, answers, tmp_path, monkeypatch):
    fill(make_llm, tiny_llama, tmp_path)
    for path in entries(tmp_path)[::2]:
        path.unlink()
    for name in ("read", "write"):
        slow = getattr(disk_tier.DiskStore, name)
        monkeypatch.setattr(
            disk_tier.DiskStore, name, lambda self, *args, slow=slow: (time.sleep(0.01), slow(self, *args))[1]
        )
    llm = start(make_llm, tiny_llama, tmp_path)
    vllm_greedy(llm, PROMPTS[4:], NUM_TOKENS)
    llm.llm_engine.add_request(
        "a", {"prompt_token_ids": PROMPTS[1]}, SamplingParams(temperature=0, max_tokens=9, detokenize=False)
    )
    llm.llm_engine.step()
    disk = manager_of(llm).disk
    core_of(llm).shutdown()
    assert not any(thread.is_alive() for thread in disk._threads)
    assert not list(tmp_path.rglob("*.tmp"))
    assert cached(start(make_llm, tiny_llama, tmp_path))[0] == answers
