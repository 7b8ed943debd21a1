"""A disk that does not answer: what waited for it is given back, and what returns late harms nobody.

No engine is started here: these are calls of a DiskTier as vLLM makes them.
"""

import os
import threading

import numpy as np
import pytest
from disk_fixture import GIVE_UP, Hang, until
from vllm.v1.kv_offload.base import LookupResult, ReqContext
from vllm.v1.kv_offload.tiering.base import TransferJob

from vllm_xlayer.connector.disk import (
    commands as tier_cli,
)
from vllm_xlayer.connector.disk import (
    finder as disk_finder,
)
from vllm_xlayer.connector.disk import (
    store as disk_store,
)
from vllm_xlayer.connector.disk import (
    tier as disk_tier,
)
from vllm_xlayer.connector.disk.files import DiskFiles
from vllm_xlayer.connector.disk.format import HEADER_BYTES, TierIdentity
from vllm_xlayer.connector.disk.tier import DiskTier

IDENTITY = TierIdentity(
    layout="l", kv_dtype="nvfp4", model="m", settings="s", weights="w", tp_size=1, block_size=16,
    blocks_per_chunk=1,
)  # fmt: skip
CHUNKS, BYTES = 4, 1000
REQUEST = ReqContext("a request")


def key(i):
    return bytes([i]) * 36


@pytest.fixture
def hang(monkeypatch):
    hang = Hang(monkeypatch)
    yield hang
    hang.release()


@pytest.fixture
def tier(tmp_path):
    view = np.empty((CHUNKS, BYTES), dtype=np.uint8)
    for chunk in range(CHUNKS):
        view[chunk] = chunk + 1
    tier = DiskTier(view, tmp_path, 1 << 20, IDENTITY, max_waiting=8)
    yield tier
    tier.shutdown()


def job(number, keys, chunks, load=False):
    return TransferJob(number, [key(i) for i in keys], np.array(chunks), load, REQUEST)


def finished(tier, *numbers):
    """Polls until these jobs have ended: whether each succeeded."""
    results = {}
    until(
        lambda: (
            results.update((r.job_id, r.success) for r in tier.get_finished_jobs())
            or len(results) >= len(numbers)
        )
    )
    assert sorted(results) == sorted(numbers)
    return [results[number] for number in numbers]


def looked_up(tier, i, request=REQUEST):
    """As in as many steps as it takes."""
    results = []

    def step():
        results.append(tier.lookup(key(i), request))
        tier.on_schedule_end(None)
        return results[-1] is not LookupResult.RETRY

    until(step)
    return results[-1]


def fill(tier):
    tier.submit_store(job(0, range(CHUNKS), range(CHUNKS)))
    assert finished(tier, 0) == [True]
    assert tier.counts["stored"] == CHUNKS


def test_a_read_that_returns_late_does_not_change_host_memory(tier, hang):
    """Its chunk belongs to somebody else by then."""
    fill(tier)
    hang.at("readv")
    tier.submit_load(job(1, [0, 1], [2, 3], load=True))
    tier.submit_load(job(2, [1], [1], load=True))
    assert finished(tier, 1, 2) == [False, False]
    assert "reading" in tier.hung
    tier.jobs.view[:] = 99  # the next owner's
    hang.release()
    until(lambda: not tier.hung or list(tier.get_finished_jobs()))
    until(lambda: tier.jobs.reader._call is None)
    assert (tier.jobs.view == 99).all()
    assert not list(tier.get_finished_jobs())  # and nobody is told of it twice
    tier.submit_load(job(3, [0, 1], [2, 3], load=True))
    assert finished(tier, 3) == [True]
    assert (
        (tier.jobs.view[2] == 1).all() and (tier.jobs.view[3] == 2).all() and (tier.jobs.view[:2] == 99).all()
    )


@pytest.mark.parametrize("call", ["open", "mkdir", "replace"])
def test_a_write_that_goes_on_late_writes_what_it_was_given(tier, hang, tmp_path, call):
    """At any point of it: before anything is written, and before the entry gets its name."""
    hang.at(call)
    tier.submit_store(job(1, [0, 1], [0, 1]))
    tier.submit_store(job(2, [2], [2]))
    assert finished(tier, 1, 2) == [False, False]
    assert "writing" in tier.hung
    tier.jobs.view[:] = 99
    hang.release()
    until(lambda: tier.jobs.writer._call is None)
    assert not list(tier.get_finished_jobs()) and not tier.hung
    assert tier_cli.verify(DiskFiles(tmp_path)) == 0
    assert looked_up(tier, 0, ReqContext("another")) is LookupResult.HIT
    tier.submit_load(job(3, [0], [3], load=True))
    assert finished(tier, 3) == [True] and (tier.jobs.view[3] == 1).all()
    # What it had not begun with has another owner's bytes by then.
    for i in (1, 2):
        assert looked_up(tier, i, ReqContext("another")) is LookupResult.MISS


