"""Starts of requests on model runner V2, told to those who keep something of each that runs."""

from ..compat.dependence import Patch
from ..config import Config
from .wrapping import wrap


def tell_start(original, states, req_id, *args, **kwargs):
    """Calls the original, which gives a request a row: a new one, and one that was preempted."""
    from ..attention.newest_rows import start_on_v2

    result = original(states, req_id, *args, **kwargs)
    places = states.req_id_to_index
    start_on_v2(states, states.max_num_reqs, places[req_id], places.values())
    return result


def _not_needed() -> str | None:
    return "VLLM_XLAYER_NEWEST_TOKENS is 0" if Config.load().newest_tokens == 0 else None


def _apply() -> None:
    from vllm.v1.worker.gpu.states import RequestState

    from ..attention.newest_rows import expect_v2_starts

    wrap(RequestState, "add_request", tell_start, "vllm")
    expect_v2_starts()


PATCH = Patch(
    feature="newest tokens in 16 bits",
    owner="vllm.v1.worker.gpu.states:RequestState",
    why="a request could read another's newest tokens, so none are kept, and asking for them is refused",
    how="is told of each request that is put into a place of model runner V2's table",
    remove_when="vLLM tells attention backends when a row's request is another one",
    methods={"add_request": "self req_id"},
    attributes=("max_num_reqs", "req_id_to_index"),
    apply=_apply,
    not_needed=_not_needed,
)
