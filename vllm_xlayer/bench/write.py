"""Writing new tokens into the cache: ours beside vLLM's fp8 and bf16 writers."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import ops
from ..nvfp4 import ROTATED_KEYS, ScaleChoice, content_bytes
from ..provenance import write
from .timing import copy_rate, graph_seconds

TOKENS = (64, 512, 4096, 16384, 65536)
HEADS, HEAD_SIZE, BLOCK_SIZE = 8, 128, 16
L2_TIMES = 4
MAX_COPIES = 64

TITLES = {
    "best_of_9": "ours, best of 9",
    "four_over_six": "ours, 4 over 6",
    "amax_6": "ours, amax/6",
    "fp8": "vLLM fp8",
    "bf16": "vLLM bf16",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--repeats", type=int, default=20, help="times each is measured (default: %(default)s)"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("write.json"), help="file to write (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Measures every writer, prints the table, writes the JSON. Returns a process exit code."""
    console = Console(width=100, highlight=False)
    rate = copy_rate()
    results = [measure(tokens, args.repeats) for tokens in track(TOKENS, "write", console=console)]
    grid = Table(title=f"K and V of one layer, {HEADS} heads of {HEAD_SIZE}: microseconds")
    grid.add_column("tokens", justify="right")
    for title in TITLES.values():
        grid.add_column(title, justify="right")
    grid.add_column("floor", justify="right")
    grid.add_column("ours / fp8", justify="right")
    for r in results:
        seconds = r["seconds"]
        cells = (f"{seconds[name] * 1e6:.1f}" for name in TITLES)
        ratio = seconds["best_of_9"] / seconds["fp8"]
        grid.add_row(f"{r['tokens']:,}", *cells, f"{r['bytes'] / rate * 1e6:.1f}", f"{ratio:.2f}x")
    console.print(grid)
    write(args.json, {"copy_rate": rate, "writes": results})
    return 0


def measure(tokens: int, repeats: int) -> dict[str, Any]:
    """Seconds of each writer for so many tokens, on slots in random order."""
    moved = tokens * HEADS * 2 * (2 * HEAD_SIZE + content_bytes(HEAD_SIZE))
    l2 = torch.cuda.get_device_properties(0).L2_cache_size
    copies = max(2, min(MAX_COPIES, L2_TIMES * l2 // moved + 1))
    inputs = torch.randn(copies, 2, tokens, HEADS, HEAD_SIZE, dtype=torch.bfloat16, device="cuda")
    slots = [torch.randperm(tokens, device="cuda") for _ in range(copies)]
    seconds = {name: graph_seconds(calls, repeats) for name, calls in _writers(inputs, slots).items()}
    return {"tokens": tokens, "bytes": moved, "seconds": seconds}


def _writers(inputs: torch.Tensor, slots: list[torch.Tensor]) -> dict[str, list[Callable[[], None]]]:
    copies, _, tokens = inputs.shape[:3]
    blocks = -(-tokens // BLOCK_SIZE)
    one = torch.ones(1, device="cuda")

    def ours(choice: ScaleChoice) -> list[Callable[[], None]]:
        shape = (copies, blocks, HEADS, BLOCK_SIZE, content_bytes(HEAD_SIZE))
        caches = torch.zeros(shape, dtype=torch.uint8, device="cuda")
        return [
            lambda x=x, cache=cache, slot=slot: ops.reshape_and_cache_nvfp4(  # type: ignore[misc]
                x[0],
                x[1],
                cache,
                slot,
                one,
                one,
                scale_choice=choice,
                rotated_keys=ROTATED_KEYS,
            )
            for x, cache, slot in zip(inputs, caches, slots, strict=True)
        ]

    def theirs(dtype: str, torch_dtype: torch.dtype) -> list[Callable[[], None]]:
        from vllm import _custom_ops

        # K and V of a token side by side, a head's tokens one behind the other: vLLM's cache.
        shape = (copies, blocks, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
        caches = torch.zeros(shape, dtype=torch_dtype, device="cuda").transpose(2, 3)
        return [
            lambda x=x, k=k, v=v, slot=slot: _custom_ops.reshape_and_cache_flash(  # type: ignore[misc]
                x[0], x[1], k, v, slot, dtype, one, one
            )
            for x, k, v, slot in zip(inputs, *caches.split(HEAD_SIZE, dim=-1), slots, strict=True)
        ]

    return {
        "best_of_9": ours(ScaleChoice.BEST_OF_9),
        "four_over_six": ours(ScaleChoice.FOUR_OVER_SIX),
        "amax_6": ours(ScaleChoice.AMAX_6),
        "fp8": theirs("fp8", torch.uint8),
        "bf16": theirs("auto", torch.bfloat16),
    }
