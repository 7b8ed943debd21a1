"""How many tokens fit, and how fast a long prompt comes back from host memory: an engine of real shape.

Weights are random: the sizes and times of a KV cache do not depend on them. Each KV cache is served
by an engine in a process of its own, with the same memory.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..provenance import write
from .arguments import shape_argument
from .engines import run_engine
from .shapes import write_model

CACHES = (("bf16", "auto", False), ("nvfp4 + XLayerConnector", "nvfp4", True))
"""Name, --kv-cache-dtype, with the connector."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shape_argument(parser)
    parser.add_argument("--prompt", type=int, default=16384, help="tokens of the restored prompt")
    parser.add_argument(
        "--repeats", type=int, default=5, help="prompts, each restored once (default: %(default)s)"
    )
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.85, help="as for vllm serve (default: %(default)s)"
    )
    parser.add_argument("--host-bytes", type=int, default=8 << 30, help="host tier")
    parser.add_argument(
        "--json", type=Path, default=Path("capacity.json"), help="file to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs both engines, prints the table, writes the JSON. Returns a process exit code."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-capacity-") as name:
        folder = Path(name)
        model = write_model(folder, args.shape)
        for cache, dtype, rows in CACHES:
            job = dict(
                model=str(model), dtype=dtype, rows=rows, prompt=args.prompt, repeats=args.repeats,
                utilization=args.gpu_memory_utilization, host_bytes=args.host_bytes,
            )  # fmt: skip
            print(f"{cache}: starting", flush=True)
            result = run_engine(f"{__name__}:engine", job, folder, core_here=True)
            if result is None:
                print(f"{cache}: the engine failed, see above", file=sys.stderr)
                return 1
            results[cache] = result
    ratio = results[CACHES[1][0]]["tokens"] / results[CACHES[0][0]]["tokens"]
    Console(width=100).print(_table(results))
    print(f"token capacity in the same memory: {ratio:.2f}x of bf16")
    write(args.json, {"shape": args.shape, "prompt": args.prompt, "capacity_ratio": ratio, "caches": results})
    return 0


def engine(job: dict[str, Any]) -> dict[str, Any]:
    """One engine, in its own process."""
    from vllm import LLM, SamplingParams

    from ..compat.engine import cache_geometry, come_to_rest, empty_device_cache, rows_loaded

    settings: dict[str, Any] = {}
    if job["rows"]:
        settings["kv_transfer_config"] = {
            "kv_connector": "XLayerConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": job["host_bytes"]},
        }  # fmt: skip
    started = time.perf_counter()
    llm: Any = LLM(
        job["model"], load_format="dummy", skip_tokenizer_init=True, kv_cache_dtype=job["dtype"],
        max_model_len=2 * job["prompt"], gpu_memory_utilization=job["utilization"],
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}, **settings,
    )  # fmt: skip
    start_seconds = time.perf_counter() - started
    come_to_rest(llm)  # the host tier is pinned
    cache = cache_geometry(llm)
    one = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    prompts = [[(31 * i + 7 * n) % vocabulary for i in range(job["prompt"])] for n in range(job["repeats"])]

    def first_token() -> float:
        times = []
        for prompt in prompts:
            begin = time.perf_counter()
            llm.generate([{"prompt_token_ids": prompt}], one, use_tqdm=False)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    report: dict[str, Any] = {
        "runner": "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1",
        "start_seconds": start_seconds,
        "tokens": cache.tokens,
        "row_bytes": cache.layers * cache.page_bytes if cache.in_rows else None,
        "page_bytes": cache.page_bytes,
        "ttft_cold": first_token(),
    }
    come_to_rest(llm)  # what was computed is stored
    report["ttft_cached"] = first_token()
    if job["rows"]:
        come_to_rest(llm)
        before = rows_loaded()
        empty_device_cache(llm)
        report["ttft_restored"] = first_token()
        report["rows_restored"] = rows_loaded() - before
    return report


def _table(results: dict[str, dict[str, Any]]) -> Table:
    grid = Table()
    grid.add_column("")
    for name in results:
        grid.add_column(name, justify="right")
    rows = {
        "model runner": lambda r: r["runner"],
        "engine start, s": lambda r: f"{r['start_seconds']:.1f}",
        "tokens that fit": lambda r: f"{r['tokens']:,}",
        "row, bytes": lambda r: "-" if r["row_bytes"] is None else f"{r['row_bytes']:,}",
        "first token cold, ms": lambda r: f"{r['ttft_cold'] * 1e3:.1f}",
        "first token cached, ms": lambda r: f"{r['ttft_cached'] * 1e3:.1f}",
        "first token restored, ms": lambda r: (
            f"{r['ttft_restored'] * 1e3:.1f}" if "ttft_restored" in r else "-"
        ),
    }
    for label, text in rows.items():
        grid.add_row(label, *(text(r) for r in results.values()))
    return grid
