"""Shows what `results.compare` found: a sentence, and tables of at most 100 columns."""

from typing import Any

from rich import box
from rich.table import Table

WIDTH = 100
WORST = 5
"""Layers that are shown: those that NVFP4 hurts most."""

Interval = list[float | None]


def verdict(result: dict[str, Any]) -> str:
    """What to make of it, in a sentence a cache."""
    noise = result["caches"][1]["decode"]["perplexity_change"]
    said = []
    for row in result["caches"][2:]:
        mean, low, high = row["decode"]["perplexity_change"]
        if mean is None:
            said.append(f"{row['title']} gives NaN in decode: it does not serve this model")
        elif low is None:
            said.append(f"{row['title']}: one window is too little to tell")
        elif low <= max(0.0, noise[2]):
            said.append(
                f"{row['title']} costs nothing that this text can show ({_percent([mean, low, high])})"
            )
        else:
            said.append(f"{row['title']} costs {100 * mean:.2f} % of perplexity in decode")
    return "; ".join(said) + "."


def table(result: dict[str, Any]) -> Table:
    """A row a cache."""
    grid = _grid(
        f"Against 16-bit KV: {result['windows']} windows, {result['positions']:,} tokens of each "
        f"(positions {result['spans'][0][0]:,} to {result['spans'][-1][1] - 1:,})"
    )
    grid.add_column("KV cache", overflow="fold")
    for title in ("decode\nperplexity", "\nKL, nats", "\nsame first", "prefill\nperplexity", "\nsame answer"):
        grid.add_column(title, justify="right", overflow="fold")
    for row in result["caches"]:
        if "decode" not in row:
            decode, prefill = row["perplexity"]["decode"], row["perplexity"]["prefill"]
            grid.add_row(row["title"], f"{decode:.3f}", "", "", f"{prefill:.3f}", "")
            continue
        decode = row["decode"]
        grid.add_row(
            row["title"],
            _percent(decode["perplexity_change"]),
            _nats(decode["divergence"]),
            f"{100 * decode['same_first'][0]:.1f} %",
            _percent(row["prefill"]["perplexity_change"]) if "prefill" in row else "",
            f"{row['answers'][0]:.0f} of {result['answer']}",
        )
    return grid


def by_position(result: dict[str, Any]) -> Table:
    """Change of perplexity in decode, by position."""
    grid = _grid("Decode: change of perplexity by position")
    grid.add_column("KV cache", overflow="fold")
    for first, end in result["spans"]:
        grid.add_column(f"{first:,}-{end - 1:,}", justify="right", overflow="fold")
    for row in result["caches"][1:]:
        grid.add_row(
            row["title"], *(_percent([mean, None, None]) for mean, *_ in row["decode"]["by_position"])
        )
    return grid


def layers(result: dict[str, Any]) -> Table:
    """K and V of the layers that NVFP4 hurts most."""
    found = [(part, name, which) for name, kv in result["layers"].items() for which, part in kv.items()]
    found.sort(key=lambda item: -item[0]["rmse"])
    grid = _grid(f"K and V: the {min(WORST, len(found))} of {len(found)} with the largest error of NVFP4")
    grid.add_column("layer", overflow="fold")
    for title in ("", "largest", "std", "mean's", "RMSE", "cut off", "coarse", "scale", "RMSE"):
        grid.add_column(title, justify="right")
    for part, name, which in found[:WORST]:
        grid.add_row(
            name.removesuffix(".attn").removesuffix(".self_attn"),
            which,
            f"{part['largest']:.4g}",
            f"{part['std']:.3g}",
            f"{100 * part['mean_share']:.0f} %",
            f"{part['rmse']:.3f}",
            _share(part["saturated"], part["groups"]),
            _share(part["underflowed"], part["groups"]),
            f"2^{part['best_exponent']}",
            f"{part['best_rmse']:.3f}",
        )
    return grid


def footer(result: dict[str, Any]) -> str:
    versions = result["versions"]
    where = f"{result['hardware']}; vLLM {versions['vllm']}, torch {versions['torch']}, {result['date']}"
    return (
        f"{where}, model runner {result['runner']}. In brackets: 95 % over windows. KL: of the 64 most "
        "probable tokens, all others as one. Same first: the most probable token is the same. Same answer: "
        "tokens of a greedy answer before the first that differs. Of K and V: the share of the energy that "
        "is a constant mean of each channel; groups of 16 whose values are cut off, or have a coarse scale; "
        "the global scale that would suit best."
    )


def _grid(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)


def _percent(interval: Interval) -> str:
    mean, low, high = interval
    if mean is None:
        return "NaN"
    if low is None or high is None:
        return f"{100 * mean:+.2f} %"
    return f"{100 * mean:+.2f} % ({100 * low:.2f}..{100 * high:.2f})"


def _nats(interval: Interval) -> str:
    return "NaN" if interval[0] is None else f"{interval[0]:.4f}"


def _share(count: int, groups: int) -> str:
    return "0" if count == 0 else f"{100 * count / groups:.2g} %"
