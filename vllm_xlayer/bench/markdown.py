"""Markdown of results files: a function a kind, each from the file's contents."""

import statistics
from collections import Counter
from typing import Any

from ..eval import TASKS
from . import engine, load, prefill
from .bounds import Bound
from .copy import WAYS, ratios
from .copy_peers import NOT_MEASURED
from .copy_peers import TITLES as COPIERS
from .faults import COUNTS
from .offload import added, floor, step_lines
from .peers import PEERS
from .write import TITLES as WRITERS

COPY_PNG = "h200-copy.png"
"""The picture of `bench copy`, in the folder of the results."""
SHORT = 5
"""Shapes in the README's table."""
BLOCK = 16
"""Tokens in a block where nobody says otherwise (vLLM's default)."""
OUTCOMES = (("passed", "passed"), ("failure", "failed"), ("error", "errors"), ("skipped", "skipped"))


def demo_table(results: dict[str, Any]) -> str:
    """Markdown of the demo's table and what it was taken on."""
    titles = {
        "stock": "stock, bf16", "fp8": "stock, fp8", "rows": "rows, bf16",
        "nvfp4": "rows, NVFP4, prompts restored",
    }  # fmt: skip
    shown = [name for name in titles if name in results]  # fp8 is missing where there is no GPU
    columns = [results[name] for name in shown]
    head = ["", *(titles[name] for name in shown)]
    lines = [
        ("bytes a token", [f"{c['bytes_per_token']:,}" for c in columns]),
        ("tokens in 256 MiB", [f"{c['tokens_per_256_mib']:,}" for c in columns]),
        ("copies to move a block", [f"{c['copies']} x {c['copy_bytes']:,} B" for c in columns]),
        *(
            (f"exact match, {task}", [_percent(c["scores"][task]) for c in columns])
            for task in TASKS
        ),
        ("answers identical to stock", ["{} of {}".format(*c["identical"]) for c in columns]),
        *(
            (f"first token {kind}, ms", [_ms(c["ttft"].get(kind)) for c in columns])
            for kind in ("cold", "cached on device", "restored")
        ),
    ]  # fmt: skip
    about = columns[-1]
    return f"{_table(head, lines)}\n\n{_about(about, about['runner'])}"


def gain(
    decode: dict[str, Any], engine: dict[str, Any], offload: dict[str, Any], capacity: dict[str, Any]
) -> str:
    """The first screen: what a user of a Hopper GPU gains."""
    shape = decode["shapes"][0]
    us = {name: f"{seconds * 1e6:.0f}" for name, seconds in shape["seconds"].items()}
    times = shape["seconds"]["fa3_fp8"] / shape["seconds"]["nvfp4"]
    ours, fp8 = (engine["caches"][cache]["decodes"][0] for cache in ("nvfp4", "fp8"))
    faster = fp8["step_seconds"] / ours["step_seconds"]
    first = {kind: _ms(statistics.median(offload["engines"]["with"]["restore"][kind]), 0)
             for kind in ("cold", "restored")}  # fmt: skip
    return (
        f"- **{capacity['capacity_ratio']:.2f} times the tokens of bf16** in the same memory "
        f"({capacity['shape']} shape, as vLLM counts them).\n"
        f"- **Decode attention {times:.1f} times as fast as with fp8 KV**: one layer, {shape['name']}: "
        f"{us['nvfp4']} us; FlashAttention-3 {us['fa3_fp8']} us with fp8, {us['fa3_bf16']} us with bf16.\n"
        f"- **In vLLM's engine {faster:.1f} times the tokens a second**: a decode step of "
        f"{ours['requests']} x {ours['tokens']} takes {_ms(ours['step_seconds'], 1)} ms, with fp8 "
        f"{_ms(fp8['step_seconds'], 1)} ms ({engine['shape']} shape).\n"
        f"- **Prompts come back instead of being computed**: just short of {offload['prompt']:,} tokens "
        f"in host memory, the first token takes {first['restored']} ms, {first['cold']} ms if they are "
        "computed.\n\n"
        f"{decode['hardware']}; how it was measured, and where it is not faster: [Measured](#measured)."
    )


def short_decode_table(results: dict[str, Any]) -> str:
    """Markdown of the first shapes of `bench decode`."""
    return decode_table(results, SHORT)


