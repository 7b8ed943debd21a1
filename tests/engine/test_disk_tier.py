"""The disk tier in vLLM's engine: a restart finds what was stored by an equal engine, and nothing else."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from disk_fixture import (
    NUM_TOKENS,
    PROMPTS,
    ROW,
    WHOLE_BLOCKS,
    cached,
    cached_right,
    connector,
    entries,
    fill,
    start,
)
from faults import (
    TALLY,
    Slow,
    core_of,
    forget_device_cache,
    live_connector,
    manager_of,
    settle,
    slow_down,
    under_way,
    without_connector,
)
from model_fixture import random_prompts, transformers_greedy, vllm_greedy
from transformers import AutoConfig

from vllm_xlayer.connector.disk import manager as tiering
from vllm_xlayer.connector.disk.format import HEADER_BYTES

fault = pytest.mark.fault


@pytest.fixture(autouse=True)
def debug(monkeypatch):
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    monkeypatch.setattr(tiering, "DEADLINE_SECONDS", 60)  # these tests wait for a slow disk


@pytest.fixture(scope="module")
def answers(make_llm, tiny_llama):
    return without_connector(make_llm, tiny_llama, PROMPTS, NUM_TOKENS)


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
    assert cached(llm) == (tokens, [(len(p) - 1) // span * span for p in PROMPTS])
    # Not the chunk that ends with a prompt's last token, which is computed.
    assert manager_of(llm).disk.counts["hit"] == sum((len(p) - 1) // span for p in PROMPTS)


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


def flip(data, i):
    """A bit of the header, of the beginning, or of the end."""
    data[[50, HEADER_BYTES + 7, len(data) - 1][i % 3]] ^= 1


def cut(data, i):
    del data[i * 997 % len(data) :]


def age(data, i):
    """As an earlier version of this package has written it."""
    data[7] = 1


@pytest.mark.parametrize(
    ("damage", "reasons"),
    [
        pytest.param(age, {"miss: old format"}, id="old format"),
        pytest.param(flip, {"miss: damaged header", "miss: damaged payload"}, marks=fault("flipped bits")),
        pytest.param(cut, {"miss: short"}, marks=fault("short read")),
    ],
)
def test_damaged_entries_are_computed(make_llm, tiny_llama, answers, tmp_path, caplog_vllm, damage, reasons):
    fill(make_llm, tiny_llama, tmp_path)
    for i, path in enumerate(entries(tmp_path)):
        if i % 2:
            data = bytearray(path.read_bytes())
            damage(data, i)
            path.write_bytes(data)
            TALLY["tries"] += 1
    llm = start(make_llm, tiny_llama, tmp_path)
    assert 0 < sum(cached_right(llm, answers)) < sum(WHOLE_BLOCKS)
    counts = manager_of(llm).disk.counts
    assert {name for name in counts if name.startswith("miss") and name != "miss: absent"} == reasons
    for reason in reasons:
        assert sum(reason in record.getMessage() for record in caplog_vllm.records) == 1
    # They have been written anew.
    core_of(llm).shutdown()
    assert cached_right(start(make_llm, tiny_llama, tmp_path), answers) == WHOLE_BLOCKS


@fault("short read")
def test_reads_that_end_early_are_computed(make_llm, tiny_llama, answers, tmp_path, monkeypatch):
    """The file is whole, but a read brings a part, and the next one nothing."""

    def ends_early(file, buffers):
        if len(buffers[0]) < ROW:
            return 0
        TALLY["tries"] += 1
        return real(file, [buffers[0][:100]])

    fill(make_llm, tiny_llama, tmp_path)
    llm = start(make_llm, tiny_llama, tmp_path)
    real = os.readv
    monkeypatch.setattr(os, "readv", ends_early)
    assert cached_right(llm, answers) == [0] * len(PROMPTS)
    assert manager_of(llm).disk.counts["miss: short"] == TALLY["tries"] > 0


def test_a_kill_leaves_nothing_that_is_read(make_llm, tiny_llama, answers, tmp_path):
    """As a kill -9 does: whole entries, and temporary files of any length."""
    fill(make_llm, tiny_llama, tmp_path)
    stale, fresh = [], []
    for i, path in enumerate(entries(tmp_path)[:6]):
        part = path.with_name(f"{path.name}.123.1.0123abcd.tmp")
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


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[4])
import conftest
from vllm import LLM
from vllm_xlayer.compat.engine import come_to_rest
from vllm_xlayer.connector.disk import store as disk_store
from model_fixture import random_prompts, vllm_greedy

real = disk_store.DiskStore.write
def slow(self, key, payload):  # dies half way into a file
    if self._writes == 12:
        path = Path(self.path_of(key))
        path.parent.mkdir(exist_ok=True)
        with open(f"{path}.9.9.01234567.tmp", "wb") as file:
            file.write(bytes(5000))
        print("HALF WAY", flush=True)
        time.sleep(60)  # until it is killed, as the test does on reading that line
    return real(self, key, payload)
disk_store.DiskStore.write = slow
extra = dict(cpu_bytes_to_use=1 << 24, disk_path=sys.argv[2], disk_bytes_to_use=1 << 30)
transfer = dict(kv_connector="XLayerConnector", kv_role="kv_both", kv_connector_extra_config=extra)
llm = LLM(sys.argv[1], kv_transfer_config=transfer, **conftest.ENGINE_DEFAULTS)
come_to_rest(llm)
vllm_greedy(llm, random_prompts([5, 100, 16, 33, 200, 1]), int(sys.argv[3]))
give_up = time.monotonic() + 60
while time.monotonic() < give_up:
    llm.llm_engine.engine_core.engine_core.step_fn()
"""


