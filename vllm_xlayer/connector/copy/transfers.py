"""Copies one way between the device pool and the host tier: at once, or on streams of a GPU.

These never raise: a copy that fails is a finished transfer without success, which the connector reports
and vLLM recovers from. (early_loads.py does raise, where it is too late for that.) On a GPU transfers are
cut into batches, which pacing.py puts on streams; on the CPU platform a transfer is done when the call
returns.
"""

import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import TransferResult

from ... import ops
from ...ops import CopyMethod
from .choice import Way, choose
from .pacing import Chain, Paced
from .pieces import Piece, Runs, pieces_of

logger = init_logger(__name__)

BATCH_BYTES = {Way.H2D: 32 << 20, Way.D2H: 8 << 20}
"""Of one submission. A copy of vLLM's own waits for up to three of these (pacing.py). To the host there is
one in every step, the sampled tokens; to the device hardly any: CUDA sends a few KB along with the command.
And a request waits for a load, and the step loop for its submission: large batches are fewer calls."""
PIECE_BYTES = 8 << 20
"""Of one row, and so the most that a batch of one piece has; larger rows are cut. A multiple of 16."""
IDLE_BATCH_BYTES = 128 << 20
"""Of a load after a step in which no model ran: vLLM has nothing to copy then, and the next step waits for
the submission."""
STORE_SHARE = 0.25
"""Of the time between two steps: what stores may have queued on the link. A load is waited for, a store is
not, and a step should wait neither for its copies nor for their submission."""
LEAST_QUEUED, MOST_QUEUED = 32 << 20, 512 << 20
"""Bounds of that, in bytes: for steps that do nothing, and for the first one after a pause."""


class HostDirection:
    """Copies at once, on the calling thread."""

    def __init__(self, src: torch.Tensor, dst: torch.Tensor):
        self.src, self.dst = src, dst
        self.rows = 0
        self._done: list[TransferResult] = []
        self._seen_errors: set[str] = set()

    def before_launch(self) -> None:
        """What is submitted until `advance` need not wait for what is launched from now on."""

    def submit(
        self, job_id: int, src_ids: torch.Tensor, dst_ids: torch.Tensor, runs: Runs | None = None
    ) -> None:
        started = time.perf_counter()
        try:
            pieces = list(pieces_of(src_ids, dst_ids, self._whole(src_ids) if runs is None else runs))
            for piece in pieces:
                self._copy_piece(piece)
        except Exception as error:  # whatever it is, the request can be computed without this copy
            self.fail(job_id, error)
            return
        self.rows += len(src_ids)
        seconds = time.perf_counter() - started
        self._done.append(TransferResult(job_id, True, sum(p.nbytes for p in pieces), seconds))

    def _whole(self, ids: torch.Tensor) -> Runs:
        return [(len(ids), self.src.shape[1])]

    def _copy_piece(self, piece: Piece, *method: CopyMethod) -> None:
        part = slice(piece.begin, piece.end)
        ops.copy_blocks(self.src[:, part], self.dst[:, part], piece.src_ids, piece.dst_ids, *method)

    def fail(self, job_id: int, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        if text not in self._seen_errors:
            self._seen_errors.add(text)
            logger.error(
                "XLayerConnector: a copy of rows failed and its requests are computed instead "
                "(said once an error): %s", text,
            )  # fmt: skip
        self._done.append(TransferResult(job_id, False))

    def advance(self, model_ran: bool = True) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: Iterable[int]) -> None:
        pass

    def drain(self) -> None:
        self._done.clear()


def kernel_can(rows: torch.Tensor) -> bool:
    """Whether the kernel reaches these rows, 16 bytes at a time."""
    aligned = all(x % 16 == 0 for x in (rows.data_ptr(), rows.stride(0), rows.shape[1]))
    return aligned and (rows.is_cuda or rows.is_pinned())


