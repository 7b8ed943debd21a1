"""What a client hands on of a prefill engine's answer, and whether it can be used.

vLLM's scheduler and worker believe a request's kv_transfer_params. A client writes them, and where they are
not what a prefill engine says, they would end the engine or let the request wait for ever.
"""

import reprlib
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, ValidationError

MOST_RANKS = 1024
BlockId = Annotated[int, Field(ge=0, lt=1 << 31)]
"""NIXL takes 32 bits."""
BlockIds = list[BlockId] | tuple[BlockId, ...]

_shortened = reprlib.Repr()
_shortened.maxother = _shortened.maxstring = _shortened.maxlong = 60


class Problem(NamedTuple):
    """What does not fit: a name of its kind, of which there are few, and a text for people."""

    kind: str
    text: str


class Asked(BaseModel, strict=True):
    """What a request asks for. A field's description says what is expected, here and below."""

    do_remote_prefill: bool | None = Field(None, description="true or false")
    do_remote_decode: bool | None = Field(None, description="true or false")


class RemotePrompt(BaseModel, strict=True):
    """Where the rows of a prompt are. Of vLLM's other fields none is looked at."""

    remote_engine_id: str = Field(min_length=1, description="the prefill engine's id, a text")
    remote_request_id: str = Field(min_length=1, description="the request's id there, a text")
    remote_host: str = Field(min_length=1, description="the prefill engine's side channel, a text")
    remote_port: int = Field(ge=1, le=65535, description="its port, 1 to 65535")
    remote_block_ids: list[BlockIds] | tuple[BlockIds, ...] = Field(
        description="a list of block ids for each KV cache group, each a number from 0 on"
    )
    tp_size: int = Field(1, ge=1, le=MOST_RANKS, description=f"ranks there, 1 to {MOST_RANKS}")
    dcp_size: int = Field(1, ge=1, le=1, description="1: context parallelism is not served")
    pp_size: int = Field(1, ge=1, le=1, description="1: pipeline parallelism is not served")
    remote_registration_generation: int = Field(0, ge=0, description="a number from 0 on")


def problem_in(params: Any, blocks: Sequence[int] | None) -> Problem | None:
    """Why a request's prompt cannot be read from where its kv_transfer_params say, or None.

    Args:
        params: whatever came as kv_transfer_params, not None.
        blocks: how many blocks the prompt has in each KV cache group that is handed over; None for a request
            that reads none of them, since it was aborted before it began.
    """
    if not isinstance(params, dict):
        return Problem("kv_transfer_params", f"expected an object, got {_shortened.repr(params)}")
    if found := _first_error(Asked, params):
        return found
    if params.get("do_remote_decode"):
        # vLLM would have the request wait for rows that nobody reads; where both are true, once it has been
        # preempted.
        for name in ("do_remote_prefill", "remote_block_ids"):
            if value := params.get(name):
                text = (
                    f"{name}: expected nothing to read beside do_remote_decode, got {_shortened.repr(value)}"
                )
                return Problem(f"do_remote_decode with {name}", text)
    if not params.get("do_remote_prefill"):
        return None
    if found := _first_error(RemotePrompt, params):
        return found
    counts = [len(ids) for ids in params["remote_block_ids"]]
    if blocks is not None and counts != [*blocks]:
        return Problem(
            "number of blocks",
            f"remote_block_ids: expected {[*blocks]} blocks, by KV cache group, of this prompt, got "
            f"{_shortened.repr(counts)}",
        )
    return None


def without_reading(params: Any) -> dict[str, Any] | None:
    """kv_transfer_params of a request that is computed: what it asks for beside is kept, if it can be."""
    if not isinstance(params, dict):
        return None
    kept = {name: value for name, value in params.items() if name not in RemotePrompt.model_fields}
    return kept | {"do_remote_prefill": False, "do_remote_decode": params.get("do_remote_decode") is True}


def _first_error(model: type[BaseModel], params: dict[str, Any]) -> Problem | None:
    try:
        model.model_validate(params)
    except ValidationError as error:
        name = str(error.errors(include_url=False)[0]["loc"][0])
        got = _shortened.repr(params[name]) if name in params else "nothing"
        return Problem(name, f"{name}: expected {model.model_fields[name].description}, got {got}")
    return None
