"""How a transfer is cut into submissions."""

import pytest
import torch

from vllm_xlayer.connector.transfers import BATCH_BYTES, batches, kernel_can


@pytest.mark.parametrize("row_bytes", [4608, 589824, BATCH_BYTES, 3 * BATCH_BYTES])
@pytest.mark.parametrize("rows", [0, 1, 28, 29, 5000])
def test_batches_are_bounded_and_lose_nothing(row_bytes, rows):
    src, dst = torch.randperm(rows), torch.randperm(rows)
    parts = list(batches(src, dst, row_bytes))
    assert torch.equal(torch.cat([a for a, _ in parts]), src)
    assert torch.equal(torch.cat([b for _, b in parts]), dst)
    sizes = [len(a) for a, _ in parts]
    assert all(n <= 1 or n * row_bytes <= BATCH_BYTES for n in sizes)
    assert all((n + 1) * row_bytes > BATCH_BYTES for n in sizes[:-1])


def test_what_the_kernel_cannot_do():
    """Pageable host memory; on a GPU also what tests/gpu/test_copies_gpu.py tries."""
    assert not kernel_can(torch.zeros(4, 4608, dtype=torch.uint8))
