"""Sliding windows: the connector looks for as many chunks as vLLM stores, those a hit on the device needs.

And of what is stored each block lies in its place."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.distributed.kv_transfer.kv_connector.v1.offloading import config as upstream_config
from vllm.distributed.kv_transfer.kv_connector.v1.offloading import scheduler as upstream_scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_xlayer.connector.windows import misplaced, with_window_as_stored

PAGE = dict(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)


class Group(SimpleNamespace):
    def _replace(self, **changes):
        return Group(**vars(self) | changes)


def found(window, chunk):
    spec = SlidingWindowSpec(sliding_window=window, **PAGE)
    group = Group(kv_cache_spec=spec, tokens_per_chunk=chunk, sliding_window_size_in_chunks=None)
    return with_window_as_stored(group).sliding_window_size_in_chunks


def upstreams(window, chunk):
    module = (
        upstream_config
        if hasattr(upstream_config, "get_sliding_window_size_in_chunks")
        else upstream_scheduler
    )
    spec = SlidingWindowSpec(sliding_window=window, **PAGE)
    return module.get_sliding_window_size_in_chunks(spec, chunk)


@pytest.mark.parametrize("chunk", [16, 48])
def test_the_tokens_before_the_next_one(chunk):
    """At a chunk's end the next token sees all but one of a window's tokens before it."""
    for window in range(1, 150):
        seen = range(1000 * chunk - window + 1, 1000 * chunk)
        assert found(window, chunk) == max(1, len({token // chunk for token in seen})), window


def test_vllm_looks_for_one_more_where_that_matters():
    """Once it does not, connector/windows.py can go."""
    different = [window for window in range(2, 200) if found(window, 16) != upstreams(window, 16)]
    assert different == list(range(17, 200, 16))
    assert upstreams(4097, 16) == found(4097, 16) + 1 == math.ceil(4097 / 16)


def test_other_groups_are_left_alone():
    group = Group(kv_cache_spec=FullAttentionSpec(**PAGE), tokens_per_chunk=16)
    assert with_window_as_stored(group) is group


@pytest.mark.parametrize("seed", range(200))
def test_what_is_stored_lies_in_its_place(seed):
    """As vLLM's workers and ours take a job: from the place of its first block on, one after the other."""
    pick = random.Random(seed)
    per_chunk, chunks = pick.randint(2, 4), pick.randint(1, 6)
    blocks = [pick.choice([0, 1, 1]) * (i + 1) for i in range(per_chunk * chunks + pick.randrange(per_chunk))]
    first = pick.randint(0, chunks)
    left_out = misplaced(blocks, first, per_chunk)
    lasts = range((first + 1) * per_chunk - 1, len(blocks), per_chunk)
    could = [last for last in lasts if blocks[last]]
    stored = [last for last in could if last not in left_out]
    assert sorted([*left_out, *stored]) == could
    # One with all its blocks is never left out, and one that begins late only for another before it.
    for last in left_out:
        assert 0 in blocks[last + 1 - per_chunk : last + 1]
    places = [i for last in stored for i in range(last + 1 - per_chunk, last + 1)]
    held = [i for i in places if blocks[i]]
    if held:
        begin = places.index(held[0])
        assert begin < per_chunk and places[begin : begin + len(held)] == held
    assert not could or stored or any(blocks[could[0] + 1 - per_chunk : could[0]])
