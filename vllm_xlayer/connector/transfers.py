"""Copies one way between the device pool and the host tier, and what became of them.

A direction never raises: a copy that fails is a finished transfer without success, which the connector
reports and vLLM recovers from. On a GPU a transfer is batches on the direction's own stream; on the CPU
platform it is done when the call returns.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import TransferResult

from .. import ops
from .copy_choice import Way, choose
from .copy_measure import times_here

logger = init_logger(__name__)

BATCH_BYTES = 16 << 20
"""Of one submission. A copy engine does one after the other: the small copies that vLLM makes in every step
wait for the rest of one of these (a fraction of a millisecond over PCIe 5.0), not for all of a prompt. Much
smaller ones would leave the link idle between them."""


class Direction(Protocol):
    """Transfers one way, in order of submission."""

    rows: int
    """Rows copied, or submitted to be copied, so far."""

    def submit(self, job_id: int, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> None:
        """Starts copying rows src_ids -> dst_ids (int64 [P] on the CPU)."""

    def fail(self, job_id: int, error: Exception) -> None:
        """Lets a job that could not be submitted finish without success."""

    def take_finished(self) -> list[TransferResult]:
        """What finished since the last call."""

    def wait(self, job_ids: Iterable[int]) -> None:
        """Returns when none of these jobs touches memory any more."""

    def drain(self) -> None:
        """Returns when no job touches memory any more, and forgets them all."""


def make_direction(src: torch.Tensor, dst: torch.Tensor, device: torch.device) -> Direction:
    """src, dst: uint8 [n, row] and [m, row]; device: where the pool is."""
    if device.type == "cuda":
        return StreamDirection(src, dst, device)
    return HostDirection(src, dst)


class HostDirection:
    """Copies at once, on the calling thread."""

    def __init__(self, src: torch.Tensor, dst: torch.Tensor):
        self.src, self.dst = src, dst
        self.rows = 0
        self._done: list[TransferResult] = []
        self._seen_errors: set[str] = set()

    def submit(self, job_id: int, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> None:
        started = time.perf_counter()
        try:
            ops.copy_blocks(self.src, self.dst, src_ids, dst_ids)
        except Exception as error:  # whatever it is, the request can be computed without this copy
            self.fail(job_id, error)
            return
        self.rows += len(src_ids)
        seconds = time.perf_counter() - started
        self._done.append(TransferResult(job_id, True, len(src_ids) * self.src.shape[1], seconds))

    def fail(self, job_id: int, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if text not in self._seen_errors:
            self._seen_errors.add(text)
            logger.error(
                "XLayerConnector: a copy of rows failed and its requests are computed instead "
                "(said once an error): %s", text,
            )  # fmt: skip
        self._done.append(TransferResult(job_id, False))

    def take_finished(self) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: Iterable[int]) -> None:
        pass

    def drain(self) -> None:
        self._done.clear()


@dataclass
class _Running:
    job_id: int
    num_bytes: int
    start: torch.cuda.Event
    end: torch.cuda.Event


def batches(
    src_ids: torch.Tensor, dst_ids: torch.Tensor, row_bytes: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """A transfer's ids in parts of at most BATCH_BYTES, or of one row."""
    rows = max(1, BATCH_BYTES // row_bytes)
    return zip(src_ids.split(rows), dst_ids.split(rows), strict=True)


def kernel_can(rows: torch.Tensor) -> bool:
    """Whether the kernel reaches these rows, 16 bytes at a time."""
    aligned = all(x % 16 == 0 for x in (rows.data_ptr(), rows.stride(0), rows.shape[1]))
    return aligned and (rows.is_cuda or rows.is_pinned())


class StreamDirection(HostDirection):
    """Copies on a stream of its own, each batch by copy engine or kernel."""

    def __init__(self, src: torch.Tensor, dst: torch.Tensor, device: torch.device):
        super().__init__(src, dst)
        self.stream = torch.cuda.Stream(device)
        self._way = Way.of(src.device, dst.device)
        self._times = times_here(device)
        self._running: deque[_Running] = deque()

    def submit(self, job_id: int, src_ids: torch.Tensor, dst_ids: torch.Tensor) -> None:
        try:
            # A store reads what the model has written so far. A load waits as well: with asynchronous
            # scheduling the step in flight may still write to a block that has just been freed and reused.
            self.stream.wait_stream(torch.cuda.current_stream())
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with torch.cuda.stream(self.stream):
                start.record()
                times = self._times if self._kernel_can else None
                for batch in batches(src_ids, dst_ids, self.src.shape[1]):
                    method = choose(times, self._way, self.src.shape[1], len(batch[0]))
                    ops.copy_blocks(self.src, self.dst, *batch, method)
                end.record()
        except Exception as error:  # as above
            self._stop_touching_memory()
            self.fail(job_id, error)
            return
        self.rows += len(src_ids)
        num_bytes = len(src_ids) * self.src.shape[1]
        self._running.append(_Running(job_id, num_bytes, start, end))

    @cached_property
    def _kernel_can(self) -> bool:
        # Asked with the first copy, not before: host memory is pinned by then.
        return kernel_can(self.src) and kernel_can(self.dst)

    def _stop_touching_memory(self) -> None:
        # A part of the transfer may have been submitted: its blocks are given away once we say "failed".
        try:
            self.stream.synchronize()
        except RuntimeError as error:
            logger.error("XLayerConnector: the device does not answer: %s", error)

    def take_finished(self) -> list[TransferResult]:
        while self._running:
            t = self._running[0]
            try:
                if not t.end.query():
                    break
                seconds = t.start.elapsed_time(t.end) * 1e-3
            except RuntimeError as error:  # the copy failed on the device
                self.fail(t.job_id, error)
            else:
                self._done.append(TransferResult(t.job_id, True, t.num_bytes, seconds))
            self._running.popleft()
        return super().take_finished()

    def wait(self, job_ids: Iterable[int]) -> None:
        wanted = set(job_ids)
        if any(t.job_id in wanted for t in self._running):
            self._synchronize([t for t in self._running if t.job_id in wanted])

    def drain(self) -> None:
        self._synchronize(self._running)
        self._running.clear()
        super().drain()

    def _synchronize(self, transfers: Iterable[_Running]) -> None:
        for t in transfers:
            try:
                t.end.synchronize()
            except RuntimeError as error:  # take_finished reports it
                logger.error("XLayerConnector: waiting for a copy failed: %s", error)
