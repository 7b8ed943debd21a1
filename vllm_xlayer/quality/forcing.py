"""Teacher forcing in vLLM: the next tokens are given, and what the model thought of each is recorded.

So every key and value comes from the cache, as when the model writes an answer of its own. Runner V2 has this
built in (trace replay). On V1 a logits processor does it; vLLM's raw log-probabilities are from before any
processor. Whoever uses this compares the tokens that came back with those that were given.
"""

from typing import Any

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, RequestLogitsProcessor

KEY = "forced_token_ids"
"""In SamplingParams.extra_args: what runner V1 is to answer."""


class ForceTokens(AdapterLogitsProcessor):
    """Leaves one token to choose from in requests that say which."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> RequestLogitsProcessor | None:
        tokens = (params.extra_args or {}).get(KEY)
        if tokens is None:
            return None

        def force(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            kept = tokens[min(len(output_ids), len(tokens) - 1)]
            return torch.full_like(logits, -torch.inf).index_fill_(0, logits.new_tensor([kept]).long(), 0.0)

        return force


def engine_options(uses_runner_v2: bool) -> dict[str, Any]:
    """What an engine must be made with, so that `forced` works."""
    if uses_runner_v2:
        return {"enable_trace_replay": True}
    return {"logits_processors": [f"{__name__}:{ForceTokens.__name__}"]}


def forced(tokens: list[int], uses_runner_v2: bool, **settings: Any) -> SamplingParams:
    """Sampling parameters of a request that answers ``tokens``."""
    how: dict[str, Any] = (
        {"trace_decode_token_ids": tokens} if uses_runner_v2 else {"extra_args": {KEY: tokens}}
    )
    return SamplingParams(max_tokens=len(tokens), temperature=0.0, ignore_eos=True, **how, **settings)
