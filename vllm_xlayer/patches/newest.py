"""Starts of requests on model runner V2, told to those who keep something of each that runs."""

from ..compat.dependence import Patch
from ..config import Config
from .wrapping import wrap


def tell_start(original, states, req_id, *args, **kwargs):
    """Calls the original, which gives a request a row: a new one, and one that was preempted."""
    from ..attention.newest import count_v2_start

    result = original(states, req_id, *args, **kwargs)
    count_v2_start(states, states.max_num_reqs, states.req_id_to_index[req_id])
    return result


def _not_needed() -> str | None:
    return None if Config.load().newest_tokens else "VLLM_XLAYER_NEWEST_TOKENS is 0"


def _apply() -> None:
    from vllm.v1.worker.gpu.states import RequestState

    from ..attention.newest import expect_v2_starts

    wrap(RequestState, "add_request", tell_start, "vllm")
    expect_v2_starts()


PATCH = Patch(
    feature="newest tokens in 16 bits",
    owner="vllm.v1.worker.gpu.states:RequestState",
    why="a request could read another's newest tokens, so VLLM_XLAYER_NEWEST_TOKENS is refused",
    how="counts the requests that are put into each row of model runner V2's table",
    remove_when="vLLM tells attention backends when a row's request is another one",
    methods={"add_request": "self req_id"},
    attributes=("max_num_reqs", "req_id_to_index"),
    apply=_apply,
    not_needed=_not_needed,
)
