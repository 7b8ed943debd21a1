"""Copies of blocks in the layouts of hybrid models: every byte of a page, whichever layer comes first."""

import sys

import pytest
import torch

pytest.importorskip("vllm")

from vllm.v1.worker import utils

from vllm_xlayer.patches import block_copies

BLOCKS, PAGE, STATE = 4, 96, 40


def views(memory, block_stride, offset):
    """Of a state, and of attention with 2 heads and 3 tokens, which share pages [BLOCKS, PAGE] bytes."""
    return [
        torch.as_strided(memory, (BLOCKS, 1, 1, STATE), (block_stride, STATE, STATE, 1), offset),
        torch.as_strided(memory, (BLOCKS, 2, 3, 16), (block_stride, 48, 16, 1), offset),
    ]


@pytest.mark.parametrize("state_first", [True, False])
@pytest.mark.parametrize("layout", ["LBHNC", "BLHNC"])
def test_pages_are_copied_whole(layout, state_first):
    block_copies.PATCH.apply()  # as the plugin does; where it is applied already nothing changes
    memory = torch.randint(0, 128, (2 * BLOCKS * PAGE,), dtype=torch.int8)
    before = memory.clone()
    block, layer = (PAGE, BLOCKS * PAGE) if layout == "LBHNC" else (2 * PAGE, PAGE)
    caches = [view for i in range(2) for view in views(memory, block, i * layer)]
    utils.copy_kv_cache_blocks_inplace(caches if state_first else caches[::-1], BLOCKS, [(1, 3)])
    for i in range(2):
        pages = torch.as_strided(memory, (BLOCKS, PAGE), (block, 1), i * layer)
        expected = torch.as_strided(before, (BLOCKS, PAGE), (block, 1), i * layer).clone()
        expected[3] = expected[1]
        assert torch.equal(pages, expected)


@pytest.mark.parametrize("nvfp4", [False, True])
def test_on_gpus_only_where_layers_are_ours(monkeypatch, nvfp4):
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setitem(sys.modules, block_copies.OUR_LAYERS, sys)
    if not nvfp4:
        monkeypatch.delitem(sys.modules, block_copies.OUR_LAYERS)
    caches, given = [torch.zeros(2), torch.zeros(3)], []
    block_copies.copy_longest_views(lambda them, *_: given.extend(them), caches, BLOCKS, [(1, 3)])
    assert [len(cache) for cache in given] == ([3, 2] if nvfp4 else [2, 3])
