"""The files of a disk tier: only its own, only for their owner, and never through a symbolic link.

    FOLDER / xlayer-rows / <identity: 32 hex digits> / <first byte of the key> / <key>.row

A path here is what follows xlayer-rows. Each folder on the way is opened by a handle, relative to the one
above it: who may write to FOLDER can put a link there, and that must not lead a write, a read or an eviction
elsewhere. FOLDER itself is the user's, and may be a link.

Names that are not of this form, and what is no regular file or too large to be an entry, are not the tier's:
they are not counted and not touched.
"""

import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .format import EntryError

SUBFOLDER = "xlayer-rows"
SUFFIX, TEMPORARY = ".row", ".tmp"
MAX_BYTES = 1 << 32
"""Of an entry. A larger file is something else, perhaps a sparse one that would push every entry out."""
NOT_A_FILE = "not a file"
FUTURE_SECONDS = 60.0
"""Files from further ahead were written before the clock was set back."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_IDENTITY, _BYTE = re.compile("[0-9a-f]{32}"), re.compile("[0-9a-f]{2}")
_NAME = re.compile(r"(?:[0-9a-f]{2})+\.row(?:\.\d+\.\d+\.[0-9a-f]{8}\.tmp)?")

Found = tuple[float, str, int]
"""Time of last use, path, bytes."""


class DiskFiles:
    """What may be done with the files below a folder. All of it calls the disk.

    Args:
        folder: the user's.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.root = folder / SUBFOLDER

    def prepare(self) -> str:
        """Makes the folders, and tries whether they can be written to.

        Returns:
            What is wrong with the root folder's permissions and could not be mended; else empty.

        Raises:
            OSError: they cannot be used.
        """
        with suppress(FileExistsError):
            os.mkdir(self.folder, 0o700)
        with self._opened((), create=True) as root:
            probe = f"probe-{os.urandom(8).hex()}{TEMPORARY}"
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=root))
            os.unlink(probe, dir_fd=root)
            return _keep_private(root, self.root)

    @contextmanager
    def opened(self, path: str, create: bool = False) -> Iterator[tuple[int, str]]:
        """A handle of the folder that a file is in, and the file's name in it.

        Args:
            create: makes the folders where they are not there. Never FOLDER: if that is gone, so is perhaps
                the disk that was mounted there.

        Raises:
            FileNotFoundError: there is no such folder.
            NotADirectoryError: something else has its name, such as a link to one.
        """
        *folders, name = path.split("/")
        with self._opened(tuple(folders), create) as handle:
            yield handle, name

    @contextmanager
    def _opened(self, folders: tuple[str, ...], create: bool = False) -> Iterator[int]:
        handle = os.open(self.folder, _FOLDER)
        try:
            for name in (SUBFOLDER, *folders):
                above = handle
                handle = _open_folder(name, above, create)
                os.close(above)
            yield handle
        finally:
            os.close(handle)

    def size(self, path: str) -> int | None:
        """Bytes of an entry; None if there is none.

        The only call that is not by handles: it is made for many files, and tells of their existence only.
        """
        try:
            found = os.lstat(self.root / path)
        except OSError:
            return None
        return found.st_size if _is_entry(found) else None

    def unlink(self, path: str) -> bool:
        """Whether the file could be deleted. What stays is seen by the next scan."""
        with suppress(OSError), self.opened(path) as (folder, name):
            os.unlink(name, dir_fd=folder)
            return True
        return False

    def scan(self, progress: Callable[[], None] = lambda: None) -> Iterator[list[Found]]:
        """Yields the entries and temporary files of every folder, a list a folder.

        Args:
            progress: called after every call to the disk.
        """
        for identity in self._subfolders((), _IDENTITY):
            for byte in self._subfolders((identity,), _BYTE):
                progress()
                yield list(self._files((identity, byte), progress))

    def _subfolders(self, folders: tuple[str, ...], form: re.Pattern[str]) -> list[str]:
        with _absent_is_empty(), self._opened(folders) as handle, os.scandir(handle) as found:
            return [e.name for e in found if form.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
        return []

    def _files(self, folders: tuple[str, str], progress: Callable[[], None]) -> Iterator[Found]:
        now = time.time()
        with _absent_is_empty(), self._opened(folders) as handle, os.scandir(handle) as entries:
            for entry in entries:
                if not (_NAME.fullmatch(entry.name) and entry.name.startswith(folders[1])):
                    continue
                try:
                    found = entry.stat(follow_symlinks=False)
                except FileNotFoundError:  # another engine was faster
                    continue
                progress()
                if not _is_entry(found):
                    continue
                used = found.st_mtime
                if used > now + FUTURE_SECONDS:
                    # It would be the last to go until the clock has caught up. From now on it ages.
                    with suppress(OSError):
                        os.utime(entry.name, (now, now), dir_fd=handle, follow_symlinks=False)
                    used = now
                yield used, f"{folders[0]}/{folders[1]}/{entry.name}", found.st_size


@contextmanager
def open_entry(folder: int, name: str) -> Iterator[tuple[int, int]]:
    """A handle of a file for reading, and its bytes. Does not wait for one that is a pipe.

    Raises:
        EntryError: it is no regular file, or too large.
        OSError: it cannot be opened.
    """
    try:
        handle = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
            raise EntryError(NOT_A_FILE, f"{name}: {error.strerror}") from error
        raise
    try:
        found = os.fstat(handle)
        if not _is_entry(found):
            raise EntryError(NOT_A_FILE, f"{name}: mode {found.st_mode:o}, {found.st_size} bytes")
        yield handle, found.st_size
    finally:
        os.close(handle)


def create_file(folder: int, name: str) -> BinaryIO:
    """A new file for writing, for its owner only, whatever the umask. FileExistsError if there is one."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    handle = os.open(name, flags, 0o600, dir_fd=folder)
    os.fchmod(handle, 0o600)
    return os.fdopen(handle, "wb")


def _open_folder(name: str, above: int, create: bool) -> int:
    try:
        return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=above)
    except FileNotFoundError:
        if not create:
            raise
    with suppress(FileExistsError):
        os.mkdir(name, 0o700, dir_fd=above)
    return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=above)


def _keep_private(root: int, path: Path) -> str:
    """Others cannot reach what is below a folder that is closed to them."""
    found = os.fstat(root)
    if not found.st_mode & 0o077:
        return ""
    try:
        os.fchmod(root, 0o700)
    except OSError as error:
        return (
            f"{path}: expected a folder for its owner only (mode 700), got {stat.S_IMODE(found.st_mode):o} "
            f"of user {found.st_uid}, and it cannot be changed ({error}): who can write to it can change "
            "what the engine answers"
        )
    return ""


def _is_entry(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode) and found.st_size <= MAX_BYTES


@contextmanager
def _absent_is_empty() -> Iterator[None]:
    """A folder that another engine deleted, that is a link, or that is closed to us holds nothing of ours."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        yield