def decode_table(results: dict[str, Any], shapes: int | None = None) -> str:
    """Markdown of `bench decode`: all shapes, or the first so many."""
    rate, lines = results["copy_rate"], []
    shown = [name for name in PEERS if any(name in shape["seconds"] for shape in results["shapes"])]
    for shape in results["shapes"][:shapes]:
        seconds, moved = shape["seconds"], shape["bytes"]
        cells = [
            f"{t * 1e6:.0f} ({moved[name] / t / rate:.2f})" if (t := seconds.get(name)) else "-"
            for name in shown
        ]
        fp8 = seconds.get("fa3_fp8")
        cells += [f"{moved['nvfp4'] / rate * 1e6:.0f}", f"{fp8 / seconds['nvfp4']:.2f}x" if fp8 else "-"]
        lines.append((shape["name"], cells))
    return _table(
        ["requests x tokens", *(PEERS[name].title for name in shown), "floor", "fp8 / ours"], lines
    ) + (
        "\n\nMicroseconds of one layer, in brackets the share of the device's copy rate "
        f"({rate / 1e12:.2f} TB/s, read plus written; reading alone is faster). {_about(results)}"
    )


def engine_table(results: dict[str, Any]) -> str:
    """Markdown of `bench engine`."""
    lines = engine.rows(results)
    # Results of before `bench prefill` was a benchmark of its own.
    for i, first in enumerate(next(iter(results["caches"].values()))["decodes"]):
        if "prefill_seconds" in first:
            cells = [f"{c['decodes'][i]['prefill_seconds']:.2f}" for c in results["caches"].values()]
            lines.append((f"prefill {first['requests']} x {first['tokens']:,}, s", cells))
    return _caches(results, lines, engine.bounds(results))


def prefill_section(results: dict[str, Any]) -> str:
    """Markdown of `bench prefill`, with its heading."""
    table = _caches(results, prefill.rows(results), prefill.bounds(results))
    return f"""\
### Prefill

`python -m vllm_xlayer.bench prefill`: engines share the GPU and are timed in turn, a round in this order, the
next in the other; medians. With all of a prompt cached, what is left is the time of everything else.

{table}"""


def load_section(results: dict[str, Any]) -> str:
    """Markdown of `bench load`, with its heading."""
    layers = f"{results['layers']} of {results['of_layers']} layers"
    return f"""\
### More context than fp8 can keep

`python -m vllm_xlayer.bench load`: {load.title(results)} offered at once, each answered with
{results["output"]} tokens; then the same requests again. What does not fit waits, and is computed again.

The model is cut to {layers} and the memory for KV to {results["kv_bytes"] / 1e9:.1f} GB, what NVFP4
needs for these requests, so that filling it takes seconds. What a step does once (sampling, the last matrix,
scheduling) weighs more than with all layers.

{_caches(results, load.rows(results), [])}"""


def write_table(results: dict[str, Any]) -> str:
    """Markdown of `bench write`."""
    lines = [
        (f"{r['tokens']:,}", [f"{r['seconds'][name] * 1e6:.1f}" for name in WRITERS])
        for r in results["writes"]
    ]
    table = _table(["tokens", *WRITERS.values()], lines)
    return f"{table}\n\nMicroseconds, K and V of one layer. {_about(results)}"


def capacity_table(results: dict[str, Any]) -> str:
    """Markdown of `bench capacity`: what fits, and how fast a prompt comes back."""
    caches = results["caches"]
    columns = list(caches.values())
    lines = [
        ("tokens that fit", [f"{c['tokens']:,}" for c in columns]),
        ("row, bytes", ["-" if c["row_bytes"] is None else f"{c['row_bytes']:,}" for c in columns]),
        *(
            (f"first token {kind}, ms", [_ms(c.get(f"ttft_{key}"), 1) for c in columns])
            for kind, key in (
                ("cold", "cold"), ("cached on device", "cached"), ("restored from host", "restored"),
            )
        ),
    ]  # fmt: skip
    ours = columns[-1]
    restored = ours["rows_restored"] * ours["row_bytes"]
    repeats = round(ours["rows_restored"] * BLOCK / results["prompt"])
    return _table(["", *caches], lines) + (
        f"\n\n{results['capacity_ratio']:.2f} times the tokens in the same memory. Prompts of "
        f"{results['prompt']:,} tokens; {repeats} of them restored, {ours['rows_restored']:,} rows, "
        f"{restored / 1e9:.2f} GB in all. {_about(results, ours['runner'])}"
    )


def copy_section(results: dict[str, Any]) -> str:
    """Markdown of `bench copy`, with its heading."""
    parts = [
        "## Copies",
        "`vllm-xlayer bench copy`: scattered pieces, GB/s on the device (submitting them is not in it), "
        'beside vLLM\'s two paths in the same process. "ours" is what the measurement at start chose, which '
        f"took {results['choice_seconds']:.2f} s. Not measured: {', '.join(NOT_MEASURED)}.",
        f"![GB/s against bytes a piece](results/{COPY_PNG})",
    ]
    for way, title in WAYS.items():
        link = results["link"][way]
        reference = "device copy" if way == "D2D" else "link"
        lines = []
        for r in results["ways"][way]:
            cells = [f"{r['rates'][name] / 1e9:,.1f}" if name in r["rates"] else "-" for name in COPIERS]
            lines.append((f"{r['piece_bytes']:,}", [*cells, *ratios(r["rates"], link)]))
        head = ["bytes a piece", *COPIERS.values(), f"ours / {reference}", "ours / better of vLLM's"]
        parts += [f"{title.capitalize()}; one large copy: {link / 1e9:,.1f} GB/s.", _table(head, lines)]
    return "\n\n".join([*parts, _about(results)])


