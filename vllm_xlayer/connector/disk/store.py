"""A folder of entries, bounded in bytes: write, read, evict. No threads, no vLLM.

One file an entry, written to a temporary name and renamed. An embedded store (SQLite, LMDB) would save
inodes, but rows are 0.1 to 10 MB, where files cost nothing; and with files two engines share a folder
without locks, a kill at any moment leaves whole entries and temporary files, damage stays in one entry, and
eviction is an unlink. Nothing is synced: what a power failure leaves half written fails its checksum.

Each engine knows the folder from a scan, and from what it wrote since; `rescan` adds what others did. So two
engines that write at the same time can exceed the bound by what the other wrote since the last scan.
"""

import copy
import errno
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from .account import Account
from .files import (
    MAX_BYTES,
    NOT_A_FILE,
    SUFFIX,
    TEMPORARY,
    DiskFiles,
    Found,
    create_file,
    open_entry,
)
from .format import (
    HEADER_BYTES,
    EntryError,
    TierIdentity,
    check_header,
    check_payload,
    decode_header,
    encode_header,
)

STALE_SECONDS = 3600.0
"""A temporary file this old was left by an engine that was killed."""
_IN_THE_WAY = (errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EEXIST, errno.ENOTEMPTY)


class DiskStore:
    """The entries of one identity, in a folder that may hold others' too; all count for the bound.

    `known` and `touch` do not call the disk, and wait for nothing that does. Everything else does.

    Args:
        folder: made if its parent is there.
        limit: bytes of all entries in it.
        payload_bytes: of every entry of this identity.
        progress: called after every call to the disk of a scan.

    Attributes:
        warning: what is wrong with the folder's permissions; else empty.

    Raises:
        OSError: the folder cannot be read or written.
    """

    def __init__(
        self,
        folder: Path,
        limit: int,
        identity: TierIdentity,
        payload_bytes: int,
        progress: Callable[[], None] = lambda: None,
    ):
        self.limit = limit
        self.identity = identity
        self.payload_bytes = payload_bytes
        self._progress = progress
        self._files = DiskFiles(folder)
        self._account = Account()
        self._writes = 0
        self.warning = self._files.prepare()
        self.rescan()

    def for_identity(self, identity: TierIdentity) -> "DiskStore":
        """The entries of another identity in the same folder. Does not call the disk."""
        other = copy.copy(self)
        other.identity = identity
        return other

    @property
    def root(self) -> Path:
        """The folder of all identities."""
        return self._files.root

    @property
    def total(self) -> int:
        """Bytes of all entries, as far as known."""
        return self._account.total

    def path_of(self, key: bytes) -> str:
        return f"{self.root}/{self._path(key)}"

    def _path(self, key: bytes) -> str:
        name = key.hex()
        return f"{self.identity.digest}/{name[:2]}/{name}{SUFFIX}"

    def known(self, key: bytes) -> bool | None:
        """Whether there is an entry, good or not; None if only the disk knows."""
        return self._account.has(self._path(key))

    def contains(self, key: bytes) -> bool:
        """Whether there is an entry, good or not. Sees what other engines wrote meanwhile."""
        path = self._path(key)
        if self._account.has(path):
            return True
        size = self._files.size(path)
        if size is None:
            self._account.forget([path])
            return False
        self._account.add(path, size)
        return True

    def assume_absent(self, keys: Iterable[bytes]) -> None:
        """Lets `known` say for a while that these are not there."""
        self._account.forget(map(self._path, keys))

    def touch(self, keys: Iterable[bytes]) -> None:
        """Marks entries as recently used, in this process."""
        self._account.touch(map(self._path, keys))

    def write(self, key: bytes, payload: memoryview) -> bool:
        """Writes an entry.

        Returns:
            False if it was not written: there is no room for it, or the folder was emptied in between.

        Raises:
            EntryError: something that is not the tier's is where the entry should be.
            OSError: the disk is full, gone or read-only.
        """
        size = HEADER_BYTES + payload.nbytes
        if size > min(self.limit, MAX_BYTES):
            return False
        path = self._path(key)
        if self.total > self.limit - size:
            self._remove(path)  # not another entry, for a key that is there; until it is written, a miss
        self._evict(self.limit - size)
        if self.total > self.limit - size:
            return False  # files that are still being written fill the folder
        self._writes += 1
        temporary = f"{path}.{os.getpid()}.{self._writes}.{os.urandom(4).hex()}{TEMPORARY}"
        try:
            self._write(temporary, path, (encode_header(self.identity, key, payload), payload))
        except OSError as error:
            self._files.unlink(temporary)
            if isinstance(error, FileNotFoundError) and self._files.folder.is_dir():
                return False  # somebody emptied the folder just now
            if error.errno in _IN_THE_WAY:
                raise EntryError("in the way", f"{self.root}/{path}: {error.strerror}") from error
            raise
        self._account.add(path, size)
        return True

    def _write(self, temporary: str, path: str, parts: Iterable[bytes | memoryview]) -> None:
        with self._files.opened(temporary, create=True) as (folder, name):
            with create_file(folder, name) as file:
                for part in parts:
                    file.write(part)
            os.replace(name, os.path.basename(path), src_dir_fd=folder, dst_dir_fd=folder)

    def read(self, key: bytes, payload: memoryview) -> None:
        """Fills ``payload`` (uint8, payload_bytes long), which is garbage if this raises.

        Raises:
            EntryError: there is no usable entry. It has been removed, if it was there and a file.
            OSError: the disk does not work.
        """
        path = self._path(key)
        try:
            self._read(path, key, payload)
        except FileNotFoundError as error:  # another engine evicted it
            self._account.forget([path])
            self._files.folder.stat()
            raise EntryError("absent", path) from error
        except NotADirectoryError as error:
            self._account.forget([path])
            raise EntryError(NOT_A_FILE, f"{path}: {error}") from error
        except EntryError as error:
            if error.reason == NOT_A_FILE:
                self._account.forget([path])
            else:
                self._remove(path)
            raise EntryError(error.reason, f"{self.root}/{path}: {error}") from error
        self._account.touch([path])

    def _read(self, path: str, key: bytes, payload: memoryview) -> None:
        with self._files.opened(path) as (folder, name), open_entry(folder, name) as (file, got):
            expected = HEADER_BYTES + self.payload_bytes
            values = decode_header(os.read(file, HEADER_BYTES))
            checksum = check_header(values, self.identity, key, self.payload_bytes)
            if got != expected:
                raise EntryError("short", f"expected {expected} bytes, got {got}")
            done = 0
            while done < self.payload_bytes and (n := os.readv(file, [payload[done:]])):
                done += n
            if done != self.payload_bytes:
                raise EntryError("short", f"expected {self.payload_bytes} bytes of payload, got {done}")
            check_payload([payload], checksum)
            os.utime(file)

    def rescan(self) -> None:
        """Learns what is in the folder, oldest first, and brings it under the bound.

        Nobody waits for this who does not call the disk, and what is written or read meanwhile counts.
        """
        self._account.begin_scan()
        now = time.time()
        found = [self._still_used(folder, now) for folder in self._files.scan(self._progress)]
        self._account.end_scan(found)
        self._evict(self.limit)

    def _still_used(self, folder: list[Found], now: float) -> list[Found]:
        """Without what engines that were killed left behind; with the time of use that is only known here."""
        kept = []
        for used, path, size in folder:
            if path.endswith(TEMPORARY) and now - used > STALE_SECONDS:
                self._files.unlink(path)
                self._progress()
            else:
                kept.append((max(used, min(now, self._account.last_use(path))), path, size))
        return kept

    def _remove(self, path: str) -> None:
        self._files.unlink(path)
        self._account.forget([path])

    def _evict(self, bytes_left: int) -> None:
        while self.total > bytes_left:
            # A file still being written is its writer's; it counts, but stays.
            oldest = self._account.oldest(SUFFIX)
            if oldest is None:
                return
            self._remove(oldest)
            self._progress()
