"""Evidence of what KV caches cost a model: one call for a machine with a GPU, and its table in Markdown.

    python -m benchmarks.quality run MODEL OUT.json [arguments of vllm-xlayer quality]
    python -m benchmarks.quality table OUT.json

Caches that this vLLM does not have are left out by the command, which says so.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

CACHES = {
    "fp8": "fp8",
    "NVFP4": "nvfp4",
    "NVFP4, pages alone": "nvfp4,VLLM_XLAYER_NEWEST_TOKENS=0",
    **{f"NVFP4, newest {n} exact": f"nvfp4,VLLM_XLAYER_NEWEST_TOKENS={n}" for n in (16, 32, 128)},
    "NVFP4, vLLM's": "nvfp4,VLLM_PLUGINS=",
    "int4, a scale a token and head": "int4_per_token_head",
    "TurboQuant, 4 bits": "turboquant_4bit_nc",
}
"""Title -> what --cache takes. VLLM_PLUGINS= leaves this package out of that engine."""


def run(model: str, out: str, more: list[str]) -> int:
    """Runs the quality command with every cache; its figures go to ``out`` and its picture beside it."""
    from vllm_xlayer.cli import main

    caches = [part for spec in CACHES.values() for part in ("--cache", spec)]
    picture = str(Path(out).with_suffix(".png"))
    return main(["quality", model, *caches, "--json", out, "--plot", picture, *more])


SHORT = ("fp8", "NVFP4", "NVFP4, pages alone")
"""Rows in the README's table."""


def short_table(result: dict[str, Any]) -> str:
    """The rows that README shows."""
    kept = [result["caches"][0], *(row for row in titled(result)["caches"] if row["title"] in SHORT)]
    return table(result | {"caches": kept})


def table(result: dict[str, Any]) -> str:
    """The rows that docs/accuracy.md shows."""
    lines = [
        "| KV | perplexity, decode | in chunked prefill | KL | same first token | greedy tokens alike |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in titled(result)["caches"][1:]:
        decode = row["decode"]
        cells = [
            row["title"],
            _percent(decode["perplexity_change"]),
            _percent(row["prefill"]["perplexity_change"]) if "prefill" in row else "",
            "NaN" if decode["divergence"][0] is None else f"{decode['divergence'][0]:.4f}",
            f"{100 * decode['same_first'][0]:.1f} %",
            _tokens(row["answers"], result["answer"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    versions = result["versions"]
    first, end = result["spans"][0][0], result["spans"][-1][1]
    where = f"{result['hardware']}; vLLM {versions['vllm']}, torch {versions['torch']}"
    lines += [
        "",
        f"Change against 16-bit KV, positions {first:,} to {end - 1:,} of {result['windows']} windows; "
        f"in brackets 95 % over windows.{_greedy(result)} "
        f"{where}, {result['date']}, commit {result['commit']}.",
    ]
    return "\n".join(lines)


def _greedy(result: dict[str, Any]) -> str:
    """What the greedy answers say of NVFP4 and fp8, where both were measured with an interval."""
    intervals = {row["title"]: row["answers"] for row in titled(result)["caches"] if "answers" in row}
    if not all(None not in intervals.get(title, [None]) for title in ("NVFP4", "fp8")):
        return ""
    (_, low, high), (_, others_low, others_high) = intervals["NVFP4"], intervals["fp8"]
    if low <= others_high and others_low <= high:
        return " Greedy tokens do not tell NVFP4 and fp8 apart: their intervals overlap."
    return ""


def titled(result: dict[str, Any]) -> dict[str, Any]:
    """The same with people's names for caches."""
    titles = {spec: title for title, spec in CACHES.items()}
    caches = [row | {"title": titles.get(row["title"], row["title"])} for row in result["caches"]]
    return result | {"caches": caches}


def _tokens(interval: list[float | None], length: int) -> str:
    mean, low, high = interval
    if low is None or high is None:
        return f"{mean:.0f} of {length}"
    return f"{mean:.0f} ({low:.0f} .. {high:.0f}) of {length}"


def _percent(interval: list[float | None]) -> str:
    mean, low, high = interval
    if mean is None:
        return "NaN"
    if low is None or high is None:
        return f"{100 * mean:+.2f} %"
    return f"{100 * mean:+.2f} % ({100 * low:.2f} .. {100 * high:.2f})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    measure = commands.add_parser("run", help="run an engine with each cache")
    measure.add_argument("model", help="name or folder of a model")
    measure.add_argument("out", help="file for the figures, .json; the picture goes beside it")
    shown = commands.add_parser("table", help="print the table of a file")
    shown.add_argument("out", help="a file that run has written")
    args, more = parser.parse_known_args(argv)
    if args.command == "run":
        return run(args.model, args.out, more)
    if more:
        parser.error(f"table: expected a file, got also {' '.join(more)}")
    print(table(json.loads(Path(args.out).read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
