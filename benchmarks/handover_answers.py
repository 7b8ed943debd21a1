"""lm_eval's tasks of the shipped model, answered by a decode engine that reads every prompt from a prefill
engine, and by one engine alone: scores, and how many answers are the same."""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import LM
from transformers import AutoTokenizer

from vllm_xlayer.bench.engines import end_when_told
from vllm_xlayer.bench.handover_pair import Pair, start_pair
from vllm_xlayer.compat.engine import histogram_sum, shuffle_free_blocks
from vllm_xlayer.demo import model_path
from vllm_xlayer.demo.engine import evaluate
from vllm_xlayer.provenance import provenance

BATCH = 16
GPU_BYTES, CPU_BYTES = 1 << 30, 256 << 20
"""Of each KV cache: a batch's prompts, with any cache."""
BLOCK = 16
Ask = Callable[[list[list[int]], int], list[list[int]]]
"""(prompts, tokens of an answer) -> answers."""


class Engines(LM):
    """lm_eval's model: prompts as tokens to whoever answers them."""

    def __init__(self, ask: Ask):
        super().__init__()
        self._ask, self._tokenizer = ask, AutoTokenizer.from_pretrained(str(model_path()))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        answers: list[str] = []
        for start in range(0, len(requests), BATCH):
            batch = [request.args for request in requests[start : start + BATCH]]
            prompts = [self._tokenizer.encode(text) for text, _ in batch]
            tokens = max(settings["max_gen_toks"] for _, settings in batch)
            for tokens_, (_, settings) in zip(self._ask(prompts, tokens), batch, strict=True):
                text = str(self._tokenizer.decode(tokens_, skip_special_tokens=True))
                for end in settings["until"]:
                    text = text.partition(end)[0]
                answers.append(text)
        return answers

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError("the tasks ask for answers only")

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("the tasks ask for answers only")


def measure(pair: Pair, limit: int) -> dict[str, Any]:
    """Asks one engine, then both."""
    computed = 0

    def alone(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        return pair.prefill.generate(prompts, tokens).tokens

    def handed_over(prompts: list[list[int]], tokens: int) -> list[list[int]]:
        nonlocal computed
        _, here = pair.hand_over(prompts, tokens)
        computed += sum(
            cached < len(prompt) - BLOCK for prompt, cached in zip(prompts, here.cached, strict=True)
        )
        return here.tokens

    for engine in (pair.prefill, pair.decode):
        engine.call(shuffle_free_blocks)
    found = []
    for what, ask in {"one engine alone": alone, "handed over": handed_over}.items():
        began = time.monotonic()
        found.append(evaluate(Engines(ask), limit))
        print(f"{what}: {len(found[-1]['answers'])} answers in {time.monotonic() - began:.1f} s", flush=True)
    first, then = found
    return {
        "scores": {"alone": first["scores"], "handed over": then["scores"]},
        "same": sum(then["answers"][key] == answer for key, answer in first["answers"].items()),
        "answers": len(first["answers"]),
        "computed": computed,
        "descriptors": pair.decode.call(histogram_sum, "vllm:nixl_num_descriptors"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.handover_answers", description=__doc__)
    parser.add_argument("--cache", choices=("nvfp4", "fp8", "bf16"), default="nvfp4")
    parser.add_argument("--devices", nargs=2, metavar=("PREFILL", "DECODE"))
    parser.add_argument("--limit", type=int, default=32, help="documents of each task")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    end_when_told()
    kv_bytes = GPU_BYTES if torch.cuda.is_available() else CPU_BYTES
    settings: dict[str, Any] = dict(
        load_format="auto", dtype="bfloat16", max_model_len=2560, max_num_seqs=BATCH, enforce_eager=True,
        gpu_memory_utilization=0.3, kv_cache_memory_bytes=kv_bytes,
    )  # fmt: skip
    began = time.monotonic()
    with start_pair(model_path(), args.cache, "XLayerNixlConnector", args.devices, **settings) as pair:
        print(f"{args.cache}: both engines have started in {time.monotonic() - began:.1f} s", flush=True)
        found = measure(pair, args.limit)
        pair.end()
    args.json.write_text(json.dumps(found | {"cache": args.cache} | provenance(), indent=2) + "\n")
    print(f"{args.cache}: {found['same']} of {found['answers']} answers are one engine's, "
          f"{found['computed']} prompts were computed")  # fmt: skip
    return int(bool(found["computed"]) or found["same"] != found["answers"])


if __name__ == "__main__":
    sys.exit(main())
