"""A disk that is bad, slow or in the way: requests get the tokens they get without a connector."""

import errno
import os
import shutil
import threading
import time

import pytest
from disk_fixture import (
    NUM_TOKENS,
    PROMPTS,
    ROW,
    WHOLE_BLOCKS,
    Hang,
    cached_right,
    connector,
    entries,
    fill,
    start,
    until,
)
from faults import (
    ANSWER_SECONDS,
    TALLY,
    Copies,
    add,
    check,
    compare,
    core_of,
    finish,
    forget_device_cache,
    greedy,
    live_connector,
    manager_of,
    settle,
    slow_down,
    step_until,
    without_connector,
)
from model_fixture import random_prompts, vllm_greedy

from vllm_xlayer.connector.disk import jobs as disk_jobs
from vllm_xlayer.connector.disk import manager as tiering
from vllm_xlayer.connector.disk import tier as disk_tier
from vllm_xlayer.connector.disk.format import HEADER_BYTES
from vllm_xlayer.connector.disk.manager import TieredManager

fault = pytest.mark.fault


@pytest.fixture(autouse=True)
def debug(monkeypatch):
    monkeypatch.setenv("VLLM_XLAYER_DEBUG", "1")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)


@pytest.fixture(scope="module")
def answers(make_llm, tiny_llama):
    return without_connector(make_llm, tiny_llama, PROMPTS, NUM_TOKENS)


@pytest.fixture
def copies(monkeypatch):
    return Copies(monkeypatch, lambda: live_connector().pool)


BAD_DISKS = {
    "removed": (None, "folder removed", "folder removed"),
    "full": (errno.ENOSPC, "disk full", "disk full"),
    "read-only": (errno.EROFS, "folder read-only", "folder read-only"),
    "broken": (errno.EIO, "read error", "write error"),
}
"""What open says of such a disk; names of the fault when the folder is full of rows, and when it is empty."""


@pytest.mark.parametrize(
    ("code", "filled"),
    [
        pytest.param(
            code, filled, id=f"{name}, {'loads' if filled else 'stores'}", marks=fault(names[not filled])
        )
        for name, (code, *names) in BAD_DISKS.items()
        for filled in (True, False)
    ],
)
def test_a_bad_disk_turns_the_tier_off(
    make_llm, tiny_llama, answers, tmp_path, monkeypatch, caplog_vllm, code, filled
):
    folder = tmp_path / "tier"
    if filled:
        fill(make_llm, tiny_llama, folder)
    llm = start(make_llm, tiny_llama, folder)
    if code is None:
        shutil.rmtree(folder)
        TALLY["tries"] += 1
    else:

        def fail(*_):
            TALLY["tries"] += 1
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(disk_tier.DiskStore, "_write", fail)
        if code == errno.EIO:
            monkeypatch.setattr(disk_tier.DiskStore, "_read", fail)
    found = cached_right(llm, answers)
    if filled and code in (errno.ENOSPC, errno.EROFS):
        # What is there can be read; nothing new can be written.
        assert found == WHOLE_BLOCKS
        fresh = random_prompts([50], seed=5)
        vllm_greedy(llm, fresh, 1)
        settle(llm)
    assert manager_of(llm).disk.problem and TALLY["tries"]
    forget_device_cache(llm)
    assert cached_right(llm, answers) == WHOLE_BLOCKS  # the host tier goes on
    assert sum("disk tier is off" in record.getMessage() for record in caplog_vllm.records) == 1


def test_a_folder_that_cannot_be_used(make_llm, tiny_llama, answers, tmp_path, caplog_vllm):
    (tmp_path / "file").write_text("not a folder")
    llm = start(make_llm, tiny_llama, tmp_path / "file")
    cached_right(llm, answers)
    assert not isinstance(manager_of(llm), TieredManager)
    assert any("without its disk tier" in record.getMessage() for record in caplog_vllm.records)


@fault("slow disk")
def test_a_slow_disk_does_not_hold_a_request_up(make_llm, tiny_llama, answers, tmp_path, monkeypatch):
    """The first read does not end before every request is answered."""
    fill(make_llm, tiny_llama, tmp_path)
    monkeypatch.setattr(tiering, "DEADLINE_SECONDS", 0.2)
    answered, real = threading.Event(), disk_tier.DiskStore.read

    def read(*args):
        TALLY["tries"] += 1
        answered.wait(ANSWER_SECONDS + 60)
        return real(*args)

    monkeypatch.setattr(disk_tier.DiskStore, "read", read)
    llm = start(make_llm, tiny_llama, tmp_path)
    try:
        check(llm, PROMPTS, answers)
        assert TALLY["tries"] == 1
    finally:
        answered.set()
    settle(llm)


