"""An independent NVFP4 reference in numpy float64, written from the format's definition.

It shares no code with vllm_xlayer, and favours being obviously right over speed: values are looked up in
tables made from the definition of each small float, rounding is a search for the nearest table entry, and a
page is addressed byte by byte.
"""

import numpy as np

GROUP = 16
E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
DIVISORS = {0: [6.0], 1: [6.0, 4.0], 2: [6.0, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.5, 7.0]}


def e4m3_value(code: int) -> float:
    """Sign, 4 exponent bits of bias 7, 3 mantissa bits; all ones are NaN, there is no Inf."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 15, code & 7
    if (exponent, mantissa) == (15, 7):
        return float("nan")
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


E4M3 = np.array([e4m3_value(code) for code in range(256)])
E4M3_POSITIVE = E4M3[:0x7F]  # 0 .. 448, ascending with the code


def nearest_code(table: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The code of the entry of an ascending table nearest to x >= 0; ties to the even code; saturating."""
    x = np.asarray(x, dtype=np.float64)
    above = np.clip(np.searchsorted(table, x), 1, len(table) - 1)
    below = above - 1
    to_below, to_above = x - table[below], table[above] - x
    tie = np.where(below % 2 == 0, below, above)
    code = np.where(to_below < to_above, below, np.where(to_below > to_above, above, tie))
    return np.where(x >= table[-1], len(table) - 1, code).astype(np.uint8)


def scale_input(x: np.ndarray, global_scale: float) -> np.ndarray:
    """x' = float32(x) * (1 / global) in float32: the definition's first step."""
    with np.errstate(all="ignore"):
        return x.astype(np.float32) * (np.float32(1.0) / np.float32(global_scale))


def candidate_scales(scaled: np.ndarray, choice: int) -> np.ndarray:
    """[candidates, groups] e4m3 codes for scaled inputs [groups, 16] without NaN."""
    amax = np.abs(scaled).max(-1)
    quotients = [amax / np.float32(d) for d in DIVISORS[choice]]
    assert all(q.dtype == np.float32 for q in quotients)
    return np.stack([nearest_code(E4M3_POSITIVE, q) for q in quotients])


def quantise(scaled: np.ndarray, scale_code: np.ndarray) -> np.ndarray:
    """[groups, 16] nibbles for scaled inputs without NaN under given block scales [groups]."""
    s = E4M3[scale_code][:, None]
    with np.errstate(all="ignore"):
        # float64 division: a quotient that is not a tie differs from one by 2^-24 or more.
        magnitude = nearest_code(E2M1, np.where(s > 0, np.abs(scaled.astype(np.float64)) / s, 0.0))
    nibble = magnitude | (np.signbit(scaled).astype(np.uint8) << 3)
    return np.where(s > 0, nibble, 0).astype(np.uint8)


def dequantise(nibbles: np.ndarray, scale_code: np.ndarray) -> np.ndarray:
    """[groups, 16] float64 values, without the global scale."""
    sign = np.where(nibbles & 8, -1.0, 1.0)
    return sign * E2M1[nibbles & 7] * E4M3[scale_code][:, None]


def errors(scaled: np.ndarray, scale_code: np.ndarray) -> np.ndarray:
    """[groups] squared error of the groups under given block scales."""
    with np.errstate(all="ignore"):
        difference = scaled.astype(np.float64) - dequantise(quantise(scaled, scale_code), scale_code)
        return np.square(difference).sum(-1)


