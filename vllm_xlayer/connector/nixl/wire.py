"""Rows over NIXL: descriptors and transfers."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .landing import Landings, Launched, RowsInto, SealCheck
from .reads import Peer, Rows
from .reshard import Move
from .seals import BYTES

BUFFERS = 4
"""Of the ring: while rows of one are copied and checked, others are read."""
LOCAL = "NIXL_INIT_AGENT"


@dataclass(frozen=True)
class RemotePool:
    """A peer's memory.

    Args:
        agent: its name to NIXL.
        address, device, memory: of its pool; memory is DRAM or VRAM.
        row_bytes, blocks: of its pool.
        seals: address of its table of seals, 0 for none.
        moves: by KV cache group, what of its rows goes where in ours; empty where the rows are the same.
    """

    agent: str
    address: int
    device: int
    memory: str
    row_bytes: int
    blocks: int
    seals: int
    moves: tuple[tuple[Move, ...], ...] = ()

    @property
    def seal_bytes(self) -> int:
        return self.blocks * BYTES if self.seals else 0


class StagingTooSmall(ValueError):
    """No row of a peer fits into a buffer; says what would do."""


@dataclass(eq=False)
class PreparedPeer:
    """A peer, and what of the ring and of NIXL belongs to it.

    Args:
        local, remote: NIXL's handles of descriptors: of the ring's rows buffer by buffer, then of its places
            for seals; and of the peer's rows, then of its seals.
        slots: by buffer, uint8 [rows, row_bytes].
        tables: by buffer, int64 [blocks, 2], where seals arrive; empty where they are off.
        first: rows that a buffer has room for beside them.
    """

    pool: RemotePool
    local: Any
    remote: Any
    slots: list[torch.Tensor]
    tables: list[torch.Tensor]
    first: int


@dataclass(eq=False)
class PoolRead:
    """One read.

    Args:
        peer: from whom.
        remote: its rows, int32 [n] as NIXL wants them, the lowest first.
        least, most: of these rows.
        into: the same on the device, and more.
    """

    peer: PreparedPeer
    remote: np.ndarray
    least: int
    most: int
    into: RowsInto


class NixlWire:
    """`staging.Wire` of one rank.

    A transfer has one descriptor a row, or one for several that are neighbours in the peer's pool. The first
    of a read has one more for the peer's table of seals: that is 16 bytes a row, read as a whole, since a
    descriptor costs as much as some hundred KiB.

    Args:
        agent: NIXL's agent, at which pool and ring are registered.
        memory: NIXL's name for the kind of memory they are in.
        pool: uint8 [blocks, row_bytes], this rank's KV cache.
        ring: uint8 [BUFFERS, n].
        on_done: called with a finished transfer's handle.
    """

    def __init__(
        self,
        agent: Any,
        memory: str,
        pool: torch.Tensor,
        ring: torch.Tensor,
        on_done: Any,
    ):
        self.agent, self.memory, self.pool, self.ring = agent, memory, pool, ring
        self.on_done = on_done
        self.landings = Landings(pool)
        self.peers: dict[Peer, PreparedPeer] = {}
        self.retired: list[tuple[Peer, PreparedPeer]] = []
        """Peers that are gone, or have been met again."""

    def rows_beside(self, seal_bytes: int, row_bytes: int) -> int:
        """Rows of a peer that a buffer has room for beside its seals. Raises StagingTooSmall."""
        if (rows := (self.ring.shape[1] - seal_bytes) // row_bytes) < 1:
            raise StagingTooSmall(
                f"staging_bytes: expected at least {BUFFERS * (row_bytes + seal_bytes)} for rows "
                f"of {row_bytes} bytes and {seal_bytes} bytes of seals, got {self.ring.numel()}"
            )
        return rows

    def add_peer(self, peer: Peer, remote: RemotePool) -> None:
        """Prepares descriptors. Raises StagingTooSmall."""
        buffer_bytes, row, size = self.ring.shape[1], remote.row_bytes, remote.seal_bytes
        first, rows = self.rows_beside(size, row), buffer_bytes // row
        if peer in self.peers:
            self.retire_peer(peer)
        device, base = max(self.ring.get_device(), 0), self.ring.data_ptr()
        starts = range(base, base + self.ring.numel(), buffer_bytes)
        local = [(start, row, device, row, rows) for start in starts]
        theirs = [(remote.address, row, remote.device, row, remote.blocks)]
        tables = []
        if size:
            self.landings.prepare(row)
            at = (buffer_bytes - size) // BYTES * BYTES
            tables = [buffer[at : at + size].view(torch.int64).view(-1, 2) for buffer in self.ring]
            local += [(start + at, size, device, size, 1) for start in starts]
            theirs += [(remote.seals, size, remote.device, size, 1)]
        self.peers[peer] = PreparedPeer(
            remote,
            self._prepare(LOCAL, local, self.memory),
            self._prepare(remote.agent, theirs, remote.memory),
            [buffer[: rows * row].view(rows, row) for buffer in self.ring],
            tables,
            first,
        )

    def retire_peer(self, peer: Peer) -> None:
        """No read begins from it any more; its descriptors are for `release_retired` to give back."""
        self.retired.append((peer, self.peers.pop(peer)))

    def release_retired(self, in_use: Collection[Peer]) -> None:
        """Gives the descriptors of retired peers back, but for those whose reads may use them yet."""
        for entry in [entry for entry in self.retired if entry[0] not in in_use]:
            self.retired.remove(entry)
            for handle in (entry[1].local, entry[1].remote):
                self.agent.release_dlist_handle(handle)

    def _prepare(self, agent: str, strided: Sequence[tuple[int, ...]], memory: str) -> Any:
        """(address, bytes, device, stride, count) each, in NIXL's form for descriptors at equal distances."""
        return self.agent.prep_xfer_dlist(agent, np.array(strided, np.uint64), mem_type=memory)

    def begin(self, peer: Peer, rows: Rows) -> PoolRead:
        known = self.peers[peer]
        # NIXL makes one descriptor of rows that follow each other on both sides, and in the ring all do. A
        # prompt has neighbours in either direction: a free list gets a request's blocks back the last first.
        order = np.argsort(rows.remote, kind="stable")
        rows = Rows(*(field[order] for field in rows))
        into = self.landings.begin(rows, checked=bool(known.pool.seals))
        least, most = int(rows.remote[0]), int(rows.remote[-1])
        return PoolRead(known, rows.remote.astype(np.int32), least, most, into)

    def capacity(self, begun: PoolRead, first: bool) -> int:
        return begun.peer.first if first else len(begun.peer.slots[0])

    def post(self, begun: PoolRead, buffer: int, rows: range) -> Any:
        peer = begun.peer
        per_buffer = len(peer.slots[0])
        start = buffer * per_buffer
        local_ids = np.arange(start, start + len(rows), dtype=np.int32)
        remote_ids = begun.remote[rows.start : rows.stop]
        if not 0 <= begun.least <= begun.most < peer.pool.blocks:
            # A GPU that is asked for the seals of such rows answers nothing any more.
            raise ValueError(
                f"expected rows of 0 to {peer.pool.blocks - 1}, got {begun.least} to {begun.most}"
            )
        if peer.tables and rows.start == 0:
            local_ids = np.append(local_ids, np.int32(BUFFERS * per_buffer + buffer))
            remote_ids = np.append(remote_ids, np.int32(peer.pool.blocks))
        handle = self.agent.make_prepped_xfer("READ", peer.local, local_ids, peer.remote, remote_ids)
        try:
            self.agent.transfer(handle)
        except Exception:
            self.release(handle)
            raise
        return handle

    def state(self, handle: Any) -> str:
        state = self.agent.check_xfer_state(handle)
        if state == "DONE":
            self.on_done(handle)
        return state

    def release(self, handle: Any) -> bool:
        try:
            self.agent.release_xfer_handle(handle)
        except Exception:  # NIXL's own, of several kinds: it must be asked again
            return False
        return True

    def land(self, begun: PoolRead, buffer: int, rows: range) -> Launched:
        peer = begun.peer
        arrived = peer.slots[buffer][: len(rows)]
        seals = peer.tables[buffer] if peer.tables and rows.start == 0 else None
        return self.landings.land(begun.into, rows, arrived, seals, peer.pool.moves)

    def launched(self) -> Launched:
        return Launched(self.landings.stream)

    def check(self, begun: PoolRead) -> SealCheck:
        return self.landings.check(begun.into)
