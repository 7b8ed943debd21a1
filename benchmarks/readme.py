"""``python -m benchmarks.readme [--check]``: puts the committed results into README.md and RESULTS.md.

They have a pair of comments for each table; what is between them is written here, and the picture is
drawn anew (needs the extra "bench").
"""

import argparse
import json
import re
import sys
from collections.abc import Callable

from . import (
    RESULTS,
    ROOT,
    markdown,
    markdown_engine,
    markdown_handover,
    markdown_models,
    markdown_steps,
    markdown_tier,
    quality,
    sinks,
    transforms,
    versions,
)
from .plot import copy_plot, decode_plot, quality_plot

DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "benchmarks/RESULTS.md",
    ROOT / "docs/configuration.md",
    ROOT / "docs/accuracy.md",
    ROOT / "docs/reliability.md",
    ROOT / "csrc/kernels/nvfp4_attention/NOTES.md",
    ROOT / "docs/models.md",
    ROOT / "docs/limits.md",
    ROOT / "docs/prefill-decode.md",
)
HANDOVERS = {
    "handover": "h200-handover.json",
    "handover_answers": "h200-handover-answers.json",
    "handover_x2": "h200-x2-handover.json",
    "handover_x2_answers": "h200-x2-handover-answers.json",
    "handover_2to1": "h200-x2-handover-2to1.json",
    "handover_1to2": "h200-x2-handover-1to2.json",
}
"""Marker -> results file of `benchmarks.handover`."""
PROXIED = {
    "handover_proxy": "h200-handover-proxy.json",
    "handover_proxy_cpu": "cpu-handover-proxy.json",
}
"""Marker -> results file of `benchmarks.handover_proxy`."""
PLOT = (RESULTS / "h200-decode.json", RESULTS / "h200-decode.png")
"""Results file, the README's picture of it."""
COPY_PLOT = (RESULTS / "h200-copy.json", RESULTS / markdown_tier.COPY_PNG)
"""The same for RESULTS; drawn once the file is there."""
QUALITY_PLOT = (RESULTS / "h200-quality.json", RESULTS / "h200-quality.png")
"""The same for docs/accuracy.md and the README."""

