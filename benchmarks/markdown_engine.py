"""Markdown of the benchmarks that start engines: steps, prefill, load and capacity."""

from typing import Any

from vllm_xlayer.bench import engine, load, prefill, traffic
from vllm_xlayer.bench.bounds import Bound

from .markdown import about, listed, milliseconds, of_other_commits, table

BLOCK = 16
"""Tokens in a block where nobody says otherwise (vLLM's default)."""
SHAPES_SAID = {
    "qwen3-next": "Qwen3-Next's shape: 4 layers of attention, 12 of a gated delta net, 64 experts a layer",
    "gpt-oss-20b": "gpt-oss-20b's shape, experts in MXFP4",
}
"""Headings of `bench engine` for shapes that are not its first."""
ANSWERS_SAID = {
    True: "Each request's answer is one token over and over, the same with every cache, so that steps read "
    "the same experts.",
    False: "Answers are the model's, which has no weights: steps may read more experts with one cache than "
    "with another.",
}
"""Whether requests of `bench engine` said the same with each cache."""


def engine_table(results: dict[str, Any]) -> str:
    """Markdown of `bench engine`."""
    lines = engine.rows(results)
    # Results of before `bench prefill` was a benchmark of its own.
    for i, first in enumerate(next(iter(results["caches"].values()))["decodes"]):
        if "prefill_seconds" in first:
            cells = [f"{c['decodes'][i]['prefill_seconds']:.2f}" for c in results["caches"].values()]
            lines.append((f"prefill {first['requests']} x {first['tokens']:,}, s", cells))
    return _caches(results, lines, engine.bounds(results))


def engine_section(results: dict[str, Any]) -> str:
    """Markdown of `bench engine` for another shape, with its heading."""
    blocks = ", ".join(f"{name} {cache['block_size']:,}" for name, cache in results["caches"].items())
    answers = ANSWERS_SAID[results.get("same_answers", False)]  # False: a file of before
    return f"""\
### {SHAPES_SAID[results["shape"]]}

`vllm-xlayer bench engine --shape {results["shape"]} --starts 1`; tokens a block: {blocks}. {answers}

{engine_table(results)}"""


def prefill_section(results: dict[str, Any]) -> str:
    """Markdown of `bench prefill`, with its heading."""
    table = _caches(results, prefill.rows(results), prefill.bounds(results))
    return f"""\
### Prefill

`vllm-xlayer bench prefill`: engines share the GPU and are timed in turn, a round in this order, the
next in the other; medians. With all of a prompt cached, what is left is the time of everything else.

{table}"""


def load_section(results: dict[str, Any]) -> str:
    """Markdown of `bench load`, with its heading."""
    return f"""\
### More context than fp8 can keep

`vllm-xlayer bench load`: {load.title(results)} offered at once, each answered with
{results["output"]} tokens; then the same requests again. What does not fit waits, and is computed again.
Memory for KV: {results["kv_bytes"] / 1e9:.1f} GB, what NVFP4 needs for all of them.

{_caches(results, load.rows(results), [])}"""


def traffic_section(results: dict[str, Any]) -> str:
    """Markdown of `bench traffic`, with its heading."""
    return f"""\
### At vLLM's default flags

`vllm-xlayer bench traffic`: {traffic.title(results)}; all offered at once, then the same requests again.

{_caches(results, traffic.rows(results), [])}"""


def capacity_table(results: dict[str, Any]) -> str:
    """Markdown of `bench capacity`: what fits, and how fast a prompt comes back."""
    caches = results["caches"]
    columns = list(caches.values())
    lines = [
        ("tokens that fit", [f"{c['tokens']:,}" for c in columns]),
        ("row, bytes", ["-" if c["row_bytes"] is None else f"{c['row_bytes']:,}" for c in columns]),
        *(
            (f"first token {kind}, ms", [milliseconds(c.get(f"ttft_{key}"), 1) for c in columns])
            for kind, key in (
                ("cold", "cold"), ("cached on device", "cached"), ("restored from host", "restored"),
            )
        ),
    ]  # fmt: skip
    ours = columns[-1]
    restored = ours["rows_restored"] * ours["row_bytes"]
    repeats = round(ours["rows_restored"] * BLOCK / results["prompt"])
    return table(["", *caches], lines) + (
        f"\n\n{results['capacity_ratio']:.2f} times the tokens in the same memory. Prompts of "
        f"{results['prompt']:,} tokens; {repeats} of them restored, {ours['rows_restored']:,} rows, "
        f"{restored / 1e9:.2f} GB in all. {about(results, ours['runner'])}"
    )


def _caches(results: dict[str, Any], lines: list[tuple[str, list[str]]], bounds: list[Bound]) -> str:
    """Table with a column for each cache, its bounds, what it was taken on."""
    told = [
        table([results["shape"], *results["caches"]], lines),
        listed(bounds),
    ]
    runner = next(iter(results["caches"].values()))["runner"]
    told += [of_other_commits(results, results["caches"]), about(results, runner)]
    return "\n\n".join(part for part in told if part)
