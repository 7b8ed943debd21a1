"""How copy_blocks brings pairs to the device, on a fake one that does its work as late as CUDA allows."""

import ctypes
import itertools
import random

import pytest
from reference.emulated import library, why_not

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

FEW = 448
SLOTS = 32
SLOT_PAIRS = 1 << 16
ALL = 1 << 40
STREAMS = 3
LAUNCH_FAILURE = 719
fresh = itertools.count()


class Device:
    """A fake device that nothing was done on yet."""

    def __init__(self, *, out_of_memory: bool = False, launch_fails: bool = False) -> None:
        self.library = library("block_copy_pairs")
        self.library.count.restype = ctypes.c_int64
        self.library.reset(next(fresh), out_of_memory, launch_fails)
        self.submitted = 0

    def submit(self, stream: int, pairs: int) -> int:
        error = self.library.submit(stream, ctypes.c_int64(pairs), ctypes.c_int64(self.submitted))
        self.submitted += pairs
        return error

    def steps(self, seed: int = 0, most: int = ALL) -> None:
        self.library.device_steps(ctypes.c_int64(seed), ctypes.c_int64(most))

    @property
    def counts(self) -> dict[str, int]:
        names = ("right", "wrong", "uploaded", "with_launch", "slots")
        return {name: self.library.count(i) for i, name in enumerate(names)}

    def check_all_right(self) -> None:
        self.steps()
        assert (self.counts["right"], self.counts["wrong"]) == (self.submitted, 0)


@pytest.mark.parametrize("seed", range(20))
def test_every_kernel_sees_its_own_pairs(seed):
    device, rng = Device(), random.Random(seed)
    for _ in range(200):
        assert device.submit(rng.randrange(STREAMS), rng.randint(1, 2 * FEW)) == 0
        device.steps(rng.randrange(1 << 30), rng.randint(0, 8))
    device.check_all_right()
    assert 0 < device.counts["slots"] <= SLOTS


def test_threads():
    device = Device()
    device.library.submit_from_threads(ctypes.c_int64(4), ctypes.c_int64(300))
    device.submitted = sum(FEW + 1 + i % 50 for i in range(300)) * 4
    device.check_all_right()


def test_a_slot_is_used_again_once_its_copy_is_done():
    device = Device()
    for _ in range(10):
        device.submit(0, FEW + 1)
        device.steps()
    device.check_all_right()
    assert device.counts["slots"] == 1


def test_the_upload_does_not_wait_for_the_callers_stream():
    device = Device()
    device.submit(0, FEW + 1)
    device.submit(0, FEW + 2)
    device.library.upload_steps()
    for _ in range(2):  # all that is left to the caller's stream: to see the upload's event, and to copy
        assert device.library.caller_step(0)
    assert device.counts["right"] == FEW + 1


def test_few_pairs_travel_with_the_launch():
    device = Device()
    device.submit(0, FEW)
    device.check_all_right()
    assert device.counts["slots"] == 0


def test_no_more_than_so_many_slots():
    device = Device()
    for _ in range(SLOTS + 5):
        assert device.submit(0, FEW + 1) == 0
    assert (device.counts["slots"], device.counts["with_launch"]) == (SLOTS, 5)
    device.steps()
    device.submit(0, FEW + 1)
    assert (device.counts["slots"], device.counts["with_launch"]) == (SLOTS, 5)
    device.check_all_right()


def test_more_pairs_than_a_slot_has():
    device = Device()
    device.submit(0, 2 * SLOT_PAIRS + FEW + 1)
    device.check_all_right()
    assert device.counts["uploaded"] == 3


def test_without_memory_they_travel_with_launches():
    device = Device(out_of_memory=True)
    assert device.submit(0, FEW + 1) == 0
    device.check_all_right()
    assert device.counts["with_launch"] == 1


def test_an_error_of_the_launch_is_told_and_its_slot_not_used_again():
    device = Device(launch_fails=True)
    assert device.submit(0, FEW + 1) == LAUNCH_FAILURE
    device.steps()
    assert device.submit(0, FEW + 1) == LAUNCH_FAILURE
    assert device.counts["slots"] == 2
