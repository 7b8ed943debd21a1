"""The NVFP4 ops with the pages of hybrid models: one page holds as many bytes as a layer's state.

784, 1,920, 3,776 and 7,424 tokens are the blocks of a 27B Qwen, Qwen3-Next, Qwen3.5-35B and Nemotron-3-Nano.
Every byte around the valid tokens is 0xFF.
"""

import pytest
import torch
from reference import attention_ref as ref
from reference.attention_cases import Case, check_batch, check_case, make_batch
from reference.emulated import emulated, why_not
from reference.nvfp4_ref import encode_amax_6, scale_input
from reference.pools import POISON, make_pool, scalar

from vllm_xlayer import ops

PAGES = [784, 1920, 3776, 7424]
ENDS = (1, 15, 16, 17, 63, 65)
"""Distances from the start of a page, and from its end."""


@pytest.mark.parametrize(("group", "q_len"), [(16, 1), (6, 2)])
@pytest.mark.parametrize("block_size", PAGES)
def test_attention(device, block_size, group, q_len):
    """Requests that end before, at and behind the end of their first page, with heads of 256."""
    lengths = (7, block_size - 1, block_size, block_size + 1, block_size + 130)
    case = Case(lengths, q_len, kv_heads=1, group=group, head_size=256, block_size=block_size)
    check_case(case, device)


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
@pytest.mark.parametrize("block_size", PAGES)
def test_attention_emulated(block_size):
    """The CUDA kernel lane by lane; a window, so that it starts deep inside a large page."""
    case = Case(
        (block_size - 1, block_size + 33),
        kv_heads=1,
        group=16,
        head_size=256,
        block_size=block_size,
        window=100,
    )
    batch = emulated(make_batch(case, torch.device("cpu")))
    check_batch(batch, *batch.run())


@pytest.mark.parametrize("block_size", PAGES)
def test_write_and_gather(device, block_size):
    """Tokens at both ends of pages have the bytes that the format says; no other byte changes."""
    pool = make_pool(device, blocks=3, heads=1, block_size=block_size, head_size=256)
    places = [*(n - 1 for n in ENDS), *(block_size - n for n in ENDS)]
    slots = [2 * block_size + place for place in places]
    generator = torch.Generator().manual_seed(block_size)
    key, value = torch.randn(2, len(slots), 1, 256, generator=generator).bfloat16().to(device)
    one = scalar(1.0, device)
    ops.reshape_and_cache_nvfp4(key, value, pool.cache, torch.tensor(slots, device=device), one, one)

    start = pool.layer * pool.page_bytes
    written = torch.full_like(pool.raw.cpu(), POISON)
    found = pool.raw.cpu()
    for is_v, x in ((False, key), (True, value)):
        nibbles, scales = encode_amax_6(scale_input(x.float().cpu().numpy(), 1.0).reshape(-1, 16))
        data_at, scale_at = (
            torch.from_numpy(at).flatten(1)[places] + start
            for at in ref.byte_addresses(1, block_size, 256, is_v, False)
        )
        data = torch.from_numpy(nibbles).view(len(places), 128, 2)
        written[2, data_at] = data[..., 0] | (data[..., 1] << 4)
        written[2, scale_at] = torch.from_numpy(scales).view(len(places), 16).view(torch.uint8)
    assert torch.equal(found, written)

    out = torch.empty(2, block_size, 1, 256, device=device)
    table = torch.tensor([[0, 2]], dtype=torch.int32, device=device)
    first = torch.tensor([block_size], dtype=torch.int32, device=device)
    bounds = torch.tensor([0, block_size], dtype=torch.int32, device=device)
    ops.gather_nvfp4(pool.cache, table, first, bounds, one, one, *out)
    for got, x in zip(out, (key, value), strict=True):
        assert ((got[places] - x.float()).norm() <= 0.12 * x.float().norm()).item()  # the format's error
