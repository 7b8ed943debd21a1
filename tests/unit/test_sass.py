"""`benchmarks.sass` finds the loops over pages in what cuobjdump prints, and a tile's way through them."""

import pytest

from benchmarks.sass import PAGE_LOOPS, instructions, loops

DECODE = PAGE_LOOPS["decode_kernel"]
HEAD = '\t\tFunction : _Z13decode_kernelILb{}E\n\t.headerflags @"EF_CUDA_SM90"\n'


def sass(kernel: int, lines: list[str]) -> str:
    """As cuobjdump prints it: two lines an instruction, the second only its encoding."""
    text = HEAD.format(kernel)
    for i, line in enumerate(lines):
        text += f"        /*{16 * i:04x}*/                   {line} ;      /* 0x000fe20000000f00 */\n"
        text += "                                                        /* 0x000fca0000000f00 */\n"
    return text


# A loop that copies nothing at its end, and rescales where a maximum lags: by code that lies behind it.
PAGES = [
    "MOV R1, c[0x0][0x28]",
    "ISETP.GE.AND P0, PT, R2, R3, PT",  # 0x10: the loop
    "@P0 BRA 0x40",  # no copy left
    "LDGSTS.E.BYPASS.128 [R4], desc[UR4][R6.64]",
    "HMMA.16816.F32 R8, R12, R16, R8",  # 0x40
    "@!P1 BRA 0x90",  # lags
    "MUFU.EX2 R5, R5",  # 0x60
    "@P2 BRA 0x10",
    "EXIT",
    "FMUL R8, R8, R9",  # 0x90
    "FMUL.FTZ R9, R8, R9",
    "BRA 0x60",
    "BRA 0xc0",  # 0xc0: never reached
]
OTHER = ["HMMA.16816.F32 R8, R12, R16, R8", "LDG.E R1, desc[UR4][R2.64]", "@P0 BRA 0x0", "EXIT"]


def test_a_tile_that_is_copied_and_not_rescaled():
    ((kernel, code), (other, newest)) = instructions(sass(1, PAGES) + sass(0, OTHER))
    assert kernel.endswith("Lb1E") and other.endswith("Lb0E") and len(code) == len(PAGES)
    (loop,) = loops(kernel, code, DECODE)
    assert loop.head == 0x10
    assert loop.counts == {"logic": 1, "shared": 1, "HMMA": 1, "MUFU": 1, "other": 3}
    assert not list(loops(other, newest, DECODE))  # copies nothing


@pytest.mark.parametrize("masked", [1, 2, 3])
def test_the_shorter_of_two_tiles(masked):
    """Masked or not, a tile has as many products: the fewer instructions count."""
    lines = ["LDGSTS [R4], [R6.64]", f"@P0 BRA 0x{16 * (masked + 4):x}"]
    lines += [*["FSEL R1, R1, R2, P1"] * masked, "HMMA.16816.F32 R8, R12, R16, R8"]
    end = len(lines) + 2
    lines += [f"BRA 0x{16 * end:x}", "HMMA.16816.F32 R8, R12, R16, R8", "@P2 BRA 0x0", "EXIT"]
    ((kernel, code),) = instructions(sass(0, lines))
    (loop,) = loops(kernel, code, DECODE)
    assert loop.counts == {"shared": 1, "HMMA": 1, "other": 2}


def test_lanes_that_part_are_another_way():
    """The gather's loop: what a shuffle takes when its warp's lanes have parted is not counted."""
    lines = [
        "LDG.E R1, desc[UR4][R2.64]",
        "BRA.DIV UR4, 0x60",
        "SHFL.BFLY PT, R2, R1, 0x1, 0x1f",
    ]  # the loop: 0
    lines += ["STG.E.128 desc[UR4][R4.64], R8", "@P0 BRA 0x0", "EXIT"]  # 0x30
    lines += ["WARPSYNC.COLLECTIVE R3, 0x70", "SHFL.BFLY PT, R2, R1, R3, R4", "BRA 0x30"]
    ((kernel, code),) = instructions(sass(0, lines))
    (loop,) = loops(kernel, code, PAGE_LOOPS["nvfp4_gather_kernel"])
    assert loop.counts == {"shared": 1, "other": 4}
