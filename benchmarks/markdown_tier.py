"""Markdown of the results of transfers and tiers: a function a kind, each from the file's contents."""

import statistics
from typing import Any

from vllm_xlayer.bench import offload_peers
from vllm_xlayer.bench.bounds import SHAPE
from vllm_xlayer.bench.copy import WAYS, table_head, table_line
from vllm_xlayer.bench.copy import bounds as copy_bounds
from vllm_xlayer.bench.copy_peers import NOT_MEASURED
from vllm_xlayer.bench.first_token import added, floor, span_lines
from vllm_xlayer.bench.offload_tables import BESIDE, step_lines
from vllm_xlayer.bench.offload_tables import bounds as offload_bounds
from vllm_xlayer.bench.shapes import has_experts

from .faults import COUNTS, FAULTS
from .markdown import about, listed, milliseconds, of_other_commits, table
from .markdown_engine import SHAPES_SAID
from .pacing import SMALL

COPY_PNG = "h200-copy.png"
"""The picture of `bench copy`, in the folder of the results."""


def copy_section(results: dict[str, Any]) -> str:
    """Markdown of `bench copy`, with its heading."""
    parts = [
        "## Copies",
        "`vllm-xlayer bench copy`: scattered pieces, GB/s of calls one behind the other, with submitting "
        'them, beside vLLM\'s two paths in the same process. "ours" is what the connector chooses. '
        "The last three columns: how many times as fast as the better "
        "of vLLM's; the same of one call until all is copied, which who waits for it sees; and on the "
        f"device alone, as if submitting took no time. Not measured: {', '.join(NOT_MEASURED)}.",
        f"![GB/s against bytes a piece](results/{COPY_PNG})",
    ]
    for way, title in WAYS.items():
        link = results["link"][way]
        lines = [(first, cells) for first, *cells in (table_line(r, link) for r in results["ways"][way])]
        parts.append(f"{title.capitalize()}; one large copy: {link / 1e9:,.1f} GB/s.")
        parts.append(table(table_head(way), lines))
    return "\n\n".join([*parts, listed(copy_bounds(results)), about(results)])


def pacing_section(results: dict[str, Any]) -> str:
    """Markdown of `benchmarks.pacing`, with its heading."""
    moved = results["rows"] * results["row_bytes"]
    head = ["MiB a batch", "submitted in, ms", "GB/s", *(f"{kind}, ms" for kind in SMALL)]
    parts = [
        "## Others' copies beside a transfer",
        f"`python -m benchmarks.pacing`: {results['rows']:,} rows of {results['row_bytes']:,} bytes, as a "
        "restored prompt of 16k tokens has, and how long a small copy of somebody else waits meanwhile "
        "(mean). Bold: what the connector does.",
    ]
    for way, lines in results["ways"].items():
        cells = []
        for line in lines:
            chosen = (line["batch_bytes"], line["how"]) == (results["batch_bytes"][way], "paced")
            label = f"{line['batch_bytes'] >> 20}, {line['how']}"
            waits = (milliseconds(w["mean"], 2) if (w := line["waits"].get(kind)) else "-" for kind in SMALL)
            rate = f"{moved / line['copy_seconds'] / 1e9:.1f}"
            cells.append(
                (f"**{label}**" if chosen else label, [milliseconds(line["submit_seconds"], 1), rate, *waits])
            )
        title = WAYS[way].capitalize()
        parts += [f"{title}; one large copy: {results['link'][way] / 1e9:.1f} GB/s.", table(head, cells)]
    return "\n\n".join([*parts, about(results)])


def offload_section(results: dict[str, Any]) -> str:
    """Markdown of `bench offload`, with its heading."""
    ours = results["engines"]["with"]
    least, restore = floor(ours), ours["restore"]
    turns = len(restore["restored"]) // results["repeats"]
    rows = restore["rows_restored"] // len(restore["restored"])
    kinds = (("computed", "cold"), ("on the device", "cached"), ("in the host tier", "restored"))
    first = [(title, [milliseconds(statistics.median(restore[kind]), 1)]) for title, kind in kinds]
    first += [
        ("host tier - device, prompt by prompt", [milliseconds(added(restore), 1)]),
        ("floor: the link's time", [milliseconds(least, 1)]),
    ]
    spans = [
        (title, ["" if seconds is None else milliseconds(seconds, 1) for seconds in medians])
        for title, *medians in span_lines(restore["spans"])
    ]
    peers = offload_peers.lines(results["engines"])
    beside = [] if len(peers) < 2 else [
        "vLLM's own connector in the same run, ms, median. Its pages lie layer by layer unless "
        "VLLM_KV_CACHE_LAYOUT=BLHNC is set:",
        table(["connector", *offload_peers.HEAD], peers),
    ]  # fmt: skip
    said = ("shape", "prompt", "steps")
    asked = "" if results["shape"] == SHAPE else "".join(f" --{name} {results[name]}" for name in said)
    return "\n\n".join([
        f"### On {SHAPES_SAID[results['shape']]}" if asked else "## The host tier in vLLM's engine",
        f"`vllm-xlayer bench offload{asked}`: {results['shape']} shape, random weights, {results['dtype']}. "
        f"Time to the first token of {results['repeats']} prompts just short of {results['prompt']:,} "
        f"tokens ({rows:,} rows, {rows * ours['row_bytes'] / 1e6:,.0f} MB), restored {turns} times, median:",
        table(["prompt", "ms"], first),
        "What it waits for, median of each:",
        table(["ms", "on the device", "in the host tier"], spans),
        *beside,
        *_decode_steps(results),
        *filter(None, [of_other_commits(results, results["engines"])]),
        about(results, ours["runner"]),
    ])  # fmt: skip


