"""Who may read a disk tier's files, and what it leaves alone: links, and what is not its own."""

import os
import socket
import stat
import threading
from pathlib import Path

import pytest
from test_tier_cli import command
from test_tier_format import IDENTITY
from test_tier_store import SIZE, held, key, payload, read, store_in

from vllm_xlayer.connector.disk import commands as tier_cli
from vllm_xlayer.connector.disk import files as disk_files
from vllm_xlayer.connector.disk.format import EntryError
from vllm_xlayer.connector.disk.store import DiskStore


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o277], ids="umask {:03o}".format)
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_only_the_owner_may_read(tmp_path, umask):
    if os.umask(0o022) == 0o277 and os.geteuid() != 0:
        pytest.skip("with this umask nobody but root can use a folder that was just made")
    store = store_in(tmp_path / "tier")
    store.write(key(0), payload(0))
    path = Path(store.path_of(key(0)))
    assert mode(path) == 0o600
    assert [mode(folder) & 0o077 for folder in list(path.parents)[:4]] == [0, 0, 0, 0]
    assert path.parents[3] == tmp_path / "tier"


def test_a_folder_that_others_could_read_is_closed(tmp_path):
    """As versions before left it. What is below cannot be reached then."""
    (tmp_path / "xlayer-rows").mkdir(mode=0o755)
    os.chmod(tmp_path / "xlayer-rows", 0o755)
    assert not store_in(tmp_path).warning
    assert mode(tmp_path / "xlayer-rows") == 0o700


def test_a_folder_that_cannot_be_closed_is_named(tmp_path, monkeypatch):
    (tmp_path / "xlayer-rows").mkdir()
    os.chmod(tmp_path / "xlayer-rows", 0o777)

    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fchmod", refuse)
        warning = store_in(tmp_path).warning
    assert "mode 700" in warning and "got 777" in warning


def outside(tmp_path):
    """A folder of somebody else, with files that are named like the tier's own."""
    folder = tmp_path / "outside"
    store = store_in(folder)
    for i in range(3):
        store.write(key(i), payload(i))
    return store, {path: path.read_bytes() for path in folder.rglob("*.row")}


LINKED = {
    "root": lambda store: store._files.root,
    "identity": lambda store: store._files.root / IDENTITY.digest,
    "byte": lambda store: Path(store.path_of(key(0))).parent,
}


@pytest.mark.parametrize("linked", LINKED)
def test_a_link_to_a_folder_is_not_followed(tmp_path, linked, capsys):
    """A scan must not delete there, a read not find, a write not land."""
    theirs, before = outside(tmp_path)
    folder = tmp_path / "tier"
    ours = store_in(folder, entries=2)
    link = LINKED[linked](ours)
    link.mkdir(parents=True, exist_ok=True)
    link.rmdir()
    link.symlink_to(LINKED[linked](theirs))
    ours.rescan()
    assert ours.total == 0
    with pytest.raises(EntryError, match="not a file"):
        read(ours, 0)
    with pytest.raises(EntryError, match="in the way"):
        ours.write(key(0), payload(9))
    if linked == "root":
        with pytest.raises(OSError, match="Not a directory"):
            store_in(folder, entries=1)
        assert command("verify", folder, "--delete") == 2 and command("tier", "purge", folder) == 2
    else:
        assert store_in(folder, entries=1).total == 0
        assert command("tier", "purge", folder) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert link.is_symlink()


def test_the_users_own_folder_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    store = store_in(tmp_path / "link")
    assert store.write(key(0), payload(0)) and read(store, 0) == payload(0)


