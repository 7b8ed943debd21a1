"""What a decode engine's worker does to read rows, without an engine: NIXL, seals, the ring, the copy into a
pool. Between NIXL alone and this is our work; between this and a hand-over are the engine's steps."""

import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from .handover_link import ENOUGH_SECONDS, READ_SECONDS, READS, Link, registered, tells

PEER = ("prefill", 0)
TAG, WRONG_TAG = 1, 2
ODD = 0x9E3779B97F4A7C1
AT_ONCE = 32
"""Rows that are filled or looked at together."""


class Geometry(NamedTuple):
    """Of the rows that are read, at most so many, and the largest ring that they are read into."""

    row_bytes: int
    blocks: int
    staging_bytes: int

    @property
    def offered(self) -> int:
        """Blocks of the pool that is read from: so many that every second one is enough."""
        return 2 * self.blocks


class WorkerLink(Link):
    """As `Link`, of a pool of sealed rows, and a worker that reads them."""

    def __init__(self, geometry: Geometry, devices: list[str] | None = None) -> None:
        self.geometry = geometry
        super().__init__(geometry, devices)

    def rows_rate(self, rows: int, staging_bytes: int, neighbours: bool) -> float:
        """Bytes a second, the best of READS, of so many rows in any order, with a ring of so many bytes.

        neighbours: whether they are the first rows of the pool, or every second one.
        """
        what = f"read {rows} sealed rows of {self.geometry.row_bytes} bytes"
        return self.asked((rows, staging_bytes, neighbours), what)


def _offer_rows(pipe: Connection, geometry: Geometry, device: str | None) -> None:
    """The process that is read from, until the pipe is closed."""
    with tells(pipe):
        row_bytes, blocks = geometry.row_bytes, geometry.offered
        memory, agent, _ = registered(row_bytes * blocks, 0, device, ours=True)
        from ..connector.nixl.seals import SealTable

        pool = memory.view(blocks, row_bytes)
        for start in range(0, blocks, AT_ONCE):
            _words(pool)[start : start + AT_ONCE] = _expected(
                pool, range(start, min(blocks, start + AT_ONCE))
            )
        seals = SealTable(pool)
        agent.register_memory(seals.table)
        seals.seal(list(range(blocks)), [TAG] * blocks)
        seals.table[:1].cpu()  # waits for it
        pipe.send((agent.get_agent_metadata(), pool.data_ptr(), seals.table.data_ptr()))
        pipe.recv()


def _fetch_rows(pipe: Connection, geometry: Geometry, device: str | None) -> None:
    """The process that reads, as often as it is told to until the pipe is closed."""
    with tells(pipe):
        row_bytes, blocks, most = geometry
        memory, agent, kind = registered(row_bytes * blocks, 0, device, ours=True)
        import torch

        from ..connector.nixl.wire import BUFFERS, NixlWire, RemotePool

        pool = memory.view(blocks, row_bytes)
        staging = torch.empty(most, dtype=torch.uint8, device=pool.device)
        agent.register_memory(staging)
        metadata, address, seals = pipe.recv()
        name = agent.add_remote_agent(metadata)
        remote = RemotePool(name, address, 0, kind, row_bytes, geometry.offered, seals)
        pipe.send("ready")
        while True:
            rows, staging_bytes, neighbours = pipe.recv()
            each = staging_bytes // BUFFERS // 16 * 16
            ring = staging[: BUFFERS * each].view(BUFFERS, each)
            wire = NixlWire(agent, kind, pool, ring, lambda handle: None)
            wire.add_peer(PEER, remote)
            pipe.send(_rate(wire, rows, neighbours))
            wire.retire_peer(PEER)
            wire.release_retired(())


def _rate(wire: Any, rows: int, neighbours: bool) -> float:
    """Bytes a second; raises RuntimeError unless rows and seals are checked."""
    pool = wire.pool
    draw = np.random.default_rng(0)
    remote, local = draw.permutation(rows) * (1 if neighbours else 2), draw.permutation(len(pool))[:rows]
    pool.zero_()
    pool[:1, :1].cpu()  # waits for it
    best, end = float("inf"), time.perf_counter() + ENOUGH_SECONDS
    for _ in range(READS):
        seconds, failure = _read(wire, remote, local, np.full(rows, TAG))
        if failure:
            raise RuntimeError(f"expected rows that are what was sealed: {failure.text}")
        best = min(best, seconds)
        if time.perf_counter() > end:
            break
    for start in range(0, rows, AT_ONCE):
        some = slice(start, start + AT_ONCE)
        if not _words(pool)[local[some]].equal(_expected(pool, remote[some])):
            raise RuntimeError("expected the other process's rows, got others")
    tags = np.full(rows, TAG)
    tags[-1] = WRONG_TAG
    _, failure = _read(wire, remote, local, tags)
    if failure is None or failure.reason != "seal":
        raise RuntimeError(f"expected a row that is sealed for other tokens to be found, got {failure}")
    return rows * pool.shape[1] / best


def _read(wire: Any, remote: np.ndarray, local: np.ndarray, tags: np.ndarray) -> tuple[float, Any]:
    """Seconds, and the failure if there is one."""
    from ..connector.nixl.reads import Rows  # not before a GPU is chosen
    from ..connector.nixl.staging import StagedReads, Stay
    from ..connector.nixl.wire import BUFFERS

    reads = StagedReads(wire, BUFFERS, READ_SECONDS, stay=Stay(2 * READ_SECONDS, 2 * READ_SECONDS))
    begin = time.perf_counter()
    reads.add("read", PEER, len(remote), Rows(remote, local, np.zeros_like(remote), tags))
    over = reads.poll()
    return time.perf_counter() - begin, over["read"]


def _words(pool: Any) -> Any:
    import torch

    return pool.view(torch.int64)


def _expected(pool: Any, rows: Any) -> Any:
    """int64 [len(rows), words]: what these rows hold."""
    import torch

    first = torch.as_tensor(np.asarray(rows) * ODD, device=pool.device)
    return first[:, None] + torch.arange(pool.shape[1] // 8, device=pool.device)


WorkerLink.works = (_offer_rows, _fetch_rows)
