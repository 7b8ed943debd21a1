"""Which requests attend to their pages as they are (vllm_xlayer.attention.prefix)."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_xlayer.attention.prefix import LIMITS, PrefixKernel, on_device

# Llama-3.1-8B on an H200.
KERNEL = PrefixKernel(rows=128, group=4, kv_heads=8, at_once=132, newest_tokens=64, limits=LIMITS)


def lens(requests, kernel=KERNEL):
    """requests: (tokens in the cache, new ones) of each."""
    cached, new = (np.array(column, dtype=np.int64) for column in zip(*requests, strict=True))
    found = kernel.lens(new, cached + new)
    return None if found is None else found.tolist()


@pytest.mark.parametrize(
    ("requests", "used"),
    [(1, False), (3, False), (4, True), (5, False), (6, False), (7, True), (8, True), (9, False), (64, True)],
)
def test_a_device_that_is_mostly_busy(requests, used):
    """100 new tokens are 32 thread blocks: of 132 at once, three requests leave a quarter idle, and of the
    two waves of five requests the second is nearly empty."""
    assert (lens([(8192, 100)] * requests) is not None) == used


def test_whole_tiles_of_pages_that_newest_tokens_do_not_cover():
    assert lens([(8192 + 9, 100)] * 8) == [8192 - 64] * 8
    assert lens([(8192 + 9, 100)] * 8, replace(KERNEL, newest_tokens=0)) == [8192] * 8


def test_requests_of_a_batch_apart():
    """With few cached tokens, and with many new ones, the workspace is faster."""
    batch = [(8192, 100)] * 16 + [
        (LIMITS.least_tokens + 63, 100),
        (8192, 32 * LIMITS.most_blocks + 1),
        (0, 100),
    ]
    assert lens(batch) == [8128] * 16 + [0, 0, 0]
    batch = [(8192, 100)] * 16 + [(LIMITS.least_tokens + 64, 100), (8192, 32 * LIMITS.most_blocks)]
    assert lens(batch) == [8128] * 16 + [1024, 8128]


def test_a_batch_without_such_requests():
    assert lens([(0, 512)] * 64) is None


def test_thread_blocks_are_for_requests_that_attend_to_something():
    starts = np.array([8128, 0, 1024])
    made = on_device(starts, np.array([7, 107, 2107, 2137]), torch.zeros(3, 1, dtype=torch.int32))
    assert made.max_query_len == 100 and made.tokens == slice(7, 2137)
    assert made.lens.tolist() == starts.tolist() and made.query_starts.tolist() == [0, 100, 2100, 2130]
