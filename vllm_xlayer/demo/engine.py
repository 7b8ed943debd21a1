"""One engine of the demo: answers the tasks, times the first token, writes one JSON file.

What it is doing it says in a line each, to the file descriptor that it is given.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

from ..compat.engine import (
    cache_geometry,
    come_to_rest,
    empty_device_cache,
    rows_loaded,
)
from ..provenance import provenance
from . import TASKS, model_path, tasks_path

KV_BYTES = 256 << 20
"""Memory of each KV cache: enough for all that runs at once, and the same for all."""
HOST_BYTES = 512 << 20
TIMED_PROMPTS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--kv-cache-dtype", required=True)
    parser.add_argument("--model", type=Path, default=model_path(), help="default: the shipped one")
    parser.add_argument("--rows", action="store_true", help="serve with XLayerConnector")
    parser.add_argument("--progress", type=int, default=1, help="file descriptor (default: stdout)")
    args = parser.parse_args()
    os.set_inheritable(args.progress, args.progress < 3)  # it ends with this process, not with one of vLLM's

    def say(text: str) -> None:
        os.write(args.progress, f"{text}\n".encode())

    documents = f"{args.limit} documents of each of {len(TASKS)} tasks"
    say("starting the engine")
    engine = start(args.kv_cache_dtype, args.rows, args.model)
    llm = engine.model
    come_to_rest(llm)  # the host tier is pinned
    say(f"answering {documents}")
    first = evaluate(engine, args.limit)
    result: dict[str, Any] = {**first, **sizes(llm)}
    if args.rows:
        say(f"answering {documents} again, restored from host memory")
        empty_device_cache(llm)
        before = rows_loaded()
        again = evaluate(engine, args.limit)
        result.update(again)
        rows = rows_loaded() - before
        result["restored_tokens"] = rows * result["block_size"]
        same = sum(again["answers"][key] == answer for key, answer in first["answers"].items())
        result["restored_identical"] = [same, len(first["answers"])]
    say("timing first tokens")
    result["ttft"] = time_to_first_token(llm, args.rows)
    result.update(provenance())
    result["runner"] = "V2" if llm.llm_engine.vllm_config.use_v2_model_runner else "V1"
    args.out.write_text(json.dumps(result))


def start(kv_cache_dtype: str, rows: bool, model: Path) -> Any:
    """lm_eval's vLLM model, with the engine in it that serves the folder ``model``."""
    from lm_eval.models.vllm_causallms import VLLM

    options: dict[str, Any] = {}
    if rows:
        options["kv_transfer_config"] = {
            "kv_connector": "XLayerConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"cpu_bytes_to_use": HOST_BYTES},
        }
    return VLLM(
        pretrained=str(model),
        dtype="bfloat16",
        max_model_len=2560,
        batch_size="auto",
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_memory_bytes=KV_BYTES,
        max_num_seqs=16,
        gpu_memory_utilization=0.5,
        # The model is tiny: compiling or capturing it would take longer than the tasks.
        enforce_eager=True,
        **options,
    )


def evaluate(engine: Any, limit: int) -> dict[str, Any]:
    """Scores and answers of `limit` documents of each task, through lm_eval."""
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.tasks import TaskManager

    # It asks git about the current folder, which is none of its business here, and git complains aloud.
    evaluator.get_git_commit_hash = lambda: None
    report = simple_evaluate(
        model=engine,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks_path()), include_defaults=False),
        limit=limit,
        log_samples=True,
        verbosity="ERROR",
    )
    scores = {}
    for task in TASKS:
        values = report["results"][task]
        scores[task] = {
            "exact_match": values["exact_match,none"],
            "stderr": values["exact_match_stderr,none"],
        }
    answers = {
        f"{task}/{sample['doc_id']}": sample["filtered_resps"][0]
        for task in TASKS
        for sample in report["samples"][task]
    }
    return {"scores": scores, "answers": answers}


def sizes(llm: Any) -> dict[str, Any]:
    """What a token and a block take, as the engine allocated them."""
    cache = cache_geometry(llm)
    block_bytes = cache.layers * cache.page_bytes
    return {
        "bytes_per_token": block_bytes // cache.block_size,
        "tokens_per_256_mib": cache.tokens,
        "copies": 1 if cache.in_rows else cache.layers,
        "copy_bytes": block_bytes if cache.in_rows else cache.page_bytes,
        "block_size": cache.block_size,
    }


def time_to_first_token(llm: Any, rows: bool) -> dict[str, Any]:
    """Median seconds to the first token of prompts of 2,000 tokens nobody has seen, then seen."""
    from vllm import SamplingParams, TokensPrompt

    one = SamplingParams(max_tokens=1, temperature=0.0)
    prompts = [[97 + (7 * i + n * n) % 26 for i in range(2000)] for n in range(1, TIMED_PROMPTS + 2)]

    def seconds(prompt: list[int]) -> float:
        begin = time.perf_counter()
        llm.generate([TokensPrompt(prompt_token_ids=prompt)], one, use_tqdm=False)
        return time.perf_counter() - begin

    seconds(prompts.pop())
    times = {"cold": [seconds(p) for p in prompts], "cached on device": [seconds(p) for p in prompts]}
    if rows:
        empty_device_cache(llm)
        times["restored"] = [seconds(p) for p in prompts]
    return {"tokens": len(prompts[0]), **{name: statistics.median(t) for name, t in times.items()}}


if __name__ == "__main__":
    main()