OFFLOADS = ("h200-offload.json", "h200-offload-qwen3-next.json")
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "demo": (("cpu-demo.json",), markdown.demo_table),
    "gain": (
        tuple(
            f"h200-{what}.json"
            for what in (
                "decode",
                "engine",
                "load",
                "offload",
                "capacity",
                "quality",
                "x2-handover",
                "decode-stock",
            )
        ),
        markdown.gain,
    ),
    "short": (("h200-decode.json",), markdown.short_decode_table),
    "decode": (("h200-decode.json",), markdown.decode_table),
    "newest_costs": (("h200-decode.json",), markdown.newest_costs),
    "decode_stock": (("h200-decode-stock.json",), markdown.stock_peers),
    "decode_peers": (("h200-decode-peers.json",), markdown.turboquant),
    "engine": (("h200-engine.json",), markdown_engine.engine_table),
    "engine_qwen": (("h200-engine-qwen3-next.json",), markdown_engine.engine_section),
    "engine_gpt_oss": (("h200-engine-gpt-oss-20b.json",), markdown_engine.engine_section),
    "steps": (("h200-steps.json",), markdown_steps.section),
    "write": (("h200-write.json",), markdown.write_table),
    "capacity": (("h200-capacity.json",), markdown_engine.capacity_table),
    "quality": (("h200-demo.json",), markdown.demo_table),
    "accuracy": (("h200-quality.json",), quality.table),
    "accuracy_short": (("h200-quality.json",), quality.short_table),
    "sinks": (("h200-quality-sinks.json",), sinks.section),
    "transforms": (("h200-transforms.json", "h200-transforms-essays.json"), transforms.table),
    "prefill": (("h200-prefill.json",), markdown_engine.prefill_section),
    "gather": (("h200-gather.json",), markdown_steps.gather_section),
    "load": (("h200-load.json",), markdown_engine.load_section),
    "traffic": (("h200-traffic.json",), markdown_engine.traffic_section),
    "gpu": (tuple(markdown.SUITES), markdown.gpu_tests),
    "gpu_x2": (("h200-x2-suite.json",), markdown.two_ranks),
    "copy": (("h200-copy.json",), markdown_tier.copy_section),
    "pacing": (("h200-pacing.json",), markdown_tier.pacing_section),
    "offload": (("h200-offload.json",), markdown_tier.offload_section),
    "restoring": (OFFLOADS, markdown_tier.restoring_in_readme),
    "restoring_limits": (OFFLOADS, markdown_tier.restoring_in_limits),
    "offload_qwen": (("h200-offload-qwen3-next.json",), markdown_tier.offload_section),
    "worse": (("vllm-0.26.json", *versions.FILES.values()), versions.section),
    "settings": ((), markdown.settings),
    "resources": (("resources.json",), markdown.resources),
    "models": (("cpu-models.json",), markdown_models.table),
    "models_gpu": (("gpu-models.json",), markdown_models.gpu_table),
    "models_large": (("gpu-models-large.json",), markdown_models.large_table),
    "models_counted": (("gpu-models.json", "cpu-models.json"), markdown_models.counted_in_readme),
    "models_counted_limits": (("gpu-models.json", "cpu-models.json"), markdown_models.counted_in_limits),
    "upstream_nixl": (("cpu-upstream-nixl.json",), markdown_handover.upstream),
    "soak": (("h200-soak.json", "cpu-soak.json"), markdown_models.soak_section),
    "soak_hybrids": (("cpu-soak-hybrids.json",), markdown_models.hybrids_soak_section),
    "soak_hybrids_gpu": (("h200-soak-hybrids.json",), markdown_models.hybrids_soak_table),
    "latents": (("gpu-latents.json",), markdown_models.latents_table),
    "faults": (("cpu-faults.json", "h200-faults.json"), markdown_tier.fault_tables),
    "faults_x2": (("h200-x2-faults.json",), markdown_tier.fault_tables),
    **{name: ((file,), markdown_handover.section) for name, file in HANDOVERS.items()},
    **{name: ((file,), markdown_handover.proxied) for name, file in PROXIED.items()},
}
"""Marker in a document -> (results files, function of their contents that makes the Markdown)."""
SECTIONS = (
    "sinks",
    "transforms",
    "engine_qwen",
    "engine_gpt_oss",
    "steps",
    "prefill",
    "gather",
    "load",
    "traffic",
    "copy",
    "pacing",
    "offload",
    "offload_qwen",
    "models",
    "models_gpu",
    "latents",
    "soak",
    "soak_hybrids",
    "soak_hybrids_gpu",
    "gpu_x2",
    "faults_x2",
    *HANDOVERS,
    *PROXIED,
)
"""Nothing is shown for these, not even a heading, until their results are there."""


def rendered(text: str) -> str:
    """A document's text with every table in it made anew from its results files.

    Raises:
        ValueError: a marker that nobody knows, or one without its end.
    """
    for name in re.findall(r"<!-- (\w+): begin -->", text):
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if name not in TABLES or text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"expected one {begin} and one {end}, name one of {', '.join(TABLES)}")
        files, make = TABLES[name]
        before, _, rest = text.partition(begin)
        after = rest.partition(end)[2]
        paths = [RESULTS / file for file in files]
        made = ""
        if name not in SECTIONS or all(path.exists() for path in paths):
            made = make(*(json.loads(path.read_text()) for path in paths)) + "\n"
        text = f"{before}{begin}\n{made}{end}{after}"
    return text


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    args = parser.parse_args()
    stale = [path for path in DOCUMENTS if rendered(path.read_text()) != path.read_text()]
    if args.check:
        for path in stale:
            print(f"{path.name} differs from the results: run without --check")
        return int(bool(stale))
    for path in stale:
        path.write_text(rendered(path.read_text()))
    decode_plot(*PLOT)
    quality_plot(*QUALITY_PLOT)
    if COPY_PLOT[0].exists():
        copy_plot(*COPY_PLOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
