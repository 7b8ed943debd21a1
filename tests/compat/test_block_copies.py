"""Copies of blocks in the layouts of hybrid models: every byte of a page, whichever layer comes first."""

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
