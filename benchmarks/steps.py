"""What a step of vLLM's engine consists of: the GPU's time by kernels, and what the host needs beside it.

    python -m benchmarks.steps [--caches bf16 fp8 nvfp4] [--shape llama-3.1-8b]

For each KV cache: a prompt of which all is cached but its last tokens (the first token's time is the host's,
where kernels take a part of it), and decode steps in CUDA graphs. Times without a profiler are medians; the
GPU's are torch.profiler's. `bench engine` and `bench offload` measure the same steps without one.
"""

import argparse
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from vllm_xlayer.bench.bounds import SHAPE
from vllm_xlayer.bench.engines import CACHES, ENVIRONMENT, GRAPHS_ONLY, prompts, run_engine
from vllm_xlayer.bench.shapes import SETTINGS, SHAPES, write_model
from vllm_xlayer.provenance import write

from . import RESULTS, ROOT
from .faults import device

CACHED, REQUESTS, TOKENS = 16384, 64, 8192
"""Tokens of the cached prompt; decode's requests, and the tokens of each."""
STEPS, REPEATS = 16, 9
NAMES, NAME_LENGTH = 16, 100
"""Kernels that are written by their names, and letters of those, which have dozens of template arguments."""
KINDS: dict[str, tuple[str, ...]] = {
    "decode attention": ("xlayer::attention::decode", "xlayer::attention::combine"),
    "FlashAttention": ("flash::", "flash_fwd"),
    "cache dequantised": ("nvfp4_gather",),
    "cache written": ("nvfp4_write", "reshape_and_cache"),
    "matrix products": ("nvjet", "gemm", "cublas", "splitK"),
}
"""What a kernel is for -> parts of its name; the first that fits counts. What fits none is "other"."""


class Kernel(NamedTuple):
    """A kernel or a copy as it ran on the GPU; microseconds."""

    name: str
    start: float
    duration: float


def by_kind(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Seconds of each kind that there is."""
    found: dict[str, float] = {}
    for kernel in kernels:
        kind = next((k for k, parts in KINDS.items() if any(p in kernel.name for p in parts)), "other")
        found[kind] = found.get(kind, 0.0) + kernel.duration / 1e6
    return {kind: found[kind] for kind in [*KINDS, "other"] if kind in found}


def told(kernels: list[Kernel], seconds: float) -> dict[str, Any]:
    """What is written of a step of so many seconds."""
    kinds = by_kind(kernels)
    return {
        "seconds": seconds, "kernels": len(kernels), "gpu_seconds": sum(kinds.values()), "kinds": kinds,
        "longest": longest(kernels),
    }  # fmt: skip


def longest(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Seconds of the kernels that took most, all launches of one name together."""
    found: dict[str, float] = {}
    for kernel in kernels:
        name = kernel.name[:NAME_LENGTH]
        found[name] = found.get(name, 0.0) + kernel.duration / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1])[:NAMES])


def one_step(kernels: list[Kernel], steps: int) -> tuple[list[Kernel], float]:
    """A step in the middle of so many equal ones, and the seconds from its begin to the next's.

    Raises:
        ValueError: no kernel ran once a step.
    """
    kernels = sorted(kernels, key=lambda kernel: kernel.start)
    starts: dict[str, list[float]] = {}
    for kernel in kernels:
        starts.setdefault(kernel.name, []).append(kernel.start)
    marks = next((found for found in starts.values() if len(found) == steps), None)
    if marks is None:
        raise ValueError(f"expected a kernel that ran {steps} times, got {sorted(map(len, starts.values()))}")
    # Not the first: it is launched while the host still prepares.
    spans = [later - earlier for earlier, later in itertools.pairwise(marks[2:])]
    begin, end = marks[steps // 2], marks[steps // 2 + 1]
    return [k for k in kernels if begin <= k.start < end], statistics.median(spans) / 1e6


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """In the engine's process, with its core: both steps of one cache."""
    from vllm import LLM, SamplingParams  # noqa: TID251 - as its users call it

    llm = LLM(**job["settings"])
    vocabulary = llm.llm_engine.model_config.get_vocab_size()

    def ask(asked: list[Any], tokens: int) -> float:
        sampling = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        begin = time.perf_counter()
        batch: list[Any] = [{"prompt_token_ids": prompt} for prompt in asked]
        llm.generate(batch, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    one = prompts("cached", 1, job["cached"], vocabulary)
    ask(one, 1)
    seconds = statistics.median(ask(one, 1) for _ in range(REPEATS))
    first = told(_profiled(lambda: ask(one, 1)), seconds)
    many = prompts("decode", job["requests"], job["tokens"], vocabulary)
    ask(many, 2)
    # The first token is the prompts'; kernels of one step only are the others'.
    kernels = _profiled(lambda: ask(many, 1 + STEPS))
    step, seconds = one_step(kernels, 1 + STEPS)
    return {"first token, cached": first, "decode step": told(step, seconds)}


def _profiled(work: Any) -> list[Kernel]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    return [
        Kernel(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in found.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.steps", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=["bf16", "fp8", "nvfp4"])
    parser.add_argument("--shape", choices=SHAPES, default=SHAPE)
    parser.add_argument("--scale", type=int, default=1, help="divides requests and tokens, to try it out")
    parser.add_argument("--json", type=Path, help="file to write (default: results/DEVICE-steps.json)")
    args = parser.parse_args()
    if device() == "cpu":
        parser.error("expected an NVIDIA GPU, got none")
    sizes = dict(cached=CACHED, requests=REQUESTS, tokens=TOKENS)
    sizes = {name: max(1, size // args.scale) for name, size in sizes.items()}
    settings = dict(
        load_format="dummy", skip_tokenizer_init=True, max_model_len=sizes["cached"] + 2 * STEPS + 2,
        max_num_seqs=sizes["requests"], **GRAPHS_ONLY, **SETTINGS.get(args.shape, {}),
    )  # fmt: skip
    caches: dict[str, Any] = {}
    path = args.json or RESULTS / f"{device()}-steps.json"
    with tempfile.TemporaryDirectory(prefix="vllm-xlayer-steps-") as folder:
        model = write_model(Path(folder), args.shape)
        for cache in args.caches:
            print(f"{cache}: starting", flush=True)
            job = sizes | {"settings": settings | CACHES[cache] | {"model": str(model)}}
            here = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
            found = run_engine(
                "benchmarks.steps:measure", job, Path(folder), core_here=True,
                environment=here | ENVIRONMENT.get(cache, {}),
            )  # fmt: skip
            if found is not None:
                caches[cache] = found
                write(path, {"shape": args.shape, **sizes, "caches": caches})
    return int(len(caches) < len(args.caches))


if __name__ == "__main__":
    sys.exit(main())
