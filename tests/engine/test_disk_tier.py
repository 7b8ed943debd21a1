"""The disk tier in vLLM's engine: a restart finds what was stored, no request suffers from a bad disk."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from faults import (
    Copies,
    core_of,
    forget_device_cache,
    live_connector,
    manager_of,
    settle,
    slow_down,
)
from model_fixture import (
    random_prompts,
    transformers_greedy,
    vllm_greedy,
    vllm_outputs,
)
from transformers import AutoConfig
from vllm import SamplingParams

from vllm_xlayer.connector import disk_tier, tiering
from vllm_xlayer.connector.disk_format import HEADER_BYTES
from vllm_xlayer.connector.tiering import TieredManager

NUM_TOKENS = 8
PROMPTS = random_prompts([5, 100, 16, 33, 200, 1])
BLOCKS = sum(len(p) // 16 for p in PROMPTS)
ROW = 2 * 2 * 2 * 16 * 32 * 4


def connector(folder, **extra):
    extra = {
        "cpu_bytes_to_use": 256 * ROW, "disk_path": str(folder), "disk_bytes_to_use": 1 << 30,
    } | extra  # fmt: skip
    return dict(kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=extra)


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


def entries(folder):
    return sorted(Path(folder).rglob("*.row"))


def start(make_llm, model, folder, **extra):
    llm = make_llm(model, kv_transfer_config=connector(folder, **extra))
    live_connector().pool.fill_(0xFF)
    return llm


def fill(make_llm, model, folder, **extra):
    """A folder with all blocks of PROMPTS, left by an engine that was stopped."""
    llm = start(make_llm, model, folder, **extra)
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    settle(llm)
    core_of(llm).shutdown()
    assert len(entries(folder)) == BLOCKS
    return llm


def cached(llm):
    """(tokens, tokens found in a tier) of each of PROMPTS."""
    outputs = vllm_outputs(llm, PROMPTS, NUM_TOKENS)
    settle(llm)
    return [list(o.outputs[0].token_ids) for o in outputs], [o.num_cached_tokens for o in outputs]


WHOLE_BLOCKS = [len(p) // 16 * 16 for p in PROMPTS]


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "nvfp4"])
@pytest.mark.parametrize("blocks_per_chunk", [1, 2])
def test_a_restarted_engine_restores(make_llm, tiny_llama, tmp_path, kv_cache_dtype, blocks_per_chunk):
    settings = dict(kv_cache_dtype=kv_cache_dtype)
    extra = connector(tmp_path, blocks_per_chunk=blocks_per_chunk)
    llm = make_llm(tiny_llama, kv_transfer_config=extra, **settings)
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    tokens, _ = cached(llm)
    core_of(llm).shutdown()
    llm = make_llm(tiny_llama, kv_transfer_config=extra, **settings)
    live_connector().pool.fill_(0xFF)
    live_connector().connector_worker.worker.host.fill_(0xFF)
    span = 16 * blocks_per_chunk
    assert cached(llm) == (tokens, [len(p) // span * span for p in PROMPTS])
    assert manager_of(llm).disk.counts["hit"] == sum(len(p) // span for p in PROMPTS)


def test_another_configuration_finds_nothing(make_llm, tiny_llama, tmp_path):
    """The same weights in the same folder, with a changed rotary base."""
    model, folder = tmp_path / "model", tmp_path / "tier"
    shutil.copytree(tiny_llama, model)
    fill(make_llm, model, folder)
    config = AutoConfig.from_pretrained(model)
    config.rope_parameters["rope_theta"] *= 3
    config.save_pretrained(model)
    answers = transformers_greedy(model, PROMPTS, NUM_TOKENS)
    assert cached(start(make_llm, model, folder)) == (answers, [0] * len(PROMPTS))


def test_updated_weights_find_nothing(make_llm, tiny_llama, tmp_path):
    shutil.copytree(tiny_llama, tmp_path / "model")
    fill(make_llm, tmp_path / "model", tmp_path / "tier")
    weights = tmp_path / "model" / "model.safetensors"
    changed = weights.read_bytes()
    tail = np.frombuffer(changed[-40_000:], dtype=np.float32)[::-1]  # a part of a tensor
    weights.write_bytes(changed[:-40_000] + tail.tobytes())  # equal size and header
    answers = transformers_greedy(tmp_path / "model", PROMPTS, NUM_TOKENS)
    assert cached(start(make_llm, tmp_path / "model", tmp_path / "tier")) == (answers, [0] * len(PROMPTS))


def test_damaged_entries_are_computed(make_llm, tiny_llama, answers, tmp_path, caplog_vllm):
    fill(make_llm, tiny_llama, tmp_path)
    for i, path in enumerate(entries(tmp_path)):
        data = bytearray(path.read_bytes())
        if i % 3 == 0:
            data[[50, HEADER_BYTES + 7, len(data) - 1][i // 3 % 3]] ^= 1
            path.write_bytes(data)
        elif i % 3 == 1:
            path.write_bytes(data[: i * 997 % len(data)])
    llm = start(make_llm, tiny_llama, tmp_path)
    tokens, found = cached(llm)
    assert tokens == answers and 0 < sum(found) < sum(WHOLE_BLOCKS)
    counts = manager_of(llm).disk.counts
    reasons = {name for name in counts if name.startswith("miss") and name != "miss: absent"}
    assert reasons == {"miss: short", "miss: damaged header", "miss: damaged payload"}
    for reason in reasons:
        assert sum(reason in record.getMessage() for record in caplog_vllm.records) == 1
    # They have been written anew.
    core_of(llm).shutdown()
    assert cached(start(make_llm, tiny_llama, tmp_path)) == (answers, WHOLE_BLOCKS)


def test_a_kill_leaves_nothing_that_is_read(make_llm, tiny_llama, answers, tmp_path):
    """As a kill -9 does: whole entries, and temporary files of any length."""
    fill(make_llm, tiny_llama, tmp_path)
    stale, fresh = [], []
    for i, path in enumerate(entries(tmp_path)[:6]):
        part = path.with_name(f"{path.name}.123.1.abcd.tmp")
        path.rename(part)
        part.write_bytes(part.read_bytes()[: i * 4000])
        (stale if i % 2 else fresh).append(part)
    for path in stale:
        os.utime(path, (time.time() - 7200,) * 2)
    llm = start(make_llm, tiny_llama, tmp_path)
    assert not any(path.exists() for path in stale) and all(path.exists() for path in fresh)
    tokens, found = cached(llm)
    assert tokens == answers and sum(found) < sum(WHOLE_BLOCKS)
    assert not {name for name in manager_of(llm).disk.counts if name.startswith("miss: d")}


def test_two_engines_share_a_folder(make_llm, tiny_llama, answers, tmp_path):
    """What one stores while the other runs, the other finds; what it evicts, the other misses."""
    llm = start(make_llm, tiny_llama, tmp_path)
    fill_folder = tmp_path / "xlayer-rows"
    other = tmp_path / "from the other"
    vllm_greedy(llm, PROMPTS, NUM_TOKENS)
    settle(llm)
    shutil.move(fill_folder, other)  # a folder as another engine would have written it meanwhile
    core_of(llm).shutdown()
    llm = start(make_llm, tiny_llama, tmp_path)
    vllm_greedy(llm, PROMPTS[:1], NUM_TOKENS)
    shutil.copytree(other, fill_folder, dirs_exist_ok=True)
    assert cached(llm) == (answers, WHOLE_BLOCKS)
    assert llm.reset_prefix_cache()
    for path in entries(tmp_path)[::2]:
        path.unlink()
    core_of(llm).scheduler.connector.connector_scheduler.manager.host.reset_cache()
    live_connector().pool.fill_(0xFF)
    tokens, found = cached(llm)
    assert tokens == answers and sum(found) < sum(WHOLE_BLOCKS)


def test_the_bound_holds(make_llm, tiny_llama, answers, tmp_path):
    limit = 9 * (ROW + HEADER_BYTES)
    llm = start(make_llm, tiny_llama, tmp_path, disk_bytes_to_use=limit)
    for _ in range(2):
        assert cached(llm)[0] == answers
        forget_device_cache(llm)
        assert 0 < sum(path.stat().st_size for path in entries(tmp_path)) <= limit


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
    settle_slowly(llm)


def test_a_slow_disk_does_not_pin_the_host_tier(make_llm, tiny_llama, answers, tmp_path, monkeypatch):
    write = disk_tier.DiskStore.write
    monkeypatch.setattr(
        disk_tier.DiskStore, "write", lambda self, *args: (time.sleep(0.05), write(self, *args))[1]
    )
    llm = start(make_llm, tiny_llama, tmp_path, cpu_bytes_to_use=24 * ROW)
    assert vllm_greedy(llm, PROMPTS, NUM_TOKENS) == answers
    assert manager_of(llm).disk.counts["not stored: disk too slow"] > 0
    assert manager_of(llm).disk._waiting < 24 // 4 + 12  # the largest prompt's job may come on top
    settle_slowly(llm)


def settle_slowly(llm):
    deadline = time.monotonic() + 30
    while core_of(llm).scheduler.has_requests() and time.monotonic() < deadline:
        llm.llm_engine.step()
        time.sleep(0.01)
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
        settle_slowly(llm)


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
    llm.llm_engine.add_request("a", {"prompt_token_ids": PROMPTS[1]}, SamplingParams(max_tokens=9))
    llm.llm_engine.step()
    disk = manager_of(llm).disk
    core_of(llm).shutdown()
    assert not any(thread.is_alive() for thread in disk._threads)
    assert not list(tmp_path.rglob("*.tmp"))
    assert cached(start(make_llm, tiny_llama, tmp_path))[0] == answers


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[4])
import conftest
from vllm import LLM
from vllm_xlayer.connector import disk_store
from model_fixture import random_prompts, vllm_greedy

real = disk_store.DiskStore.write
def slow(self, key, payload):  # dies half way into a file
    if self._writes == 12:
        self._create(self.path_of(key) + ".9.9.tmp").write(bytes(5000))
        print("HALF WAY", flush=True)
        time.sleep(60)
    return real(self, key, payload)
disk_store.DiskStore.write = slow
extra = dict(cpu_bytes_to_use=1 << 24, disk_path=sys.argv[2], disk_bytes_to_use=1 << 30)
transfer = dict(kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=extra)
llm = LLM(sys.argv[1], kv_transfer_config=transfer, **conftest.ENGINE_DEFAULTS)
vllm_greedy(llm, random_prompts([5, 100, 16, 33, 200, 1]), int(sys.argv[3]))
while True:
    llm.llm_engine.engine_core.engine_core.step_fn()
"""


