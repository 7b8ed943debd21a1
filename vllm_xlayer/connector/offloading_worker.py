"""The worker's side of the host tier: which host row is which block's, and copies both ways."""

from collections.abc import Sequence

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)

from .copy import directions
from .copy.pieces import Runs
from .host.pinning import Pinning

logger = init_logger(__name__)


def _ids(device: GPULoadStoreSpec) -> torch.Tensor:
    """Device blocks, as the copies take them: vLLM has them in 32 bits."""
    return torch.from_numpy(device.block_ids.astype(np.int64))


class RowOffloadingWorker(OffloadingWorker):
    """Moves rows between the device pool and host memory.

    Args:
        pool: uint8 [num_blocks, row_bytes], on the device.
        host: uint8 [num_chunks * blocks_per_chunk, row_bytes].
        blocks_per_chunk: Blocks that the manager treats as one.
        pins: pins the host memory, started and closed with this; None if it need not be.
        early_loads: Whether only this worker's transfers write to the host memory (copy/early_loads.py).
        used_bytes: of a row, for each KV cache group; None is all of it for one group.
    """

    def __init__(
        self,
        pool: torch.Tensor,
        host: torch.Tensor,
        blocks_per_chunk: int,
        pins: Pinning | None = None,
        early_loads: bool = False,
        used_bytes: Sequence[int] | None = None,
    ):
        self.used_bytes = [pool.shape[1]] if used_bytes is None else list(used_bytes)
        self.blocks_per_chunk = blocks_per_chunk
        self.host = host
        self._pins = pins
        self._rows_of: dict[int, int] = {}
        self._store = directions.make_direction(pool, host, pool.device)
        self._load = directions.make_direction(host, pool, pool.device, early=early_loads)
        if pins is not None:
            pins.start()

    @property
    def ready(self) -> bool:
        """Whether transfers may be submitted."""
        return self._pins is None or self._pins.ready

    @property
    def problem(self) -> str:
        """Why that will never be; empty as long as it may."""
        return "" if self._pins is None else self._pins.problem

    @property
    def rows_stored(self) -> int:
        return self._store.rows

    @property
    def rows_loaded(self) -> int:
        return self._load.rows

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        try:
            host_rows = self._host_rows(src_spec, dst_spec)
        except ValueError as error:
            self._store.fail(job_id, error)
        else:
            self._rows_of[job_id] = len(host_rows)
            self._store.submit(job_id, _ids(src_spec), host_rows, self._runs(src_spec))
        return True

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        try:
            host_rows = self._host_rows(dst_spec, src_spec)
        except ValueError as error:
            self._load.fail(job_id, error)
        else:
            self._rows_of[job_id] = len(host_rows)
            self._load.submit(job_id, host_rows, _ids(dst_spec), self._runs(dst_spec))
        return True

    def _host_rows(self, device: GPULoadStoreSpec, host: LoadStoreSpec) -> torch.Tensor:
        """Host row of every device block, in order. A group's first block may lie inside a chunk."""
        if not isinstance(host, BlockIDsLoadStoreSpec):
            raise ValueError(f"transfer: expected host chunks, got {type(host).__name__}")
        n, rows, at = self.blocks_per_chunk, [], 0
        for size, first in zip(device.group_sizes, device.block_indices, strict=True):
            if size == 0:
                continue
            skip = first % n
            chunks = host.block_ids[at : at - (-(skip + size) // n)].astype(np.int64)
            at += len(chunks)
            rows.append((chunks[:, None] * n + np.arange(n)).ravel()[skip : skip + size])
        found = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        if len(found) != len(device.block_ids) or at != len(host.block_ids):
            raise ValueError(
                f"transfer: expected host chunks for {len(device.block_ids)} device blocks, got "
                f"{len(host.block_ids)} chunks of {n} blocks ({len(found)} usable)"
            )
        return torch.from_numpy(found)

    def _runs(self, device: GPULoadStoreSpec) -> Runs:
        """Of every group that has blocks in a transfer: how many, and the bytes that can be its own."""
        found = zip(device.group_sizes, self.used_bytes, strict=True)
        return [(rows, used) for rows, used in found if rows]

    def take_rows(self, job_id: int) -> int:
        """How many rows a transfer had that ended; asked once."""
        return self._rows_of.pop(job_id, 0)

    def before_launch(self) -> None:
        """Loads that are submitted until `get_finished` need not wait for what is launched from now on."""
        self._load.before_launch()

    def get_finished(self, model_ran: bool = True) -> list[TransferResult]:
        """What finished since the last call.

        model_ran: whether it did in the step that this is asked after.
        """
        return self._store.advance(model_ran) + self._load.advance(model_ran)

    def wait(self, job_ids: set[int]) -> None:
        self._store.wait(job_ids)
        self._load.wait(job_ids)

    def shutdown(self) -> None:
        self._store.drain()
        self._load.drain()
        self._rows_of.clear()
        if self._pins is not None:
            self._pins.close()


class NoTierWorker(OffloadingWorker):
    """Stands in where no host memory was to be had: no transfer succeeds.

    Args:
        problem: Why there is no tier; the scheduler's side is told and stops asking.
    """

    rows_stored = rows_loaded = 0
    ready = False

    def __init__(self, problem: str):
        logger.warning("XLayerConnector: the engine runs without its host tier: %s", problem)
        self.problem = problem
        self._done: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        self._done.append(TransferResult(job_id, False))
        return True

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        self._done.append(TransferResult(job_id, False))
        return True

    def take_rows(self, job_id: int) -> int:
        return 0

    def get_finished(self, model_ran: bool = True) -> list[TransferResult]:
        done, self._done = self._done, []
        return done

    def wait(self, job_ids: set[int]) -> None:
        pass
