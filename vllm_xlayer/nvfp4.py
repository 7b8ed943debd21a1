"""The NVFP4 KV format: constants, enums and page geometry. Pure Python and torch.

Format (one K or V vector of one token and KV head, ``head_size`` D a multiple of 16):
D/2 bytes of packed e2m1 (the low nibble is the even element) and D/16 bytes of e4m3
block scales. value = e2m1 * block scale * global scale.

A page is one layer's part of a block of N tokens and H heads, dense:

    [K data H*N*D/2][K scale H*N*D/16][V data H*N*D/2][V scale H*N*D/16]

vLLM sees a page as (H, N, C) bytes with C = 2 * (D/2 + D/16): the shape says the size,
the bytes inside are ordered as above.
"""

from enum import IntEnum

GROUP = 16
"""Elements that share one e4m3 block scale."""


class ScaleOrder(IntEnum):
    """Order of V's block scales inside a page. K's are always linear: [H][N][D/16]."""

    LINEAR = 0
    SWIZZLED = 1
    """4-token groups as trtllm-gen reads them on sm_100: linear (t, s) is stored at
    t' = (t//4)*4 + s//(S/4), s' = (s % (S/4))*4 + t%4 with S = D/16."""


class ScaleChoice(IntEnum):
    """How the writer picks a group's block scale."""

    AMAX_6 = 0
    FOUR_OVER_SIX = 1
    """The better of amax/6 and amax/4 by squared error (ties: amax/6)."""
    BEST_OF_9 = 2
    """The best of the divisors 3, 3.5, ..., 7 by squared error."""
