"""Parts of blocks that vLLM finds in a hybrid model's cache (``--prefix-match-unit``): none yet to come.

A request that goes on inside a found block gets a copy of it before the step computes anything. A block is
found from the moment a request that will fill it is scheduled, though. Where both are of one step, what is
copied is what was there before, and answers are wrong: of a block that another request computes (one that
is resumed after preemption, say), or gets itself by a copy. For states vLLM lets such a request wait for
the next step. It does here for attention, too, by the same answer: more blocks than there are.

That is so where the cache is ours: with NVFP4, with XLayerConnector, and on the CPU reference platform.
"""

import sys
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from ..compat.dependence import PARTIAL_HITS_FEATURE, Patch
from ..compat.private import require
from .wrapping import wrap

OUR_CONNECTOR = "vllm_xlayer.connector.connector"
"""The module of XLayerConnector, imported where it is asked for."""

_hashed: WeakKeyDictionary[Any, set[int]] = WeakKeyDictionary()
"""Manager of an attention group -> ids of the blocks that got a hash in this step."""


def note_hashed(original: Any, manager: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    """The original, which gives blocks of a request that is scheduled their hashes."""
    first = manager.num_cached_block.get(request.request_id, 0)
    blocks = manager.req_to_blocks.get(request.request_id, ())[first:]
    before = [block.block_hash_num_tokens for block in blocks]
    result = original(manager, request, *args, **kwargs)
    changed = (
        block.block_id
        for block, was in zip(blocks, before, strict=True)
        if block.block_hash_num_tokens not in (None, was)
    )
    _hashed.setdefault(manager, set()).update(changed)
    return result


def wait_for_next_step(
    original: Any,
    manager: Any,
    request_id: Any,
    num_tokens: int,
    new_computed_blocks: Sequence[Any],
    total_computed_tokens: int,
    num_local_computed_tokens: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """The original, or more blocks than there are where a part of a block is found too early."""
    is_part = new_computed_blocks and num_local_computed_tokens % manager.block_size
    if is_part and new_computed_blocks[-1].block_id in _hashed.get(manager, ()) and _is_ours(manager):
        return manager.block_pool.num_gpu_blocks + 1
    return original(
        manager, request_id, num_tokens, new_computed_blocks, total_computed_tokens,
        num_local_computed_tokens, *args, **kwargs,
    )  # fmt: skip


def forget_hashed(original: Any, manager: Any) -> Any:
    """The original, which is told that a step begins."""
    _hashed.pop(manager, None)
    return original(manager)


def _is_ours(manager: Any) -> bool:
    from vllm.platforms import current_platform

    if current_platform.is_cpu() or OUR_CONNECTOR in sys.modules:
        return True
    spec = manager.kv_cache_spec
    specs = getattr(spec, "kv_cache_specs", {"": spec}).values()  # those of a group that has several
    return any(one.kv_quant_mode.is_nvfp4 for one in specs)


def _apply() -> None:
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager

    require(PARTIAL_HITS_FEATURE)
    wrap(FullAttentionManager, "cache_blocks", note_hashed, "vllm")
    wrap(FullAttentionManager, "get_num_blocks_to_allocate", wait_for_next_step, "vllm")
    wrap(FullAttentionManager, "new_step_starts", forget_hashed, "vllm")


PATCH = Patch(
    feature=PARTIAL_HITS_FEATURE,
    owner="vllm.v1.core.single_type_kv_cache_manager:FullAttentionManager",
    why="with --prefix-match-unit a hybrid model may answer from a part of a block that is copied before it "
    "is computed: leave --prefix-match-unit out",
    how="wrapped: a request that goes on inside a block which got its hash in this step waits for the next",
    remove_when="get_num_blocks_to_allocate looks at cached_blocks_this_step, as MambaManager's does",
    methods={
        "cache_blocks": "self request",
        "get_num_blocks_to_allocate": "self request_id num_tokens new_computed_blocks total_computed_tokens "
        "num_local_computed_tokens",
        "new_step_starts": "self",
    },
    attributes=("num_cached_block", "req_to_blocks", "block_size", "block_pool", "kv_cache_spec"),
    apply=_apply,
)