def encode_amax_6(scaled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(nibbles [groups, 16], scale codes [groups]) of scaled inputs [groups, 16], NaN and Inf allowed."""
    has_nan = np.isnan(scaled).any(-1)
    clean = np.where(has_nan[:, None], np.float32(0), scaled)
    scale = candidate_scales(clean, 0)[0]
    nibbles = quantise(clean, scale)
    return np.where(has_nan[:, None], 0, nibbles).astype(np.uint8), np.where(has_nan, 0x7F, scale).astype(
        np.uint8
    )


def kept_keys(head_size: int) -> np.ndarray:
    """[D, D] float64: what a row K is multiplied by before it is quantised, where keys are rotated.

    Blocks of 32 elements (of 16 where 32 does not divide D) of (-1)^(bits that i and j share) / 4.
    """
    n = 32 if head_size % 32 == 0 else 16
    shared = [[bin(i & j).count("1") for j in range(n)] for i in range(n)]
    return np.kron(np.eye(head_size // n), np.where(np.array(shared) % 2, -0.25, 0.25))


def keys_from_kept(head_size: int) -> np.ndarray:
    """[D, D] float64: what a kept row is multiplied by to be K."""
    return np.linalg.inv(kept_keys(head_size))


def _lane_nibbles() -> np.ndarray:
    """[65536, 4] nibbles of places 0 to 3 of every lane, by what csrc/kernels/nvfp4/packed.cuh draws."""
    bit = [np.arange(1 << 16) >> i & 1 for i in range(16)]
    places = [
        (bit[15], bit[11], bit[10], bit[9]),
        (bit[14] ^ bit[6], bit[2] ^ bit[10], bit[1] ^ bit[9], bit[0] ^ bit[8]),
        (bit[13] ^ bit[9], bit[5] ^ bit[9], bit[4] ^ bit[8], bit[3] ^ bit[7]),
        (bit[12], bit[8], bit[7], bit[6]),
    ]
    return np.stack([8 * s + 4 * x + 2 * y + z for s, x, y, z in places], -1).astype(np.uint8)


LANE_NIBBLES = _lane_nibbles()
LANE_OF = np.argsort(LANE_NIBBLES.astype(np.int64) @ [1, 16, 256, 4096])
"""The lane that has four nibbles, by these as a number, place 0 the lowest."""
ELEMENTS = np.array([[0, 1, 4, 5], [2, 3, 6, 7]])
"""Of a word: those of lane 0's places and of lane 1's."""


def unpacked(data: np.ndarray) -> np.ndarray:
    """Nibbles [..., D] from a page's data [..., D / 2]."""
    lanes = np.ascontiguousarray(data).view("<u2")
    words = LANE_NIBBLES[lanes.reshape(*lanes.shape[:-1], -1, 2)]
    nibbles = np.zeros((*words.shape[:-2], 8), np.uint8)
    nibbles[..., ELEMENTS] = words
    return nibbles.reshape(*data.shape[:-1], -1)


def packed(nibbles: np.ndarray) -> np.ndarray:
    """A page's data [..., D / 2] from nibbles [..., D]."""
    words = nibbles.reshape(*nibbles.shape[:-1], -1, 8)[..., ELEMENTS].astype(np.int64)
    lanes = LANE_OF[words @ [1, 16, 256, 4096]].astype("<u2")
    return lanes.reshape(*nibbles.shape[:-1], -1).view(np.uint8)


def data_byte(heads: int, block_size: int, head_size: int, is_v: bool, h: int, n: int, i: int) -> int:
    """Where byte i of token n, head h lies in a page; elements 8w to 8w + 7 are in bytes 4w to 4w + 3."""
    half_page = heads * block_size * (head_size // 2 + head_size // GROUP)
    return int(is_v) * half_page + (h * block_size + n) * (head_size // 2) + i


def scale_byte(
    heads: int, block_size: int, head_size: int, is_v: bool, h: int, n: int, s: int, swizzled: bool = False
) -> int:
    """Where the block scale s of token n, head h lies in a page. Only V's scales are ever swizzled."""
    scales = head_size // GROUP
    half_page = heads * block_size * (head_size // 2 + scales)
    if swizzled and is_v:
        n, s = (n // 4) * 4 + s // (scales // 4), (s % (scales // 4)) * 4 + n % 4
    start = int(is_v) * half_page + heads * block_size * (head_size // 2)
    return start + (h * block_size + n) * scales + s


def read_token(
    page: np.ndarray, heads: int, block_size: int, head_size: int, is_v: bool, n: int, swizzled: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """(nibbles [H, D], scale codes [H, S]) of one token of one page's bytes."""
    nibbles = np.zeros((heads, head_size), np.uint8)
    scale = np.zeros((heads, head_size // GROUP), np.uint8)
    for h in range(heads):
        places = range(head_size // 2)
        data = np.array(
            [page[data_byte(heads, block_size, head_size, is_v, h, n, i)] for i in places], np.uint8
        )
        nibbles[h] = unpacked(data)
        for s in range(head_size // GROUP):
            scale[h, s] = page[scale_byte(heads, block_size, head_size, is_v, h, n, s, swizzled)]
    return nibbles, scale
