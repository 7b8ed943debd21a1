"""The host tier's memory: rows of all ranks side by side, chunk after chunk.

Without a disk tier each worker has memory of its own. With one, the scheduler's process reads and writes the
same bytes: the worker's own tensor where both are one process, else a file in /dev/shm that all of them map.
"""

import mmap
import os
import time
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from vllm.logger import init_logger

logger = init_logger(__name__)

GIB = 1 << 30
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


def worker_memory(shape: HostShape, rank: int, pinned: bool) -> torch.Tensor:
    """uint8 [chunks * rows_per_chunk, row_bytes]: a rank's rows, dense or `ranks` rows apart.

    Raises:
        MemoryError: that much cannot be had.
    """
    rows = shape.chunks * shape.rows_per_chunk
    started = time.perf_counter()
    if shape.shared_as is None or shape.in_process:
        host = _allocate(rows, shape.row_bytes, pinned)
        if shape.shared_as is not None:
            _in_process[shape.shared_as] = host
    else:
        whole = _map_shared(shape, create=True)
        if pinned:
            _pin(whole)
        host = whole.view(rows, shape.ranks, shape.row_bytes)[:, rank]
    logger.info(
        "XLayerConnector: host tier of %d rows x %d bytes (%.2f GiB%s) in %.1f s",
        rows, shape.row_bytes, rows * shape.row_bytes / GIB, ", pinned" if pinned else "",
        time.perf_counter() - started,
    )  # fmt: skip
    return host


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
    whole = _map_shared(shape, create=False)
    os.unlink(_path(shape))  # all who need it have it open; nothing is left behind by a kill
    return whole.view(shape.chunks, shape.chunk_bytes)


def _allocate(rows: int, row_bytes: int, pinned: bool) -> torch.Tensor:
    try:
        # Zeroed by the first touch of each page where it is not pinned: no start-up cost on the CPU platform.
        return torch.empty((rows, row_bytes), dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _no_memory(
            rows * row_bytes, "pinned host memory" if pinned else "host memory", reason
        ) from error


def _no_memory(size: int, kind: str, reason: str) -> MemoryError:
    return MemoryError(
        f"expected {size / GIB:.2f} GiB of {kind}, got: {reason}. "
        "Set cpu_bytes_to_use in kv_connector_extra_config to less."
    )


def _path(shape: HostShape) -> str:
    return f"{SHARED_FOLDER}/vllm_xlayer_{shape.shared_as}"


def _map_shared(shape: HostShape, create: bool) -> torch.Tensor:
    """uint8 [bytes of all ranks], made by the first worker that comes."""
    path, size = _path(shape), shape.chunks * shape.chunk_bytes
    try:
        file = _create(path, size) if create else None
        if file is None:
            file = _open(path, size)
        try:
            return torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
        finally:
            os.close(file)
    except (OSError, ValueError) as error:
        raise _no_memory(size, f"shared memory in {SHARED_FOLDER}", str(error)) from error


def _create(path: str, size: int) -> int | None:
    """None if another worker was first."""
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    except FileExistsError:
        return None
    try:
        # Not ftruncate: where /dev/shm is too small (in a container, often), that would be a SIGBUS later.
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


def _pin(memory: torch.Tensor) -> None:
    result = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
    if int(result) != 0:
        raise _no_memory(memory.nbytes, "pinned shared memory", f"cudaHostRegister: {result}")
