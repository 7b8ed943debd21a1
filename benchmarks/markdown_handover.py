"""Markdown of `benchmarks.handover`'s results: answers, and times beside the link's floor."""

import statistics
from typing import Any

from vllm_xlayer.bench.handover_ways import CONNECTORS, WAYS

from .markdown import about, milliseconds, of_other_commits, table

HEAD = [
    "cache, tokens (MB)", "", "NIXL alone, in one piece", "in as many pieces", "first token, ms",
    "once on the device, ms", "hand-over, ms", "times one piece", "times as many", "descriptors",
]  # fmt: skip


def upstream(results: dict[str, Any]) -> str:
    """A sentence of what `benchmarks.upstream_nixl` counted."""
    counts, all_of_them = results["counts"], len(results["tests"])
    kinds = ("not for ours", "cannot run here, with vLLM's classes neither", "not run", "failed")
    told = [
        f"{sum(count for what, count in counts.items() if what.startswith(f'{kind}:'))} {said}"
        for kind, said in zip(
            kinds, ("are not for this one", "cannot run there", "are left out", "fail"), strict=True
        )
    ]
    versions = results["versions"]
    return (
        f"Of {all_of_them} tests {counts['passed']} pass, {', '.join(told)}; each has its reason in "
        "benchmarks/results/cpu-upstream-nixl.json (most need what is refused below, or look inside vLLM's "
        f"own classes). No GPU; vLLM {versions['vllm']}, {results['date']}, commit {results['commit']}."
    )


def section(results: dict[str, Any]) -> str:
    """A sentence of answers, a table of times, and what was not measured."""
    steps = results["steps"]
    parts = [_engines(results["devices"])]
    answers = [
        f"{step['cache']} {step['same']} of {step['answers']} ({step['computed']} prompts computed again)"
        for step in steps.values()
        if "answers" in step
    ]
    if answers:
        parts.append(f"Answers to lm_eval's questions that are one engine's alone: {', '.join(answers)}.")
    lines = [
        line for step in steps.values() for length in step.get("lengths", ()) for line in _lines(step, length)
    ]
    if lines:
        parts.append(table(HEAD, lines))
    problems = [
        f"{name}: {text}"
        for name, step in steps.items()
        for text in (*step.get("problems", {}).values(), *([step["problem"]] if "problem" in step else ()))
    ]
    if problems:
        parts.append("Not measured: " + "; ".join(problems) + ".")
    parts += [of_other_commits(results, steps), about(results)]
    return "\n\n".join(part for part in parts if part)


def proxied(results: dict[str, Any]) -> str:
    """A sentence of what `benchmarks.handover_proxy` found."""
    scores = []
    for way, found in results["scores"].items():
        matches = ", ".join(f"{task} {score['exact_match']:.0%}" for task, score in found.items())
        scores.append(f"{way} {matches}")
    return (
        f"Two `vllm serve` behind vLLM's small proxy, {results['cache']}: {results['same']} of "
        f"{results['answers']} answers to lm_eval's tasks are the prefill engine's own, and "
        f"{results['rows']:,} rows were read "
        f"({'; '.join(scores)}). {about(results)}"
    )


def _engines(devices: list[str] | None) -> str:
    if devices is None:
        return "Both engines on one GPU:"
    prefill, decode = devices
    return f"Prefill engine on GPU {prefill}, decode engine on GPU {decode}:"


def _lines(step: dict[str, Any], length: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """One for each way."""
    nbytes, link = length["kv_bytes"], length["link"]
    what = f"{step['cache']}, {length['tokens']:,} ({nbytes / 1e6:,.0f})"
    floors = {pieces: nbytes / rate for pieces, rate in link.items()}
    lines = []
    for how, rates in length.get("worker", {}).items():
        # NIXL makes one piece of neighbours.
        pieces = {"neighbours": ("one",), "scattered": ("one", "rows")}[how]
        for staging, rate in rates.items():
            took = nbytes / rate
            floor = {name: floors.get(name) for name in pieces}
            cells = [
                *(_alone(nbytes, floor.get(name)) for name in ("one", "rows")), "", "", milliseconds(took, 1),
                *(f"{took / floor[name]:.2f}" if floor.get(name) else "-" for name in ("one", "rows")), "",
            ]  # fmt: skip
            says = f"rows, {how}, without engines, ring of {int(staging) >> 20:,} MiB"
            lines.append((what, [says, *cells]))
    for way, numbers in length["ways"].items():
        seconds = statistics.median(numbers["seconds"])
        as_many = way.partition("-")[0]
        cells = ["", "", "", "", ""]
        if way in CONNECTORS:
            cached = statistics.median(numbers["cached_seconds"])
            took = seconds - cached
            cells = [
                milliseconds(cached, 1),
                milliseconds(took, 1),
                *(f"{took / floors[floor]:.2f}" if floor in floors else "-" for floor in ("one", as_many)),
                f"{numbers['descriptors']:,.0f}",
            ]
        alone = [_alone(nbytes, floors.get(pieces)) for pieces in ("one", as_many)]
        lines.append((what, [WAYS[way], *alone, milliseconds(seconds, 1), *cells]))
    return lines


def _alone(nbytes: int, seconds: float | None) -> str:
    if not seconds:
        return "-"
    rate = nbytes / seconds / 1e9
    return f"{milliseconds(seconds, 1)} ms ({f'{rate:,.0f}' if rate >= 1000 else f'{rate:.3g}'} GB/s)"
