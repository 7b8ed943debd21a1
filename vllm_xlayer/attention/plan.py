"""Cut a batch into pieces whose keys fit a bounded workspace. Pure numpy, no vLLM, no GPU.

The attention over an NVFP4 cache dequantises a request's cached tokens into a dense
16-bit workspace and attends to them with a dense kernel. The workspace has a fixed
capacity, so a batch is worked through in pieces:

* requests that fit are packed together, as many as the capacity takes, less those whose thread blocks would
  leave the device half empty at the end of the piece;
* a request longer than the capacity is cut along its keys: every part but the last lies
  wholly before the query tokens (no mask needed), the last one ends with them (causal).
  The parts' outputs are merged by log-sum-exp.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Piece:
    """Keys ``[seq_starts[i], seq_starts[i] + lens[i])`` of requests ``first .. last - 1``.

    Attributes:
        first, last: Half-open range of requests in the batch.
        seq_starts: int32 [last - first], first key position of each request.
        lens: int32 [last - first], keys of each request in this piece.
        causal: The keys end with the request's own query tokens.
        merge: An earlier piece already holds a partial output of this (single) request.
    """

    first: int
    last: int
    seq_starts: np.ndarray
    lens: np.ndarray
    causal: bool
    merge: bool


@dataclass(frozen=True)
class Waves:
    """Thread blocks of the dense attention.

    Attributes:
        blocks: int [R], of each request.
        at_once: that the device computes at once.
    """

    blocks: np.ndarray
    at_once: int

    def fullest(self, first: int, last: int) -> int:
        """Where a piece that begins with request ``first`` ends, at ``last`` at the latest: waves of thread
        blocks are as full as they can be, or nearly, and requests many."""
        blocks = np.cumsum(self.blocks[first:last])
        used = blocks / (-(-blocks // self.at_once) * self.at_once).clip(1)
        return first + 1 + int(np.flatnonzero(used >= used.max() - NEARLY)[-1])


NEARLY = 0.05
"""Of a piece's waves: less is not worth a launch."""


def plan_pieces(
    query_lens: np.ndarray,
    seq_lens: np.ndarray,
    capacity: int,
    window: int | None = None,
    waves: Waves | None = None,
    starts: np.ndarray | None = None,
) -> list[Piece]:
    """Plan a batch.

    Args:
        query_lens: int [R], tokens of this step of each request (0 for padding rows).
        seq_lens: int [R], tokens of each request including this step's.
        capacity: Tokens the workspace holds.
        window: Sliding window in tokens (a query sees itself and ``window - 1`` before it),
            None for full attention.
        waves: of the dense attention, None if it is not known how it cuts its work.
        starts: int [R], first key of each request: those before are attended to elsewhere. Not with a window.

    Raises:
        ValueError: A request's query tokens, or with a window the keys they can see, do not
            fit the capacity.
    """
    query_lens = np.asarray(query_lens, dtype=np.int64)
    seq_lens = np.where(query_lens > 0, np.asarray(seq_lens, dtype=np.int64), 0)
    context = seq_lens - query_lens
    starts = np.zeros_like(context) if starts is None else starts
    if window is not None:
        starts = np.maximum(0, context - (window - 1))
    lens = np.where(query_lens > 0, seq_lens - starts, 0)

    pieces: list[Piece] = []
    first = 0
    while first < len(lens):
        if lens[first] > capacity:
            pieces += _cut(
                first, int(starts[first]), int(seq_lens[first]), int(query_lens[first]), capacity, window
            )
            first += 1
            continue
        last, used = first, 0
        while last < len(lens) and used + lens[last] <= capacity:
            used += int(lens[last])
            last += 1
        if waves is not None and last < len(lens):
            last = waves.fullest(first, last)
        if query_lens[first:last].any():
            pieces.append(
                Piece(
                    first,
                    last,
                    starts[first:last].astype(np.int32),
                    lens[first:last].astype(np.int32),
                    causal=True,
                    merge=False,
                )
            )
        first = last
    return pieces


def _cut(req: int, start: int, end: int, query_len: int, capacity: int, window: int | None) -> list[Piece]:
    """Cut one long request along its keys; the last part holds all of its query tokens."""
    if window is not None or query_len > capacity:
        raise ValueError(
            f"workspace: expected room for {query_len if window is None else end - start} tokens of one "
            f"request, got {capacity}"
        )
    pieces: list[Piece] = []
    last_start = end - capacity
    for at in range(start, last_start, capacity):
        n = min(capacity, last_start - at)
        pieces.append(
            Piece(
                req,
                req + 1,
                np.array([at], np.int32),
                np.array([n], np.int32),
                causal=False,
                merge=bool(pieces),
            )
        )
    pieces.append(
        Piece(
            req,
            req + 1,
            np.array([last_start], np.int32),
            np.array([capacity], np.int32),
            causal=True,
            merge=bool(pieces),
        )
    )
    return pieces
