"""The host tier's memory: rows of all ranks side by side, chunk after chunk; of equal rows one copy.

Without a disk tier each worker has memory of its own. With one, the scheduler's process reads and writes the
same bytes: the worker's own tensor where both are one process, else memory that all of them map
(shared_memory.py). It is for the scheduler only if every rank has it. Ranks that share one copy of each row
map the same memory in either case.

What has to be pinned gets its address space at once, and its pages beside the engine's start (pinning.py).
"""

import logging
import mmap
import os
from dataclasses import dataclass
from weakref import WeakValueDictionary

import psutil
import torch

from . import pinning, shared_memory
from .pinning import GIB, Pinning

logger = logging.getLogger(__name__)

_in_process: WeakValueDictionary[str, torch.Tensor] = WeakValueDictionary()


@dataclass(frozen=True)
class HostShape:
    """Args:
    row_bytes: of one block on one rank.
    shared_as: a name that no other engine has; None where only the worker itself uses the memory.
    in_process: scheduler and worker are in one process.
    one_copy: the ranks' rows are equal: each is there once, and the first rank writes it.
    """

    chunks: int
    rows_per_chunk: int
    row_bytes: int
    ranks: int
    shared_as: str | None
    in_process: bool
    one_copy: bool = False

    @property
    def copies(self) -> int:
        """Rows that one block has in host memory."""
        return 1 if self.one_copy else self.ranks

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk, all ranks."""
        return self.rows_per_chunk * self.copies * self.row_bytes


def worker_memory(
    shape: HostShape, rank: int, pin_for: torch.device | None = None
) -> tuple[torch.Tensor, Pinning | None]:
    """A rank's rows, uint8 [chunks * rows_per_chunk, row_bytes], dense or `copies` rows apart.

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
        whole, file = _join(shape, rank, pages_later=pin_for is not None)
        if pin_for is not None:
            pins = Pinning(whole, shape.chunk_bytes, pin_for, file.populate)
        host = whole.view(rows, shape.copies, shape.row_bytes)[:, 0 if shape.one_copy else rank]
    logger.info(
        "XLayerConnector: host tier of %d rows x %d bytes (%.2f GiB%s%s)",
        rows, shape.row_bytes, rows * shape.row_bytes / GIB,
        f", one copy for {shape.ranks} ranks, whose rows are equal" if shape.one_copy else "",
        "" if pins is None else "; until it is pinned, requests are served without it",
    )  # fmt: skip
    return host, pins


def scheduler_memory(shape: HostShape) -> torch.Tensor:
    """uint8 [chunks, chunk_bytes]: what the workers, which were made before, have as their memory.

    Raises:
        MemoryError: they have none, or not all of them have this one.
    """
    assert shape.shared_as is not None
    if shape.in_process:
        host = _in_process.pop(shape.shared_as, None)
        if host is None:
            raise MemoryError("the worker has no host memory")
        return host.view(shape.chunks, shape.chunk_bytes)
    try:
        descriptor, ranks = shared_memory.take(shape.shared_as)
    except OSError as error:
        raise MemoryError(f"no worker on the scheduler's host shares its host memory: {error}") from error
    whole, _ = _map(descriptor, shape.chunks * shape.chunk_bytes)
    if elsewhere := set(range(shape.ranks)) - ranks:
        raise MemoryError(
            f"expected the host memory of all {shape.ranks} ranks, got that of {len(ranks)}: the scheduler "
            f"does not share memory with {_named(elsewhere)}, on another host or in a container of its own"
        )
    return whole.view(shape.chunks, shape.chunk_bytes)


def _named(ranks: set[int]) -> str:
    listed = ", ".join(map(str, sorted(ranks)[:8]))
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}{', ...' if len(ranks) > 8 else ''}"


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


class _File:
    """An open file of shared memory."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def populate(self, begin: int, count: int) -> None:
        """Gives a part of it its pages, where it has none. OSError if there are none left."""
        os.posix_fallocate(self._descriptor, begin, count)

    def __del__(self) -> None:
        os.close(self._descriptor)


def _join(shape: HostShape, rank: int, pages_later: bool) -> tuple[torch.Tensor, _File]:
    """uint8 [bytes of all ranks], made by the first worker that comes, with all its pages or without."""
    assert shape.shared_as is not None
    size = shape.chunks * shape.chunk_bytes
    try:
        return _map(shared_memory.join(shape.shared_as, rank, lambda: _make(size, pages_later)), size)
    except (OSError, ValueError, OverflowError) as error:
        raise _no_memory(size, "shared memory", str(error)) from error


def _make(size: int, pages_later: bool) -> int:
    # It has no limit of its own: Linux ends processes when pages are not to be had.
    if size > (available := psutil.virtual_memory().available):
        raise OSError(f"{available / GIB:.2f} GiB that are available")
    descriptor = os.memfd_create("vllm-xlayer", os.MFD_CLOEXEC)
    try:
        if pages_later:
            os.ftruncate(descriptor, size)
        else:
            os.posix_fallocate(descriptor, 0, size)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _map(descriptor: int, size: int) -> tuple[torch.Tensor, _File]:
    file = _File(descriptor)
    if (got := os.fstat(descriptor).st_size) != size:
        raise OSError(f"expected {size} bytes, got {got}")
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8), file
