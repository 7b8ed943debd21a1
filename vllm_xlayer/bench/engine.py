"""Decode steps and prefill in vLLM's engine, with each KV cache: an engine of a real model's shape."""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .engines import SHAPES, run_engine, write_model
from .record import RESULTS, write

CACHES = (("bf16", "auto"), ("fp8", "fp8"), ("nvfp4", "nvfp4"))
"""Name, --kv-cache-dtype."""
DECODES = ((64, 8192), (1, 16384))
"""Requests, tokens of each."""
STEPS = 32
"""Decode steps timed, on top of the first token."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--caches", nargs="+", choices=[c[0] for c in CACHES], default=[c[0] for c in CACHES])
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument("--scale", type=int, default=1, help="divides requests and tokens, to try it out")
    parser.add_argument("--json", type=Path, default=RESULTS / "engine.json", help="file to write")


def run(args: argparse.Namespace) -> int:
    """Runs an engine for each cache, prints the table, writes the JSON. Returns a process exit code."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-engine-") as name:
        folder = Path(name)
        model = write_model(folder, args.shape)
        for cache, dtype in CACHES:
            if cache not in args.caches:
                continue
            print(f"{cache}: starting", flush=True)
            decodes = [(max(1, n // args.scale), tokens // args.scale) for n, tokens in DECODES]
            job = dict(
                model=str(model), dtype=dtype, utilization=args.gpu_memory_utilization, decodes=decodes
            )
            result = run_engine(f"{__name__}:measure", job, folder)
            if result is None:
                print(f"{cache}: the engine failed, see above", file=sys.stderr)
                return 1
            results[cache] = result
            # What is measured is kept, whatever happens to the next engine.
            write(args.json, {"shape": args.shape, "steps": STEPS, "caches": results})
    Console(width=100).print(_table(results))
    return 0


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One engine, in its own process."""
    from vllm import LLM, SamplingParams, TokensPrompt

    begin = time.perf_counter()
    llm = LLM(
        job["model"], load_format="dummy", skip_tokenizer_init=True, kv_cache_dtype=job["dtype"],
        max_model_len=2 * max(tokens for _, tokens in job["decodes"]),
        max_num_seqs=max(n for n, _ in job["decodes"]),
        gpu_memory_utilization=job["utilization"],
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    )  # fmt: skip
    report: dict[str, Any] = {"start_seconds": time.perf_counter() - begin, "decodes": []}
    report["runner"] = "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1"
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def seconds(prompts: list[TokensPrompt], tokens: int) -> float:
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    for number, (requests, tokens) in enumerate(job["decodes"]):
        prompts = [
            TokensPrompt(
                prompt_token_ids=[(31 * i + 7 * n + 101 * number) % vocabulary for i in range(tokens)]
            )
            for n in range(requests)
        ]
        prefill = seconds(prompts, 1)
        # The prompts are cached now: what more tokens take is decode steps.
        few = min(seconds(prompts, 1 + STEPS // 4) for _ in range(2))
        many = min(seconds(prompts, 1 + STEPS // 4 + STEPS) for _ in range(2))
        report["decodes"].append(
            {
                "requests": requests,
                "tokens": tokens,
                "prefill_seconds": prefill,
                "step_seconds": (many - few) / STEPS,
            }
        )
    return report


def _table(results: dict[str, Any]) -> Table:
    runners = {r["runner"] for r in results.values()}
    grid = Table(title=f"One engine a KV cache, model runner {' and '.join(sorted(runners))}")
    grid.add_column("")
    for name in results:
        grid.add_column(name, justify="right")
    grid.add_row("start, s", *(f"{r['start_seconds']:.1f}" for r in results.values()))
    for i, first in enumerate(next(iter(results.values()))["decodes"]):
        batch = f"{first['requests']} x {first['tokens']}"
        steps = [r["decodes"][i]["step_seconds"] * 1e3 for r in results.values()]
        prefill = [r["decodes"][i]["prefill_seconds"] for r in results.values()]
        grid.add_row(f"decode step {batch}, ms", *(f"{s:.2f}" for s in steps))
        grid.add_row(f"prefill {batch}, s", *(f"{s:.2f}" for s in prefill))
    return grid
