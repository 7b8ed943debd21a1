"""What KV caches cost a small trained gpt-oss: attention sinks, windows, heads of 64, experts.

    python -m benchmarks.training.train --architecture gpt_oss --out MODEL
    python -m benchmarks.sinks MODEL OUT.json

Each cache answers the demo's tasks (lm_eval), and `vllm-xlayer quality` reads a text of the same kind with
it. Everything is made of keys that training never draws. Caches that do not run here are left out.
"""

import argparse
import concurrent.futures
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_xlayer.demo import TASKS
from vllm_xlayer.demo.documents import HEADERS, QUERIES, TASK_NAMES, records
from vllm_xlayer.quality.command import Cache

from . import markdown, quality

CACHES = ("fp8", "nvfp4", "nvfp4,VLLM_XLAYER_NEWEST_TOKENS=0")
"""As `vllm-xlayer quality` takes them."""
REFERENCE = "16 bits"
SEED = 20261
MEMORY = {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.15}
"""Of an engine that reads text: several of them share a GPU."""


def document(task: str, seed: int, length: int) -> str:
    """``length`` bytes: a table of about half of them, then answered questions, which may come again."""
    rng = random.Random(f"{task} {length} {seed} text")
    lines, pairs = records(task, length // 2, rng)
    text = HEADERS[task] + "".join(line + "\n" for line in lines) + QUERIES
    while len(text) < length:
        question, answer = rng.choice(pairs)
        text += question + answer + "\n"
    return text[:length]


def text(windows: int, length: int) -> str:
    """A document of each task in turn, each as long as a window of the quality command."""
    return "".join(document(TASK_NAMES[i % len(TASK_NAMES)], SEED + i, length) for i in range(windows))


def answered(model: Path, spec: str, limit: int, folder: Path) -> dict[str, Any] | None:
    """Scores and answers of the tasks with one cache; None: its engine failed, which was said."""
    cache = Cache(REFERENCE, "auto") if spec == REFERENCE else Cache.parse(spec)
    out = folder / f"{spec}.json"
    command = [sys.executable, "-m", "vllm_xlayer.demo.engine", "--out", str(out), "--limit", str(limit)]
    command += ["--kv-cache-dtype", cache.kv_cache_dtype, "--model", str(model)]
    quiet = {
        "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }  # fmt: skip
    environment = {**quiet, **os.environ, **cache.environment}
    ended = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if ended.returncode or not out.exists():
        print(ended.stderr.decode(errors="replace")[-3000:], file=sys.stderr)
        print(f"left out: the engine with {spec} ended with exit code {ended.returncode}", file=sys.stderr)
        return None
    found = json.loads(out.read_text())
    return {name: found[name] for name in ("scores", "answers", "runner")}


def measure(model: Path, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Figures of the quality command, with those of the tasks and how the model was trained.

    The tasks' engines run beside those of the command.
    """
    written, figures = folder / "held-out.txt", folder / "quality.json"
    written.write_text(text(args.windows, args.length))
    command = [sys.executable, "-m", "vllm_xlayer.cli", "quality", str(model.resolve())]
    command += [part for spec in CACHES for part in ("--cache", spec)]
    for name in ("windows", "length", "first", "answer", "at_once"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    command += ["--text", str(written), "--batch", str(args.windows), "--extra", json.dumps(MEMORY)]
    specs = (REFERENCE, *CACHES)
    with concurrent.futures.ThreadPoolExecutor(args.at_once + 1) as pool:
        tasks = [pool.submit(answered, model.resolve(), spec, args.limit, folder) for spec in specs]
        subprocess.run([*command, "--json", str(figures)], check=True)
        found = {spec: task.result() for spec, task in zip(specs, tasks, strict=True)}
    exact = found[REFERENCE]
    if exact is None:
        raise RuntimeError("the engine with 16-bit KV failed, see above")
    rows = []
    for spec, one in found.items():
        if one is not None:
            same = sum(one["answers"][key] == answer for key, answer in exact["answers"].items())
            rows.append({"title": spec, "scores": one["scores"], "same": same})
    training = json.loads((model / "train.json").read_text())
    result = json.loads(figures.read_text())
    result["text"] = [Path(file).name for file in result["text"]]
    return result | {"tasks": rows, "documents": args.limit, "training": training}


def section(results: dict[str, Any]) -> str:
    """Markdown of docs/accuracy.md, with its heading."""
    training, shape = results["training"], results["training"]["shape"]
    sinks = training["sinks"]
    shares = [share for layer in sinks["shares"] for share in layer]
    exact, without = training["exact_match"], "without_"
    lost = {name.removeprefix(without): exact[name] for name in exact if name.startswith(without)}
    changed = ", ".join(f"with its {what} taken away {_of(scores)}" for what, scores in lost.items())
    asked = results["documents"] * len(TASKS)
    lines = []
    titles = {REFERENCE: REFERENCE, **{spec: title for title, spec in quality.CACHES.items()}}
    for row in results["tasks"]:
        cells = [_interval(row["scores"][task]["exact_match"], results["documents"]) for task in TASKS]
        lines.append((titles[row["title"]], [*cells, f"{row['same']} of {asked}"]))
    return f"""\
## A small model with attention sinks

gpt-oss has attention sinks, windows of 128 tokens in every other layer and heads of 64. Its weights were not
at hand, so a small GptOssForCausalLM was trained on the tasks of the demo's model: {shape["layers"]} layers,
{shape["heads"]} query and {shape["kv_heads"]} KV heads of {shape["head_size"]}, {shape["experts"]} experts,
{training["parameters"] / 1e6:.1f} million parameters, gpt-oss-20b's RoPE; {training["seconds"]:.0f} seconds
on one {training["hardware"]} (`python -m benchmarks.training.train --architecture gpt_oss`). What it makes of
both: of the attention in prompts of 2,000 bytes {100 * sum(shares) / len(shares):.0f} % goes to sinks
({100 * max(shares):.0f} % in the head where it is most). In plain PyTorch it answers
{_of(exact["bf16_kv"])} of the held-out documents, {changed}.

The tasks in vLLM (lm_eval, {results["documents"]} documents each), and how many answers are those of the
16-bit cache:

{markdown.table(["KV", *(task.removeprefix("xlayer_") for task in TASKS), "same answers"], lines)}

In brackets 95 % (Wilson), as if documents were independent; eight each share a table.

Tables, questions and answers of the same kind, read with `vllm-xlayer quality`:

{quality.table(results)}

`python -m benchmarks.sinks` is the command.

What this shows: sinks, windows, heads of 64 and 8 query heads a KV head, with trained weights, and what each
cache costs a model whose answers stand in it. **What it does not show: what gpt-oss-20b loses.** Three tasks
with one right answer each leave wider margins than language does, a model so small need not have the outliers
of a large one's keys, and nothing here reasons over thousands of tokens, in which an error can grow; FP4
caches have cost gpt-oss much in other engines there. Before you serve it with NVFP4, run
`vllm-xlayer quality` on it, with your text."""


def _of(scores: dict[str, float]) -> str:
    return f"{100 * scores['overall']:.1f} %"


def _interval(share: float, count: int) -> str:
    """A share of ``count`` with Wilson's 95 %, which are not without width at 100 %."""
    z = 1.96
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return f"{100 * share:.1f} % ({100 * low:.1f} .. {100 * high:.1f})"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sinks",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="a folder that training wrote")
    parser.add_argument("out", type=Path, help="file for the figures, .json")
    parser.add_argument("--limit", type=int, default=96, help="documents a task (default and at most: 96)")
    parser.add_argument("--windows", type=int, default=60, help="windows of text (default: 60)")
    parser.add_argument("--length", type=int, default=2048, help="bytes of a window (default: 2048)")
    parser.add_argument("--first", type=int, default=1408, help="first byte that counts (default: 1408)")
    parser.add_argument("--answer", type=int, default=200, help="bytes of a greedy answer (default: 200)")
    parser.add_argument("--at-once", type=int, default=3, help="engines beside each other (default: 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="sinks-") as folder:
        result = measure(args.model, args, Path(folder))
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(section(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
