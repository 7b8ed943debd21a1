"""Rows over NIXL: descriptors, transfers, and a buffer's way into the KV cache."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .reshard import Move, scatter
from .seals import BYTES, RowDigest, to_device
from .staging import Peer, Row

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


class NixlWire:
    """`staging.Wire` of one rank.

    A transfer has one descriptor a row, and one for the table of seals: that is 16 bytes a row, read as a
    whole, since a descriptor costs as much as some hundred KiB.

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
        self.digests: dict[int, RowDigest] = {}
        """By bytes of a row."""
        self.peers: dict[Peer, tuple[RemotePool, int, int]] = {}
        """Peer -> its memory, and the handles of the descriptors of the ring, and of its rows and seals."""
        self.retired: list[tuple[Peer, tuple[int, int]]] = []
        """Those handles of peers that are gone, or have been met again."""
        on_gpu = pool.device.type == "cuda"
        self.stream = torch.cuda.Stream(pool.device) if on_gpu else None

    def add_peer(self, peer: Peer, remote: RemotePool) -> None:
        """Prepares descriptors. Raises StagingTooSmall."""
        rows, buffer_bytes = self._capacity(remote), self.ring.shape[1]
        if rows < 1:
            least = BUFFERS * (remote.row_bytes + remote.seal_bytes)
            raise StagingTooSmall(
                f"staging_bytes: expected at least {least} for rows "
                f"of {remote.row_bytes} bytes and {remote.seal_bytes} bytes of seals, got {self.ring.numel()}"
            )
        if peer in self.peers:
            self.retire_peer(peer)
        device = max(self.ring.get_device(), 0)
        base = self.ring.data_ptr()
        starts = range(base, base + self.ring.numel(), buffer_bytes)
        local = [(start, remote.row_bytes, device, remote.row_bytes, rows) for start in starts]
        theirs = [(remote.address, remote.row_bytes, remote.device, remote.row_bytes, remote.blocks)]
        if size := remote.seal_bytes:
            self.digests.setdefault(remote.row_bytes, RowDigest(remote.row_bytes, self.pool.device))
            local += [(start + rows * remote.row_bytes, size, device, size, 1) for start in starts]
            theirs += [(remote.seals, size, remote.device, size, 1)]
        self.peers[peer] = (
            remote,
            self._prepare(LOCAL, local, self.memory),
            self._prepare(remote.agent, theirs, remote.memory),
        )

    def retire_peer(self, peer: Peer) -> None:
        """No more reads from it; its descriptors are for `release_retired` to give back."""
        self.retired.append((peer, self.peers.pop(peer)[1:]))

    def release_retired(self, in_use: Collection[Peer]) -> None:
        """Gives the descriptors of retired peers back, but for those whose transfers may use them yet."""
        for entry in [entry for entry in self.retired if entry[0] not in in_use]:
            self.retired.remove(entry)
            for handle in entry[1]:
                self.agent.release_dlist_handle(handle)

    def _prepare(self, agent: str, strided: Sequence[tuple[int, ...]], memory: str) -> int:
        """(address, bytes, device, stride, count) each, in NIXL's form for descriptors at equal distances."""
        return self.agent.prep_xfer_dlist(agent, np.array(strided, np.uint64), mem_type=memory)

    def _capacity(self, remote: RemotePool) -> int:
        return (self.ring.shape[1] - remote.seal_bytes) // remote.row_bytes

    def capacity(self, peer: Peer) -> int:
        return self._capacity(self.peers[peer][0])

    def post(self, peer: Peer, buffer: int, rows: Sequence[Row]) -> Any:
        remote, local_list, remote_list = self.peers[peer]
        per_buffer = self._capacity(remote)
        local_ids = list(range(buffer * per_buffer, buffer * per_buffer + len(rows)))
        remote_ids = [row.remote for row in rows]
        if remote.seals:
            local_ids.append(BUFFERS * per_buffer + buffer)
            remote_ids.append(remote.blocks)
        handle = self.agent.make_prepped_xfer(
            "READ", local_list, np.array(local_ids), remote_list, np.array(remote_ids)
        )
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

    def begin(self) -> torch.cuda.Event | None:
        return None if self.stream is None else torch.cuda.current_stream(self.pool.device).record_event()

    def land(self, peer: Peer, buffer: int, rows: Sequence[Row], begun: Any) -> "PoolLanding":
        if self.stream is None:
            return self._land(peer, buffer, rows)
        # Whatever used the blocks' former contents was launched before the read began. Not after a step that
        # was launched since: rows would wait for all of it.
        self.stream.wait_event(begun)
        with torch.cuda.stream(self.stream):
            return self._land(peer, buffer, rows)

    def _land(self, peer: Peer, buffer: int, rows: Sequence[Row]) -> "PoolLanding":
        remote = self.peers[peer][0]
        staged, size = self.ring[buffer], len(rows) * remote.row_bytes
        numbers = to_device(
            np.array(rows, np.int64).T, self.pool.device
        )  # one transfer for all there is to say
        arrived = staged[:size].view(len(rows), remote.row_bytes)
        wrong = None
        if remote.seals:
            start = self._capacity(remote) * remote.row_bytes
            table = staged[start : start + remote.seal_bytes].view(torch.int64).view(-1, 2)
            wrong = self._check(arrived, table, numbers)
        self._into_pool(remote, arrived, rows, numbers)
        return PoolLanding(len(rows), wrong, self.stream)

    def _into_pool(
        self, remote: RemotePool, arrived: torch.Tensor, rows: Sequence[Row], numbers: torch.Tensor
    ) -> None:
        _, blocks, _, _ = numbers
        if not remote.moves:
            self.pool.index_copy_(0, blocks, arrived)
            return
        for group, moves in enumerate(remote.moves):
            mine = [i for i, row in enumerate(rows) if row.group == group]
            if len(mine) == len(rows):
                scatter(arrived, self.pool, blocks, moves)
            elif mine:
                which = to_device(mine, self.pool.device)
                scatter(arrived[which], self.pool, blocks[which], moves)

    def _check(self, arrived: torch.Tensor, table: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """int64 [2]: rows that are sealed for other tokens, and such whose bytes are not those sealed.

        numbers: int64 [4, n], what `Row` has of each.
        """
        remotes, _, _, tags = numbers
        seals = table[remotes]
        stale = seals[:, 0] != tags
        torn = (seals[:, 1] != self.digests[arrived.shape[1]](arrived)) & ~stale
        return torch.stack((stale.sum(), torn.sum()))


class PoolLanding:
    """`staging.Landing`: rows on their way into the pool.

    Args:
        rows: how many.
        wrong: as `NixlWire._check` returns it; None where nothing is checked.
        stream: what they are copied and checked on; None where that is done already, on a CPU.
    """

    def __init__(self, rows: int, wrong: torch.Tensor | None, stream: torch.cuda.Stream | None):
        self.rows, self.event, self.wrong = rows, None, wrong
        if wrong is not None and wrong.is_cuda:
            self.wrong = torch.empty(2, dtype=torch.int64, pin_memory=True)
            self.wrong.copy_(wrong, non_blocking=True)
        if stream is not None:
            self.event = stream.record_event()

    def done(self) -> bool:
        return self.event is None or self.event.query()

    def problem(self) -> str | None:
        if self.wrong is None or not self.wrong.any():
            return None
        stale, torn = self.wrong.tolist()
        return (
            f"of {self.rows} rows {stale} are sealed for other tokens (their blocks were given to another "
            f"request) and {torn} are not what was sealed"
        )
