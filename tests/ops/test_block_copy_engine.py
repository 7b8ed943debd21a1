"""What copy_blocks gives a copy engine, on a fake device that begins a batch when all of it is there."""

import ctypes
import itertools
import random

import pytest
import torch
from reference.emulated import library, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

SIZE, GAPS = 48, (16, 32)
DENSE = (0, 0)
FIRST, SHARE = 64, 4
MERGED = (2 << 20) // SIZE
ALL = -1
INVALID_VALUE, LAUNCH_FAILURE = 1, 719


class Copy:
    """Of pairs of ids, submitted when made.

    Args:
        gaps: bytes between pieces of src and of dst.
        registration: byte of dst with which another registration of its memory begins.

    Attributes:
        error: CUDA's.
        last_error: CUDA's, of which the next launch would be told.
        batches: Copies of each that was submitted.
    """

    def __init__(
        self,
        src_ids: list[int],
        dst_ids: list[int],
        gaps: tuple[int, int] = GAPS,
        *,
        pinned: bool = True,
        batches_until_failure: int = ALL,
        registration: int | None = None,
    ) -> None:
        pairs = len(src_ids)
        generator = torch.Generator().manual_seed(pairs)
        # With pieces behind, for a copy that is too long to be seen.
        counts = [max(ids) + 2 + pairs for ids in (src_ids, dst_ids)]
        shapes = [(count, SIZE + gap) for count, gap in zip(counts, gaps, strict=True)]
        self.src, self.dst = (
            torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator) for shape in shapes
        )
        self.before = self.dst.clone()
        self.src_ids, self.dst_ids = torch.tensor(src_ids), torch.tensor(dst_ids)
        self.library = library("block_copy_engine")
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (self.src, self.dst, self.src_ids, self.dst_ids)]
        sizes = [ctypes.c_int64(n) for n in (self.src.stride(0), self.dst.stride(0), SIZE)]
        how = (ctypes.c_int64(pairs), pinned, ctypes.c_int64(batches_until_failure))
        second = None if registration is None else ctypes.c_void_p(self.dst.data_ptr() + registration)
        self.error = self.library.submit(*pointers[:2], *sizes, *pointers[2:], *how, second)
        self.last_error = self.library.last_error()
        submitted = (ctypes.c_int64 * max(1, 2 * pairs))()
        self.batches = list(submitted[: self.library.batches(submitted)])

    @classmethod
    def anywhere(cls, pairs: int, **how) -> "Copy":
        """Of so many pairs, sources repeated, of pieces with gaps."""
        generator = torch.Generator().manual_seed(pairs)
        src_ids = torch.randint(0, pairs + 3, (pairs,), generator=generator)
        dst_ids = torch.randperm(pairs + 5, generator=generator)[:pairs]
        return cls(src_ids.tolist(), dst_ids.tolist(), **how)

    def finish(self) -> int:
        """The device does all of it; how many commands that were."""
        return self.library.device_steps()

    def check(self, pairs: int) -> None:
        """So many pairs have been copied, the first ones, and nothing else was written to."""
        expected = self.before.clone()
        expected[self.dst_ids[:pairs], :SIZE] = self.src[self.src_ids[:pairs], :SIZE]
        assert torch.equal(self.dst, expected)

    def finish_and_check(self) -> None:
        assert self.error == 0
        self.finish()
        self.check(len(self.src_ids))


@pytest.mark.parametrize("pairs", [1, 63, 64, 65, 128, 129, 320, 321, 5000])
def test_every_pair_is_in_one_batch(pairs):
    copy = Copy.anywhere(pairs)
    copy.check(0)  # nothing is copied by the host
    assert copy.error == 0 and sum(copy.batches) == pairs
    assert copy.finish() == len(copy.batches)
    copy.check(pairs)


