"""Markdown of what a step consists of."""

from typing import Any

from .markdown import about, milliseconds, table
from .steps import KINDS


def section(results: dict[str, Any]) -> str:
    """Markdown of `benchmarks.steps`, with its heading."""
    caches = results["caches"]
    titles = {
        "first token, cached": f"first token of {results['cached']:,}, all cached",
        "decode step": f"decode step {results['requests']} x {results['tokens']:,}",
    }
    parts = [
        "### What a step consists of",
        "`python -m benchmarks.steps`, ms: what passes without a profiler (of decode steps: between two of "
        "them, in CUDA graphs), and how long the GPU computes meanwhile, by what its kernels are for. Where "
        "both are far apart, the GPU waits for the host, which launches such a step kernel by kernel.",
    ]
    for step, title in titles.items():
        found = [cache[step] for cache in caches.values()]
        lines = [
            ("passes", [milliseconds(one["seconds"], 2) for one in found]),
            ("GPU computes", [milliseconds(one["gpu_seconds"], 2) for one in found]),
        ]
        kinds = [k for k in (*KINDS, "other") if any(k in one["kinds"] for one in found)]
        lines += [(k, [milliseconds(one["kinds"].get(k), 2) for one in found]) for k in kinds]
        lines.append(("kernels and copies", [f"{one['kernels']:,}" for one in found]))
        parts.append(table([title, *caches], lines))
    return "\n\n".join([*parts, about(results)])
