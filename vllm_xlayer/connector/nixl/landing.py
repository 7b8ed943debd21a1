"""A chunk's way from the ring into the KV cache, and the check of a read's seals.

Nothing here waits for a GPU. A chunk costs a few launches; what can be done once a read is.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch

from ... import ops
from .reads import Rows
from .reshard import Move, scatter
from .seals import RowDigest, to_device


@dataclass(eq=False)
class OnDevice:
    """What kernels are told of the rows of one read: int64 [n] each, but for the last.

    Args:
        remote, blocks: as `Rows` has them.
        digests: written as chunks land.
        expected: int64 [2, n], what seals must be: tags, and the digests.
    """

    remote: torch.Tensor
    blocks: torch.Tensor
    digests: torch.Tensor
    expected: torch.Tensor


@dataclass(eq=False)
class RowsInto:
    """Where the rows of one read go.

    Args:
        rows: which.
        checked: whether they have seals.
        begun: on a GPU, after all that uses the blocks' former contents; None once the stream waits for it.
        on_device: made when the first chunk lands. Before that nothing has been read yet, and each
            microsecond of the host is one that the link stands still.
        seals: int64 [n, 2], once the first chunk is landing.
    """

    rows: Rows
    checked: bool
    begun: torch.cuda.Event | None
    on_device: OnDevice | None = None
    seals: torch.Tensor | None = None


class Launched:
    """`staging.Landing` of what a stream was given so far; on a CPU, where it is None, of what is done."""

    def __init__(self, stream: torch.cuda.Stream | None):
        self.event = None if stream is None else stream.record_event()

    def done(self) -> bool:
        return self.event is None or self.event.query()


class SealCheck(Launched):
    """`staging.Check`.

    Args:
        rows: how many.
        wrong: bool [2, rows] on the device: which are sealed for other tokens, and of which the bytes are not
            those sealed; None where nothing is checked.
    """

    def __init__(self, rows: int, wrong: torch.Tensor | None, stream: torch.cuda.Stream | None):
        self.rows, self.wrong = rows, wrong
        if wrong is not None and wrong.is_cuda:
            self.wrong = torch.empty(wrong.shape, dtype=torch.bool, pin_memory=True)
            self.wrong.copy_(wrong, non_blocking=True)
        super().__init__(stream)

    def problem(self) -> str | None:
        if self.wrong is None or not self.wrong.any():
            return None
        stale, torn = self.wrong.numpy()
        return (
            f"of {self.rows} rows {stale.sum()} are sealed for other tokens (their blocks were given to "
            f"another request) and {(torn & ~stale).sum()} are not what was sealed"
        )


class Landings:
    """What is launched for reads, on a stream of its own.

    Args:
        pool: uint8 [blocks, row_bytes], this rank's KV cache.
    """

    def __init__(self, pool: torch.Tensor):
        self.pool = pool
        self.stream = torch.cuda.Stream(pool.device) if pool.is_cuda else None
        self.digests: dict[int, RowDigest] = {}
        """By bytes of a row."""

    def prepare(self, row_bytes: int) -> None:
        """Before rows of that size are checked; also in another thread."""
        if row_bytes not in self.digests:
            self.digests[row_bytes] = RowDigest(row_bytes, self.pool.device)

    def begin(self, rows: Rows, checked: bool) -> RowsInto:
        """After all that uses the blocks' former contents has been launched."""
        begun = None
        if self.stream is not None:
            begun = torch.cuda.current_stream(self.pool.device).record_event()
        return RowsInto(rows, checked, begun)

    def land(
        self,
        read: RowsInto,
        rows: range,
        arrived: torch.Tensor,
        seals: torch.Tensor | None,
        moves: tuple[tuple[Move, ...], ...],
    ) -> Launched:
        """Copies some rows of a read into the pool.

        Args:
            arrived: uint8 [len(rows), row bytes of the peer].
            seals: int64 [blocks of the peer, 2], where they have come with these rows.
            moves: as in `wire.RemotePool`.
        """
        with self._on_stream():
            if read.on_device is None:
                # Not after `begun`: what is launched for other reads would wait for it.
                read.on_device = self._to_device(read.rows)
            if self.stream is not None and read.begun is not None:
                # Not after a step that was launched since: rows would wait for all of it.
                self.stream.wait_event(read.begun)
                read.begun = None
            self._land(read, read.on_device, rows, arrived, seals, moves)
            return Launched(self.stream)

    def check(self, read: RowsInto) -> SealCheck:
        """Submits the comparison of seals for all rows of a read, whose chunks are landing."""
        with self._on_stream():
            return SealCheck(len(read.rows.remote), _wrong(read), self.stream)

    def _to_device(self, rows: Rows) -> OnDevice:
        """In one transfer."""
        digests = np.zeros_like(rows.tag)
        all_four = to_device(np.stack((rows.remote, rows.local, rows.tag, digests)), self.pool.device)
        return OnDevice(all_four[0], all_four[1], all_four[3], all_four[2:])

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        """Launches go to the stream; on a CPU, which has none, they are done at once."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _land(
        self,
        read: RowsInto,
        known: OnDevice,
        rows: range,
        arrived: torch.Tensor,
        seals: torch.Tensor | None,
        moves: tuple[tuple[Move, ...], ...],
    ) -> None:
        some = slice(rows.start, rows.stop)
        blocks = known.blocks[some]
        if seals is not None:
            read.seals = seals[known.remote]
        digest = digests = None
        if read.checked:
            digest, digests = self.digests[arrived.shape[1]], known.digests[some]
        if not moves:
            # The digests are of what it stores, whatever comes into the ring before or after.
            ops.land_rows(arrived, self.pool, blocks, None if digest is None else digest.factors, digests)
            return
        self._scatter(read.rows.group[some], blocks, arrived, moves)
        if digest is not None and digests is not None:
            digest.into(digests, arrived.view(torch.int64))

    def _scatter(
        self,
        groups: np.ndarray,
        blocks: torch.Tensor,
        arrived: torch.Tensor,
        moves: tuple[tuple[Move, ...], ...],
    ) -> None:
        for group, its_moves in enumerate(moves):
            mine = np.flatnonzero(groups == group)
            if len(mine) == len(groups):
                scatter(arrived, self.pool, blocks, its_moves)
            elif len(mine):
                which = to_device(mine, self.pool.device)
                scatter(arrived[which], self.pool, blocks[which], its_moves)


def _wrong(read: RowsInto) -> torch.Tensor | None:
    if not read.checked:
        return None
    assert read.seals is not None and read.on_device is not None
    return read.on_device.expected != read.seals.T
