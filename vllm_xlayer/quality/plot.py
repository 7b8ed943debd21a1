"""A picture of `results.compare`: what each cache costs in decode, in all and by position."""

from pathlib import Path
from typing import Any


def draw(result: dict[str, Any], path: Path, **saving: Any) -> None:
    """Writes an image file; the suffix says which kind. ``saving``: for matplotlib's savefig.

    Raises:
        ImportError: there is no matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A cache that gave NaN has no place on either axis; the tables say it.
    rows = [row for row in result["caches"][1:] if row["decode"]["perplexity_change"][0] is not None]
    figure, (whole, along) = pyplot.subplots(
        1, 2, figsize=(12, 3.6), width_ratios=(2, 3), layout="constrained"
    )
    for at, row in enumerate(rows):
        mean, low, high = row["decode"]["perplexity_change"]
        error = None if low is None else [[100 * (mean - low)], [100 * (high - mean)]]
        whole.barh(at, 100 * mean, xerr=error, color=f"C{at}", capsize=3)
        middles = [(first + end) / 2 for first, end in result["spans"]]
        along.plot(
            middles,
            [100 * x[0] for x in row["decode"]["by_position"]],
            "o-",
            color=f"C{at}",
            label=row["title"],
        )
    whole.set_yticks(range(len(rows)), [row["title"] for row in rows])
    whole.invert_yaxis()
    whole.set_xlabel("change of perplexity in decode, %")
    along.set_xlabel("position")
    along.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize="small")
    for axes in (whole, along):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150, **saving)
    pyplot.close(figure)
