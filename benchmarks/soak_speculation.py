"""The soak of speculation with NVFP4. The model is MiMo's, with random weights: a Qwen 2 that drafts by a
layer of its own (MTP).

With NVFP4 a prompt has as many right answers as ways to be computed: what a step computes together is exact
to each other, what it finds in a cache is quantised. So the model has one layer, where a token's K and V
depend on nothing but the token, and no step cuts a prompt. That leaves an answer for each number of cached
tokens; all are taken beforehand, without drafts and connector. A request that was preempted and goes on has
yet others: it must be answered, and is not compared. Where two tokens were as likely, either is right, and
what follows is not known.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_xlayer.provenance import write

from . import serving
from .soaking import ZEROS, soak, with_host_tier

VOCABULARY, NUM_TOKENS, BLOCK = 16, 16, 16
"""So few tokens make many drafts right by chance."""
BLOCKS, ROWS = 30, 40
"""Of the device's cache, and of the host tier: three requests fill the first."""
TIE = 1 / 4
"""Logprobs as near as that may change places. Not for rounding alone: drafts that a step accepts together are
exact to each other, and the right answers are taken without drafts, each token after quantised ones. 0.1 was
seen to change places; what `noticed` counts says whether wrong blocks change more."""
ENGINE = dict(
    dtype="bfloat16", kv_cache_dtype="nvfp4", max_model_len=160, max_num_seqs=8, max_num_batched_tokens=2048,
    block_size=BLOCK,
)  # fmt: skip
"""A step takes eight whole prompts."""


@dataclass(frozen=True)
class Right:
    """An answer, and how much likelier each token was than the next."""

    tokens: list[int]
    margins: list[float]

    def fits(self, tokens: list[int]) -> bool:
        """Whether these are its tokens, up to where two were as likely."""
        for one, other, margin in zip(tokens, self.tokens, self.margins, strict=True):
            if one != other:
                return margin < TIE
        return True


def prompts_with_shared_prefixes() -> list[list[int]]:
    from test_soak import prompts_with_shared_prefixes

    return [[1 + token % (VOCABULARY - 1) for token in prompt] for prompt in prompts_with_shared_prefixes()]


def right_answers(llm: Any, prompts: list[list[int]]) -> list[list[Right]]:
    """Of each prompt, with every number of tokens that a cache can hold of it."""
    found = []
    for prompt in prompts:
        answers = []
        for cached in range(0, len(prompt), BLOCK):
            llm.reset_prefix_cache()
            if cached:
                serving.answer_to(llm, prompt[: cached + 1], 1)
            answers.append(_right(llm, prompt, cached))
        found.append(answers)
    return found


def _right(llm: Any, prompt: list[int], cached: int) -> Right:
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, logprobs=2
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    if output.num_cached_tokens != cached:
        raise RuntimeError(f"expected {cached} cached tokens, got {output.num_cached_tokens}")
    margins = []
    for step in output.outputs[0].logprobs:
        best, second = sorted((logprob.logprob for logprob in step.values()), reverse=True)[:2]
        margins.append(best - second)
    return Right(list(output.outputs[0].token_ids), margins)


def noticed(llm: Any, prompts: list[list[int]], right: list[list[Right]]) -> tuple[int, int]:
    """(answers from wrong blocks that the soak would call wrong, of so many): what its zero is worth."""
    from hybrid_fixture import corrupt_group

    from vllm_xlayer.compat.engine import empty_device_cache

    asked = [(prompt, answers) for prompt, answers in zip(prompts, right, strict=True) if len(answers) > 1]
    seen = 0
    for prompt, answers in asked:
        empty_device_cache(llm)
        serving.answer_to(llm, prompt, 1)
        corrupt_group(llm, 0)
        tokens = serving.answer_to(llm, prompt, NUM_TOKENS)[0]
        seen += not any(answer.fits(tokens) for answer in answers)
    return seen, len(asked)


def run(folder: Path, seconds: float, seed: int, result: Path) -> int:
    """Soaks for so long; returns 1 if an answer was wrong or lost, accounts did not balance, or no wrong
    block would have been noticed."""
    from faults import greedy
    from model_fixture import save_mimo

    from vllm_xlayer.compat.engine import core_of

    model = save_mimo(folder / "model", vocab_size=VOCABULARY, num_hidden_layers=1)
    prompts = prompts_with_shared_prefixes()
    with serving.started({"model": str(model), **ENGINE}) as llm:
        right = right_answers(llm, prompts)
        seen, of = noticed(llm, prompts, right)
        config = core_of(llm).scheduler.kv_cache_config
        row = 2 * config.kv_cache_tensors[0].size // config.num_blocks  # the drafter has a layer too
    print(f"{sum(map(len, right))} right answers to {len(prompts)} prompts")
    print(f"wrong blocks are noticed in {seen} of {of}")

    def is_right(which: int, output: Any, before: int | None) -> bool:
        tokens = list(output.outputs[0].token_ids)
        if before is not None:
            return True
        return len(tokens) == NUM_TOKENS and any(answer.fits(tokens) for answer in right[which])

    def note(llm: Any, found: dict[str, Any]) -> None:
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
        newest = sum(layer.impl.newest is not None for layer in layers)
        found |= dict(newest_layers=newest, noticed=seen, noticed_of=of, accepted_drafts=_accepted(llm))
        write(result, found)
        print(found, flush=True)

    settings = ENGINE | dict(
        model=str(model), num_gpu_blocks_override=BLOCKS, disable_log_stats=False,
        speculative_config=dict(method="mtp", num_speculative_tokens=2), **with_host_tier(ROWS * row),
    )  # fmt: skip
    counts = ("requests", "answers", "preempted", "wrong")
    found = soak(settings, prompts, greedy(NUM_TOKENS), is_right, seconds, seed, counts, note)
    return int(any(found[name] for name in ZEROS) or not seen)


def _accepted(llm: Any) -> int:
    found = {metric.name: metric for metric in llm.get_metrics()}
    return found["vllm:spec_decode_num_accepted_tokens"].value
