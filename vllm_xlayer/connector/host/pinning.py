"""Host memory is pinned beside the engine's start: piece by piece, on a thread of its own.

CUDA takes about 0.1 s a GB, and holds up other calls into the driver while it does: hence pieces. A copy must
not begin in one piece and end in another (CUDA refuses it), so a piece holds whole chunks; and a page belongs
to one piece, so it is whole pages as well.
"""

import ctypes
import logging
import math
import mmap
import threading
import time
from collections.abc import Callable

import torch

from . import numa

logger = logging.getLogger(__name__)

GIB = 1 << 30
PIECE_BYTES = 256 << 20


def needed() -> bool:
    """Whether copies want pinned memory here. Scheduler and workers answer alike."""
    from vllm.platforms import current_platform

    return current_platform.is_cuda()


class Pinning:
    """Pins memory once it is started, and unpins it when closed.

    Args:
        memory: uint8 [bytes], dense, begins with a page; kept alive.
        unit: bytes that a copy stays within: memory is cut at multiples of it only.
        device: the GPU.
        populate: gives (offset, bytes) of the memory its pages; called on the thread before they are pinned.

    Attributes:
        ready: All of it is pinned.
        problem: Why that will never be; empty as long as it may.
    """

    def __init__(
        self, memory: torch.Tensor, unit: int, device: torch.device, populate: Callable[[int, int], None]
    ):
        self.ready = False
        self.problem = ""
        self._memory, self._piece = memory, piece_bytes(unit)
        self._device, self._populate = device, populate
        self._pinned: list[int] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="xlayer-pin", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Returns when no memory is pinned any more; no copy may be under way."""
        self._stop.set()
        self._thread.join()
        self._unpin()

    def _run(self) -> None:
        started = time.perf_counter()
        try:
            node = enter(self._device)
            self._pin()
        except Exception as error:  # whatever it is, the engine can run without the tier
            self.problem = _explained(error, self._memory.nbytes, len(self._pinned) * self._piece)
            self._unpin()
            return
        if self._stop.is_set():
            return
        logger.info(
            "XLayerConnector: host tier ready: %.2f GiB pinned in %.1f s%s",
            self._memory.nbytes / GIB, time.perf_counter() - started,
            "" if node is None else f", on NUMA node {node} as {self._device} is",
        )  # fmt: skip
        self.ready = True

    def _pin(self) -> None:
        address, size = self._memory.data_ptr(), self._memory.nbytes
        for begin in range(0, size, self._piece):
            if self._stop.is_set():
                return
            count = min(self._piece, size - begin)
            self._populate(begin, count)
            pin(address + begin, count)
            self._pinned.append(address + begin)

    def _unpin(self) -> None:
        self.ready = False
        while self._pinned:
            try:
                unpin(self._pinned.pop())
            except RuntimeError as error:  # the device is broken: the process is about to end
                logger.warning("XLayerConnector: %s", error)


def piece_bytes(unit: int) -> int:
    """About PIECE_BYTES: a multiple of `unit` and of a page."""
    smallest = math.lcm(unit, mmap.PAGESIZE)
    return max(1, PIECE_BYTES // smallest) * smallest


def touch(memory: torch.Tensor) -> Callable[[int, int], None]:
    """`populate` for anonymous memory."""

    def zero(begin: int, count: int) -> None:
        ctypes.memset(memory.data_ptr() + begin, 0, count)  # without Python's lock

    return zero


def _explained(error: Exception, size: int, pinned: int) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"expected {size / GIB:.2f} GiB of pinned host memory, got {pinned / GIB:.2f} GiB, then: {reason}. "
        "Set cpu_bytes_to_use in kv_connector_extra_config to less, or raise the limit of locked memory "
        "(ulimit -l)."
    )


def enter(device: torch.device) -> int | None:
    """Prepares the calling thread to populate and pin. Returns the NUMA node it stays on, if any."""
    from cuda.bindings import runtime

    torch.cuda.set_device(device)
    # Else CUDA refuses what this thread asks for while the engine captures its graphs.
    relaxed = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
    _check("cudaThreadExchangeStreamCaptureMode", *runtime.cudaThreadExchangeStreamCaptureMode(relaxed))
    return numa.stay_near(device)


def pin(address: int, size: int) -> None:
    """RuntimeError if CUDA refuses."""
    from cuda.bindings import runtime

    _check("cudaHostRegister", *runtime.cudaHostRegister(address, size, 0))


def unpin(address: int) -> None:
    """RuntimeError if CUDA refuses."""
    from cuda.bindings import runtime

    _check("cudaHostUnregister", *runtime.cudaHostUnregister(address))


def _check(call: str, error, *_) -> None:
    if int(error) != 0:
        raise RuntimeError(f"{call}: {error.name}")
