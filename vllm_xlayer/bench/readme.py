"""``python -m vllm_xlayer.bench.readme [--check]``: puts the committed results into README.md.

The README has a pair of comments for each table; what is between them is written here.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..eval import TASKS
from .record import RESULTS

README = Path(__file__).parents[2] / "README.md"


def demo_table(results: dict[str, Any]) -> str:
    """Markdown of the demo's table and what it was taken on."""
    columns = [results[name] for name in ("stock", "rows", "nvfp4")]
    head = ["", "stock, bf16", "rows, bf16", "rows, NVFP4, prompts restored"]
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
    table = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * len(columns)]
    table += ["| " + " | ".join([name, *cells]) + " |" for name, cells in lines]
    about = columns[-1]
    return "\n".join(table) + (
        f"\n\n{about['hardware']}; vLLM {about['versions']['vllm']}, torch {about['versions']['torch']}, "
        f"model runner {about['runner']}, {about['date']}, commit {about['commit']}."
    )


TABLES = {"demo": (RESULTS / "cpu-demo.json", demo_table)}
"""Marker in the README -> (results file, function that makes the Markdown)."""


def rendered(text: str) -> str:
    """README text with every table made anew from its results file.

    Raises:
        ValueError: a pair of markers is missing.
    """
    for name, (path, make) in TABLES.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README.md: expected one {begin} and one {end}")
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        text = f"{before}{begin}\n{make(json.loads(path.read_text()))}\n{end}{after}"
    return text


def _percent(score: dict[str, float]) -> str:
    return f"{100 * score['exact_match']:.1f} ± {100 * score['stderr']:.1f} %"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.0f}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m vllm_xlayer.bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    args = parser.parse_args()
    text = README.read_text()
    new = rendered(text)
    if args.check:
        print("up to date" if new == text else "README.md differs from the results: run without --check")
        return int(new != text)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
