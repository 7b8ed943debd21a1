"""What copy_blocks gives a copy engine, on a fake device that begins a batch when all of it is there."""

import ctypes

import pytest
import torch
from reference.emulated import library, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

SIZE, GAPS = 48, (16, 32)
FIRST, SHARE = 64, 4
ALL = -1
LAUNCH_FAILURE = 719


class Copy:
    """Of so many pairs, sources repeated; submitted when made.

    Attributes:
        error: CUDA's.
        batches: Pairs of each that was submitted.
    """

    def __init__(self, pairs: int, *, pinned: bool = True, batches_until_failure: int = ALL) -> None:
        generator = torch.Generator().manual_seed(pairs)
        shapes = ((pairs + 3, SIZE + GAPS[0]), (pairs + 5, SIZE + GAPS[1]))
        self.src, self.dst = (
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes
        )
        self.before = self.dst.clone()
        self.src_ids = torch.randint(0, pairs + 3, (pairs,), generator=generator)
        self.dst_ids = torch.randperm(pairs + 5, generator=generator)[:pairs]
        self.library = library("block_copy_engine")
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (self.src, self.dst, self.src_ids, self.dst_ids)]
        sizes = [ctypes.c_int64(n) for n in (self.src.stride(0), self.dst.stride(0), SIZE)]
        how = (ctypes.c_int64(pairs), pinned, ctypes.c_int64(batches_until_failure))
        self.error = self.library.submit(*pointers[:2], *sizes, *pointers[2:], *how)
        submitted = (ctypes.c_int64 * max(1, pairs))()
        self.batches = list(submitted[: self.library.batches(submitted)])

    def finish(self) -> int:
        """The device does all of it; how many commands that were."""
        return self.library.device_steps()

    def check(self, pairs: int) -> None:
        """So many pairs have been copied, the first ones, and nothing else was written to."""
        expected = self.before.clone()
        expected[self.dst_ids[:pairs], :SIZE] = self.src[self.src_ids[:pairs], :SIZE]
        assert torch.equal(self.dst, expected)


@pytest.mark.parametrize("pairs", [1, 63, 64, 65, 128, 129, 320, 321, 5000])
def test_every_pair_is_in_one_batch(pairs):
    copy = Copy(pairs)
    copy.check(0)  # nothing is copied by the host
    assert copy.error == 0 and sum(copy.batches) == pairs
    assert copy.finish() == len(copy.batches)
    copy.check(pairs)


def test_the_engine_begins_early_and_is_not_out_of_work():
    """However long a batch takes to submit, up to four fifths of what it takes to copy."""
    batches = Copy(5000).batches
    assert batches[0] == FIRST
    for i in range(1, len(batches)):
        assert batches[i] <= max(FIRST, sum(batches[:i]) // SHARE)
    assert len(batches) < 30  # each costs a call


def test_few_pairs_are_one_batch():
    """As the connector's: 56 rows of an 8B model are 32 MiB."""
    assert Copy(56).batches == [56]


def test_pageable_memory_is_copied_one_by_one():
    copy = Copy(100, pinned=False)
    assert (copy.error, copy.batches, copy.finish()) == (0, [], 100)
    copy.check(100)


def test_an_error_is_told_with_what_is_under_way():
    copy = Copy(300, batches_until_failure=2)
    assert (copy.error, copy.batches) == (LAUNCH_FAILURE, [64, 64])
    copy.finish()
    copy.check(128)
