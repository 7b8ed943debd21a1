"""An engine in this process, and whether a prompt is answered from every cache as from the device's.

Answers are compared with answers only that had the same tokens left to compute, alone in their batches: with
NVFP4 a cached prompt has others than a cold one, and kernels of a GPU round by the shape of a batch.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import ROOT

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")  # it would be compiled first, for minutes
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

CONNECTOR = {
    "kv_transfer_config": {
        "kv_connector": "XLayerConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"cpu_bytes_to_use": 64 << 20},
    }
}
ON_GPU: dict[str, Any] = dict(
    enforce_eager=True, gpu_memory_utilization=0.1, additional_config={"gdn_prefill_backend": "triton"}
)  # fmt: skip
"""Several engines share a GPU, and FlashInfer's kernels would be compiled first, for minutes."""
OURS = "vllm_xlayer."
"""What the names of this package's modules begin with."""
PROMPT_TOKENS = 700
"""More than the largest block of models.json."""
NUM_TOKENS = 8
POISONS = (0x77, 0xF7)
"""What memory is filled with: bytes that are large numbers in every dtype of a cache, 5e33 in bfloat16 and
240 in fp8, of either sign. An answer made of them differs between the two. They are no NaNs: kernels that
multiply what lies behind a prompt's end by 0 are right, and from logits that are NaNs vLLM samples tokens
outside a small vocabulary, which ends in an assertion on the device."""
Answer = tuple[list[int], list[float], int]
"""Tokens, their logprobs, and how many tokens of the prompt came from a cache."""


class Finding(Exception):
    """What was found instead of equal answers, for a cell of a table."""


def prepare() -> None:
    """In a case's process: the tests' models can be imported, and torch takes one thread."""
    import torch

    sys.path.insert(0, str(ROOT / "tests" / "engine"))
    torch.set_num_threads(1)  # the models are too small to share among threads


@contextlib.contextmanager
def started(settings: dict[str, Any]) -> Iterator[Any]:
    """An LLM whose cache is the first of `POISONS`; ends with all that it leaves behind.

    It takes its blocks from the end of the cache.
    """
    import torch
    from hybrid_fixture import last_blocks_first
    from vllm import LLM
    from vllm.distributed.kv_transfer import ensure_kv_transfer_shutdown
    from vllm.distributed.parallel_state import destroy_model_parallel

    llm = None
    here = ON_GPU if torch.cuda.is_available() else {}
    defaults = dict(
        skip_tokenizer_init=True, max_model_len=1024, max_num_seqs=4, max_num_batched_tokens=128,
        kv_cache_memory_bytes=16 << 20, seed=0, **here,
    )  # fmt: skip
    try:
        llm = LLM(**(defaults | settings))
        empty(llm, POISONS[0])
        last_blocks_first(llm)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        ensure_kv_transfer_shutdown()
        destroy_model_parallel()


def empty(llm: Any, byte: int) -> None:
    """Nothing is cached on the device any more, and its memory is that byte."""
    from hybrid_fixture import fill_memory

    from vllm_xlayer.compat.engine import empty_device_cache

    empty_device_cache(llm)
    fill_memory(llm, byte)


def prompt_of(tokens: int = PROMPT_TOKENS) -> list[int]:
    from model_fixture import random_prompts

    return random_prompts([tokens])[0]


def answer_to(llm: Any, prompt: list[int], num_tokens: int = NUM_TOKENS) -> Answer:
    from hybrid_fixture import answers_and_hits

    return answers_and_hits(llm, [prompt], num_tokens)[0]


def cached_answer(llm: Any, prompt: list[int]) -> Answer:
    """The answer to a prompt that is in the device's cache.

    Raises:
        Finding: it is not, or the answer is no number, or asked again it is another one.
    """
    answer_to(llm, prompt, 1)
    cached, again = (answer_to(llm, prompt) for _ in range(2))
    if cached[2] == 0:
        raise Finding("runs, but nothing was cached")
    if any(logprob != logprob for logprob in cached[1]):
        raise Finding(f"WRONG: cached tokens have no number as logprob: {cached}")
    if again != cached:
        raise Finding(f"runs, but answers {again} where it answered {cached}, both cached on the device")
    return cached


