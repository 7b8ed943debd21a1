"""The disk tier's folder: bounded, least recently used first out, shared by two writers."""

import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_tier_format import IDENTITY, entry_of_version

from vllm_xlayer.connector.disk.format import HEADER_BYTES, EntryError
from vllm_xlayer.connector.disk.store import DiskStore

BYTES = 2000
SIZE = HEADER_BYTES + BYTES


def key(i):
    return i.to_bytes(4, "big") * 8


def payload(i):
    return memoryview(bytes((i + j) % 256 for j in range(BYTES)))


def store_in(folder, entries=100, identity=IDENTITY):
    return DiskStore(folder, entries * SIZE, identity, BYTES)


def read(store, i):
    into = bytearray(BYTES)
    store.read(key(i), memoryview(into))
    return into


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def used(folder):
    return sum(path.stat().st_size for path in files(folder))


def held(store, n):
    return [i for i in range(n) if store.contains(key(i))]


def test_what_was_written_is_read(tmp_path):
    store = store_in(tmp_path)
    for i in range(5):
        assert store.write(key(i), payload(i))
    for other in (store, store_in(tmp_path)):
        assert [read(other, i) for i in range(5)] == [bytearray(payload(i)) for i in range(5)]
        assert other.total == used(tmp_path) == 5 * SIZE
    assert all(path.suffix == ".row" for path in files(tmp_path))


def test_what_is_not_there(tmp_path):
    store = store_in(tmp_path)
    assert not store.contains(key(0))
    with pytest.raises(EntryError, match="absent"):
        read(store, 0)


def test_the_least_recently_used_goes_first(tmp_path):
    store = store_in(tmp_path, entries=4)
    for i in range(4):
        store.write(key(i), payload(i))
    read(store, 0)
    store.touch([key(1)])
    store.write(key(4), payload(4))
    store.write(key(5), payload(5))
    assert held(store, 6) == [0, 1, 4, 5] and used(tmp_path) == 4 * SIZE


def test_use_is_remembered_over_a_scan_and_a_restart(tmp_path):
    store = store_in(tmp_path, entries=4)
    for i in range(4):
        store.write(key(i), payload(i))
        os.utime(store.path_of(key(i)), (i, i))
    read(store, 0)
    store.rescan()
    restarted = store_in(tmp_path, entries=2)  # a smaller bound: brought under it at once
    assert held(restarted, 4) == [0, 3] and used(tmp_path) == 2 * SIZE


def test_other_models_entries_count_and_go(tmp_path):
    old = store_in(tmp_path, entries=3, identity=replace(IDENTITY, weights="other"))
    for i in range(3):
        old.write(key(i), payload(i))
        os.utime(old.path_of(key(i)), (i, i))
    new = store_in(tmp_path, entries=3)
    assert held(new, 3) == []
    new.write(key(0), payload(0))
    old.rescan()
    assert used(tmp_path) == 3 * SIZE and held(old, 3) == [1, 2]


def test_what_never_fits_is_not_written(tmp_path):
    store = DiskStore(tmp_path, SIZE - 1, IDENTITY, BYTES)
    assert not store.write(key(0), payload(0)) and used(tmp_path) == 0


def test_two_writers_stay_under_the_bound_together(tmp_path):
    """Each learns of the other's entries when it scans: in between they may exceed it by what was written."""
    first, second = store_in(tmp_path, entries=10), store_in(tmp_path, entries=10)
    for i in range(40):
        (first if i % 2 else second).write(key(i), payload(i))
    assert used(tmp_path) <= 20 * SIZE
    first.rescan()
    second.rescan()
    assert used(tmp_path) <= 10 * SIZE
    assert held(first, 40) == held(second, 40)


def test_two_writers_of_the_same_keys(tmp_path):
    """At any moment a reader gets a whole entry or none."""
    stores = [store_in(tmp_path, entries=6) for _ in range(3)]
    stop, wrong, good = threading.Event(), [], []

    def write(store):
        for i in range(300):
            store.write(key(i % 8), payload(i % 8))
        stop.set()

    def keep_reading():
        while not stop.is_set() or not good:
            for i in range(8):
                try:
                    (good if read(stores[2], i) == payload(i) else wrong).append(i)
                except EntryError as error:
                    if error.reason != "absent":
                        wrong.append(error)
                except OSError as error:
                    wrong.append(error)

    threads = [threading.Thread(target=write, args=(s,)) for s in stores[:2]]
    threads.append(threading.Thread(target=keep_reading))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and good


def test_damage_is_removed(tmp_path):
    store = store_in(tmp_path)
    store.write(key(0), payload(0))
    with open(store.path_of(key(0)), "ab") as file:
        file.write(b"\0")
    with pytest.raises(EntryError, match="short"):
        read(store, 0)
    assert not store.contains(key(0)) and store.total == 0 == used(tmp_path)