def test_a_write_from_before_a_reset_is_not_found_after_it(tier, hang):
    """The weights may have been changed in between: it must not get the identity of afterwards."""
    hang.at("replace", seconds=1000)
    tier.submit_store(job(1, [0], [0]))
    assert hang.began.wait(GIVE_UP)
    tier.drain_jobs()
    tier.forget()
    hang.release()
    until(lambda: tier.jobs.writer._call is None)
    assert finished(tier, 1) == [False]
    assert looked_up(tier, 0) is LookupResult.MISS


def test_while_the_disk_hangs_nothing_is_found_nor_taken(tier, hang, caplog_vllm):
    fill(tier)
    hang.at("readv")
    tier.submit_load(job(1, [0], [0], load=True))
    assert finished(tier, 1) == [False]
    for i in (0, 9):  # known, and not known
        assert tier.lookup(key(i), REQUEST) is LookupResult.MISS
    tier.submit_load(job(2, [1], [0], load=True))
    tier.submit_store(job(3, [9], [0]))
    assert [(r.job_id, r.success) for r in tier.get_finished_jobs()] == [(2, False), (3, False)]
    assert tier.counts["not loaded: disk hangs"] == 2 and tier.counts["not stored: disk hangs"] == 1
    hang.release()
    until(lambda: not list(tier.get_finished_jobs()) and not tier.hung)
    assert tier.lookup(key(0), REQUEST) is LookupResult.HIT
    said = [r.getMessage() for r in caplog_vllm.records if "disk tier is" in r.getMessage()]
    assert len(said) == 2 and "comes back by itself" in said[0] and "is on" in said[1]
    assert not tier.problem


def test_a_search_that_hangs(tier, hang):
    """A request asks for a while, and then is computed; all others at once."""
    hang.at("lstat")
    assert looked_up(tier, 5) is LookupResult.MISS
    until(lambda: list(tier.get_finished_jobs()) or tier.hung)
    assert "looking for" in tier.hung
    assert tier.lookup(key(5), ReqContext("another")) is LookupResult.MISS
    hang.release()
    until(lambda: list(tier.get_finished_jobs()) or not tier.hung)
    assert looked_up(tier, 5, ReqContext("a third")) is LookupResult.MISS


def test_a_scan_that_hangs(tier, hang):
    tier.jobs._scan_at = 0.0
    hang.at("scandir")
    fill(tier)
    assert hang.began.wait(GIVE_UP)
    assert tier.lookup(key(0), REQUEST) is LookupResult.HIT  # it does not wait for the scan
    until(lambda: list(tier.get_finished_jobs()) or tier.hung)
    assert "looking through" in tier.hung
    hang.release()
    until(lambda: list(tier.get_finished_jobs()) or not tier.hung)
    assert tier.used == CHUNKS * (BYTES + HEADER_BYTES)
    assert tier.lookup(key(0), REQUEST) is LookupResult.HIT


