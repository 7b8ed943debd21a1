"""What the soaks have in common: an engine whose requests are aborted, reset and failed, and what became of
their answers."""

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WRITE_SECONDS = 20
ZEROS = ("wrong", "lost", "leaked")
"""Of what is counted, that must be none."""
Judge = Callable[[int, Any, int | None], bool]
"""Whether a prompt (by its number) got a right answer (a RequestOutput). The last argument is how many tokens
a request had when it was first preempted, None of one that never was."""


def make_soak(
    llm: Any, copies: Any, prompts: list[list[int]], sampling: Any, judge: Judge, folder: Path, seed: int
) -> Any:
    """tests/engine's soak, with another way to tell right answers, which stops at no wrong one."""
    from faults import ANSWER_SECONDS, under_way
    from test_soak import Soak

    class JudgedSoak(Soak):
        def __init__(self) -> None:
            super().__init__(llm, copies, folder, prompts, [], random.Random(seed))
            self.preempted: dict[str, int] = {}
            self.restored: set[str] = set()  # that waited for rows; some of those loads failed

        def add(self) -> None:
            for _ in range(self.rng.randint(1, 6)):
                name, which = f"r{self.did['requests']}", self.rng.randrange(len(self.prompts))
                self.did["requests"] += 1
                self.running[name] = which
                self.llm.llm_engine.add_request(name, {"prompt_token_ids": self.prompts[which]}, sampling)

        def step(self) -> None:
            for _ in range(self.rng.randint(1, 12)):
                self.step_once()

        def step_once(self) -> None:
            outputs = {o.request_id: o for o in self.llm.llm_engine.step() if o.finished}
            self.restored |= set(map(_name, under_way(self.llm, "load")))
            note_preempted(self.llm, self.preempted)
            self.answered(outputs)

        def answered(self, outputs: dict[str, Any]) -> None:
            for name, output in outputs.items():
                which, before = self.running.pop(name), self.preempted.get(name)
                self.did["answers"] += 1
                self.did["preempted"] += before is not None
                self.did["restored"] += name in self.restored
                if not judge(which, output, before):
                    self.did["wrong"] += 1
                    print(
                        f"wrong: {name}, prompt {which}, preempted after {before} tokens, "
                        f"{output.num_cached_tokens} cached, restored: {name in self.restored}: "
                        f"{list(output.outputs[0].token_ids)}"
                    )

        def finish(self) -> None:
            end = time.monotonic() + ANSWER_SECONDS
            while self.llm.llm_engine.has_unfinished_requests() and time.monotonic() < end:
                self.step_once()

    return JudgedSoak()


def note_preempted(llm: Any, preempted: dict[str, int]) -> None:
    """Adds requests that have been preempted: how many tokens they had when they first were."""
    from vllm_xlayer.compat.engine import core_of

    for request in core_of(llm).scheduler.requests.values():
        if request.num_preemptions:
            preempted.setdefault(_name(request.request_id), request.num_output_tokens)


def _name(request_id: str) -> str:
    """As it was added: vLLM's core has a suffix of its own on it."""
    return request_id.rpartition("-")[0] or request_id


def with_host_tier(cpu_bytes: int) -> dict[str, Any]:
    """An engine's settings of XLayerConnector with so much host memory."""
    return dict(
        kv_transfer_config=dict(
            kv_connector="XLayerConnector", kv_role="kv_both",
            kv_connector_extra_config={"cpu_bytes_to_use": cpu_bytes},
        )
    )  # fmt: skip


def soak(
    settings: dict[str, Any],
    prompts: list[list[int]],
    sampling: Any,
    judge: Judge,
    seconds: float,
    seed: int,
    counts: tuple[str, ...],
    note: Callable[[Any, dict[str, Any]], None],
) -> dict[str, Any]:
    """Soaks an engine with XLayerConnector, and says what was counted.

    Args:
        settings: of the engine.
        counts: of the soak's own, those that are wanted.
        note: called with the engine and what was counted, every WRITE_SECONDS and at the end; may add to it.
    """
    import pytest

    from . import serving

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        from faults import Copies, live_connector, settle, slow_down

        from vllm_xlayer.compat.engine import rows_loaded
        from vllm_xlayer.connector.host.accounts import AccountingError

        slow_down(patch, 2)
        copies = Copies(patch, lambda: live_connector().pool)
        with serving.started(settings) as llm:
            soak = make_soak(llm, copies, prompts, sampling, judge, Path(folder), seed)
            found: dict[str, Any] = dict(seconds=0.0, seed=seed, leaked=0, lost=0)
            begin = time.monotonic()

            def count() -> None:
                tries = copies.failed + sum(
                    soak.did[what] for what in ("aborted", "resets", "resets of tiers")
                )
                did = {name: soak.did[name] for name in counts}
                found.update(seconds=round(time.monotonic() - begin, 1), **did, tries=tries)
                found["rows_loaded"] = rows_loaded()
                note(llm, found)

            try:
                while (left := seconds - (time.monotonic() - begin)) > 0:
                    soak.act(min(left, WRITE_SECONDS))
                    count()
                soak.finish()
                found["lost"] = len(soak.running)
                settle(llm)
            except AccountingError as error:
                found["leaked"] = len(error.problems)
                print(error)
            count()
    return found