def offload_section(results: dict[str, Any]) -> str:
    """Markdown of `bench offload`, with its heading."""
    ours = results["engines"]["with"]
    least, restore = floor(ours), ours["restore"]
    kinds = (("computed", "cold"), ("on the device", "cached"), ("in the host tier", "restored"))
    first = [(title, [_ms(statistics.median(restore[kind]), 1)]) for title, kind in kinds]
    first += [("host tier - device", [_ms(added(restore), 1)]), ("floor: the link's time", [_ms(least, 1)])]
    steps = [
        (title, [
            _ms(seconds, 2), "" if compared is None else f"{100 * (seconds / compared - 1):+.1f} %",
            f"{copied / 1e9:.1f}" if copied else "",
        ])
        for title, seconds, compared, copied in step_lines(results["engines"])
    ]  # fmt: skip
    return "\n\n".join([
        "## The host tier in vLLM's engine",
        f"`vllm-xlayer bench offload`: {results['shape']} shape, random weights, {results['dtype']}. Time "
        f"to the first token of {results['repeats']} prompts just short of {results['prompt']:,} tokens, "
        "median:",
        _table(["prompt", "ms"], first),
        f"A decode step of {results['requests']} requests with {results['tokens']:,} tokens, median of "
        f"{results['rounds']} rounds of {results['steps']}. The copies are of rows, by the connector's own "
        "code, without a pause, between memory that the engine does not use. Decoding stored "
        f"{ours['decode']['rows_stored']:,} rows in all rounds:",
        _table(["decode step", "ms", "slower by", "copied meanwhile, GB/s"], steps),
        _about(results, ours["runner"]),
    ])  # fmt: skip


def gpu_tests(suite: dict[str, Any], sm80: dict[str, Any]) -> str:
    """Markdown of the GPU tests' outcome, and of the ops' tests with kernels of sm_80's instructions."""
    return (
        f"- `pytest -m {suite['mark']}`: {_told(suite)}. {_about(suite)}\n"
        f"- The ops' tests with kernels that use sm_80's instructions only (VLLM_XLAYER_FORCE_SM80): "
        f"{_told(sm80)}. {_about(sm80)}"
    )


def _told(suite: dict[str, Any]) -> str:
    counts: Counter[str] = Counter()
    for outcomes in suite["files"].values():
        counts.update(outcomes)
    return ", ".join(f"{counts[kind]} {word}" for kind, word in OUTCOMES if counts[kind] or kind == "passed")


def fault_tables(*runs: dict[str, Any] | None) -> str:
    """Markdown of `bench faults`, a table a device; what was not run is left out."""
    return "\n\n".join(_fault_table(results) for results in runs if results is not None)


def _fault_table(results: dict[str, Any]) -> str:
    lines = [
        (name, [f"{row[count]:,}" if row["tries"] else "-" for count in COUNTS])
        for name, row in results["faults"].items()
    ]
    failed = sum(row["failed"] for row in results["faults"].values())
    tests = sum(row["tests"] for row in results["faults"].values())
    return _table(["fault", *COUNTS], lines) + (
        f"\n\n{tests} tests, {failed} failed; the soak ran {results['soak_seconds']:.0f} s. {_about(results)}"
    )


def _table(head: list[str], lines: list[tuple[str, list[str]]]) -> str:
    rows = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(rows + ["| " + " | ".join([name, *cells]) + " |" for name, cells in lines])


def _caches(results: dict[str, Any], lines: list[tuple[str, list[str]]], bounds: list[Bound]) -> str:
    """Table with a column for each cache, its bounds, what it was taken on."""
    told = [
        _table([results["shape"], *results["caches"]], lines),
        "\n".join(f"- {bound}" for bound in bounds),
    ]
    runner = next(iter(results["caches"].values()))["runner"]
    return "\n\n".join(part for part in (*told, _about(results, runner)) if part)


def _about(results: dict[str, Any], runner: str | None = None) -> str:
    """What the numbers were taken on, and when."""
    versions = results["versions"]
    said = f"{results['hardware']}; vLLM {versions['vllm']}, torch {versions['torch']}, "
    said += "" if runner is None else f"model runner {runner}, "
    return f"{said}{results['date']}, commit {results['commit']}."


def _percent(score: dict[str, float]) -> str:
    return f"{100 * score['exact_match']:.1f} ± {100 * score['stderr']:.1f} %"


def _ms(seconds: float | None, digits: int = 0) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.{digits}f}"
