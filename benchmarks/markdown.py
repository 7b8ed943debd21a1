"""Markdown of results files: a function a kind, each from the file's contents."""

import statistics
from collections import Counter
from collections.abc import Mapping
from typing import Any

from vllm_xlayer.bench.bounds import Bound
from vllm_xlayer.bench.peers import PEERS
from vllm_xlayer.bench.write import TITLES as WRITERS
from vllm_xlayer.config import PREFIX, REFUSED, VARIABLES, VLLMS_SETTINGS, ConnectorSettings
from vllm_xlayer.connector.nixl import settings as nixl
from vllm_xlayer.demo import TASKS

from .resources import others_table
from .resources import table as kernel_table

SHORT = 5
"""Shapes in the README's table."""
SUITES = {
    "h100-suite.json": "`pytest -m gpu`",
    "h200-suite.json": "The same on another GPU",
    "h200-suite-sm80.json": (
        "The ops' tests with kernels that use sm_80's instructions only (VLLM_XLAYER_FORCE_SM80)"
    ),
    "h200-memcheck.json": "compute-sanitizer's memcheck, in the ops' tests",
    "h200-racecheck.json": "compute-sanitizer's racecheck, in those of kernels that use shared memory",
    "h200-memcheck-gather.json": "memcheck, in those of the gather, which has changed since",
    "h200-racecheck-gather.json": "racecheck, the same",
    "h200-memcheck-prefix.json": "memcheck, in those of attention to a prompt's pages, which is newer",
    "h200-racecheck-prefix.json": "racecheck, the same",
    "cpu-newest-search.json": (
        "The search for stale newest tokens, ten minutes each for an engine without drafts, with n-grams, "
        "with a drafter, and of a hybrid (NEWEST_TOKENS_SECONDS=600)"
    ),
    "h200-x2-suite-tp.json": (
        "Two ranks on two GPUs, pinning, a config file in which only the connector's name is changed, "
        "`bench offload` (faults are in docs/reliability.md)"
    ),
}
"""Results file of `benchmarks.suite` -> what it says."""
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
            (f"first token {kind}, ms", [milliseconds(c["ttft"].get(kind)) for c in columns])
            for kind in ("cold", "cached on device", "restored")
        ),
    ]  # fmt: skip
    last = columns[-1]
    return f"{table(head, lines)}\n\n{about(last, last['runner'])}"


OURS = "nvfp4_newest"
"""What a user gets, of `bench decode`: with newest tokens."""


def gain(
    decode: dict[str, Any],
    engine: dict[str, Any],
    load: dict[str, Any],
    offload: dict[str, Any],
    capacity: dict[str, Any],
    quality: dict[str, Any],
    handover: dict[str, Any],
    stock: dict[str, Any],
) -> str:
    """The first screen: what a user of a Hopper GPU gains. What is of another vLLM than decode says so."""

    def of(results: dict[str, Any]) -> str:
        """ " (with vLLM 0.26)" where that is not decode's version."""
        version, others = (found["versions"]["vllm"].rsplit(".", 1)[0] for found in (results, decode))
        return "" if version == others else f" (with vLLM {version})"

    shape = decode["shapes"][0]
    us = {name: f"{seconds * 1e6:.0f}" for name, seconds in shape["seconds"].items()}
    times = shape["seconds"]["fa3_fp8"] / shape["seconds"][OURS]
    ours, fp8 = (engine["caches"][cache]["decodes"][0] for cache in ("nvfp4", "fp8"))
    faster = fp8["step_seconds"] / ours["step_seconds"]
    flashinfer = milliseconds(1e3 * stock["shapes"][0]["seconds"]["flashinfer_nvfp4"], 0)
    theirs = ""
    if "stock-nvfp4" in engine["caches"]:
        step = engine["caches"]["stock-nvfp4"]["decodes"][0]["step_seconds"]
        theirs = f", with vLLM's own NVFP4 {milliseconds(step, 1)} ms"
    kept, most = (load["caches"][cache] for cache in ("fp8", "nvfp4"))
    rates = [c["fit"] / c["step_seconds"] for c in (kept, most)]
    first = {kind: milliseconds(statistics.median(offload["engines"]["with"]["restore"][kind]), 0)
             for kind in ("cold", "restored")}  # fmt: skip
    loss = {row["title"]: row["decode"]["perplexity_change"][0] for row in quality["caches"][1:]}
    exact, of_fp8 = (f"{100 * loss[title]:.1f} %" for title in ("nvfp4", "fp8"))
    read = handover["steps"]["times, nvfp4"]["lengths"][0]
    ways = {
        name: milliseconds(statistics.median(way["seconds"]), 0) for name, way in read["ways"].items()
    } | {"computed": milliseconds(read["ways"]["rows"]["prefill_seconds"], 0)}
    return (
        f"- **{capacity['capacity_ratio']:.2f} times the tokens of bf16** in the same memory "
        f"({capacity['shape']} shape, as vLLM counts them; newest tokens in 16 bits take at most 2.5 % "
        f"of the GPU's){of(capacity)}.\n"
        f"- **Decode attention {times:.1f} times as fast as with fp8 KV**: one layer, {shape['name']}: "
        f"{us[OURS]} us; FlashAttention-3 {us['fa3_fp8']} us with fp8, {us['fa3_bf16']} us with "
        f"bf16; FlashInfer's NVFP4, which is vLLM's own, {flashinfer} us in an earlier run.\n"
        f"- **In vLLM's engine {faster:.1f} times the tokens a second**: a decode step of "
        f"{ours['requests']} x {ours['tokens']} takes {milliseconds(ours['step_seconds'], 1)} ms, with fp8 "
        f"{milliseconds(fp8['step_seconds'], 1)} ms{theirs} ({engine['shape']} shape){of(engine)}.\n"
        f"- **{rates[1] / rates[0]:.1f} times where memory is the limit**: {most['fit']} contexts of "
        f"{load['tokens']:,} tokens fit in {load['kv_bytes'] / 1e9:.0f} GB and decode {rates[1]:,.0f} tokens "
        f"a second; with fp8 {kept['fit']} fit and decode {rates[0]:,.0f}{of(load)}.\n"
        f"- **Less loss than fp8**: answers cost {exact} of perplexity, with fp8 KV {of_fp8} (a small real "
        "model; each request's newest 64 tokens are kept in 16 bits, too: "
        f"[Accuracy](docs/accuracy.md)){of(quality)}.\n"
        f"- **Prompts come back instead of being computed**: just short of {offload['prompt']:,} tokens "
        f"in host memory, the first token takes {first['restored']} ms, {first['cold']} ms if they are "
        f"computed{of(offload)}.\n"
        f"- **Prompts come from another GPU**: {read['tokens']:,} tokens that an engine beside it has "
        f"computed, in {ways['computed']} ms, give an engine their first token in {ways['rows']} ms, in "
        f"{ways['pages']} ms by vLLM's own pages{of(handover)}.\n\n"
        f"{decode['hardware']}; how it was measured, and where it is not faster: [Measured](#measured)."
    )