def test_the_probe_does_not_write_through_a_link(tmp_path, monkeypatch):
    """Its name can be guessed, and somebody was there first."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "xlayer-rows").mkdir()
    monkeypatch.setattr(os, "urandom", bytes)
    for name in (f"probe-{os.getpid()}.tmp", f"probe-{'00' * 8}.tmp"):
        (tmp_path / "xlayer-rows" / name).symlink_to(victim)
    with pytest.raises(FileExistsError):
        store_in(tmp_path)
    assert victim.read_text() == "precious"


def test_foreign_files_are_neither_counted_nor_touched(tmp_path):
    store = store_in(tmp_path, entries=2)
    store.write(key(0), payload(0))
    own = Path(store.path_of(key(0)))
    foreign = [
        own.with_name("notes.txt"), own.with_name("photo.row"), own.with_name(f"{own.name}.tmp"),
        own.with_name("ff.row"), own.parents[1] / "zz" / own.name, own.parents[2] / "mine" / "00" / own.name,
        own.parents[2] / own.name, own.parents[2] / "download.tmp",
    ]  # fmt: skip
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(3 * SIZE))
        os.utime(path, (0, 0))
    store.rescan()
    assert store.total == SIZE and held(store, 1) == [0]
    assert command("tier", "purge", tmp_path) == 0
    assert all(path.exists() for path in foreign) and not own.exists()


def put_directory(path):
    path.mkdir()
    (path / "inside").write_text("precious")


def put_socket(path):
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name may have about 100 characters
    try:
        socket.socket(socket.AF_UNIX).bind("s")
    finally:
        os.chdir(here)
    path.with_name("s").rename(path)


def put_sparse(path):
    with path.open("wb") as file:
        file.truncate(disk_files.MAX_BYTES * 1000)


ODD = {
    "directory": put_directory,
    "pipe": os.mkfifo,
    "socket": put_socket,
    "link to a file": lambda path: path.symlink_to("/etc/hostname"),
    "link to a device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path),
    "huge sparse file": put_sparse,
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_things_named_like_an_entry(tmp_path, kind, capsys):
    """A miss, and nothing waits for them, counts them, or deletes them."""
    store = store_in(tmp_path, entries=3)
    store.write(key(1), payload(1))
    odd = Path(store.path_of(key(0)))
    odd.parent.mkdir(exist_ok=True)
    ODD[kind](odd)
    before = os.lstat(odd)
    results = []

    def use():
        results.append(store.contains(key(0)))
        with pytest.raises(EntryError, match="not a file"):
            read(store, 0)
        results.append(store.known(key(0)))
        store.rescan()
        results.append(command("verify", tmp_path, "--delete"))
        results.append(command("tier", "stat", tmp_path))

    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    thread.join(30)
    assert not thread.is_alive() and results == [False, False, 0, 0]
    assert "1 entries checked, 0 damaged" in capsys.readouterr().out
    assert os.lstat(odd).st_ino == before.st_ino
    assert store.total == SIZE and read(store, 1) == payload(1)


def test_a_directory_in_an_entrys_place_is_not_written_over(tmp_path):
    store = store_in(tmp_path)
    odd = Path(store.path_of(key(0)))
    odd.parent.mkdir(parents=True)
    put_directory(odd)
    with pytest.raises(EntryError, match="in the way"):
        store.write(key(0), payload(0))
    assert (odd / "inside").read_text() == "precious"
    assert not list(tmp_path.rglob("*.tmp"))
    assert store.write(key(1), payload(1))


def test_what_can_never_be_an_entry_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr("vllm_xlayer.connector.disk.store.MAX_BYTES", SIZE - 1)
    store = DiskStore(tmp_path, 10 * SIZE, IDENTITY, SIZE)
    assert not store.write(key(0), payload(0))


def test_verify_reads_large_entries_in_pieces(tmp_path, monkeypatch, capsys):
    store = store_in(tmp_path)
    store.write(key(0), payload(0))
    real, sizes = os.read, []

    def counted(file, count):
        sizes.append(count)
        return real(file, count)

    monkeypatch.setattr(tier_cli, "_PIECE", 300)
    monkeypatch.setattr(os, "read", counted)
    assert command("verify", tmp_path) == 0
    assert max(sizes[1:]) == 300 and len(sizes) > 6
