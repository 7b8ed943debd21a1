"""Pictures of results files, for people who look rather than read. Drawing needs the extra "bench"."""

import hashlib
import json
from pathlib import Path
from typing import Any

from vllm_xlayer.bench.peers import PEERS

from .quality import titled

SOURCE = "Source"
"""Text field of a PNG with the digest of the results file it was drawn from."""


def digest(results: Path) -> str:
    """What a plot writes into its picture of these results."""
    return hashlib.sha256(results.read_bytes()).hexdigest()


def decode_plot(results: Path, png: Path) -> None:
    """Achieved bandwidth against context length, for a batch of 64."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from vllm_xlayer.bench.decode import PLOTTED

    data = json.loads(results.read_text())
    shapes = {s["name"]: s for s in data["shapes"]}
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for name, peer in PEERS.items():
        points = [shapes[p] for p in PLOTTED if p in shapes and name in shapes[p]["seconds"]]
        if not points:
            continue
        context = [p["tokens"] / 64 for p in points]
        axes[0].plot(
            context, [p["tokens"] / p["seconds"][name] / 1e9 for p in points], "o-", label=peer.title
        )
        axes[1].plot(
            context, [p["bytes"][name] / p["seconds"][name] / 1e12 for p in points], "o-", label=peer.title
        )
    axes[1].axhline(data["copy_rate"] / 1e12, color="grey", linestyle="--", label="device copy")
    axes[0].set_ylabel("10⁹ tokens of KV read a second")
    axes[1].set_ylabel("TB/s of KV read")
    for a in axes:
        a.set_xscale("log", base=2)
        a.set_xlabel("context length, 64 requests")
        a.set_ylim(bottom=0)
        a.grid(alpha=0.3)
    _legend_below(figure, axes[1])
    figure.suptitle(f"Decode attention, 32 query heads, 8 KV heads, D=128, page 16 — {data['hardware']}")
    figure.savefig(png, dpi=110, metadata={SOURCE: digest(results)})


def copy_plot(results: Path, png: Path) -> None:
    """Bandwidth against piece size, one panel a direction."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from vllm_xlayer.bench.copy import WAYS
    from vllm_xlayer.bench.copy_peers import TITLES as COPIERS

    data = json.loads(results.read_text())
    figure, axes = pyplot.subplots(2, 2, figsize=(10, 7), constrained_layout=True)
    for a, (way, title) in zip(axes.flat, WAYS.items(), strict=True):
        lines = data["ways"][way]
        for name, label in COPIERS.items():
            points = [(r["piece_bytes"], r["stream"][name] / 1e9) for r in lines if name in r["stream"]]
            style = {"linewidth": 3, "alpha": 0.5} if name == "ours" else {}
            a.plot(*zip(*points, strict=True), "o-", label=label, **style)
        a.axhline(data["link"][way] / 1e9, color="grey", linestyle="--", label="one large copy")
        a.set_title(title)
        a.set_xscale("log", base=2)
        a.set_xlabel("bytes a piece")
        a.set_ylabel("GB/s")
        a.set_ylim(bottom=0)
        a.grid(alpha=0.3)
    _legend_below(figure, axes.flat[0])
    figure.suptitle(f"Scattered pieces — {data['hardware']}")
    figure.savefig(png, dpi=110, metadata={SOURCE: digest(results)})


def _legend_below(figure: Any, axes: Any) -> None:
    """One legend for all panels, of the lines of one of them, where it covers none."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize="small")


def quality_plot(results: Path, png: Path) -> None:
    """What each cache costs a model in decode, in all and by position."""
    from vllm_xlayer.quality.plot import draw

    draw(titled(json.loads(results.read_text())), png, metadata={SOURCE: digest(results)})
