"""A chunk's way from the ring into the KV cache, and the check of a read's seals.

Nothing here waits for a GPU. A chunk costs a few launches; what can be done once a read is.
"""

import contextlib
from dataclasses import dataclass

import numpy as np
import torch

from ... import ops
from .reshard import Move, scatter
from .seals import RowDigest, to_device
from .staging import Rows


@dataclass(eq=False)
class RowsInto:
    """Rows of one read, on the device.

    Args:
        remote, blocks, tags: int64 [n], as `Rows` has them.
        groups: int64 [n] on the host.
        digests: int64 [n], written as chunks land; None where nothing is checked.
        seals: int64 [n, 2], once the first chunk is landing.
        begun: on a GPU, after all that uses the blocks' former contents; None once the stream waits for it.
    """

    remote: torch.Tensor
    blocks: torch.Tensor
    tags: torch.Tensor
    groups: np.ndarray
    digests: torch.Tensor | None
    begun: torch.cuda.Event | None
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
        wrong: int64 [2] on the device: rows that are sealed for other tokens, and such whose bytes are not
            those sealed; None where nothing is checked.
    """

    def __init__(self, rows: int, wrong: torch.Tensor | None, stream: torch.cuda.Stream | None):
        self.rows, self.wrong = rows, wrong
        if wrong is not None and wrong.is_cuda:
            self.wrong = torch.empty(2, dtype=torch.int64, pin_memory=True)
            self.wrong.copy_(wrong, non_blocking=True)
        super().__init__(stream)

    def problem(self) -> str | None:
        if self.wrong is None or not self.wrong.any():
            return None
        stale, torn = self.wrong.tolist()
        return (
            f"of {self.rows} rows {stale} are sealed for other tokens (their blocks were given to another "
            f"request) and {torn} are not what was sealed"
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
        with self._on_stream():
            # One transfer for all. Not after `begun`: what is launched for other reads would wait for it.
            all_three = np.stack((rows.remote, rows.local, rows.tag))
            remote, blocks, tags = to_device(all_three, self.pool.device).unbind()
            digests = torch.empty(len(rows.remote), dtype=torch.int64, device=self.pool.device)
        return RowsInto(remote, blocks, tags, rows.group, digests if checked else None, begun)

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
            if self.stream is not None and read.begun is not None:
                # Not after a step that was launched since: rows would wait for all of it.
                self.stream.wait_event(read.begun)
                read.begun = None
            self._land(read, rows, arrived, seals, moves)
            return Launched(self.stream)

    def check(self, read: RowsInto) -> SealCheck:
        """Of all rows of a read, whose chunks are landing."""
        with self._on_stream():
            return SealCheck(len(read.blocks), _wrong(read), self.stream)

    def _on_stream(self) -> contextlib.AbstractContextManager[object]:
        """Launches go to the stream; on a CPU, which has none, they are done at once."""
        return contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def _land(
        self,
        read: RowsInto,
        rows: range,
        arrived: torch.Tensor,
        seals: torch.Tensor | None,
        moves: tuple[tuple[Move, ...], ...],
    ) -> None:
        some = slice(rows.start, rows.stop)
        blocks = read.blocks[some]
        if seals is not None:
            read.seals = seals[read.remote]
        digest = digests = None
        if read.digests is not None:
            digest, digests = self.digests[arrived.shape[1]], read.digests[some]
        if not moves:
            # The digests are of what it stores, whatever comes into the ring before or after.
            ops.land_rows(arrived, self.pool, blocks, None if digest is None else digest.factors, digests)
            return
        self._scatter(read.groups[some], blocks, arrived, moves)
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
    if read.digests is None:
        return None
    assert read.seals is not None
    stale = read.seals[:, 0] != read.tags
    torn = (read.seals[:, 1] != read.digests) & ~stale
    return torch.stack((stale.sum(), torn.sum()))
