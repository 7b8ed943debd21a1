"""Whose newest tokens are kept: a row of memory for each running request, as long as there are any.

Nothing stale is read as long as every start of a request in a row is counted, a resumption too
(`RequestRows.starts`). A request without a row reads its pages.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from vllm.logger import init_logger
from vllm.v1.attention.backend import CommonAttentionMetadata

logger = init_logger(__name__)

NO_ROW = -1


class RequestRows(Protocol):
    """A process's rows of running requests.

    Attributes:
        starts: int64 [rows], how often a request was started in each row, or started again.
    """

    starts: np.ndarray

    def rows_of(self, step: CommonAttentionMetadata) -> np.ndarray:
        """int32 [step.num_reqs]: the row of each request of a batch; NO_ROW: it has none."""
        ...


class NamedRows:
    """Rows given to requests by name, for a runner that keeps none: model runner V1.

    Args:
        rows: as many as requests can run.
        batch: returns the names of the current step's requests, in the order of its batch.
    """

    def __init__(self, rows: int, batch: Callable[[], list[str]]) -> None:
        self.starts = np.zeros(rows, dtype=np.int64)
        self._batch = batch
        self._free = list(range(rows))
        self._row_of: dict[str, int] = {}

    def start(self, names: Iterable[str]) -> None:
        """Requests are about to run whose rows hold nothing of theirs: new ones, and resumed ones."""
        for name in names:
            self.end([name])
            if self._free:
                row = self._row_of[name] = self._free.pop()
                self.starts[row] += 1
            else:
                _count_start_without_row(len(self.starts))

    def end(self, names: Iterable[str]) -> None:
        """Requests run no longer. Those that never did are passed over."""
        for name in names:
            if (row := self._row_of.pop(name, None)) is not None:
                self._free.append(row)

    def rows_of(self, step: CommonAttentionMetadata) -> np.ndarray:
        rows = np.full(step.num_reqs, NO_ROW, dtype=np.int32)
        for i, name in enumerate(self._batch()[: step.num_reqs]):
            rows[i] = self._row_of.get(name, NO_ROW)
        return rows


class RunnerRows:
    """Rows given to requests of model runner V2 by their place in its table, which they keep while they run.

    Args:
        table: the runner's.
        places: that it has, as many as requests can run.
        rows: at most as many. Requests beyond them read pages.
    """

    def __init__(self, table: Any, places: int, rows: int) -> None:
        self.table = table
        self.starts = np.zeros(rows, dtype=np.int64)
        self._free = list(range(rows))
        self._row_of = np.full(places, NO_ROW, dtype=np.int32)

    def start(self, place: int, running: Iterable[int], is_warm_up: bool = False) -> None:
        """A request is put into a place: a new one, or one that resumes.

        running: the places of all that run. is_warm_up: nobody waits for its answer.
        """
        if self._row_of[place] == NO_ROW:
            self._free = self._free or self._take_from_ended(running)
            if not self._free:
                if not is_warm_up:
                    _count_start_without_row(len(self.starts))
                return
            self._row_of[place] = self._free.pop()
        self.starts[self._row_of[place]] += 1

    def _take_from_ended(self, running: Iterable[int]) -> list[int]:
        """Nobody says when a request ends: its row stays with its place until another one needs it."""
        ended = np.setdiff1d(np.flatnonzero(self._row_of != NO_ROW), np.fromiter(running, dtype=np.int64))
        rows: list[int] = self._row_of[ended].tolist()
        self._row_of[ended] = NO_ROW
        return rows

    def rows_of(self, step: CommonAttentionMetadata) -> np.ndarray:
        rows = np.full(step.num_reqs, NO_ROW, dtype=np.int32)
        places = _batch_of_hybrid if step.req_idx is None else step.req_idx
        if places is not None:  # a dummy run's may be None; padding has none
            places = places[: step.num_reqs]
            known = np.flatnonzero(places < len(self._row_of))  # another engine's table may be longer
            rows[known] = self._row_of[places[known]]
        return rows


_starts_without_row = 0


def _count_start_without_row(rows: int) -> None:
    """A request starts that reads pages, as all rows are taken. Said of the first one, the tenth, the
    hundredth, in the log: without a connector nothing of a worker's gets into vLLM's metrics."""
    global _starts_without_row
    _starts_without_row += 1
    count = str(_starts_without_row)
    if count == "1" + "0" * (len(count) - 1):
        logger.warning(
            "NVFP4 KV cache: newest tokens are kept of %d running requests, and more run: %s so far read all "
            "tokens from NVFP4 pages, which costs accuracy. --max-num-seqs %d lets them wait instead; a "
            "smaller VLLM_XLAYER_NEWEST_TOKENS keeps fewer tokens of more requests",
            rows, f"{count} request" if count == "1" else f"{count} requests", rows,
        )  # fmt: skip


_rows: RequestRows | None = None
_v2_starts_are_told = False
_batches_of_hybrids_are_told = False
_batch_of_hybrid: np.ndarray | None = None
_num_rows = 0


def expect_v2_starts() -> None:
    """From now on every start of a request on model runner V2 is told to `start_on_v2`."""
    global _v2_starts_are_told
    _v2_starts_are_told = True


def start_on_v2(
    table: Any, places: int, place: int, running: Iterable[int], is_warm_up: bool = False
) -> None:
    """A request was put into a place of a runner's table; see `RunnerRows.start`."""
    if not _num_rows:  # no layer keeps newest tokens: another KV cache, or they are off
        return
    rows = _rows
    if not isinstance(rows, RunnerRows) or rows.table is not table:
        rows = RunnerRows(table, places, min(places, _num_rows))
        use_rows(rows)
    rows.start(place, running, is_warm_up)


def starts_on_v2_are_told() -> bool:
    """Whether every start on model runner V2 is told."""
    return _v2_starts_are_told


def expect_batches_of_hybrids() -> None:
    """From now on `batch_of_hybrid` says the requests of every step of a hybrid on model runner V2."""
    global _batches_of_hybrids_are_told
    _batches_of_hybrids_are_told = True


def batches_of_hybrids_are_told() -> bool:
    """Whether every step's requests are told for hybrids on model runner V2."""
    return _batches_of_hybrids_are_told


@contextmanager
def batch_of_hybrid(places: np.ndarray) -> Iterator[None]:
    """While a hybrid's metadata is built: the places of the step's requests in the runner's table, which
    vLLM puts into no metadata of theirs."""
    global _batch_of_hybrid
    _batch_of_hybrid = places
    try:
        yield
    finally:
        _batch_of_hybrid = None


def have_rows(count: int) -> None:
    """This process's layers have memory for so many."""
    global _num_rows
    _num_rows = count


def rows_in_use() -> RequestRows | None:
    """The rows that this process's builders take; None: nobody has any."""
    return _rows


def use_rows(rows: RequestRows | None) -> None:
    """The rows that this process's builders take from now on; None: nobody has any."""
    global _rows
    _rows = rows
