"""The copy path between the device pool and the host tier: one piece a block.

The manager (which block is where, what is evicted) is vLLM's CPUOffloadingManager. On a GPU
a transfer is one batched submission on a stream of its direction; on the CPU platform it is
done when the call returns.
"""

import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from .. import ops

logger = init_logger(__name__)

GIB = 1 << 30


def default_host_bytes() -> int:
    """4 GiB, or a quarter of the machine's memory where that is less."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(4 * GIB, memory // 4)


class RowOffloadingSpec(CPUOffloadingSpec):
    """vLLM's CPU offloading with our worker, which also runs where there is no GPU."""

    _worker: OffloadingWorker | None  # type: ignore[assignment]

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        if self._worker is None:
            self._worker = RowOffloadingWorker(kv_caches, self.num_blocks, self.blocks_per_chunk)
        return self._worker


@dataclass
class _Transfer:
    job_id: int
    num_bytes: int
    start: torch.cuda.Event
    end: torch.cuda.Event
    # The tensors a running copy reads must outlive it.
    ids: tuple[torch.Tensor, torch.Tensor]


class _Direction:
    """Transfers one way, in order of submission, on a stream of their own (GPU) or at once (CPU)."""

    def __init__(self, src: torch.Tensor, dst: torch.Tensor, device: torch.device):
        self.src, self.dst = src, dst
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.running: deque[_Transfer] = deque()
        self.done: list[TransferResult] = []
        self.rows = 0
        """Rows submitted so far."""

    def submit(self, job_id: int, src_ids: np.ndarray, dst_ids: np.ndarray) -> None:
        ids = torch.from_numpy(src_ids), torch.from_numpy(dst_ids)
        num_bytes = len(src_ids) * self.src.shape[1]
        self.rows += len(src_ids)
        if self.stream is None:
            started = time.perf_counter()
            ops.copy_blocks(self.src, self.dst, *ids)
            seconds = time.perf_counter() - started
            self.done.append(TransferResult(job_id, True, num_bytes, seconds))
            return
        # A store reads what the model has written so far. A load waits as well: with asynchronous
        # scheduling the step in flight may still write to a block that has just been freed and reused.
        self.stream.wait_stream(torch.cuda.current_stream())
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self.stream):
            start.record()
            ops.copy_blocks(self.src, self.dst, *ids)
            end.record()
        self.running.append(_Transfer(job_id, num_bytes, start, end, ids))

    def take_finished(self) -> list[TransferResult]:
        while self.running and self.running[0].end.query():
            t = self.running.popleft()
            seconds = t.start.elapsed_time(t.end) * 1e-3
            self.done.append(TransferResult(t.job_id, True, t.num_bytes, seconds))
        done, self.done = self.done, []
        return done

    def wait(self, job_ids: Iterable[int]) -> None:
        wanted = set(job_ids)
        for t in self.running:
            if t.job_id in wanted:
                t.end.synchronize()

    def drain(self) -> None:
        for t in self.running:
            t.end.synchronize()
        self.running.clear()
        self.done.clear()


class RowOffloadingWorker(OffloadingWorker):
    """Moves rows between the device pool and host memory.

    Args:
        kv_caches: vLLM's canonical form; rows give exactly one tensor, int8 [num_blocks, row_bytes].
        num_chunks: Chunks the host tier holds.
        blocks_per_chunk: Blocks that vLLM's manager treats as one.

    Raises:
        ValueError: More than one tensor (the cache was not allocated in rows).
        MemoryError: The host tier cannot be allocated.
    """

    def __init__(self, kv_caches: CanonicalKVCaches, num_chunks: int, blocks_per_chunk: int):
        if len(kv_caches.tensors) != 1:
            raise ValueError(
                f"XLayerConnector: expected one tensor of rows, got {len(kv_caches.tensors)} tensors "
                "(the KV cache is not in cross-layer rows)"
            )
        pool = kv_caches.tensors[0].tensor.view(torch.uint8)
        self.blocks_per_chunk = blocks_per_chunk
        self.host = _allocate_host(num_chunks * blocks_per_chunk, pool.shape[1], pinned=pool.is_cuda)
        self._store = _Direction(pool, self.host, pool.device)
        self._load = _Direction(self.host, pool, pool.device)

    @property
    def rows_stored(self) -> int:
        return self._store.rows

    @property
    def rows_loaded(self) -> int:
        return self._load.rows

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        assert isinstance(dst_spec, BlockIDsLoadStoreSpec)
        self._store.submit(job_id, src_spec.block_ids, self._host_rows(src_spec, dst_spec))
        return True

    def submit_load(self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec) -> bool:
        assert isinstance(src_spec, BlockIDsLoadStoreSpec)
        self._load.submit(job_id, self._host_rows(dst_spec, src_spec), dst_spec.block_ids)
        return True

    def _host_rows(self, device: GPULoadStoreSpec, host: BlockIDsLoadStoreSpec) -> np.ndarray:
        """Host row of every device block, in order. A group's first block may lie inside a chunk."""
        n, rows, at = self.blocks_per_chunk, [], 0
        for size, first in zip(device.group_sizes, device.block_indices, strict=True):
            if size == 0:
                continue
            skip = first % n
            chunks = host.block_ids[at : at - (-(skip + size) // n)]
            at += len(chunks)
            rows.append((chunks[:, None] * n + np.arange(n)).ravel()[skip : skip + size])
        found = np.concatenate(rows) if rows else np.empty(0, dtype=np.int64)
        if len(found) != len(device.block_ids) or at != len(host.block_ids):
            raise ValueError(
                f"transfer: expected host chunks for {len(device.block_ids)} device blocks, got "
                f"{len(host.block_ids)} chunks of {n} blocks ({len(found)} usable)"
            )
        return found

    def get_finished(self) -> list[TransferResult]:
        return self._store.take_finished() + self._load.take_finished()

    def wait(self, job_ids: set[int]) -> None:
        self._store.wait(job_ids)
        self._load.wait(job_ids)

    def shutdown(self) -> None:
        self._store.drain()
        self._load.drain()


def _allocate_host(rows: int, row_bytes: int, pinned: bool) -> torch.Tensor:
    started = time.perf_counter()
    try:
        # Zeroed by the first touch of each page where it is not pinned: no start-up cost on the CPU platform.
        host = torch.empty((rows, row_bytes), dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError as error:
        raise MemoryError(
            f"XLayerConnector: expected {rows * row_bytes / GIB:.2f} GiB of host memory for its tier, "
            f"got: {error}. Set cpu_bytes_to_use in kv_connector_extra_config to less."
        ) from error
    logger.info(
        "XLayerConnector: host tier of %d rows x %d bytes (%.2f GiB%s) in %.1f s",
        rows, row_bytes, rows * row_bytes / GIB, ", pinned" if pinned else "",
        time.perf_counter() - started,
    )  # fmt: skip
    return host
