"""NVFP4 attention with the pages of hybrid models: one page holds as many bytes as a layer's state.

784, 1,920, 3,776 and 7,424 tokens are the blocks of a 27B Qwen, Qwen3-Next, Qwen3.5-35B and Nemotron-3-Nano.
Every byte around the valid tokens is 0xFF.
"""

import pytest
from reference.attention_cases import Case
from reference.attention_checks import check_case

PAGES = [784, 1920, 3776, 7424]


@pytest.mark.parametrize(("group", "q_len"), [(16, 1), (6, 2)])
@pytest.mark.parametrize("block_size", PAGES)
def test_attention(device, block_size, group, q_len):
    """Requests that end before, at and behind the end of their first page, with heads of 256."""
    lengths = (7, block_size - 1, block_size, block_size + 1, block_size + 130)
    case = Case(lengths, q_len, kv_heads=1, group=group, head_size=256, block_size=block_size)
    check_case(case, device)
