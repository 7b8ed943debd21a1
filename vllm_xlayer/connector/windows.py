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


def misplaced(blocks: Sequence[int], first_chunk: int, per_chunk: int) -> list[int]:
    """Of chunks that are to be stored in one job: those whose blocks would get others' places in host memory.

    A block that has left the window may have another owner, and is not stored. vLLM tells the worker which
    blocks remain and the place of the first one, and it takes the others to follow: so only the chunk that
    comes first may lack blocks, and those before the others.

    Args:
        blocks: of a request; 0 for those that are gone. A chunk without its last one is not stored.
        first_chunk: that may be in the job.
        per_chunk: blocks of one chunk.

    Returns:
        Indices of the chunks' last blocks.
    """
    found, begun = [], False
    for last in range((first_chunk + 1) * per_chunk - 1, len(blocks), per_chunk):
        if blocks[last] == 0:
            continue
        chunk = blocks[last + 1 - per_chunk : last + 1]
        gone = chunk.count(0)
        if gone and (begun or any(chunk[:gone])):
            found.append(last)
        else:
            begun = True
    return found
