"""A folder of entries, bounded in bytes: write, read, evict. No threads, no vLLM.

    FOLDER / xlayer-rows / <identity> / <first byte of the key> / <key>.row

One file an entry, written to a temporary name and renamed. An embedded store (SQLite, LMDB) would save
inodes, but rows are 0.1 to 10 MB, where files cost nothing; and with files two engines share a folder
without locks, a kill at any moment leaves whole entries and temporary files, damage stays in one entry, and
eviction is an unlink. Nothing is synced: what a power failure leaves half written fails its checksum.

Each engine knows the folder from a scan, and from what it wrote since; `rescan` adds what others did. So two
engines that write at the same time can exceed the bound by what the other wrote since the last scan.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .disk_format import (
    HEADER_BYTES,
    EntryError,
    TierIdentity,
    check_header,
    check_payload,
    decode_header,
    encode_header,
)

SUBFOLDER = "xlayer-rows"
SUFFIX, TEMPORARY = ".row", ".tmp"
STALE_SECONDS = 3600.0
"""A temporary file this old was left by an engine that was killed."""


class DiskStore:
    """The entries of one identity, in a folder that may hold others' too; all count for the bound.

    Args:
        folder: must exist.
        limit: bytes of all entries in it.
        payload_bytes: of every entry of this identity.

    Raises:
        OSError: the folder cannot be read or written.
    """

    def __init__(self, folder: Path, limit: int, identity: TierIdentity, payload_bytes: int):
        self.root = folder / SUBFOLDER
        self.limit = limit
        self.identity = identity
        self.payload_bytes = payload_bytes
        self._own = f"{self.root}/{identity.digest}"
        self._lock = threading.Lock()
        # path -> (bytes, time of last use), the least recently used first
        self._known: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._total = 0
        self._writes = 0
        self.root.mkdir(exist_ok=True)
        probe = self.root / f"probe-{os.getpid()}{TEMPORARY}"
        probe.write_bytes(b"")
        probe.unlink()
        self.rescan()

    @property
    def total(self) -> int:
        """Bytes of all entries, as far as known."""
        return self._total

    def path_of(self, key: bytes) -> str:
        name = key.hex()
        return f"{self._own}/{name[:2]}/{name}{SUFFIX}"

    def contains(self, key: bytes) -> bool:
        """Whether there is an entry, good or not. Sees what other engines wrote meanwhile."""
        path = self.path_of(key)
        with self._lock:
            if path in self._known:
                return True
        try:
            size = os.stat(path).st_size
        except OSError:
            return False
        self._add(path, size)
        return True

    def touch(self, key: bytes) -> None:
        """Marks an entry as recently used, in this process."""
        with self._lock:
            if (path := self.path_of(key)) in self._known:
                self._known[path] = (self._known.pop(path)[0], time.time())

    def write(self, key: bytes, payload: memoryview) -> bool:
        """Writes an entry; OSError if the disk is full, gone or read-only.

        Returns:
            False if it was not written: it could never fit, or the folder was emptied in between.
        """
        size = HEADER_BYTES + payload.nbytes
        if size > self.limit:
            return False
        path = self.path_of(key)
        if self._total > self.limit - size:
            self.remove(path)  # not another entry, for a key that is there; until it is written, a miss
        self._evict(self.limit - size)
        self._writes += 1
        temporary = f"{path}.{os.getpid()}.{self._writes}.{os.urandom(4).hex()}{TEMPORARY}"
        header = encode_header(self.identity, key, payload)
        try:
            with self._create(temporary) as file:
                file.write(header)
                file.write(payload)
            os.replace(temporary, path)
        except OSError as error:
            _unlink(temporary)
            if isinstance(error, FileNotFoundError) and self.root.parent.is_dir():
                return False  # somebody emptied the folder just now
            raise
        self._add(path, size)
        return True

    def read(self, key: bytes, payload: memoryview) -> None:
        """Fills ``payload`` (uint8, payload_bytes long), which is garbage if this raises.

        Raises:
            EntryError: there is no usable entry. It has been removed, if it was there.
            OSError: the disk does not work.
        """
        path = self.path_of(key)
        try:
            self._read(path, key, payload)
        except FileNotFoundError as error:  # another engine evicted it
            self._forget(path)
            self.root.parent.stat()
            raise EntryError("absent", path) from error
        except EntryError as error:
            self.remove(path)
            raise EntryError(error.reason, f"{path}: {error}") from error
        with suppress(FileNotFoundError):  # evicted just now
            os.utime(path)
        self.touch(key)

    def _read(self, path: str, key: bytes, payload: memoryview) -> None:
        with open(path, "rb", buffering=0) as file:
            expected, got = HEADER_BYTES + self.payload_bytes, os.fstat(file.fileno()).st_size
            values = decode_header(file.read(HEADER_BYTES))
            checksum = check_header(values, self.identity, key, self.payload_bytes)
            if got != expected:
                raise EntryError("short", f"expected {expected} bytes, got {got}")
            done = 0
            while done < self.payload_bytes and (n := file.readinto(payload[done:])):
                done += n
        if done != self.payload_bytes:
            raise EntryError("short", f"expected {self.payload_bytes} bytes of payload, got {done}")
        check_payload(payload, checksum)

    def rescan(self) -> None:
        """Learns what is in the folder, oldest first, and brings it under the bound."""
        found, now = list(scan(self.root)), time.time()
        with self._lock:
            last_use = {path: used for path, (_, used) in self._known.items()}
            self._known.clear()
            self._total = 0
            for used, path, size in sorted((max(t, last_use.get(p, t)), p, n) for t, p, n in found):
                if path.endswith(TEMPORARY) and now - used > STALE_SECONDS:
                    _unlink(path)
                    continue
                self._total += size
                self._known[path] = (size, used)
        self._evict(self.limit)

    def remove(self, path: str) -> None:
        _unlink(path)
        self._forget(path)

    def _add(self, path: str, size: int) -> None:
        with self._lock:
            self._total += size - self._known.pop(path, (0, 0.0))[0]
            self._known[path] = (size, time.time())

    def _forget(self, path: str) -> None:
        with self._lock:
            self._total -= self._known.pop(path, (0, 0.0))[0]

    def _evict(self, bytes_left: int) -> None:
        while self._total > bytes_left:
            with self._lock:
                # A file still being written is its writer's; it counts, but stays.
                oldest = next((path for path in self._known if path.endswith(SUFFIX)), None)
            if oldest is None:
                return
            self.remove(oldest)

    def _create(self, path: str):
        try:
            return open(path, "xb")
        except FileNotFoundError:
            # Not makedirs: if the folder itself is gone, so is perhaps the disk that was mounted there.
            for folder in (self.root, Path(path).parent.parent, Path(path).parent):
                folder.mkdir(exist_ok=True)
            return open(path, "xb")


def scan(root: Path) -> Iterator[tuple[float, str, int]]:
    """(time of last use, path, bytes) of every entry and temporary file below a DiskStore's root."""
    try:
        with os.scandir(root) as identities:
            folders = [entry.path for entry in identities if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return
    for identity in folders:
        for folder in _subfolders(identity):
            yield from _files(folder)


def _subfolders(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _files(folder: str) -> Iterator[tuple[float, str, int]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith((SUFFIX, TEMPORARY)):
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:  # another engine was faster
                        continue
                    yield found.st_mtime, entry.path, found.st_size
    except FileNotFoundError:
        return


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:  # gone already, or on a disk that does not let us: the next scan knows
        return
