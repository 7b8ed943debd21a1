"""The kernel of nvfp4_prefix_attention itself, lane by lane on the CPU (tests/emulation)."""

import pytest
import torch
from reference.emulated import why_not
from reference.prefix_cases import CASES, MERGED, EmulatedPrefixBatch, check, check_merge

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest.mark.parametrize("late_copies", [True, False], ids=["late", "early"])
@pytest.mark.parametrize("batch", CASES, ids=str)
def test_equals_attention_in_float64(batch, late_copies):
    check(batch, torch.device("cpu"), EmulatedPrefixBatch, late_copies=late_copies)


@pytest.mark.parametrize("batch", MERGED, ids=str)
def test_what_is_there_is_merged(batch):
    check_merge(batch, torch.device("cpu"), EmulatedPrefixBatch)