def test_after_kill_9_another_process_finds_what_was_whole(make_llm, tiny_llama, answers, tmp_path):
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED, str(tiny_llama), str(tmp_path), str(NUM_TOKENS), here]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert any("HALF WAY" in line for line in process.stdout)
    finally:
        process.kill()
        process.wait()
    assert len(entries(tmp_path)) == 12 and len(list(tmp_path.rglob("*.tmp"))) == 1
    llm = start(make_llm, tiny_llama, tmp_path)
    tokens, found = cached(llm)
    # A job's chunks are written in no particular order, so what lies behind a hole is not looked for.
    hits = manager_of(llm).disk.counts["hit"]
    assert tokens == answers and 0 < hits <= 12 and sum(found) == hits * 16


def test_a_reset_of_the_connector_forgets_the_disk(make_llm, tiny_llama, answers, tmp_path):
    """Weights may have been changed in the engine's memory: their files no longer say what KV this is."""
    llm = start(make_llm, tiny_llama, tmp_path)
    assert cached(llm) == (answers, [0] * len(PROMPTS))
    assert llm.reset_prefix_cache(reset_connector=True)
    assert cached(llm) == (answers, [0] * len(PROMPTS))
    forget_device_cache(llm)
    assert cached(llm) == (answers, WHOLE_BLOCKS)


@pytest.mark.parametrize("extra", [dict(disk_path=3), dict(disk_bytes_to_use="1"), dict(disk_bytes_to_use=0)])
def test_bad_settings_are_refused(make_llm, tiny_llama, tmp_path, extra):
    with pytest.raises(ValueError, match=next(iter(extra))):
        start(make_llm, tiny_llama, tmp_path, **extra)
