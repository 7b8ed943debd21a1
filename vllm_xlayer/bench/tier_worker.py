"""What `bench offload` does in vLLM's worker process: looks at the tier, notes when what happens there, and
copies beside the steps. And what it asks from outside."""

import functools
import itertools
import time
from collections.abc import Callable
from typing import Any, TypedDict, cast

import torch

from ..compat.engine import connector as connector_of_worker


class TierState(TypedDict):
    ready: bool
    """Whether rows can be stored and loaded."""
    problem: str
    """Why they never can be."""
    row_bytes: int
    stored: int
    """Rows so far."""
    loaded: int


Event = tuple[str, float]
"""Name, time.perf_counter()."""


class TierWorker:
    """Methods that vLLM adds to its worker (``worker_extension_cls``), for ``LLM.collective_rpc``."""

    def tier_state(self) -> TierState:
        worker = connector_of_worker().connector_worker.worker
        return TierState(
            ready=worker.ready, problem=worker.problem, row_bytes=worker.host.shape[1],
            stored=worker.rows_stored, loaded=worker.rows_loaded,
        )  # fmt: skip

    def begin_events(self) -> None:
        """Notes from now on when a load is "asked" for, when one is "told" to have ended, and when a step
        with tokens begins its "launch" and is "launched".
        """
        events: list[Event] = []
        self._events = events

        def note(name: str) -> None:
            events.append((name, time.perf_counter()))

        def submit_load(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            note("asked")
            return original(*args, **kwargs)

        def get_finished(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            sent, received = original(*args, **kwargs)
            if received:
                note("told")
            return sent, received

        def execute_model(original: Callable[..., Any], scheduled: Any, *args: Any, **kwargs: Any) -> Any:
            if not scheduled.total_num_scheduled_tokens:
                return original(scheduled, *args, **kwargs)
            note("launch")
            output = original(scheduled, *args, **kwargs)
            note("launched")
            return output

        connector = connector_of_worker()
        tier = connector.connector_worker.worker
        calls = ((tier, submit_load), (connector, get_finished), (self, execute_model))
        self._noted = [(owner, call.__name__) for owner, call in calls]
        _call_first(*calls)

    def end_events(self) -> list[Event]:
        """Those since begin_events."""
        _call_no_more(self._noted)
        return self._events

    def begin_copies(self, load: bool, row_bytes: int) -> None:
        """Keeps rows moving one way from now on, as vLLM has the connector do it: stores are submitted before
        a step's launch, loads after it, and then it is asked what has finished."""
        connector = connector_of_worker()
        copies = self._copies = row_copies(load, row_bytes, connector.pool.device)
        samples: list[tuple[float, int]] = []
        self._samples = samples

        def bind_connector_metadata(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            copies.before_launch()
            return original(*args, **kwargs)

        def start_load_kv(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            copies.after_launch()
            return original(*args, **kwargs)

        def get_finished(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            copies.book()
            samples.append((time.monotonic(), copies.bytes))
            return original(*args, **kwargs)

        calls = (bind_connector_metadata, start_load_kv, get_finished)
        self._beside = [(connector, call.__name__) for call in calls]
        _call_first(*((connector, call) for call in calls))

    def end_copies(self) -> list[tuple[float, int]]:
        """Ends them; (time.monotonic(), bytes copied until then) of every step."""
        _call_no_more(self._beside)
        self._copies.stop()
        del self._copies
        return self._samples


def _call_first(*calls: tuple[Any, Callable[..., Any]]) -> None:
    """Lets a function be called in place of its owner's method of that name, which it is handed first."""
    for owner, call in calls:
        setattr(owner, call.__name__, functools.partial(call, getattr(owner, call.__name__)))


def _call_no_more(names: list[tuple[Any, str]]) -> None:
    for owner, name in names:
        delattr(owner, name)


class RowCopies:
    """Copies without end between memory that nobody else uses; how much is queued, the connector says."""

    JOB_BYTES, JOBS = 64 << 20, 32
    """Jobs that are not finished: 2 GiB, which take a PCIe 5.0 link longer than two decode steps take."""

    def __init__(self, load: bool, row_bytes: int, device: torch.device):
        from ..connector.copy.directions import make_direction

        self._load = load
        rows = max(1, self.JOB_BYTES // row_bytes)
        pool = torch.zeros((2 * rows, row_bytes), dtype=torch.uint8, device=device)
        host = torch.zeros((2 * rows, row_bytes), dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._direction = make_direction(host, pool, device) if load else make_direction(pool, host, device)
        # Drawn before: the engine's process should have nothing to do but submit.
        self._ids = itertools.cycle([[torch.randperm(2 * rows)[:rows] for _ in "12"] for _ in range(8)])
        self._running = 0
        self._ahead = self.JOBS if device.type == "cuda" else 1  # on the CPU a job is done at once
        self.bytes = 0
        """Copied since they began."""

    def before_launch(self) -> None:
        """Submits stores; loads that come after the launch need not wait for it."""
        if self._load:
            self._direction.before_launch()
        else:
            self._submit()

    def after_launch(self) -> None:
        """Submits loads."""
        if self._load:
            self._submit()

    def _submit(self) -> None:
        """So many jobs that JOBS of them are not finished."""
        while self._running < self._ahead:
            src_ids, dst_ids = next(self._ids)
            self._direction.submit(self._running, src_ids, dst_ids)
            self._running += 1

    def book(self) -> None:
        """Counts what has finished. RuntimeError: a copy failed."""
        for result in self._direction.advance():
            if not result.success:
                raise RuntimeError("a copy of rows failed, see above")
            self.bytes += result.transfer_size or 0
            self._running -= 1

    def stop(self) -> None:
        self._direction.drain()
        self._running, self.bytes = 0, 0


@functools.cache
def row_copies(load: bool, row_bytes: int, device: torch.device) -> RowCopies:
    """The same ones each time: torch has 32 streams for all of a process and gives them out in turn, so that
    new ones for every round would come round to vLLM's own."""
    return RowCopies(load, row_bytes, device)


def tier(llm: Any) -> TierState:
    """The tier as the worker sees it."""
    (state,) = llm.collective_rpc("tier_state")
    if state["problem"]:
        raise RuntimeError(f"expected a host tier, got none: {state['problem']}")
    return cast(TierState, state)


def wait_for_tier(llm: Any) -> None:
    """Returns when the tier is ready and no row has moved for a while.

    Raises:
        TimeoutError: not within a minute.
    """
    deadline, seen, same = time.monotonic() + 60, None, 0
    while same < 10:
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected a tier at rest within a minute, got {seen}")
        time.sleep(0.02)
        state = tier(llm)
        same = same + 1 if state["ready"] and state == seen else 0
        seen = state
