"""The commands that look at a disk tier's folder."""

import argparse
import os
import shutil
import time
from pathlib import Path

import pytest
from test_tier_format import IDENTITY, entry_of_version

from vllm_xlayer.connector.disk import commands as tier_cli
from vllm_xlayer.connector.disk.format import HEADER_BYTES
from vllm_xlayer.connector.disk.store import DiskStore

BYTES = 500


@pytest.fixture
def store(tmp_path):
    store = DiskStore(tmp_path, 1 << 20, IDENTITY, BYTES)
    for i in range(5):
        store.write(bytes([i]) * 36, memoryview(bytes([i]) * BYTES))
    return store


def command(*words):
    parser = argparse.ArgumentParser()
    tier_cli.add_parsers(parser.add_subparsers(dest="command", required=True))
    return tier_cli.run(parser.parse_args(list(map(str, words))))


def path(store, i):
    return Path(store.path_of(bytes([i]) * 36))


def test_a_good_folder(store, tmp_path, capsys):
    assert command("verify", tmp_path) == 0
    assert capsys.readouterr().out == "5 entries checked, 0 damaged\n"


def test_damage_is_named_and_deleted_on_demand(store, tmp_path, capsys):
    data = bytearray(path(store, 1).read_bytes())
    data[HEADER_BYTES + 3] ^= 1
    path(store, 1).write_bytes(data)
    path(store, 2).write_bytes(b"")
    shutil.copy(path(store, 3), path(store, 4))
    other = tmp_path / "xlayer-rows" / ("0" * 32) / "03"
    other.mkdir(parents=True)
    shutil.copy(path(store, 3), other)
    assert command("verify", tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    summary = "6 entries checked, 4 damaged (1 damaged payload, 1 other identity, 1 other key, 1 short)"
    assert lines[-1] == summary and len(lines) == 5
    assert command("verify", tmp_path, "--delete") == 1
    assert command("verify", tmp_path) == 0
    assert capsys.readouterr().out.endswith("2 entries checked, 0 damaged\n")
    assert path(store, 0).exists() and not path(store, 1).exists()


def test_ls_and_stat(store, tmp_path, capsys):
    os.utime(path(store, 2), (time.time() - 1000,) * 2)
    assert command("tier", "ls", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and lines[-1].split()[:2] == [str(HEADER_BYTES + BYTES), "1000"]
    assert lines[-1].endswith((bytes([2]) * 36).hex())
    assert command("tier", "stat", tmp_path) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{IDENTITY.digest}: 5 files") and "a/model" in out and "nvfp4" in out


def test_entries_of_an_old_format(store, tmp_path, capsys):
    """Counted apart from damage, and removed on demand."""
    key = bytes([1]) * 36
    path(store, 1).write_bytes(entry_of_version(1, key=key, payload=bytes(BYTES)))
    assert command("verify", tmp_path) == 0
    good, old = capsys.readouterr().out.splitlines()
    assert good == "5 entries checked, 0 damaged" and old.startswith("1 of an old format")
    assert command("verify", tmp_path, "--delete") == 0
    assert capsys.readouterr().out.endswith("never used: deleted\n") and not path(store, 1).exists()


def test_stat_of_headers_it_does_not_know(store, tmp_path, capsys):
    for i in range(5):
        old = entry_of_version(1, key=bytes([i]) * 36, payload=bytes(BYTES))
        path(store, i).write_bytes(old)
    assert command("tier", "stat", tmp_path) == 0
    assert "old format: expected version 2, got 1" in capsys.readouterr().out


def test_stat_of_a_header_with_a_field_less(store, tmp_path, capsys, monkeypatch):
    """As another version of this package may have written, or will."""
    monkeypatch.setattr(tier_cli, "_NAMES", (*tier_cli._NAMES, "a field of tomorrow"))
    assert command("tier", "stat", tmp_path) == 0
    assert "a/model" in capsys.readouterr().out


def test_purge(store, tmp_path, capsys):
    part = path(store, 0).with_name(f"{path(store, 0).name}.1.1.01234567.tmp")
    part.write_bytes(b"part")  # somebody may be writing it
    assert command("tier", "purge", tmp_path) == 0
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == [part]
    assert capsys.readouterr().out.startswith("5 files deleted")
    store.rescan()
    assert store.write(bytes(36), memoryview(bytes(BYTES)))


def test_no_folder(tmp_path, capsys):
    assert command("tier", "ls", tmp_path / "none") == 2
    assert "expected a folder" in capsys.readouterr().err
