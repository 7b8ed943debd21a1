"""Answers of a model with their logprobs, and how far another answer is from them."""

import itertools
import math
from dataclasses import dataclass
from typing import Any

from . import serving

NUM_TOKENS = 16
LIKELIEST = 5
"""Tokens whose logprobs are compared: where two were as likely either may come, and the others still tell."""


@dataclass(frozen=True)
class Right:
    """An answer.

    Attributes:
        tokens: of the answer.
        likely: for each of them, the logprobs of the likeliest tokens in its place.
    """

    tokens: list[int]
    likely: list[dict[int, float]]

    def distance(self, other: "Right", tokens: int) -> float:
        """How far logprobs must have moved, at least, to make another answer of this one, in so many tokens.

        That is told up to where another token came; what follows is not known.
        """
        found = 0.0
        places = zip(self.tokens, other.tokens, self.likely, other.likely, strict=True)
        for token, another, ours, theirs in itertools.islice(places, tokens):
            moved = [abs(theirs[one] - ours[one]) for one in ours.keys() & theirs.keys()]
            if another not in ours:  # it has overtaken all of these
                moved.append((max(ours.values()) - min(ours.values())) / 2)
            if any(map(math.isnan, theirs.values())):
                return math.inf
            found = max(found, *moved)
            if token != another:
                break
        return found


@dataclass(frozen=True)
class Answers:
    """Right answers to a prompt."""

    right: list[Right]

    def distance(self, output: Any, tokens: int = NUM_TOKENS) -> float:
        """Of the first so many tokens of a RequestOutput, from the nearest."""
        got = answer_of(output)
        return min(answer.distance(got, tokens) for answer in self.right)

    def spread(self) -> float:
        """How far they are from each other, at most."""
        return max(one.distance(other, NUM_TOKENS) for one in self.right for other in self.right)


def sampling() -> Any:
    """SamplingParams: greedy, with the logprobs that are compared."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, detokenize=False, logprobs=LIKELIEST
    )


def answer_of(output: Any) -> Right:
    """Of a RequestOutput."""
    made = output.outputs[0]
    likely = [{token: logprob.logprob for token, logprob in step.items()} for step in made.logprobs]
    return Right(list(made.token_ids), likely)


def ask(llm: Any, prompts: list[list[int]]) -> list[Any]:
    """All prompts in one batch; RequestOutputs."""
    found: list[Any] = llm.generate([{"prompt_token_ids": p} for p in prompts], sampling(), use_tqdm=False)
    return found


def right_answers(llm: Any, prompts: list[list[int]], drafts: bool = False) -> list[list[Right]]:
    """Of each prompt, with every number of tokens that a cache can hold of it.

    drafts: by a layer with a KV cache: vLLM then computes a block that it has anew, for the layer's input.
    """
    from vllm_xlayer.compat.engine import empty_device_cache

    found = []
    for prompt in prompts:
        answers = []
        for cached in range(0, len(prompt), serving.block_of(llm)):
            empty_device_cache(llm)
            if cached:
                serving.answer_to(llm, prompt[: cached + 1], 1)
            (output,) = ask(llm, [prompt])
            fewest = cached - serving.block_of(llm) if drafts else cached
            if not fewest <= output.num_cached_tokens <= cached:
                raise RuntimeError(f"expected {cached} cached tokens, got {output.num_cached_tokens}")
            answers.append(answer_of(output))
        found.append(answers)
    return found