def slow_disk(monkeypatch, seconds, *names):
    """Every chunk takes so much longer."""

    def slowed(real):
        def slow(*args):
            TALLY["tries"] += 1
            time.sleep(seconds)
            return real(*args)

        return slow

    for name in names:
        monkeypatch.setattr(disk_tier.DiskStore, name, slowed(getattr(disk_tier.DiskStore, name)))


@fault("slow disk")
def test_a_slow_disk_does_not_pin_the_host_tier(make_llm, tiny_llama, answers, tmp_path, monkeypatch):
    slow_disk(monkeypatch, 0.05, "write")
    llm = start(make_llm, tiny_llama, tmp_path, cpu_bytes_to_use=24 * ROW)
    check(llm, PROMPTS, answers)
    assert manager_of(llm).disk.counts["not stored: disk too slow"] > 0
    assert manager_of(llm).disk.chunks_to_write < 24 // 4 + 12  # the largest prompt's job may come on top
    settle(llm)


HANGS = {"read": "readv", "write": "replace", "stat": "lstat", "scan": "scandir"}


@fault("hung disk")
@pytest.mark.parametrize("call", HANGS)
def test_a_disk_that_hangs(make_llm, tiny_llama, answers, tmp_path, monkeypatch, caplog_vllm, call):
    """Requests are answered without it, all is given back, and nothing waits for it: neither a reset nor the
    engine's end. (test_disk_hang.py has what becomes of calls that return late.)"""
    if call == "read":
        fill(make_llm, tiny_llama, tmp_path)
    monkeypatch.setattr(disk_tier, "FLUSH_SECONDS", 0.3)
    monkeypatch.setattr(disk_jobs, "MIN_RESCAN_SECONDS", 0.0)
    llm = start(make_llm, tiny_llama, tmp_path)
    disk, hang = manager_of(llm).disk, Hang(monkeypatch)
    try:
        hang.at(HANGS[call])
        check(llm, PROMPTS, answers)
        settle(llm)
        until(lambda: any(worker.overdue(disk_tier.HUNG_SECONDS) for worker in disk._workers))
        assert llm.reset_prefix_cache(reset_connector=True)
        live_connector().pool.fill_(0xFF)
        assert cached_right(llm, answers) == [0] * len(PROMPTS)
        assert disk.hung and not disk.problem
        assert disk.counts["hit"] == 0
        forget_device_cache(llm)
        assert cached_right(llm, answers) == WHOLE_BLOCKS  # the host tier goes on
        assert sum("off until the disk answers" in r.getMessage() for r in caplog_vllm.records) == 1
        core_of(llm).shutdown()
    finally:
        hang.release()
    for worker in disk._workers:
        worker.thread.join(60)
        assert not worker.thread.is_alive()
    assert not disk.counts["miss: damaged payload"]


@fault("hung disk")
def test_a_disk_that_hangs_and_comes_back(make_llm, tiny_llama, answers, tmp_path, monkeypatch):
    fill(make_llm, tiny_llama, tmp_path)
    llm = start(make_llm, tiny_llama, tmp_path)
    disk, hang = manager_of(llm).disk, Hang(monkeypatch)
    try:
        hang.at("readv")
        assert cached_right(llm, answers) == [0] * len(PROMPTS)
        assert disk.hung
        before = disk.jobs.view.copy()
    finally:
        hang.release()
    until(lambda: disk.jobs.reader._call is None)
    assert (disk.jobs.view == before).all()  # the read that returned changed nothing
    monkeypatch.setattr(tiering, "DEADLINE_SECONDS", 60)
    manager_of(llm).host.reset_cache()
    forget_device_cache(llm)
    assert cached_right(llm, answers) == WHOLE_BLOCKS
    assert disk.counts["hit"] > 0 and not disk.hung


@fault("hung disk")
def test_a_disk_that_does_not_answer_at_the_start(
    make_llm, tiny_llama, answers, tmp_path, monkeypatch, caplog_vllm
):
    (tmp_path / "xlayer-rows").mkdir()
    hang = Hang(monkeypatch)
    try:
        hang.at("scandir")
        llm = start(make_llm, tiny_llama, tmp_path)
        cached_right(llm, answers)
        forget_device_cache(llm)
        assert cached_right(llm, answers) == WHOLE_BLOCKS
    finally:
        hang.release()
    assert not isinstance(manager_of(llm), TieredManager)
    assert any("without its disk tier" in record.getMessage() for record in caplog_vllm.records)


@fault("copy error")
def test_failed_copies_do_not_loop(make_llm, tiny_llama, answers, tmp_path, copies):
    """The disk has every row, and no copy to the device succeeds: the request must not try for ever."""
    fill(make_llm, tiny_llama, tmp_path)
    llm = start(make_llm, tiny_llama, tmp_path)
    copies.fail_loads = lambda n: True
    cached_right(llm, answers)
    assert 0 < copies.failed <= len(PROMPTS)


