"""vllm_xlayer/nvfp4.py: page geometry and the torch codec, without the extension."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import nvfp4_ref as ref

from vllm_xlayer import nvfp4
from vllm_xlayer.nvfp4 import ScaleChoice


@pytest.mark.parametrize(("head_size", "content"), [(16, 18), (64, 72), (80, 90), (128, 144), (256, 288)])
def test_sizes(head_size, content):
    assert nvfp4.content_bytes(head_size) == content
    assert nvfp4.head_size_of(content) == head_size
    assert nvfp4.page_bytes(8, 16, head_size) == 8 * 16 * content


@pytest.mark.parametrize("bad", [0, -16, 8, 72, 100])
def test_head_sizes_that_are_refused(bad):
    with pytest.raises(ValueError, match=f"head_size: expected a positive multiple of 16, got {bad}"):
        nvfp4.content_bytes(bad)


@pytest.mark.parametrize("bad", [0, -18, 16, 128])
def test_contents_that_are_refused(bad):
    with pytest.raises(ValueError, match=f"content: expected a positive multiple of 18 bytes, got {bad}"):
        nvfp4.head_size_of(bad)


@pytest.mark.parametrize("head_size", [16, 64, 80])
def test_page_views_cover_every_byte_where_the_reference_says(head_size):
    """Number the bytes of a page; each view must show the numbers the reference computes."""
    blocks, heads, block_size = 2, 3, 16
    page = nvfp4.page_bytes(heads, block_size, head_size)
    raw = torch.zeros(blocks, 2 * page, dtype=torch.uint8)  # two layers
    cache = raw[:, page:].unflatten(-1, (heads, block_size, nvfp4.content_bytes(head_size)))
    views = nvfp4.page_views(cache)
    seen = np.zeros(page, int)
    for is_v, data, scale in ((False, views.k_data, views.k_scale), (True, views.v_data, views.v_scale)):
        for h in range(heads):
            for n in range(block_size):
                for view, width, locate in (
                    (data, head_size // 2, ref.data_byte),
                    (scale, head_size // 16, ref.scale_byte),
                ):
                    for i in range(width):
                        address = locate(heads, block_size, head_size, is_v, h, n, i)
                        seen[address] += 1
                        one = view[1, h, n, i]
                        assert one.data_ptr() == raw.data_ptr() + 3 * page + address
    assert (seen == 1).all()


@pytest.mark.parametrize(
    "cache",
    [
        torch.zeros(2, 2, 16, 72),
        torch.zeros(2, 16, 72, dtype=torch.uint8),
        torch.zeros(2, 16, 2, 72, dtype=torch.uint8).transpose(1, 2),
        torch.zeros(2, 2, 3, 16, 72, dtype=torch.uint8)[:, :, 1],
    ],
    ids=["dtype", "rank", "NHD", "BHLNC"],
)
def test_page_views_refuse_pages_that_are_not_dense(cache):
    with pytest.raises(ValueError, match=r"kv_cache: expected .*got "):
        nvfp4.page_views(cache)


@given(tokens=st.integers(1, 8), quarters=st.integers(1, 6), heads=st.integers(1, 3))
def test_swizzle_is_the_reference_permutation(tokens, quarters, heads):
    block_size, scales = 4 * tokens, 4 * quarters
    linear = torch.arange(heads * block_size * scales).view(heads, block_size, scales)
    swizzled = nvfp4.swizzle(linear)
    assert torch.equal(nvfp4.unswizzle(swizzled), linear)
    head_size = scales * 16
    start = ref.scale_byte(heads, block_size, head_size, True, 0, 0, 0)
    flat = swizzled.flatten().tolist()
    for h, n, s in (
        (0, 0, 0),
        (heads - 1, block_size - 1, scales - 2),
        (0, 2, 1),
        (heads - 1, 1, scales - 1),
    ):
        where = ref.scale_byte(heads, block_size, head_size, True, h, n, s, swizzled=True) - start
        assert flat[where] == linear[h, n, s]


@pytest.mark.parametrize("shape", [(16, 5), (6, 8)])
def test_swizzle_refuses_other_sizes(shape):
    with pytest.raises(ValueError, match=r"scale: expected .*multiples of 4"):
        nvfp4.swizzle(torch.zeros(shape))


def test_decode_of_every_scale_with_every_nibble():
    scale = torch.arange(256, dtype=torch.uint8).view(256, 1)
    nibbles = np.tile(np.arange(16, dtype=np.uint8), (256, 1))
    data = torch.from_numpy(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4))
    expected = ref.dequantise(nibbles, np.arange(256))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert np.array_equal(
            nvfp4.decode(data, scale, 1.0, dtype).double().numpy(), expected, equal_nan=True
        )


@pytest.mark.parametrize("global_scale", [1.0, 0.013, 100.0])
def test_encode_is_the_reference(global_scale):
    x = torch.randn(2048, 16, generator=torch.Generator().manual_seed(0)) * 5
    x[0, 3], x[1, 4], x[2, :] = torch.nan, -torch.inf, 0.0
    data, scale = nvfp4.encode(x, global_scale, ScaleChoice.AMAX_6)
    nibbles, expected_scale = ref.encode_amax_6(ref.scale_input(x.numpy(), global_scale))
    assert np.array_equal(scale.flatten().numpy(), expected_scale)
    assert np.array_equal(data.numpy(), nibbles[:, 0::2] | (nibbles[:, 1::2] << 4))


def test_pages_keep_elements_as_drawn():
    """Every lane of 16 bits beside others, packed and unpacked by this package and by the reference."""
    lanes = np.arange(1 << 16, dtype="<u2")
    data = np.stack((lanes, np.random.default_rng(2).permutation(lanes)), -1).view(np.uint8)
    nibbles = ref.unpacked(data)
    usual = torch.from_numpy(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4))
    assert np.array_equal(nvfp4.unpack(torch.from_numpy(data)).numpy(), usual.numpy())
    assert np.array_equal(nvfp4.pack(usual).numpy(), data) and np.array_equal(ref.packed(nibbles), data)


@pytest.mark.parametrize("choice", list(ScaleChoice))
def test_relative_error_on_gaussian_data(choice):
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(1))
    error = nvfp4.decode(*nvfp4.encode(x, 1.0, choice)) - x
    assert error.norm() / x.norm() <= 0.12