def test_the_engine_begins_early_and_is_not_out_of_work():
    """However long a batch takes to submit, up to four fifths of what it takes to copy."""
    batches = Copy.anywhere(5000).batches
    assert batches[0] == FIRST
    for i in range(1, len(batches)):
        assert batches[i] <= max(FIRST, sum(batches[:i]) // SHARE)
    assert len(batches) < 30  # each costs a call


def test_few_pairs_are_one_batch():
    """As the connector's: 56 rows of an 8B model are 32 MiB."""
    assert Copy.anywhere(56).batches == [56]


def test_pageable_memory_is_copied_one_by_one():
    copy = Copy.anywhere(100, pinned=False)
    assert (copy.error, copy.batches, copy.finish()) == (0, [], 100)
    copy.check(100)


def test_an_error_is_told_with_what_is_under_way():
    copy = Copy.anywhere(300, batches_until_failure=2)
    assert (copy.error, copy.batches) == (LAUNCH_FAILURE, [64, 64])
    copy.finish()
    copy.check(128)


UP, DOWN = [*range(7, 19)], [*range(18, 6, -1)]


@pytest.mark.parametrize(
    ("src_ids", "dst_ids", "copies"),
    [
        (UP, [i + 5 for i in UP], 1),
        (DOWN, [i - 3 for i in DOWN], 1),
        (UP, DOWN, 12),
        (DOWN, UP, 12),
        ([4] * 12, UP, 12),  # a source that occurs twice is copied as often
        (UP, [2 * i for i in UP], 12),
        ([2 * i for i in UP], UP, 12),
        ([*range(6), *range(20, 26)], UP, 2),
        (UP, [*range(6), *range(20, 26)], 2),
        ([*range(6), *range(4, -2, -1)][:10], [*range(10, 16), *range(4, 0, -1)], 2),
        ([3], [3], 1),
    ],
)
def test_pieces_side_by_side_at_both_ends_are_one_copy(src_ids, dst_ids, copies):
    copy = Copy(src_ids, dst_ids, DENSE)
    copy.finish_and_check()
    assert copy.batches == [copies]


@pytest.mark.parametrize("gaps", [GAPS, (16, 0), (0, 16)], ids=["both", "source", "destination"])
@pytest.mark.parametrize("ids", [UP, DOWN], ids=["up", "down"])
def test_pieces_with_gaps_are_not_one_copy(ids, gaps):
    copy = Copy(ids, ids, gaps)
    copy.finish_and_check()
    assert copy.batches == [len(ids)]


@pytest.mark.parametrize("seed", range(20))
def test_runs_of_all_kinds(seed):
    """Blocks that were given out and freed for a while."""
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        cuts = sorted(rng.sample(range(count), rng.randint(0, 40)))
        runs = [[*range(a, b)] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
        rng.shuffle(runs)
        return [i for run in runs for i in (run if rng.random() < 0.5 else run[::-1])]

    copy = Copy(ids(1000), ids(1000), DENSE)
    copy.finish_and_check()
    assert sum(copy.batches) == count_runs(copy.src_ids.tolist(), copy.dst_ids.tolist())


def count_runs(src_ids: list[int], dst_ids: list[int]) -> int:
    runs, step = 1, 0
    for (src, dst), (next_src, next_dst) in itertools.pairwise(zip(src_ids, dst_ids, strict=True)):
        up = next_src - src
        if abs(up) == 1 and up == next_dst - dst and step in (0, up):
            step = up
        else:
            runs, step = runs + 1, 0
    return runs


def test_a_run_is_not_one_copy_beyond_2_mib():
    """Copies of that size have the link's rate, so more would save nothing but calls."""
    ids = [*range(2 * MERGED + 1)]
    copy = Copy(ids, ids, DENSE)
    copy.finish_and_check()
    assert copy.batches == [3]


def test_runs_fill_batches_as_pieces_do():
    ids = [i for i in range(3 * 400) if i % 3]  # 400 runs of 2
    copy = Copy(ids, ids, DENSE)
    copy.finish_and_check()
    assert copy.batches == [*[FIRST] * 5, 5 * FIRST // SHARE]


@pytest.mark.parametrize("order", [UP, DOWN], ids=["up", "down"])
def test_a_run_from_one_registration_into_the_next_is_copied_piece_by_piece(order):
    """The second of two batches is refused; the others are as without."""
    others = [2 * i + 30 for i in range(63)]
    copy = Copy([*others, 500, *order, 502], [*others, 500, *order, 502], DENSE, registration=12 * SIZE)
    copy.finish_and_check()
    assert copy.batches == [64, 0, 13]
    assert copy.last_error == 0


def test_a_piece_that_cuda_refuses_is_told():
    ids = [*UP, 30, 32]
    copy = Copy(ids, ids, DENSE, registration=30 * SIZE + 1)
    assert copy.error == INVALID_VALUE
    copy.finish()
    copy.check(len(UP))