def test_an_entry_under_another_name(tmp_path):
    """As after a copy of files by hand."""
    store = store_in(tmp_path)
    store.write(key(0), payload(0))
    store.write(key(1), payload(1))
    shutil.copy(store.path_of(key(1)), store.path_of(key(0)))
    with pytest.raises(EntryError, match="other key"):
        read(store, 0)


def leave_old_entry(store, i, used):
    """As an engine of an earlier version has left it, with the same identity."""
    path = Path(store.path_of(key(i)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(entry_of_version(1, key=key(i), payload=bytes(payload(i))))
    os.utime(path, (used, used))


def test_an_entry_of_an_old_format_is_a_miss(tmp_path):
    store = store_in(tmp_path)
    leave_old_entry(store, 0, used=time.time())
    with pytest.raises(EntryError) as caught:
        read(store, 0)
    assert caught.value.reason == "old format"
    assert used(tmp_path) == 0  # there is room for one of today's
    assert store.write(key(0), payload(0)) and read(store, 0) == payload(0)


def test_entries_of_an_old_format_count_and_go_first(tmp_path):
    store = store_in(tmp_path, entries=4)
    for i in (0, 1):
        leave_old_entry(store, i, used=time.time() - 60)
    store.rescan()
    assert store.total == 2 * SIZE
    for i in (2, 3, 4, 5):
        store.write(key(i), payload(i))
    assert held(store, 6) == [2, 3, 4, 5] and used(tmp_path) == 4 * SIZE


def leave_temporary(store, i, hours=0.0, size=SIZE):
    """As an engine that is writing leaves it, or one that was killed."""
    part = f"{store.path_of(key(i))}.1.1.01234567.tmp"
    os.makedirs(os.path.dirname(part), exist_ok=True)
    with open(part, "wb") as file:
        file.write(bytes(size))
    os.utime(part, (time.time() - hours * 3600,) * 2)
    return part


def test_temporary_files(tmp_path):
    store = store_in(tmp_path, entries=3)
    store.write(key(0), payload(0))
    part = leave_temporary(store, 0)
    fresh = store_in(tmp_path, entries=3)
    assert fresh.total == 2 * SIZE  # perhaps another engine is writing it: it counts and stays
    for i in range(1, 4):
        fresh.write(key(i), payload(i))
    assert os.path.exists(part) and held(fresh, 4) == [2, 3]
    leave_temporary(store, 0, hours=1.1)
    assert store_in(tmp_path, entries=3).total == 2 * SIZE and not os.path.exists(part)


def test_files_being_written_count_for_the_bound(tmp_path):
    """They cannot be evicted: what no longer fits beside them is not written."""
    store = store_in(tmp_path, entries=3)
    parts = [leave_temporary(store, i) for i in range(3)]
    store.rescan()
    assert not store.write(key(3), payload(3)) and used(tmp_path) == 3 * SIZE
    os.unlink(parts[0])
    store.rescan()
    assert store.write(key(3), payload(3)) and used(tmp_path) == 3 * SIZE


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_clock_that_was_set(tmp_path, monkeypatch, hours):
    """Back: what was written before lies in the future, and must not stay for ever."""
    store, now = store_in(tmp_path, entries=4), time.time()
    for i in range(3):
        store.write(key(i), payload(i))
        os.utime(store.path_of(key(i)), (now + i, now + i))
    part = leave_temporary(store, 9)
    clock = [now + hours * 3600]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    store = store_in(tmp_path, entries=4)
    assert os.path.exists(part) == (hours < 0)  # its writer, if there is one, starts it anew
    for i in range(3, 9):
        clock[0] += 7200
        store.write(key(i), payload(i))
        os.utime(store.path_of(key(i)), (clock[0],) * 2)
        store.rescan()
    assert held(store, 9) == [5, 6, 7, 8] and not os.path.exists(part)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    store.write(key(0), payload(0))

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        store.write(key(1), payload(1))
    assert held(store, 2) == [0] and used(tmp_path) == SIZE == store.total


def test_a_folder_emptied_while_writing(tmp_path, monkeypatch):
    """As `vllm-xlayer tier purge` may do while an engine runs."""
    store, rename = store_in(tmp_path), os.replace

    def purge_first(*args, **handles):
        shutil.rmtree(tmp_path / "xlayer-rows")
        rename(*args, **handles)

    monkeypatch.setattr(os, "replace", purge_first)
    assert not store.write(key(0), payload(0))
    monkeypatch.setattr(os, "replace", rename)
    assert store.write(key(1), payload(1)) and read(store, 1) == payload(1)


def test_a_folder_that_went_away_is_an_error(tmp_path):
    """It is not made again: a disk may have been mounted there."""
    folder = tmp_path / "disk"
    folder.mkdir()
    store = store_in(folder)
    store.write(key(0), payload(0))
    shutil.rmtree(folder)
    with pytest.raises(OSError, match="No such file"):
        store.write(key(1), payload(1))
    with pytest.raises(OSError, match="No such file"):
        read(store, 0)
    assert not folder.exists()
