"""Tables and bounds of `offload`, from what its engines measured."""

import statistics
from typing import Any

from rich.table import Table

from .bounds import SHAPE, Bound
from .first_token import added

STORING = "with the connector, storing what it decodes"
LARGE = 64 << 20
"""Bytes of a large piece."""
BESIDE = {
    "stores": "beside rows to the host",
    "loads": "beside rows from the host",
    "large": f"beside {LARGE >> 20} MiB pieces from the host",
}
"""What decoding is timed beside -> its title. Large pieces show what is not due to the rows."""
PROMPT, BATCH = 16384, (64, 8192)
"""Tokens of a restored prompt; requests that decode, and tokens of each."""
RESTORE_MS = 12.5
STEP_COSTS = {SHAPE: {STORING: 2.0, BESIDE["loads"]: 3.0}, "qwen3-next": {STORING: 5.0}}
"""Bounds: milliseconds that a first token may come later; by shape, per cent that a step may take longer."""


def step_lines(results: dict[str, Any]) -> list[tuple[str, float, float | None, float]]:
    """(what, seconds of a step, seconds compared with, bytes copied a second): medians of the rounds."""
    decode = results["with"]["decode"]
    without = statistics.median(results["without"]["decode"]["alone"]["seconds"])
    alone = statistics.median(decode["alone"]["seconds"])
    lines: list[tuple[str, float, float | None, float]] = [
        ("without the connector", without, None, 0.0),
        (STORING, alone, without, 0.0),
    ]
    for name, title in BESIDE.items():
        seconds, copied = (statistics.median(decode[name][k]) for k in ("seconds", "copied_per_second"))
        lines.append((title, seconds, alone, copied))
    return lines


def bounds(results: dict[str, Any]) -> list[Bound]:
    """Of the connector's costs, at full size."""
    if results["dtype"] != "nvfp4" or (results["requests"], results["tokens"]) != BATCH:
        return []
    engines = results["engines"]
    costs = {title: 100 * (s / compared - 1) for title, s, compared, _ in step_lines(engines) if compared}
    found = [
        Bound(f"decode step {what}", costs[what], limit, " %")
        for what, limit in STEP_COSTS.get(results["shape"], {}).items()
    ]
    if (results["shape"], results["prompt"]) == (SHAPE, PROMPT):
        later = added(engines["with"]["restore"]) * 1e3
        found.insert(0, Bound("host tier - device", later, RESTORE_MS, " ms"))
    return found


def decode_table(results: dict[str, Any], batch: str) -> Table:
    grid = Table(title=f"Decode step, {batch} tokens")
    for title in ("", "ms", "slower by", "copied meanwhile, GB/s"):
        grid.add_column(title, justify="right" if title else "left")
    for title, seconds, compared, copied in step_lines(results):
        slower = "" if compared is None else f"{100 * (seconds / compared - 1):+.1f} %"
        grid.add_row(title, f"{seconds * 1e3:.2f}", slower, f"{copied / 1e9:.1f}" if copied else "")
    return grid