NEWEST_SHAPES = {
    "64 x 8192": "64 x 8,192",
    "64 x 8192, 4 KV heads": "64 x 8,192 with 4 KV heads",
    "64 x 1024": "64 x 1,024",
    "256 x 1024": "256 x 1,024",
    "64 x 8192, D 256": "64 x 8,192 with heads of 256",
    "ragged 96, up to 60k": "a ragged batch of up to 60,000 tokens",
}
"""Shapes of `bench decode` whose cost of newest tokens docs/accuracy.md tells -> what it calls them."""


def newest_costs(results: dict[str, Any]) -> str:
    """What newest tokens cost decode attention: a bullet of docs/accuracy.md."""
    seconds = {shape["name"]: shape["seconds"] for shape in results["shapes"]}
    costs = [
        f"{100 * (seconds[name][OURS] / seconds[name]['nvfp4'] - 1):.0f} % ({said})"
        for name, said in NEWEST_SHAPES.items()
    ]
    return (
        f"- **Time**: decode attention takes longer by {', '.join(costs[:3])},\n  {', '.join(costs[3:])}\n"
        f"  (`bench decode`, {results['hardware']})."
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
        cells += [f"{moved['nvfp4'] / rate * 1e6:.0f}", f"{fp8 / seconds[OURS]:.2f}x" if fp8 else "-"]
        lines.append((shape["name"], cells))
    return table(
        ["requests x tokens", *(PEERS[name].title for name in shown), "floor", f"fp8 / {PEERS[OURS].title}"],
        lines,
    ) + (
        "\n\nMicroseconds of one layer, in brackets the share of the device's copy rate "
        f"({rate / 1e12:.2f} TB/s, read plus written; reading alone is faster). {about(results)}"
    )


def turboquant(results: dict[str, Any]) -> str:
    """Markdown of the peer that was measured beside an early kernel only."""
    return _beside(results, "turboquant")


def stock_peers(results: dict[str, Any]) -> str:
    """Markdown of vLLM's own 4-bit caches, beside an earlier kernel."""
    return _beside(results, "int4", "flashinfer_nvfp4")


def _beside(results: dict[str, Any], *peers: str) -> str:
    shown = ("nvfp4", OURS, "fa3_fp8", *peers)
    shapes = [
        shape | {"seconds": {name: t for name, t in shape["seconds"].items() if name in shown}}
        for shape in results["shapes"]
    ]
    return decode_table(results | {"shapes": shapes}, SHORT)


def write_table(results: dict[str, Any]) -> str:
    """Markdown of `bench write`."""
    lines = [
        (f"{r['tokens']:,}", [f"{r['seconds'][name] * 1e6:.1f}" for name in WRITERS])
        for r in results["writes"]
    ]
    head = ["tokens", *WRITERS.values()]
    return f"{table(head, lines)}\n\nMicroseconds, K and V of one layer. {about(results)}"


def gpu_tests(*runs: dict[str, Any]) -> str:
    """Markdown of what `benchmarks.suite` saw, a line for each of SUITES."""
    return "\n".join(
        f"- {title}: {_told(run)}. {about(run)}" for title, run in zip(SUITES.values(), runs, strict=True)
    )


def two_ranks(run: dict[str, Any]) -> str:
    """The same of what `benchmarks.two_gpus` ran."""
    return (
        "- Two ranks on two GPUs, with vLLM 0.33: early loads under full graphs, latents that are equal on "
        "both, hand-over between one and two ranks (faults are in docs/reliability.md): "
        f"{_told(run)}. {about(run)}"
    )


def _told(suite: dict[str, Any]) -> str:
    counts: Counter[str] = Counter()
    for outcomes in suite["files"].values():
        counts.update(outcomes)
    return ", ".join(f"{counts[kind]} {word}" for kind, word in OUTCOMES if counts[kind] or kind == "passed")


def table(head: list[str], lines: list[tuple[str, list[str]]]) -> str:
    rows = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join(rows + ["| " + " | ".join([name, *cells]) + " |" for name, cells in lines])


def resources(results: dict[str, Any]) -> str:
    """Markdown of `benchmarks.resources`: a line an instantiation of the decode kernel, and of the others."""
    return "\n\n".join([
        table(*kernel_table(results["kernels"])),
        "The other kernels: registers of the instantiation with the most (+ bytes spilled), and warps that "
        "an SM has registers for.",
        table(*others_table(results["others"])),
        f"nvcc {results['nvcc']}, {results['date']}, commit {results['commit']}.",
    ])  # fmt: skip


def settings() -> str:
    """Markdown of every setting: each connector's, what of vLLM's it takes, and the environment's."""
    ours = [(f"`{name}`", [str(field.description)]) for name, field in ConnectorSettings.model_fields.items()]
    theirs = [(f"`{name}`", [text]) for name, text in VLLMS_SETTINGS.items() if text]
    nothing = [f"`{name}`" for name, text in VLLMS_SETTINGS.items() if not text and name not in REFUSED]
    hand_over = [
        (f"`{name}`", [str(field.description)]) for name, field in nixl.NixlSettings.model_fields.items()
    ]
    variables = [(f"`{PREFIX}{name.upper()}`", list(about)) for name, about in VARIABLES.items()]
    return "\n\n".join(
        [
            "Of this package:",
            _text_table(["key", "what"], ours),
            "Of vLLM's OffloadingConnector, and the same here:",
            _text_table(["key", "what"], theirs),
            f"Taken, and without an effect (the log says so): {', '.join(nothing)}.",
            "Refused: " + "; ".join(f"`{name}` ({why})" for name, why in REFUSED.items()) + ".",
            "## Hand-over",
            "XLayerNixlConnector ([prefill and decode on different engines](prefill-decode.md)) takes these:",
            _text_table(["key", "what"], hand_over),
            f"Of vLLM's NixlConnector, and the same here: {', '.join(f'`{name}`' for name in nixl.VLLMS)}.",
            "Refused: " + "; ".join(f"`{name}` ({why})" for name, why in nixl.REFUSED.items()) + ".",
            "XLayerTieredNixlConnector ([with tiers](prefill-decode.md#with-tiers)) takes these, and those "
            "of XLayerConnector.",
            "## Environment",
            _text_table(["variable", "default", "meaning"], variables),
        ]
    )


def _text_table(head: list[str], lines: list[tuple[str, list[str]]]) -> str:
    """A table whose columns are aligned to the left."""
    return table(head, lines).replace("---:|", "---|")


def listed(bounds: list[Bound]) -> str:
    return "\n".join(f"- {bound}" for bound in bounds)


def of_other_commits(results: dict[str, Any], rows: Mapping[str, dict[str, Any]]) -> str:
    """Which rows of a file are not of its last run; empty if all are."""
    others = [
        f"{name}: {row['date']}, commit {row['commit']}"
        for name, row in rows.items()
        if row.get("commit", results["commit"]) != results["commit"]
    ]
    return f"Of another commit: {'; '.join(others)}." if others else ""


def about(results: dict[str, Any], runner: str | None = None) -> str:
    """What the numbers were taken on, and when."""
    versions = results["versions"]
    said = f"{results['hardware']}; vLLM {versions['vllm']}, torch {versions['torch']}, "
    said += "" if runner is None else f"model runner {runner}, "
    return f"{said}{results['date']}, commit {results['commit']}."


def _percent(score: dict[str, float]) -> str:
    return f"{100 * score['exact_match']:.1f} ± {100 * score['stderr']:.1f} %"


def milliseconds(seconds: float | None, digits: int = 0) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.{digits}f}"