@dataclass(eq=False)
class Job:
    """A transfer on streams."""

    job_id: int
    unsent: deque[Piece]
    """What is not yet part of a batch."""
    nbytes: int
    """All of it."""
    done: int = 0
    """Bytes of batches that ended."""
    seconds: float = 0.0
    failed: bool = False


@dataclass
class _Batch:
    parts: list[tuple[Job, int]]
    """Jobs, and how many of their bytes."""
    nbytes: int
    paced: Paced


class StreamDirection(HostDirection):
    """Copies in paced batches, each with rows of one job or of several.

    vLLM hands over stores before a step's launch, and loads after it. They go to the device when the
    connector asks what has finished, after every launch: all of the loads, and as much of the stores as the
    link should have; those of a step's requests then share batches.
    """

    def __init__(self, src: torch.Tensor, dst: torch.Tensor, device: torch.device):
        super().__init__(src, dst)
        self._way = Way.of(src.device, dst.device)
        self._row_bytes = src.shape[1]
        self._chain = Chain(device)
        self._unsent: deque[Job] = deque()
        self._running: deque[_Batch] = deque()
        self._bytes_running = 0
        self._bytes_copied, self._seconds_copying = 0, 0.0
        self._asked = time.perf_counter()
        self._follows = False
        """What is submitted now follows what the model's stream had before the launch."""

    def before_launch(self) -> None:
        try:
            self._chain.follow()
        except RuntimeError:  # submit meets it again, and has a job to fail
            return
        self._follows = True

    def submit(
        self, job_id: int, src_ids: torch.Tensor, dst_ids: torch.Tensor, runs: Runs | None = None
    ) -> None:
        runs = self._whole(src_ids) if runs is None else runs
        try:
            pieces = deque(pieces_of(src_ids, dst_ids, runs, PIECE_BYTES))
            # A store reads what the model has written so far. A load waits as well: with asynchronous
            # scheduling the step in flight may still write to a block that has just been freed and reused.
            if not self._follows:
                self._chain.follow()
        except (RuntimeError, ValueError) as error:
            self.fail(job_id, error)
            return
        self.rows += len(src_ids)
        self._unsent.append(Job(job_id, pieces, sum(piece.nbytes for piece in pieces)))

    def advance(self, model_ran: bool = True) -> list[TransferResult]:
        self._follows = False
        self._book_what_ended()
        if self._way is Way.D2H:
            self._send_until_queued(self._room())
        else:
            self._send_until_queued(math.inf, BATCH_BYTES[Way.H2D] if model_ran else IDLE_BATCH_BYTES)
        return super().advance()

    def _send_until_queued(self, size: float, batch_bytes: int | None = None) -> None:
        """Submits until so many bytes are, or all."""
        while self._unsent and self._bytes_running < size:
            self._send_batch(batch_bytes)

    def _room(self) -> float:
        """Bytes of stores that may be queued until this is asked again."""
        now = time.perf_counter()
        since, self._asked = now - self._asked, now
        if not self._seconds_copying:
            return LEAST_QUEUED
        rate = self._bytes_copied / self._seconds_copying
        return min(max(LEAST_QUEUED, STORE_SHARE * since * rate), MOST_QUEUED)

    def _send_all_but(self, jobs: int) -> None:
        """Submits all but the last so many of the jobs that wait."""
        while len(self._unsent) > jobs:
            self._send_batch()

    def _send_batch(self, batch_bytes: int | None = None) -> None:
        """batch_bytes: at most, or one row's piece; None is BATCH_BYTES."""
        parts: list[tuple[Job, int]] = []
        pieces: list[Piece] = []
        room = batch_bytes or BATCH_BYTES[self._way]
        while self._unsent and (room > 0 or not parts):
            job = self._unsent[0]
            if job.unsent and room < job.unsent[0].end - job.unsent[0].begin and parts:
                break
            taken = self._take(job, room)
            if not job.unsent:
                self._unsent.popleft()
            pieces += taken
            parts.append((job, sum(piece.nbytes for piece in taken)))
            room -= parts[-1][1]
        try:
            paced = self._chain.run(lambda: self._copy_all(pieces))
        except Exception as error:  # as above
            self._give_up(parts, error)
            return
        nbytes = sum(part for _, part in parts)
        self._bytes_running += nbytes
        self._running.append(_Batch(parts, nbytes, paced))

    @staticmethod
    def _take(job: Job, room: int) -> list[Piece]:
        """A job's next pieces, as many rows as fit and at least one."""
        taken: list[Piece] = []
        while job.unsent and (not taken or room >= job.unsent[0].end - job.unsent[0].begin):
            first, rest = job.unsent.popleft().split(room)
            if rest is not None:
                job.unsent.appendleft(rest)
            taken.append(first)
            room -= first.nbytes
        return taken

    def _copy_all(self, pieces: list[Piece]) -> None:
        """Like pieces in one call: each is a call into the driver, and more."""
        for (begin, end), alike in groupby(pieces, key=lambda piece: (piece.begin, piece.end)):
            src_ids, dst_ids = zip(*((piece.src_ids, piece.dst_ids) for piece in alike), strict=True)
            if len(src_ids) > 1:
                self._copy_piece(Piece(torch.cat(src_ids), torch.cat(dst_ids), begin, end), self._method)
            else:
                self._copy_piece(Piece(src_ids[0], dst_ids[0], begin, end), self._method)

    @cached_property
    def _method(self) -> CopyMethod:
        # Asked with the first copy, not before: host memory is pinned by then.
        if not (kernel_can(self.src) and kernel_can(self.dst)):
            return CopyMethod.ENGINE
        return choose(self._way, self._row_bytes)

    def _book_what_ended(self) -> None:
        while self._running:
            batch = self._running[0]
            try:
                if not batch.paced.end.query():
                    return
                seconds = batch.paced.seconds()
            except RuntimeError as error:  # the copy failed on the device
                self._forget_first()
                self._give_up(batch.parts, error)
                continue
            self._forget_first()
            self._bytes_copied += batch.nbytes
            self._seconds_copying += seconds
            for job, nbytes in batch.parts:
                self._book(job, nbytes, seconds * nbytes / max(1, batch.nbytes))

    def _forget_first(self) -> None:
        self._bytes_running -= self._running.popleft().nbytes

    def _book(self, job: Job, nbytes: int, seconds: float) -> None:
        job.done += nbytes
        job.seconds += seconds
        if job.done == job.nbytes:  # never, if one of its batches failed
            self._done.append(TransferResult(job.job_id, True, job.nbytes, job.seconds))

    def _give_up(self, parts: list[tuple[Job, int]], error: Exception) -> None:
        # Their other batches, and a part of this one, may be running, and their blocks are given away once we
        # say "failed".
        try:
            self._chain.synchronize()
        except RuntimeError as unanswered:
            logger.error("XLayerConnector: the device does not answer: %s", unanswered)
        for job, _ in parts:
            if not job.failed:
                job.failed = True
                self.fail(job.job_id, error)
        self._unsent = deque(job for job in self._unsent if not job.failed)

    def wait(self, job_ids: Iterable[int]) -> None:
        wanted = set(job_ids)
        unsent = [at for at, job in enumerate(self._unsent) if job.job_id in wanted]
        if unsent:
            self._send_all_but(len(self._unsent) - 1 - unsent[-1])
        self._synchronize(b for b in self._running if any(job.job_id in wanted for job, _ in b.parts))

    def drain(self) -> None:
        self._unsent.clear()
        self._synchronize(self._running)
        self._running.clear()
        self._bytes_running = 0
        super().drain()

    def _synchronize(self, batches: Iterable[_Batch]) -> None:
        for batch in batches:
            try:
                batch.paced.end.synchronize()
            except RuntimeError as error:  # advance reports it
                logger.error("XLayerConnector: waiting for a copy failed: %s", error)