def check_unread(llm: Any, prompt: list[int], cached: Answer) -> None:
    """Asks again when the prompt was computed anew, in memory that was another byte.

    Raises:
        Finding: the answer is not what was cached.
    """
    empty(llm, POISONS[1])
    again = cached_answer(llm, prompt)
    if again != cached:
        raise Finding(f"WRONG: computed anew in other unused memory {again} is not {cached}")


def check_restored(llm: Any, prompt: list[int], cached: Answer) -> None:
    """Asks again when the device's cache is empty, and its memory another byte.

    Raises:
        Finding: the host tier's answer is not what was cached.
    """
    empty(llm, POISONS[1])
    restored = answer_to(llm, prompt)
    if restored[2] != cached[2]:
        raise Finding(f"runs, but {restored[2]} tokens were restored of {cached[2]} cached")
    if restored != cached:
        raise Finding(f"WRONG: restored {restored} is not cached {cached}")


def check_power(llm: Any, prompt: list[int], cached: Answer) -> None:
    """Asks with each group's cached blocks changed, of a prompt that is in the device's cache.

    Raises:
        Finding: wrong blocks of a group change nothing, so that equal answers prove nothing of it.
    """
    from hybrid_fixture import corrupt_group, groups

    from vllm_xlayer.compat.engine import come_to_rest

    for group in range(len(groups(llm))):
        come_to_rest(llm)
        if not corrupt_group(llm, group):
            continue  # of windows that the prompt has left behind nothing is kept
        wrong = answer_to(llm, prompt)
        come_to_rest(llm)
        corrupt_group(llm, group)  # which takes it back
        if wrong == cached:
            raise Finding(f"runs, but wrong blocks of group {group} change no answer")
    if answer_to(llm, prompt) != cached:
        raise Finding("runs, but the check of wrong blocks could not be taken back")


def block_of(llm: Any) -> int:
    return llm.llm_engine.vllm_config.cache_config.block_size


def other_nvfp4_backends(llm: Any) -> list[str]:
    """Names of the backends beside this package's that were told to keep NVFP4: what they keep is theirs."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    told = [layer for layer in layers if str(getattr(layer, "kv_cache_dtype", "")).startswith("nvfp4")]
    backends = {layer.attn_backend for layer in told}
    # For layers that attend in chunks vLLM makes a class of its own from this package's.
    return sorted(
        {
            backend.get_name()
            for backend in backends
            if not any(base.__module__.startswith(OURS) for base in backend.__mro__)
        }
    )


def sentence(error: BaseException) -> str:
    """The first line of an error, with those that it announces by a colon, or what it says was wrong where
    that is a list of vLLM's."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [""]
    first = next((i for i, line in enumerate(lines) if line.startswith("Value error, ")), 0)
    said = lines[first].removeprefix("Value error, ").partition(" [type=")[0]
    return f"{said} {'; '.join(lines[first + 1 :])}" if said.endswith(":") and lines[first + 1 :] else said


def cell_of(error: BaseException) -> str:
    """What a start or a comparison that raised this is called in a table."""
    if isinstance(error, Finding):
        return str(error)
    if isinstance(error, (ValueError, NotImplementedError)):
        return f"refused: {sentence(error)}"
    return f"does not run: {type(error).__name__}: {sentence(error)}{_place(error)}"


def _place(error: BaseException) -> str:
    """Where an error was raised, by the innermost line that is not torch's."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not {"torch", "<string>"} & set(Path(frame.filename).parts)
    ]
    return f" ({Path(frames[-1].filename).name}:{frames[-1].lineno}, {frames[-1].name})" if frames else ""
