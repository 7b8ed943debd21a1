"""Leaves out of a step the requests of which the connector's scheduler side has nothing to learn.

vLLM goes through every request in every step, and each time past all hashes of its tokens. A decoding
request has news in few steps: a block, a chunk to store, or a state of it that was copied for the connector.
"""

from collections.abc import Callable
from dataclasses import replace

from vllm.v1.core.sched.output import SchedulerOutput


def without_idle(output: SchedulerOutput, has_news: Callable[[str, int], bool]) -> SchedulerOutput:
    """The step without the requests that were running before, get no block and have no news.

    It is for the connector only: the tokens of those that stay are not in it.

    Args:
        has_news: of a request's id and its tokens in this step.
    """
    cached, scheduled = output.scheduled_cached_reqs, output.num_scheduled_tokens
    states = output.kv_connector_block_state
    handed_over = states.boundary_state_offloads if states is not None else {}
    kept = [
        i
        for i, (request, blocks) in enumerate(zip(cached.req_ids, cached.new_block_ids, strict=True))
        if blocks is not None
        or request in cached.resumed_req_ids
        or request in handed_over
        or has_news(request, scheduled[request])
    ]
    if len(kept) == len(cached.req_ids):
        return output
    stay = replace(
        cached,
        req_ids=[cached.req_ids[i] for i in kept],
        new_token_ids=[],
        all_token_ids={},
        new_block_ids=[cached.new_block_ids[i] for i in kept],
        num_computed_tokens=[cached.num_computed_tokens[i] for i in kept],
        num_output_tokens=[cached.num_output_tokens[i] for i in kept],
    )
    gone = set(cached.req_ids).difference(stay.req_ids)
    return replace(
        output,
        scheduled_cached_reqs=stay,
        num_scheduled_tokens={request: n for request, n in scheduled.items() if request not in gone},
    )


def without_reloaded(output: SchedulerOutput, reloaded: Callable[[str], bool]) -> SchedulerOutput:
    """The step without the preemptions of requests that are back in the same step, after a reset that takes
    running requests along.

    vLLM sees to it that what a preempted request had under way ends. Of such a request only a new load is,
    which vLLM before 0.33 takes for a store: it would end the engine.

    Args:
        reloaded: of a request's id.
    """
    preempted = output.preempted_req_ids or set()
    stay = {request for request in preempted if not reloaded(request)}
    return output if len(stay) == len(preempted) else replace(output, preempted_req_ids=stay)


def without_unwanted_states(output: SchedulerOutput, most: Callable[[str], int]) -> SchedulerOutput:
    """The step without states that end with a later token than a request wants stored.

    Of parts of blocks vLLM asserts that there are none, while a request may want any number
    (``max_offload_tokens`` in its kv_transfer_params): it would end the engine.

    Args:
        most: tokens that may be stored of a request, by its id.
    """
    states = output.kv_connector_block_state
    if states is None or not states.boundary_state_offloads:
        return output
    wanted = {
        request: [entry for entry in entries if entry[2] <= limit]
        for request, entries in states.boundary_state_offloads.items()
        if (limit := most(request))
    }
    return replace(output, kv_connector_block_state=replace(states, boundary_state_offloads=wanted))
