"""How many tokens fit, and how fast a long prompt comes back from host memory: an engine of real shape.

Weights are random: the sizes and times of a KV cache do not depend on them. Each KV cache is served
by an engine in a process of its own, with the same memory.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .record import RESULTS, write

LLAMA = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", rms_norm_eps=1e-5, rope_theta=500000.0,
    hidden_act="silu", dtype="bfloat16",
)  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": dict(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=131072,
    ),
    "tiny": dict(
        hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=2, head_dim=128, vocab_size=512, max_position_embeddings=32768,
    ),
}  # fmt: skip
CACHES = (("bf16", "auto", False), ("nvfp4 + XLayerConnector", "nvfp4", True))
"""Name, --kv-cache-dtype, with the connector."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--prompt", type=int, default=16384, help="tokens of the restored prompt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.85)
    parser.add_argument("--host-bytes", type=int, default=8 << 30, help="host tier")
    parser.add_argument("--json", type=Path, default=RESULTS / "capacity.json", help="file to write")


def run(args: argparse.Namespace) -> int:
    """Runs both engines, prints the table, writes the JSON. Returns a process exit code."""
    results = {}
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-capacity-") as folder:
        model = Path(folder) / args.shape
        model.mkdir()
        (model / "config.json").write_text(json.dumps(LLAMA | SHAPES[args.shape]))
        for name, dtype, rows in CACHES:
            out = Path(folder) / "out.json"
            job = dict(
                model=str(model), dtype=dtype, rows=rows, prompt=args.prompt, repeats=args.repeats,
                utilization=args.gpu_memory_utilization, host_bytes=args.host_bytes, out=str(out),
            )  # fmt: skip
            env = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"} | os.environ
            code = f"from {__name__} import engine; engine({json.dumps(json.dumps(job))})"
            print(f"{name}: starting", flush=True)
            # Not in the current folder: a source tree there would be imported instead of the package.
            if subprocess.run([sys.executable, "-c", code], env=env, cwd=folder, check=False).returncode:
                print(f"{name}: the engine failed, see above", file=sys.stderr)
                return 1
            results[name] = json.loads(out.read_text())
    ratio = results[CACHES[1][0]]["tokens"] / results[CACHES[0][0]]["tokens"]
    Console(width=100).print(_table(results))
    print(f"token capacity in the same memory: {ratio:.2f}x of bf16")
    write(args.json, {"shape": args.shape, "prompt": args.prompt, "capacity_ratio": ratio, "caches": results})
    return 0


def engine(job_text: str) -> None:
    """One engine, in its own process: writes its figures to the job's file."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from .. import compat

    job = json.loads(job_text)
    settings: dict[str, Any] = {}
    if job["rows"]:
        settings["kv_transfer_config"] = {
            "kv_connector": "XLayerConnector", "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": job["host_bytes"]},
        }  # fmt: skip
    started = time.perf_counter()
    llm = LLM(
        job["model"], load_format="dummy", skip_tokenizer_init=True, kv_cache_dtype=job["dtype"],
        max_model_len=2 * job["prompt"], gpu_memory_utilization=job["utilization"],
        compilation_config={"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}, **settings,
    )  # fmt: skip
    start_seconds = time.perf_counter() - started
    layers, page_bytes, rows, tokens, _ = compat.current().cache_geometry(llm)
    one = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    prompts = [[(31 * i + 7 * n) % vocabulary for i in range(job["prompt"])] for n in range(job["repeats"])]

    def first_token() -> float:
        times = []
        for prompt in prompts:
            begin = time.perf_counter()
            llm.generate([TokensPrompt(prompt_token_ids=prompt)], one, use_tqdm=False)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    report: dict[str, Any] = {
        "runner": "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1",
        "start_seconds": start_seconds,
        "tokens": tokens,
        "row_bytes": layers * page_bytes if rows else None,
        "page_bytes": page_bytes,
        "ttft_cold": first_token(),
        "ttft_cached": first_token(),
    }
    if job["rows"]:
        before = compat.current().rows_loaded()
        compat.current().empty_device_cache(llm)
        report["ttft_restored"] = first_token()
        report["rows_restored"] = compat.current().rows_loaded() - before
    Path(job["out"]).write_text(json.dumps(report))


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
