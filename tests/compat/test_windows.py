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

from vllm_xlayer.connector.windows import incomplete, with_window_as_stored

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


@pytest.mark.parametrize("seed", range(50))
def test_only_chunks_with_all_their_blocks_are_stored(seed):
    pick = random.Random(seed)
    per_chunk, chunks = pick.randint(1, 4), pick.randint(1, 6)
    blocks = [pick.choice([0, 1, 1]) * (i + 1) for i in range(per_chunk * chunks + pick.randrange(per_chunk))]
    first = pick.randint(0, chunks)
    left_out = incomplete(blocks, first, per_chunk)
    for chunk in range(chunks):
        mine = blocks[chunk * per_chunk : (chunk + 1) * per_chunk]
        stored = mine[-1] != 0 and (chunk + 1) * per_chunk - 1 not in left_out
        assert chunk < first or stored == all(mine)
    assert all(last >= first * per_chunk for last in left_out)
