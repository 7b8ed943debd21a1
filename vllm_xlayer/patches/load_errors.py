"""Failed loads in hybrid models: vLLM 0.26 recovers from them only where there is one KV cache group."""

import inspect

from .registry import FOUND, Finding, Patch, Phase, missing
from .wrapping import wrap

FEATURE = "failed loads in hybrid models"

_PARAMETERS = ["self", "requests", "invalid_block_ids", "num_scheduled_tokens", "evict_blocks"]


def _probe() -> Finding:
    from vllm.v1.core.sched.scheduler import Scheduler

    parameters = list(inspect.signature(Scheduler._update_requests_with_invalid_blocks).parameters)
    if parameters != _PARAMETERS:
        return missing(f"expected parameters {', '.join(_PARAMETERS)}, got {', '.join(parameters)}")
    return FOUND


def _apply() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap(Scheduler, "_update_requests_with_invalid_blocks", start_over, "vllm")


def start_over(
    original, scheduler, requests, invalid_block_ids, num_scheduled_tokens, evict_blocks=True
) -> tuple[set[str], int, set[int]]:
    """With several groups, a request that waits for blocks that failed to load starts from its first token.

    No shorter prefix will do: a sliding-window group holds only the window before the end of what was to
    be loaded. What other requests have in the device cache is found again when it is scheduled.
    """
    if len(scheduler.kv_cache_config.kv_cache_groups) == 1:
        return original(scheduler, requests, invalid_block_ids, num_scheduled_tokens, evict_blocks)
    affected, tokens = set(), 0
    for request in requests:
        groups = scheduler.kv_cache_manager.get_block_ids(request.request_id)
        if evict_blocks or not any(invalid_block_ids.intersection(group) for group in groups):
            continue  # running requests hold no block that a load of ours still fills
        affected.add(request.request_id)
        tokens += request.num_computed_tokens
        request.num_computed_tokens = 0
    return affected, tokens, set()


PATCHES = (
    Patch(
        target="vllm.v1.core.sched.scheduler.Scheduler._update_requests_with_invalid_blocks",
        why="a failed load ends the engine where a model has several KV cache groups",
        how="lets the request that waited for it start from its first token",
        upstream="none",
        remove_when="the method no longer unpacks exactly one group's block ids",
        phase=Phase.PLUGIN,
        probe=_probe,
        apply=_apply,
    ),
)
