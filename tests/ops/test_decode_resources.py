"""Registers, spills and occupancy of the decode kernel are those of the committed table."""

import json
import re

import pytest

from benchmarks.resources import FILE, SM, blocks_of, kernels, parsed
from vllm_xlayer import ops

SAID = """
Fatbin elf code:
================
arch = sm_90a
 Function _ZN6xlayer9attention13decode_kernelINS0_6ConfigILi128ELi2ELi4EEELb1EEEvNS_20Nvfp4AttentionParamsE:
  REG:168 STACK:152 SHARED:1024 LOCAL:0 CONSTANT[0]:904 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN6xlayer9attention19decode_pages_kernelINS0_10PageConfigILi8EEELb0EEEvNS_20Nvfp4AttentionParamsE:
  REG:96 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:904 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN6xlayer18newest_step_kernelENS_16NewestStepParamsE:
  REG:30 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:904 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_what_cuobjdump_says_is_understood():
    kernel, pages = parsed(SAID, {(128, 16, 4): 34304, (128, 8, 9): 92240})
    assert (kernel.arch, kernel.head_size, kernel.rows, kernel.warps) == ("90a", 128, 16, 4)
    assert kernel.newest and (kernel.registers, kernel.spilled, kernel.shared_bytes) == (168, 152, 34304)
    assert kernel.blocks == 3
    assert (pages.rows, pages.warps, pages.newest, pages.registers, pages.blocks) == (8, 9, False, 96, 2)


@pytest.mark.parametrize(
    ("arch", "warps", "registers", "shared_bytes", "blocks"),
    [
        ("90a", 4, 128, 44_800, 4),  # registers
        ("90", 4, 32, 61_952, 3),  # shared memory: 3 x 62,976 of 233,472
        ("86", 4, 128, 44_800, 2),
        ("80", 16, 128, 27_648, 1),  # all registers
        ("120f", 16, 32, 0, 3),  # warps
        ("89", 4, 168, 200_000, 0),
        ("90a", 9, 96, 92_240, 2),  # five warps a scheduler
        ("90a", 9, 104, 92_240, 1),
    ],
)
def test_thread_blocks_of_an_sm(arch, warps, registers, shared_bytes, blocks):
    assert blocks_of(arch, warps, registers, shared_bytes) == blocks


@pytest.fixture(scope="module")
def built():
    if not ops.build_info()["cuda"]:
        pytest.skip("the extension was built without CUDA")
    return kernels()


@pytest.fixture(scope="module")
def committed():
    return json.loads(FILE.read_text())


def key(kernel):
    return (re.sub(r"\D", "", kernel["arch"]), *(kernel[n] for n in ("head_size", "rows", "warps", "newest")))


def test_as_committed(built, committed):
    if ops.build_info()["nvcc"].split(".")[:2] != committed["nvcc"].split(".")[:2]:
        pytest.skip(f"built by nvcc {ops.build_info()['nvcc']}, the table by {committed['nvcc']}")
    expected = {key(k): (k["registers"], k["spilled"], k["blocks"]) for k in committed["kernels"]}
    found = {key(vars(k)): (k.registers, k.spilled, k.blocks) for k in built}
    differs = {k: (v, expected.get(k)) for k, v in found.items() if v != expected.get(k)}
    assert not differs, "run `python -m benchmarks.resources --write`, then `python -m benchmarks.readme`"


def test_every_architecture_is_in_the_table(committed):
    assert {key(k)[0] for k in committed["kernels"]} == set(SM)


def test_without_newest_tokens_two_blocks_fit_and_little_is_spilled(committed):
    """Heads of 64 to 128, everywhere. What is put away once costs nothing; more would be in the loop."""
    for kernel in committed["kernels"]:
        if kernel["newest"] or kernel["warps"] != 4:
            continue
        assert kernel["spilled"] <= 16, kernel
        if kernel["head_size"] <= 128:
            assert kernel["blocks"] >= 2, kernel
