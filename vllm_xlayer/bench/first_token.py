"""First tokens of prompts that are computed, on the device, or in the host tier, and what they wait for."""

import statistics
import time
from typing import Any

import torch
from rich.table import Table

from .tier_worker import tier, wait_for_tier
from .timing import link_rate

TURNS = 12
"""Of restored prompts: on the device, then in the host tier. A host can be 10 ms faster in one than
in another."""
SPANS = {
    "asked": "until its rows are asked for",
    "told": "until their copies are submitted, and the load is reported",
    "launch": "until the model's step begins",
    "launched": "until it is launched",
    "token": "until the token is there",
}
"""Moments of a request, in this order (tier_worker.Event) -> what ends there."""


def link() -> float | None:
    """Bytes a second from host to device; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    host = torch.zeros(256 << 20, dtype=torch.uint8).pin_memory()
    return link_rate(host, torch.empty_like(host, device="cuda"))


def make_prompts(llm: Any, count: int, tokens: int, seed: int) -> list[list[int]]:
    """Token ids of so many prompts; prompt n begins with 7 n + seed, so that none begins as another."""
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    return [[(31 * i + 7 * n + seed) % vocabulary for i in range(tokens)] for n in range(count)]


def restores(llm: Any, tokens: int, repeats: int, turns: int = TURNS) -> dict[str, Any]:
    """Seconds to the first token: prompts that are new, on the device, and in the host tier only; what they
    were spent on (`spans`); and the link's rate after every turn.

    In turns, as a step takes the host another time in another second.

    Raises:
        RuntimeError: the device's cache does not hold all of the prompts.
    """
    from vllm import SamplingParams

    one = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    prompts = make_prompts(llm, repeats, tokens, seed=0)
    report: dict[str, Any] = {"spans": {}, "links": []}

    def first_tokens(kind: str) -> None:
        llm.collective_rpc("begin_events")
        answers = []
        for prompt in prompts:
            begin = time.perf_counter()
            llm.generate([{"prompt_token_ids": prompt}], one, use_tqdm=False)
            answers.append((begin, time.perf_counter()))
        (events,) = llm.collective_rpc("end_events")
        report.setdefault(kind, []).extend(end - begin for begin, end in answers)
        report["spans"].setdefault(kind, []).extend(spans(begin, events, end) for begin, end in answers)

    wait_for_tier(llm)  # the host tier is pinned
    first_tokens("cold")
    wait_for_tier(llm)
    before = tier(llm)["loaded"]
    for _ in range(turns):
        loaded = tier(llm)["loaded"]
        first_tokens("cached")
        wait_for_tier(llm)
        if moved := tier(llm)["loaded"] - loaded:
            raise RuntimeError(
                f"expected all prompts on the device, got {moved} rows loaded from the host tier; "
                "--repeats or --prompt must be less"
            )
        if not llm.reset_prefix_cache():
            raise RuntimeError("the device's prefix cache could not be emptied")
        first_tokens("restored")
        report["links"].append(link())
    report["rows_restored"] = tier(llm)["loaded"] - before
    return report


def spans(begin: float, events: list[tuple[str, float]], end: float) -> dict[str, float]:
    """Seconds of one request from each of SPANS to the next. events: (name, time) of all requests."""
    found: dict[str, float] = {}
    before = begin
    for name, when in [*(e for e in events if begin <= e[1] <= end), ("token", end)]:
        found[name] = found.get(name, 0.0) + when - before
        before = when
    return found


def added(restore: dict[str, Any]) -> float:
    """Seconds that a first token comes later from the host tier than from the device's cache.

    Prompt by prompt: the host, which launches such a step, is faster in one turn than in another.
    """
    pairs = zip(restore["cached"], restore["restored"], strict=True)
    return statistics.median(restored - cached for cached, restored in pairs)


def floor(result: dict[str, Any]) -> float | None:
    """Seconds that the link needs for one prompt's rows."""
    restore = result["restore"]
    moved = restore["rows_restored"] * result["row_bytes"] / len(restore["restored"])
    return moved / result["link"] if result["link"] else None


def restore_table(result: dict[str, Any]) -> Table:
    restore, least = result["restore"], floor(result)
    grid = Table(title=f"First token, model runner {result['runner']}, {len(restore['cold'])} prompts")
    grid.add_column("")
    grid.add_column("ms, median", justify="right")
    grid.add_column("least to most", justify="right")
    for kind, title in (("cold", "computed"), ("cached", "on the device"), ("restored", "in the host tier")):
        times = restore[kind]
        span = f"{min(times) * 1e3:.1f} to {max(times) * 1e3:.1f}"
        grid.add_row(title, f"{statistics.median(times) * 1e3:.1f}", span)
    grid.add_row("host tier - device", f"{added(restore) * 1e3:.1f}")
    if all(restore["links"]):
        rates = [rate / 1e9 for rate in restore["links"]]
        grid.add_row(
            "the link, GB/s", f"{statistics.median(rates):.1f}", f"{min(rates):.1f} to {max(rates):.1f}"
        )
    rows = f"{restore['rows_restored']:,} rows of {result['row_bytes']:,} bytes in all"
    grid.add_row("floor: the link's time", "-" if least is None else f"{least * 1e3:.1f}", rows)
    return grid


def span_lines(kinds: dict[str, list[dict[str, float]]]) -> list[tuple[str, float | None, float | None]]:
    """(what is waited for, seconds of prompts on the device, seconds of those in the host tier): medians.

    A prompt that is not restored has some of SPANS only.
    """

    def median(kind: str, name: str) -> float | None:
        found = [spans[name] for spans in kinds[kind] if name in spans]
        return statistics.median(found) if found else None

    return [(title, median("cached", name), median("restored", name)) for name, title in SPANS.items()]


def span_table(kinds: dict[str, list[dict[str, float]]]) -> Table:
    grid = Table(title="What a first token waits for, ms, median")
    grid.add_column("")
    for title in ("on the device", "in the host tier"):
        grid.add_column(title, justify="right")
    for title, *medians in span_lines(kinds):
        grid.add_row(title, *("" if seconds is None else f"{seconds * 1e3:.1f}" for seconds in medians))
    return grid