def test_a_long_scan_is_not_a_hang(tmp_path, monkeypatch):
    """What has a limit is one call."""
    now = [0.0]
    tier = DiskTier(np.zeros((CHUNKS, BYTES), dtype=np.uint8), tmp_path, 1 << 20, IDENTITY, max_waiting=8)
    fill(tier)
    hungs, real = [], disk_store.DiskFiles._files

    def slow(self, folders, progress):
        for found in real(self, folders, lambda: None):
            now[0] += 1
            hungs.append(tier.jobs.writer.overdue(1.5))
            progress()
            yield found

    monkeypatch.setattr(disk_tier.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(disk_store.DiskFiles, "_files", slow)
    tier.jobs.writer.calls("looking through")
    tier._store.rescan()
    assert hungs == [""] * CHUNKS
    monkeypatch.undo()
    tier.jobs.writer._call = None
    tier.shutdown()


def test_a_folder_that_does_not_answer_at_the_start(tmp_path, hang):
    hang.at("scandir")
    (tmp_path / "xlayer-rows").mkdir()
    with pytest.raises(OSError, match=r"opening .* has taken .* Restart the engine"):
        DiskTier(np.empty((CHUNKS, BYTES), dtype=np.uint8), tmp_path, 1 << 20, IDENTITY, max_waiting=8)


@pytest.mark.parametrize("call", ["readv", "replace"])
def test_reset_and_stop_wait_for_no_disk(tmp_path, hang, monkeypatch, call):
    """Also before the call has taken so long that it counts as one that hangs."""
    monkeypatch.setattr(disk_tier, "FLUSH_SECONDS", 0.1)
    view = np.zeros((CHUNKS, BYTES), dtype=np.uint8)
    tier = DiskTier(view, tmp_path, 1 << 20, IDENTITY, max_waiting=8)
    fill(tier)
    hang.at(call, seconds=1000)
    tier.submit_load(job(1, [0], [0], load=True))
    tier.submit_store(job(2, [8], [1]))
    tier.submit_store(job(3, [9], [1]))
    assert hang.began.wait(GIVE_UP)
    tier.drain_jobs()
    assert tier.chunks_to_write == 0
    results = {r.job_id: r.success for r in tier.get_finished_jobs()}
    assert set(results) == {1, 2, 3} and not all(results.values())
    tier.forget()
    tier.shutdown()
    hang.release()
    for worker in tier._workers:
        worker.thread.join(GIVE_UP)
        assert not worker.thread.is_alive()


def test_the_calling_thread_never_calls_the_disk(tier, monkeypatch):
    fill(tier)
    me, called = threading.current_thread(), []
    for name in ("opened", "_opened", "size", "unlink", "scan"):
        real = getattr(DiskFiles, name)

        def watched(*args, real=real, name=name, **more):
            called.append((name, threading.current_thread() is me))
            return real(*args, **more)

        monkeypatch.setattr(DiskFiles, name, watched)
    tier.jobs._scan_at = 0.0
    for i in range(2 * CHUNKS):
        looked_up(tier, i)
    tier.touch([key(i) for i in range(CHUNKS)], REQUEST)
    tier.submit_load(job(1, [0, 1], [2, 3], load=True))
    tier.submit_store(job(2, [7], [1]))
    finished(tier, 1, 2)
    until(lambda: not tier.jobs.writer.tasks())
    tier.drain_jobs()
    tier.forget()
    tier.lookup(key(0), REQUEST)
    tier.on_request_finished(REQUEST)
    assert {name for name, _ in called} == {"opened", "_opened", "size", "scan"}
    assert not any(mine for _, mine in called)


def test_what_another_engine_wrote_is_found(tier, tmp_path):
    other = DiskTier(np.ones((CHUNKS, BYTES), dtype=np.uint8), tmp_path, 1 << 20, IDENTITY, max_waiting=8)
    fill(other)
    other.shutdown()
    assert [looked_up(tier, i) for i in (0, 3, 9)] == [LookupResult.HIT, LookupResult.HIT, LookupResult.MISS]


def test_a_prompt_that_nobody_has_asks_the_disk_once(tier, monkeypatch):
    """And a request that waits to be admitted is not held up again."""
    asked, real = [], os.lstat

    def counted(path, *args):
        asked.append(path)
        return real(path, *args)

    monkeypatch.setattr(os, "lstat", counted)
    keys = [key(i) for i in range(100, 140)]
    assert {tier.lookup(k, REQUEST) for k in keys} == {LookupResult.RETRY}
    tier.on_schedule_end(None)
    until(lambda: tier.lookup(keys[0], REQUEST) is LookupResult.MISS)
    until(lambda: not tier._finder.worker.tasks())
    for request in (REQUEST, ReqContext("another")):
        assert {tier.lookup(k, request) for k in keys} == {LookupResult.MISS}
    tier.on_schedule_end(None)
    assert len([path for path in asked if "xlayer-rows" in str(path)]) == 1


def test_a_request_waits_for_answers_only_so_long(tier, hang, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(disk_finder.time, "monotonic", lambda: now[0])
    hang.at("lstat", seconds=1000)
    assert tier.lookup(key(5), REQUEST) is LookupResult.RETRY
    tier.on_schedule_end(None)
    now[0] += disk_finder.ASK_SECONDS / 2
    assert tier.lookup(key(5), REQUEST) is LookupResult.RETRY
    now[0] += disk_finder.ASK_SECONDS
    assert tier.lookup(key(5), REQUEST) is LookupResult.MISS
    assert tier.lookup(key(5), ReqContext("another")) is LookupResult.RETRY
    tier.on_request_finished(REQUEST)
    assert list(tier._finder._since) == ["another"]
    monkeypatch.undo()
