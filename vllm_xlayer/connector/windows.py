"""Sliding windows: how many chunks must be in the tier before a prompt's end, and which can be stored.

vLLM stores those that its device cache would need for a hit, the window without the token that comes next.
Then it looks for the whole window, which is one chunk more where the window is a multiple of a chunk's tokens
and one: of such a model (Cohere 2: 4,096 and one) nothing would ever be found.
"""

from collections.abc import Sequence

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import GroupOffloadConfig
from vllm.v1.kv_cache_interface import SlidingWindowSpec


def with_window_as_stored(group: GroupOffloadConfig) -> GroupOffloadConfig:
    """The group's configuration, which looks for as many chunks as are stored."""
    spec, chunk = group.kv_cache_spec, group.tokens_per_chunk
    if not isinstance(spec, SlidingWindowSpec):
        return group
    before = spec.sliding_window - 1 + spec.extra_retained_tokens
    return group._replace(sliding_window_size_in_chunks=max(1, -(-before // chunk)))


def incomplete(blocks: Sequence[int], first_chunk: int, per_chunk: int) -> list[int]:
    """Chunks of which some blocks are gone: they have left the window, and may have other owners.

    vLLM stores what is left of them under the whole chunk's key. But who finds the key may need all: a hit
    that ends with the chunk, or, where groups have chunks of different size, in it. And the worker, which is
    told the place of the first block only, takes the others of a job to follow it.

    Args:
        blocks: of a request; 0 for those that are gone. A chunk without its last one is not stored.
        first_chunk: that may be stored.
        per_chunk: blocks of one chunk.

    Returns:
        Indices of the chunks' last blocks.
    """
    lasts = range((first_chunk + 1) * per_chunk - 1, len(blocks), per_chunk)
    return [last for last in lasts if blocks[last] and 0 in blocks[last + 1 - per_chunk : last]]
