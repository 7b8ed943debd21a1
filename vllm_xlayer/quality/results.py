"""From the files that the engines wrote to the numbers that are shown: plain data, as `--json` writes it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..kv_scales import Scales
from . import measures
from .measures import Estimate, Run

REFERENCE = "16 bits"
AGAIN = "16 bits, other batches"
"""Rows of the table; the second one is the noise."""


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(runs and answers by name, facts) of an engine's file."""
    with np.load(path) as file:
        facts = json.loads(str(file["facts"]))
        arrays = {name: file[name] for name in file.files if name != "facts"}
    found: dict[str, Any] = {name: arrays[name] for name in arrays if name.endswith("answers")}
    for name in ("decode", "prefill", "again"):
        if f"{name}.text" in arrays:
            text, ids, top = (arrays[f"{name}.{part}"] for part in ("text", "top_ids", "top"))
            found[name] = Run(text.astype(np.float64), ids.astype(np.int64), top.astype(np.float64))
    return found, facts


def compare(reference: Path, others: dict[str, Path], first: int, length: int) -> dict[str, Any]:
    """All numbers: of the 16-bit cache, of itself again, and of each other cache by title."""
    base, facts = read(reference)
    spans = measures.spans(first, length)
    rows = [
        {
            "title": REFERENCE,
            "perplexity": _plain({n: measures.perplexity(base[n]) for n in ("decode", "prefill")}),
        },
        {
            "title": AGAIN,
            "decode": _distances(base["again"], base["decode"], spans, first),
            "answers": _plain(measures.same_answer(base["again.answers"], base["answers"])),
        },
    ]
    for title, path in others.items():
        found, _ = read(path)
        rows.append(
            {
                "title": title,
                "decode": _distances(found["decode"], base["decode"], spans, first),
                "prefill": _distances(found["prefill"], base["prefill"], spans, first),
                "answers": _plain(measures.same_answer(found["answers"], base["answers"])),
            }
        )
    windows, positions = base["decode"].text.shape
    layers = facts.pop("layers")
    return {
        **facts,
        "windows": windows,
        "positions": positions,
        "answer": base["answers"].shape[1],
        "spans": spans,
        "caches": rows,
        "layers": layers,
    }


def calibrated(result: dict[str, Any]) -> dict[str, Scales]:
    """The global scales that suit each layer best."""
    return {
        name: Scales(*(2.0 ** kv[which]["best_exponent"] for which in "KV"))
        for name, kv in result["layers"].items()
    }


def _distances(run: Run, reference: Run, spans: list[tuple[int, int]], first: int) -> dict[str, Any]:
    change = measures.perplexity_change
    return {
        "perplexity_change": _plain(change(run, reference)),
        "by_position": [_plain(change(run, reference, slice(a - first, b - first))) for a, b in spans],
        "divergence": _plain(measures.divergence(run, reference)),
        "same_first": _plain(measures.same_first(run, reference)),
    }


def _plain(value: Any) -> Any:
    """For JSON: an estimate as [mean, low, high], and what is not a number as null."""
    if isinstance(value, dict):
        return {name: _plain(x) for name, x in value.items()}
    if isinstance(value, Estimate):
        return [_plain(x) for x in value]
    return None if value != value else value