def test_a_store_after_the_request_has_finished(make_llm, tiny_llama, tmp_path, monkeypatch):
    """The host tier had no room while it ran; its last chance is after that."""
    llm = start(make_llm, tiny_llama, tmp_path)
    host = manager_of(llm).host
    with monkeypatch.context() as patch:
        patch.setattr(host, "prepare_store", lambda *_: None)
        vllm_greedy(llm, PROMPTS[1:2], 1)
    settle(llm)
    assert len(host.chunks()) == len(entries(tmp_path)) == len(PROMPTS[1]) // 16
    assert not manager_of(llm)._req_state


@pytest.mark.parametrize(
    "faulty",
    [
        pytest.param(False, id="good copies"),
        pytest.param(True, id="failing copies", marks=fault("copy error")),
    ],
)
def test_a_tiny_host_tier_in_between(make_llm, tiny_llama, tmp_path, copies, monkeypatch, faulty):
    """Neither the device nor the host holds all prompts; everything moves all the time, late."""
    slow_down(monkeypatch, 2)
    prompts = random_prompts([60, 61, 62, 63, 90, 91, 92, 93])
    answers = without_connector(make_llm, tiny_llama, prompts, 24)
    extra = connector(tmp_path, cpu_bytes_to_use=10 * ROW, disk_bytes_to_use=30 * (ROW + HEADER_BYTES))
    settings = dict(num_gpu_blocks_override=24, max_model_len=128)
    llm = make_llm(tiny_llama, kv_transfer_config=extra, **settings)
    if faulty:
        copies.fail_loads = lambda n: n % 2 == 0
        copies.fail_stores = lambda n: n % 5 == 0
    for order in ([*range(8)], [7, 0, 6, 1, 5, 2, 4, 3], [*reversed(range(8))]):
        check(llm, [prompts[i] for i in order], [answers[i] for i in order])
        settle(llm)
        assert llm.reset_prefix_cache()
    assert manager_of(llm).disk.counts["hit"] > 0


def reading(llm):
    """Whether rows are on their way from the disk to host memory."""
    return any(writes for _, writes in manager_of(llm).transfers())


@fault("abort during load")
def test_aborts_meet_promotions(make_llm, tiny_llama, answers, tmp_path, copies, monkeypatch):
    slow_down(monkeypatch, 2)
    fill(make_llm, tiny_llama, tmp_path)
    llm = make_llm(tiny_llama, max_num_batched_tokens=64, kv_transfer_config=connector(tmp_path))
    slow_disk(monkeypatch, 0.01, "read")
    tries = 0
    for steps in range(5):
        names = [f"{steps}-{i}" for i in range(len(PROMPTS))]
        add(llm, names, PROMPTS, greedy(100))
        for _ in range(steps):
            llm.llm_engine.step()
        tries += reading(llm)
        llm.llm_engine.abort_request(names)
        if steps % 2:
            check(llm, PROMPTS, answers)
        settle(llm)
        manager_of(llm).host.reset_cache()
        assert llm.reset_prefix_cache()
    TALLY["tries"] = tries
    assert tries


@fault("reset_prefix_cache during load")
@pytest.mark.parametrize("tier_too", [False, True], ids=["device cache", "tiers too"])
def test_reset_during_promotions(make_llm, tiny_llama, answers, tmp_path, monkeypatch, tier_too):
    fill(make_llm, tiny_llama, tmp_path)
    slow_down(monkeypatch, 2)
    slow_disk(monkeypatch, 0.01, "read")
    names, tries = [str(i) for i in range(len(PROMPTS))], 0
    for steps in (1, 2, 5):
        llm = start(make_llm, tiny_llama, tmp_path)
        add(llm, names, PROMPTS, greedy(NUM_TOKENS))
        outputs = [output for _ in range(steps) for output in llm.llm_engine.step()]
        tries += reading(llm)
        llm.reset_prefix_cache(reset_connector=tier_too)
        compare(finish(llm, outputs), dict(zip(names, answers, strict=True)))
        settle(llm)
    TALLY["tries"] = tries
    assert tries


@fault("engine stop during load")
def test_stop_during_promotions_and_stores(make_llm, tiny_llama, answers, tmp_path, monkeypatch):
    fill(make_llm, tiny_llama, tmp_path)
    slow_disk(monkeypatch, 0.03, "read", "write")
    llm = start(make_llm, tiny_llama, tmp_path)
    add(llm, ["new", "known"], [*random_prompts([300], seed=6), PROMPTS[4]], greedy(9))
    step_until(llm, lambda: len({writes for _, writes in manager_of(llm).transfers()}) == 2)
    disk = manager_of(llm).disk
    core_of(llm).shutdown()
    assert not any(worker.thread.is_alive() for worker in disk._workers)
    assert not list(tmp_path.rglob("*.tmp"))
    cached_right(start(make_llm, tiny_llama, tmp_path), answers)
    TALLY["tries"] = 1