@fault("engine killed while writing")
def test_after_kill_9_another_process_finds_what_was_whole(
    make_llm, tiny_llama, answers, tmp_path, monkeypatch
):
    # This process wrote the model and the other only read it: this one is to be as if it had begun later.
    monkeypatch.setattr("vllm_xlayer.connector.disk.weight_files.process_began", time.time)
    here = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLED, str(tiny_llama), str(tmp_path), str(NUM_TOKENS), here]
    # Not in the current folder: a source tree there would be imported instead of the installed package.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    try:
        assert any("HALF WAY" in line for line in process.stdout)
    finally:
        process.kill()
        process.wait()
    assert len(entries(tmp_path)) == 12 and len(list(tmp_path.rglob("*.tmp"))) == 1
    llm = start(make_llm, tiny_llama, tmp_path)
    TALLY["tries"] += 1
    found = cached_right(llm, answers)
    # A job's chunks are written in no particular order. What is behind a hole is of no use, but may be read,
    # as only the disk's thread knows that it is one.
    hits = manager_of(llm).disk.counts["hit"]
    assert 0 < sum(found) <= hits * 16 <= 12 * 16


def test_a_reset_of_the_connector_forgets_the_disk(make_llm, tiny_llama, answers, tmp_path):
    """Weights may have been changed in the engine's memory: their files no longer say what KV this is."""
    llm = start(make_llm, tiny_llama, tmp_path)
    assert cached(llm) == (answers, [0] * len(PROMPTS))
    assert llm.reset_prefix_cache(reset_connector=True)
    assert cached(llm) == (answers, [0] * len(PROMPTS))
    forget_device_cache(llm)
    assert cached(llm) == (answers, WHOLE_BLOCKS)


def change_weights(worker):
    for parameter in worker.get_model().parameters():
        parameter.data.neg_()


def test_a_sleep_keeps_the_disk(make_llm, tiny_llama, answers, tmp_path):
    """Unless the weights are others after it, as when an engine trains."""
    fill(make_llm, tiny_llama, tmp_path)
    llm = start(make_llm, tiny_llama, tmp_path)
    llm.sleep(1)
    llm.wake_up()
    assert cached_right(llm, answers) == WHOLE_BLOCKS
    llm.sleep(1)
    llm.wake_up(["weights"])
    llm.collective_rpc(change_weights)
    llm.wake_up(["kv_cache"])
    changed, found = cached(llm)
    assert found == [0] * len(PROMPTS) and changed != answers
    llm.sleep(1)
    llm.wake_up()
    assert cached(llm) == (changed, WHOLE_BLOCKS)  # what it has written since
    core_of(llm).shutdown()
    assert cached_right(start(make_llm, tiny_llama, tmp_path), answers) == WHOLE_BLOCKS


def test_a_sleep_waits_for_what_is_being_stored(make_llm, tiny_llama, answers, tmp_path, monkeypatch):
    """In this process vLLM does not: and gives away the chunks that late copies write to."""
    slow_down(monkeypatch, 50)
    wait = Slow.wait

    def wait_late(self, jobs):
        if {job for _, job, *_ in self.running}.intersection(jobs):
            time.sleep(1)  # the disk is faster
        wait(self, jobs)

    monkeypatch.setattr(Slow, "wait", wait_late)
    llm = start(make_llm, tiny_llama, tmp_path, cpu_bytes_to_use=40 * ROW)
    assert cached_right(llm, answers) == [0] * len(PROMPTS)
    vllm_greedy(llm, random_prompts([200, 200], seed=77), 4)
    assert under_way(llm, "store")
    llm.sleep(1)
    llm.wake_up()
    cached_right(llm, answers)  # vLLM 0.33 takes nothing from the disk until what was stored has ended
    forget_device_cache(llm)
    assert sum(cached_right(llm, answers)) > 0


def test_a_reset_while_it_sleeps_forgets_the_disk(make_llm, tiny_llama, answers, tmp_path):
    fill(make_llm, tiny_llama, tmp_path)
    llm = start(make_llm, tiny_llama, tmp_path)
    llm.sleep(1)
    assert llm.reset_prefix_cache(reset_connector=True)
    llm.wake_up()
    assert cached(llm) == (answers, [0] * len(PROMPTS))


@pytest.mark.parametrize("extra", [dict(disk_path=3), dict(disk_bytes_to_use="1"), dict(disk_bytes_to_use=0)])
def test_bad_settings_are_refused(make_llm, tiny_llama, tmp_path, extra):
    with pytest.raises(ValueError, match=next(iter(extra))):
        start(make_llm, tiny_llama, tmp_path, **extra)
