"""How many chunks of a sliding window must be in the tier before a prompt's end.

vLLM stores those that its device cache would need for a hit, the window without the token that comes next.
Then it looks for the whole window, which is one chunk more where the window is a multiple of a chunk's tokens
and one: of such a model (Cohere 2: 4,096 and one) nothing would ever be found.
"""

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import GroupOffloadConfig
from vllm.v1.kv_cache_interface import SlidingWindowSpec


def with_window_as_stored(group: GroupOffloadConfig) -> GroupOffloadConfig:
    """The group's configuration, which looks for as many chunks as are stored."""
    spec, chunk = group.kv_cache_spec, group.tokens_per_chunk
    if not isinstance(spec, SlidingWindowSpec):
        return group
    before = spec.sliding_window - 1 + spec.extra_retained_tokens
    return group._replace(sliding_window_size_in_chunks=max(1, -(-before // chunk)))
