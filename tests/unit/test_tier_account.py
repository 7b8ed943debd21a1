"""What an engine knows of the disk tier's folder: its lock covers every change, and no call to the disk."""

import os
import threading

import pytest
from test_tier_store import SIZE, key, leave_temporary, payload, read, store_in

from vllm_xlayer.connector.disk import account as disk_account
from vllm_xlayer.connector.disk.account import Account

GIVE_UP = 30
"""Seconds after which a thread that should not wait is taken for one that does."""


class Guarded(Account):
    """Fails where something changes without the lock."""

    def __setattr__(self, name, value):
        if name != "_lock" and "_changes" in vars(self):
            assert self._lock.locked(), f"{name} was set without the lock"
        super().__setattr__(name, value)


def test_every_change_is_made_under_the_lock():
    account = Guarded()
    account.add("a", 10)
    account.add("b", 20)
    account.touch(["a"])
    account.forget(["a", "c"])
    account.begin_scan()
    account.add("d", 5)
    account.end_scan([[(1.0, "b", 20)], [(0.5, "e", 7)]])
    assert account.total == 32 and account.oldest("") == "e"


def test_a_store_uses_it_so(tmp_path):
    store = store_in(tmp_path, entries=3)
    store._account = Guarded()
    for i in range(4):
        store.write(key(i), payload(i))
    store.rescan()
    read(store, 1)
    assert store.total == 3 * SIZE


DISK_CALLS = (
    "open",
    "close",
    "scandir",
    "unlink",
    "lstat",
    "fstat",
    "utime",
    "replace",
    "mkdir",
    "read",
    "readv",
)


def test_no_call_to_the_disk_is_made_under_the_lock(tmp_path, monkeypatch):
    store, made = store_in(tmp_path, entries=3), set()

    def watched(name, real):
        def call(*args, **more):
            made.add(name)
            assert not store._account._lock.locked(), f"os.{name} was called under the lock"
            return real(*args, **more)

        return call

    for name in DISK_CALLS:
        monkeypatch.setattr(os, name, watched(name, getattr(os, name)))
    leave_temporary(store, 0, hours=2)
    for i in range(4):  # with an eviction
        store.write(key(i), payload(i))
    store.rescan()
    read(store, 1)
    assert not store.contains(key(9))
    assert made == {*DISK_CALLS}


@pytest.mark.parametrize("call", ["unlink", "scandir", "close"])
def test_a_disk_that_is_slow_holds_no_other_thread_up(tmp_path, monkeypatch, call):
    """A call of a rescan takes long: what the scheduler's thread does goes on."""
    store = store_in(tmp_path)
    store.write(key(0), payload(0))
    leave_temporary(store, 0, hours=2)
    called, go_on = threading.Event(), threading.Event()
    real = getattr(os, call)

    def slow(*args, **more):
        called.set()
        assert go_on.wait(GIVE_UP)
        return real(*args, **more)

    seen = []

    def schedule():
        seen.append(store.known(key(0)))
        store.touch([key(0)])
        store.assume_absent([key(1)])
        seen.append(store.known(key(1)))
        seen.append(store.total > 0)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, slow)
        scanning = threading.Thread(target=store.rescan)
        scanning.start()
        assert called.wait(GIVE_UP)
        scheduler = threading.Thread(target=schedule, daemon=True)
        scheduler.start()
        scheduler.join(GIVE_UP)
        waited = scheduler.is_alive()
        go_on.set()
        scanning.join()
    assert not waited and seen == [True, False, True]
    assert store.total == SIZE


def test_what_changes_while_a_scan_is_under_way_counts(tmp_path, monkeypatch):
    """Whether the scan saw a file before it changed, or after."""
    store = store_in(tmp_path, entries=6)
    for i in range(4):
        store.write(key(i), payload(i))
    scan = store._files.scan

    def while_it_scans(progress):
        seen = list(scan(progress))
        store.write(key(4), payload(4))  # not seen
        store._remove(store._path(key(1)))  # seen, and gone
        store.touch([key(0)])
        store.write(key(5), payload(5))
        yield from seen

    monkeypatch.setattr(store._files, "scan", while_it_scans)
    store.rescan()
    assert [store.known(key(i)) for i in range(6)] == [True, False, True, True, True, True]
    assert store.total == 5 * SIZE
    monkeypatch.undo()
    for i in (6, 7):  # one fits, and one pushes the least recently used out
        store.write(key(i), payload(i))
    assert [i for i in range(8) if store.known(key(i))] == [0, 3, 4, 5, 6, 7]


def test_what_is_not_known_is_asked_again_after_a_while(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(disk_account.time, "monotonic", lambda: now[0])
    account = Account()
    assert account.has("a") is None
    account.forget(["a"])
    assert account.has("a") is False
    now[0] += disk_account.ABSENT_SECONDS + 0.1
    assert account.has("a") is None
    account.forget(["b"])
    assert list(account._absent) == ["b"]  # and is not remembered for ever
    account.add("b", 1)
    assert account.has("b") is True
