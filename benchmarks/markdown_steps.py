"""Markdown of what a step consists of, and of a prompt's attention where its beginning is cached."""

from typing import Any

from vllm_xlayer.bench import gather

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


def gather_section(results: dict[str, Any]) -> str:
    """Markdown of `bench gather`, with its heading."""
    sweep = ", ".join(f"{mib} MiB {seconds * 1e6:,.0f}" for mib, seconds in results["workspaces"].items())
    return f"""\
### Prompts whose beginning is cached

`vllm-xlayer bench gather`: one layer of 32 query heads, 8 KV heads of 128. FlashAttention-3 reads fp8's and
bf16's pages themselves. NVFP4 pages are dequantised into a workspace for it (the first two columns), or read
by a kernel of this package's where many requests go on by a few tokens (the second table).

{table(gather.HEAD, list(gather.rows(results)))}

Microseconds, in brackets the share of the device's copy rate ({results["copy_rate"] / 1e12:.2f} TB/s); what
the host takes to submit it. Of the first batch, dequantised first, by the size of the workspace: {sweep} us.

{table(gather.HEAD_WAYS, list(gather.rows_of_ways(results)))}

Microseconds of a layer's attention, by what is done with the cached tokens. {about(results)}"""
