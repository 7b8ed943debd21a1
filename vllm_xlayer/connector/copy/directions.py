"""What the connector asks of transfers one way between pool and host tier, and which kind it gets."""

from collections.abc import Iterable
from typing import Protocol

import torch
from vllm.v1.kv_offload.base import TransferResult

from .early_loads import EarlyLoads
from .pieces import Runs
from .transfers import HostDirection, StreamDirection


class Direction(Protocol):
    """Transfers one way, in order of submission."""

    rows: int
    """Rows copied, or submitted to be copied, so far."""

    def before_launch(self) -> None:
        """What is submitted until `advance` need not wait for what is launched from now on."""

    def submit(
        self, job_id: int, src_ids: torch.Tensor, dst_ids: torch.Tensor, runs: Runs | None = None
    ) -> None:
        """Takes a job: rows src_ids -> dst_ids (int64 [P] on the CPU, not to be changed before it ends).

        runs: how many bytes of which rows are used; None is all of all of them.
        """

    def fail(self, job_id: int, error: Exception) -> None:
        """Lets a job that could not be submitted finish without success."""

    def advance(self, model_ran: bool = True) -> list[TransferResult]:
        """Sends what waits and now may go, and returns what finished since the last call; with ``early``
        also what is about to. Called after every step.

        model_ran: whether it did in that step.

        Raises:
            RuntimeError: (with ``early``) a load failed after it was reported.
        """

    def wait(self, job_ids: Iterable[int]) -> None:
        """Returns when none of these jobs touches memory any more."""

    def drain(self) -> None:
        """Returns when no job touches memory any more, and forgets them all."""


def make_direction(
    src: torch.Tensor, dst: torch.Tensor, device: torch.device, early: bool = False
) -> Direction:
    """src, dst: uint8 [n, row] and [m, row]; device: where the pool is.

    early: whether transfers may be reported shortly before they end (early_loads.py). For loads only, and
    only where nothing but transfers on streams writes to the host memory they read.
    """
    if device.type != "cuda":
        return HostDirection(src, dst)
    return EarlyLoads(src, dst, device) if early else StreamDirection(src, dst, device)
