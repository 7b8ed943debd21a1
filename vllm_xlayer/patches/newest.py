"""Starts of requests on model runner V2, told to those who keep something of each that runs."""

from ..compat.dependence import Patch
from ..config import Config
from .wrapping import wrap

WARM_UP = "_warmup_"
"""What the names of vLLM's own requests begin with. One of a user's that does has a row as any other."""


def tell_start(original, states, req_id, *args, **kwargs):
    """Calls the original, which gives a request a row: a new one, and one that was preempted."""
    from ..attention.newest_rows import start_on_v2

    result = original(states, req_id, *args, **kwargs)
    places = states.req_id_to_index
    # vLLM warms up with as many requests as may run: that is no word to the user.
    is_warm_up = str(req_id).startswith(WARM_UP)
    start_on_v2(states, states.max_num_reqs, places[req_id], places.values(), is_warm_up)
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


def tell_batch(original, states, input_batch, *args, **kwargs):
    """Calls the original, which builds a hybrid's metadata, and says meanwhile whose they are."""
    from ..attention.newest_rows import batch_of_hybrid

    with batch_of_hybrid(input_batch.idx_mapping_np):
        return original(states, input_batch, *args, **kwargs)


def _apply_to_hybrids() -> None:
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

    from ..attention.newest_rows import expect_batches_of_hybrids

    wrap(MambaHybridModelState, "prepare_attn", tell_batch, "vllm")
    expect_batches_of_hybrids()


HYBRIDS = Patch(
    feature="newest tokens in 16 bits, of hybrids",
    owner="vllm.v1.worker.gpu.model_states.mamba_hybrid:MambaHybridModelState",
    why="nobody says which requests a hybrid's step has, so none are kept, and asking for them is refused",
    how="takes the places of a batch's requests while their metadata is built",
    remove_when="vLLM gives CommonAttentionMetadata.req_idx to hybrids, too",
    methods={"prepare_attn": "self input_batch"},
    attributes=("idx_mapping",),
    apply=_apply_to_hybrids,
    not_needed=_not_needed,
)
