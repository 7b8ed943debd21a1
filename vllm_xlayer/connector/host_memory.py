"""The host tier's memory: rows of all ranks side by side, chunk after chunk.

Without a disk tier each worker has memory of its own. With one, the scheduler's process reads and writes the
same bytes: the worker's own tensor where both are one process, else a file in /dev/shm that all of them map.

What has to be pinned gets its address space at once, and its pages beside the engine's start (pinning.py).
"""

import errno
import mmap
import os
import time
from dataclasses import dataclass
from weakref import WeakValueDictionary

import psutil
import torch
from vllm.logger import init_logger

from . import pinning
from .pinning import GIB, Pinning

logger = init_logger(__name__)

SHARED_FOLDER = "/dev/shm"
WAIT_SECONDS = 60.0
"""For the worker that makes the shared file, by the others."""

_in_process: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()


@dataclass(frozen=True)
class HostShape:
    """Args:
    row_bytes: of one block on one rank.
    shared_as: a name unique to the engine; None where only the worker itself uses the memory.
    in_process: scheduler and worker are in one process.
    """

    chunks: int
    rows_per_chunk: int
    row_bytes: int
    ranks: int
    shared_as: str | None
    in_process: bool

    @property
    def chunk_bytes(self) -> int:
        """Of one chunk, all ranks."""
        return self.rows_per_chunk * self.ranks * self.row_bytes


def worker_memory(
    shape: HostShape, rank: int, pin_for: torch.device | None = None
) -> tuple[torch.Tensor, Pinning | None]:
    """A rank's rows, uint8 [chunks * rows_per_chunk, row_bytes], dense or `ranks` rows apart.

    Args:
        pin_for: the GPU that copies from and to them. They may not be used before they are pinned, and that
            is for the caller to start.

    Raises:
        MemoryError: that much cannot be had.
    """
    rows, pins = shape.chunks * shape.rows_per_chunk, None
    if shape.shared_as is None or shape.in_process:
        if pin_for is None:
            host = _allocate(rows, shape.row_bytes)
        else:
            whole = _reserve(rows * shape.row_bytes)
            pins = Pinning(whole, shape.chunk_bytes, pin_for, pinning.touch(whole))
            host = whole.view(rows, shape.row_bytes)
        if shape.shared_as is not None:
            _in_process[shape.shared_as] = host
    else:
        whole, file = _map_shared(shape, create=True, pages_later=pin_for is not None)
        if pin_for is not None:
            pins = Pinning(whole, shape.chunk_bytes, pin_for, file.populate)
        host = whole.view(rows, shape.ranks, shape.row_bytes)[:, rank]
    logger.info(
        "XLayerConnector: host tier of %d rows x %d bytes (%.2f GiB%s)",
        rows, shape.row_bytes, rows * shape.row_bytes / GIB,
        "" if pins is None else "; until it is pinned, requests are served without it",
    )  # fmt: skip
    return host, pins


def scheduler_memory(shape: HostShape) -> torch.Tensor:
    """uint8 [chunks, chunk_bytes]: what the workers, which were made before, have as their memory.

    Raises:
        MemoryError: they have none.
    """
    assert shape.shared_as is not None
    if shape.in_process:
        host = _in_process.get(shape.shared_as)
        if host is None:
            raise MemoryError("the worker has no host memory")
        return host.view(shape.chunks, shape.chunk_bytes)
    whole, _ = _map_shared(shape, create=False)
    os.unlink(_path(shape))  # all who need it have it open; nothing is left behind by a kill
    return whole.view(shape.chunks, shape.chunk_bytes)


def _allocate(rows: int, row_bytes: int) -> torch.Tensor:
    try:
        # Zeroed by the first touch of each page: no start-up cost on the CPU platform.
        return torch.empty((rows, row_bytes), dtype=torch.uint8)
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _no_memory(rows * row_bytes, "host memory", reason) from error


def _reserve(size: int) -> torch.Tensor:
    """uint8 [size] that has no pages yet."""
    # Linux hands out addresses freely, and ends the process when their pages are not to be had.
    if size > (available := psutil.virtual_memory().available):
        raise _no_memory(size, "pinned host memory", f"{available / GIB:.2f} GiB that are available")
    try:
        return torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
    except (OSError, ValueError, OverflowError) as error:
        raise _no_memory(size, "host memory", str(error)) from error


def _no_memory(size: int, kind: str, reason: str) -> MemoryError:
    return MemoryError(
        f"expected {size / GIB:.2f} GiB of {kind}, got: {reason}. "
        "Set cpu_bytes_to_use in kv_connector_extra_config to less."
    )


def _path(shape: HostShape) -> str:
    return f"{SHARED_FOLDER}/vllm_xlayer_{shape.shared_as}"


class _File:
    """An open file of shared memory."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def populate(self, begin: int, count: int) -> None:
        """Gives a part of it its pages, where it has none. OSError if there are none left."""
        os.posix_fallocate(self._descriptor, begin, count)

    def __del__(self) -> None:
        os.close(self._descriptor)


def _map_shared(shape: HostShape, create: bool, pages_later: bool = False) -> tuple[torch.Tensor, _File]:
    """uint8 [bytes of all ranks], made by the first worker that comes, with all its pages or without."""
    path, size = _path(shape), shape.chunks * shape.chunk_bytes
    try:
        descriptor = _create(path, size, pages_later) if create else None
        file = _File(_open(path, size) if descriptor is None else descriptor)
        return torch.frombuffer(mmap.mmap(file._descriptor, size), dtype=torch.uint8), file
    except (OSError, ValueError) as error:
        raise _no_memory(size, f"shared memory in {SHARED_FOLDER}", str(error)) from error


def _create(path: str, size: int, pages_later: bool) -> int | None:
    """None if another worker was first."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except FileExistsError:
        return None
    try:
        # A page that is not there when it is touched is a SIGBUS, and /dev/shm is often small in a container.
        if pages_later:
            free = os.fstatvfs(file).f_bavail * os.fstatvfs(file).f_frsize
            if size > free:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({free / GIB:.2f} GiB are left)")
            os.ftruncate(file, size)
        else:
            os.posix_fallocate(file, 0, size)
    except OSError:
        os.close(file)
        os.unlink(path)
        raise
    return file


def _open(path: str, size: int) -> int:
    file, deadline = os.open(path, os.O_RDWR), time.monotonic() + WAIT_SECONDS
    while os.fstat(file).st_size != size:
        if time.monotonic() > deadline or os.fstat(file).st_nlink == 0:
            got = os.fstat(file).st_size
            os.close(file)
            raise OSError(f"{path}: expected {size} bytes, got {got}")
        time.sleep(0.01)
    return file