def _decode_steps(results: dict[str, Any]) -> list[str]:
    """Of `bench offload`: decode steps beside copies, and the bounds."""
    decode, without = (results["engines"][name]["decode"] for name in ("with", "without"))
    same_answers = decode.get("same_answers") and without.get("same_answers")
    if has_experts(results["shape"]) and not same_answers:
        alone = without["alone"]["seconds"]
        return [
            "Decode steps beside copies are not shown: what was said chose the experts that a step reads, "
            f"and steps without a connector took from {milliseconds(min(alone), 1)} to "
            f"{milliseconds(max(alone), 1)} ms."
        ]
    rounds = [without["alone"], decode["alone"], *(decode[name] for name in BESIDE)]
    ranges = [f"{min(one['seconds']) * 1e3:.2f} to {max(one['seconds']) * 1e3:.2f}" for one in rounds]
    lines = [
        (title, [
            milliseconds(seconds, 2), least_to_most,
            "" if compared is None else f"{100 * (seconds / compared - 1):+.1f} %",
            f"{copied / 1e9:.1f}" if copied else "",
        ])
        for (title, seconds, compared, copied), least_to_most in zip(
            step_lines(results["engines"]), ranges, strict=True
        )
    ]  # fmt: skip
    stored = f"Decoding stored {decode['rows_stored']:,} rows in all rounds"
    same = ", and every answer is one token over and over, so that steps read the same experts"
    return [
        f"A decode step of {results['requests']} requests with {results['tokens']:,} tokens, median of "
        f"{results['rounds']} rounds of {results['steps']}. The copies are by the connector's "
        "own code, without a pause, between memory that the engine does not use. "
        f"{stored}{same if same_answers else ''}:",
        table(["decode step", "ms", "least to most", "slower by", "copied meanwhile, GB/s"], lines),
        listed(offload_bounds(results)),
    ]


def restoring_in_readme(results: dict[str, Any], hybrid: dict[str, Any]) -> str:
    """What restored prompts cost others, and a first token: one bullet of the README's limits."""
    later, slower = milliseconds(added(results["engines"]["with"]["restore"]), 0), _slower(results)
    return (
        f"- **Restoring prompts slows others' decode steps** while it lasts (by {slower['loads']:.0f} %; of "
        f"Qwen3-Next's shape, by {_slower(hybrid)['loads']:.0f} %), and a restored\n"
        f"  first token comes {later} ms after one from the device's cache."
    )


def restoring_in_limits(results: dict[str, Any], hybrid: dict[str, Any]) -> str:
    """The same for docs/limits.md, with what it was measured with."""
    ours, slower, of_hybrid = results["engines"]["with"], _slower(results), _slower(hybrid)
    alone = statistics.median(ours["decode"]["alone"]["seconds"])
    rounds = [100 * (seconds / alone - 1) for seconds in ours["decode"]["loads"]["seconds"]]
    batch, later = f"{results['requests']} x {results['tokens']:,}", milliseconds(added(ours["restore"]), 0)
    return (
        f"- **Restoring without a pause slows others' decode steps**: of {batch} tokens by "
        f"{slower['loads']:.1f} % (median of {len(rounds)} rounds\n  that scatter from {min(rounds):.0f} to "
        f"{max(rounds):.0f} %; pieces of 64 MiB: {slower['large']:.1f} %), storing by "
        f"{slower['stores']:.1f} % ({results['hardware']}).\n"
        "  Of Qwen3-Next's shape, whose steps are shorter, by "
        f"{of_hybrid['loads']:.0f} % (64 MiB: {of_hybrid['large']:.0f} %), storing by "
        f"{of_hybrid['stores']:.0f} %. Rows of\n  what is decoded are few, and not stored without a pause.\n"
        f"- **A restored first token comes {later} ms later than one from the device's cache** (a prompt "
        f"just short of {results['prompt']:,} tokens).\n"
        f"  Its rows take the link {milliseconds(floor(ours), 0)} ms, for a part of which the host launches "
        "the step that reads them."
    )


def _slower(results: dict[str, Any]) -> dict[str, float]:
    """Kind of copies -> percent that a decode step beside them takes longer."""
    costs = {
        title: 100 * (took / than - 1) for title, took, than, _ in step_lines(results["engines"]) if than
    }
    return {kind: costs[title] for kind, title in BESIDE.items()}


def fault_tables(*runs: dict[str, Any]) -> str:
    """Markdown of `benchmarks.faults`, a table a device."""
    return "\n\n".join(_fault_table(results) for results in runs)


def _fault_table(results: dict[str, Any]) -> str:
    faults = results["faults"]
    lines = [(name, [f"{row[count]:,}" for count in COUNTS]) for name, row in faults.items() if row["tries"]]
    # Of all faults, not of the file's: one that a file does not know was not tried either.
    asked = results.get("asked", FAULTS)
    untried = [name for name in asked if name not in faults or not faults[name]["tries"]]
    failed = sum(row["failed"] for row in faults.values())
    tests = sum(row["tests"] for row in faults.values())
    soak = f"; the soak ran {results['soak_seconds']:.0f} s" if "soak" in asked else ""
    ran = f"{tests} tests, {failed} failed{soak}. {about(results)}"
    left_out = f"\n\nNot tried there: {'; '.join(untried)}." if untried else ""
    return f"{ran}\n\n{table(['fault', *COUNTS], lines)}{left_out}"
