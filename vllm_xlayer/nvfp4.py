"""The NVFP4 KV format: constants, enums and page geometry. Pure Python and torch.

Format (one K or V vector of one token and KV head, ``head_size`` D a multiple of 16):
D/2 bytes of packed e2m1 (the low nibble is the even element) and D/16 bytes of e4m3
block scales. value = e2m1 * block scale * global scale. This package's backends keep K rotated
(``rotate``), and the bits of eight elements in another order (``pack``).

A page is one layer's part of a block of N tokens and H heads, dense:

    [K data H*N*D/2][K scale H*N*D/16][V data H*N*D/2][V scale H*N*D/16]

vLLM sees a page as (H, N, C) bytes with C = 2 * (D/2 + D/16): the shape says the size,
the bytes inside are ordered as above.
"""

import functools
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple

import torch

GROUP = 16
"""Elements that share one e4m3 block scale."""

MAX_HEAD_SIZE = 256
"""Of the ops that attend (csrc/kernels/nvfp4_attention/shapes.h); the others take any."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the magnitude codes 0..7; bit 3 of a nibble is the sign."""

E4M3_MAX = 448.0
E4M3_NAN = 0x7F

E4M3_MIN_NORMAL = 2.0**-6


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


KV_DTYPES = ("nvfp4", "nvfp4_4over6")
"""vLLM's names (``--kv-cache-dtype``) of caches in this format. The second also says how to pick scales."""


def scale_choice_of(kv_cache_dtype: str, default: ScaleChoice) -> ScaleChoice:
    """How the writer of a cache of that dtype picks block scales; ``default`` where its name does not say."""
    return ScaleChoice.FOUR_OVER_SIX if kv_cache_dtype == "nvfp4_4over6" else default


def content_bytes(head_size: int) -> int:
    """Bytes of one token and head, K and V, data and scale: the C of an NVFP4 cache."""
    _check_head_size(head_size)
    return 2 * (head_size // 2 + head_size // GROUP)


def head_size_of(content: int) -> int:
    """The head size D of a cache with C = ``content`` bytes a token and head."""
    unit = content_bytes(GROUP)
    if content <= 0 or content % unit:
        raise ValueError(f"content: expected a positive multiple of {unit} bytes, got {content}")
    return content // unit * GROUP


def page_bytes(heads: int, block_size: int, head_size: int) -> int:
    """Bytes of one dense page of H heads and N = ``block_size`` tokens."""
    return heads * block_size * content_bytes(head_size)


def _check_head_size(head_size: int) -> None:
    if head_size <= 0 or head_size % GROUP:
        raise ValueError(f"head_size: expected a positive multiple of {GROUP}, got {head_size}")


@dataclass(frozen=True)
class PageViews:
    """The four parts of every page of a cache, as uint8 views that share its memory."""

    k_data: torch.Tensor
    """(B, H, N, D/2)"""
    k_scale: torch.Tensor
    """(B, H, N, D/16)"""
    v_data: torch.Tensor
    """(B, H, N, D/2)"""
    v_scale: torch.Tensor
    """(B, H, N, D/16) in memory order: swizzled caches need ``unswizzle``."""


def page_views(kv_cache: torch.Tensor) -> PageViews:
    """Views of the parts of a (B, H, N, 9D/8) uint8 cache with dense pages and any block stride."""
    if kv_cache.dtype != torch.uint8 or kv_cache.dim() != 4:
        raise ValueError(
            "kv_cache: expected uint8 (blocks, heads, block_size, bytes), "
            f"got {kv_cache.dtype} of shape {tuple(kv_cache.shape)}"
        )
    blocks, heads, block_size, content = kv_cache.shape
    head_size = head_size_of(content)
    inner = kv_cache.stride()[1:]
    if inner[1:] != (content, 1) or (heads > 1 and inner[0] != block_size * content):
        raise ValueError(
            f"kv_cache: expected dense pages, strides (any, {block_size * content}, {content}, 1), "
            f"got {kv_cache.stride()}"
        )
    offset = kv_cache.storage_offset()
    views = []
    for width in (head_size // 2, head_size // GROUP) * 2:
        shape = (blocks, heads, block_size, width)
        strides = (kv_cache.stride(0), block_size * width, width, 1)
        views.append(kv_cache.as_strided(shape, strides, offset))
        offset += heads * block_size * width
    return PageViews(*views)


def swizzle(scale: torch.Tensor) -> torch.Tensor:
    """Block scales (..., N, S) from LINEAR to SWIZZLED order; N and S multiples of 4. A copy."""
    tokens, scales = _check_swizzle(scale)
    # (group of 4 tokens, t%4, s//(S/4), s%(S/4)) -> (group, s//(S/4), s%(S/4), t%4)
    parts = scale.unflatten(-1, (4, scales // 4)).unflatten(-3, (tokens // 4, 4))
    return parts.movedim(-3, -1).reshape(scale.shape)


def unswizzle(scale: torch.Tensor) -> torch.Tensor:
    """Block scales (..., N, S) from SWIZZLED to LINEAR order: the inverse of ``swizzle``. A copy."""
    tokens, scales = _check_swizzle(scale)
    parts = scale.unflatten(-1, (scales // 4, 4)).unflatten(-3, (tokens // 4, 4))
    return parts.movedim(-1, -3).reshape(scale.shape)


def _check_swizzle(scale: torch.Tensor) -> tuple[int, int]:
    tokens, scales = scale.shape[-2:]
    if tokens % 4 or scales % 4:
        raise ValueError(
            "scale: expected tokens and scales a token that are multiples of 4 (head sizes of 64), "
            f"got shape {tuple(scale.shape)}"
        )
    return tokens, scales


def encode(
    x: torch.Tensor,
    global_scale: float | torch.Tensor = 1.0,
    choice: ScaleChoice = ScaleChoice.BEST_OF_9,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise x [..., D] to (data [..., D/2], scale [..., D/16]) uint8, bit for bit as the ops do.

    Plain torch operations on x's device: for tests, tools and explanation. The rounding is defined in
    csrc/kernels/nvfp4/codec.cuh.
    """
    _check_head_size(x.shape[-1])
    inverse = 1.0 / torch.as_tensor(global_scale, dtype=torch.float32, device=x.device)
    scaled = (x.float() * inverse).unflatten(-1, (-1, GROUP))
    magnitude = scaled.abs()
    amax = magnitude.amax(-1)  # NaN where the group has one
    is_nan = amax.isnan()
    amax = amax.nan_to_num(nan=0.0, posinf=torch.inf)

    scale = e4m3_encode(amax / 6.0)
    if choice != ScaleChoice.AMAX_6:
        best = _group_error(magnitude, e4m3_decode(scale))
        for divisor in (4.0,) if choice == ScaleChoice.FOUR_OVER_SIX else (3, 3.5, 4, 4.5, 5, 5.5, 6.5, 7):
            candidate = e4m3_encode(amax / divisor)
            error = _group_error(magnitude, e4m3_decode(candidate))
            better = error < best
            scale = torch.where(better, candidate, scale)
            best = torch.where(better, error, best)

    s = e4m3_decode(scale).unsqueeze(-1)
    code = torch.zeros_like(magnitude, dtype=torch.uint8)
    for i, (low, high) in enumerate(pairwise(E2M1_VALUES)):
        middle = s * ((low + high) / 2)  # exact; the tie goes to the even one of codes i and i + 1
        code += (magnitude > middle) if i % 2 == 0 else (magnitude >= middle)
    nibble = code | (torch.signbit(scaled).to(torch.uint8) << 3)
    empty = is_nan | (scale == 0)
    nibble = nibble.masked_fill(empty.unsqueeze(-1), 0).flatten(-2)
    data = nibble[..., 0::2] | (nibble[..., 1::2] << 4)
    return data, scale.masked_fill(is_nan, E4M3_NAN)


def decode(
    data: torch.Tensor,
    scale: torch.Tensor,
    global_scale: float | torch.Tensor = 1.0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Dequantise (data [..., D/2], scale [..., D/16]) to [..., D] of dtype, bit for bit as the ops do."""
    table = torch.tensor(E2M1_VALUES + tuple(-v for v in E2M1_VALUES), device=data.device)
    nibbles = torch.stack((data & 15, data >> 4), -1).flatten(-2)
    values = table[nibbles.long()].unflatten(-1, (-1, GROUP)) * e4m3_decode(scale).unsqueeze(-1)
    factor = torch.as_tensor(global_scale, dtype=torch.float32, device=data.device)
    return (values.flatten(-2) * factor).to(dtype)


OURS_FIRST = (8, 9)
"""Compute capabilities whose users get our kernels unless these refuse. On others vLLM's own come first."""

PACKED = "lanes of 16 bits"
"""Names what ``pack`` does, as ``KEY_ROTATION`` does the rotation."""


def pack(data: torch.Tensor) -> torch.Tensor:
    """Data as this package's pages keep it, uint8 [..., D/2], from that of ``encode``, of the same shape.

    Each four bytes have the same eight elements in another order of bits, of which a GPU without FP4 makes
    halves with fewer instructions: csrc/kernels/nvfp4/packed.cuh draws it. Plain torch operations, for tests
    and tools.
    """
    nibbles = _words(data)
    word = torch.zeros_like(nibbles)
    for element in range(8):
        code, sign = _bits_of(element)
        word |= (nibbles >> 4 * element & 7) << code | (nibbles >> 4 * element + 3 & 1) << sign
    return _bytes(_change(word), data)


def unpack(data: torch.Tensor) -> torch.Tensor:
    """What ``decode`` reads, from data as this package's pages keep it."""
    word = _change(_words(data))
    nibbles = torch.zeros_like(word)
    for element in range(8):
        code, sign = _bits_of(element)
        nibbles |= ((word >> code & 7) | (word >> sign & 1) << 3) << 4 * element
    return _bytes(nibbles, data)


def _bits_of(element: int) -> tuple[int, int]:
    """The first bit of an element's magnitude code in a word, and its sign's, before they are changed."""
    lane, place = element // 2 % 2 * 16, element // 4 * 2 + element % 2
    return lane + (9, 0, 3, 6)[place], lane + 15 - place


def _change(word: torch.Tensor) -> torch.Tensor:
    """Places 1 and 2 changed by the others, or changed back."""
    parts = (word >> 8 & 0x00070007, word << 8 & 0x40004000, word >> 4 & 0x00380038, word << 4 & 0x20002000)
    for part in parts:
        word = word ^ part
    return word


def _words(data: torch.Tensor) -> torch.Tensor:
    return data.contiguous().view(torch.int32).long() & 0xFFFFFFFF


def _bytes(words: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return (words - (words >> 31 << 32)).int().view(torch.uint8).view(like.shape)


ROTATED_KEYS = True
"""Whether this package's backends keep K rotated. vLLM's own never do."""
KEY_ROTATION = "hadamard 32"
"""Names the rotation where engines compare what shapes their pages. Another rotation needs another name."""


def rotation_block(head_size: int) -> int:
    """Elements of a head that are rotated together: 32, or 16 where 32 does not divide the head size."""
    return 32 if head_size % 32 == 0 else 16


def rotate(k: torch.Tensor) -> torch.Tensor:
    """K [..., D] as it is kept, float32 [..., D], bit for bit as the ops make it.

    Each block of n = ``rotation_block(D)`` elements becomes H k / 4, H the Hadamard matrix of order n (1 and
    -1 in Sylvester's order, H H = n I). It spreads a channel that is larger than the others over its
    block: the error of NVFP4 in q . k falls (docs/accuracy.md), for queries that become H q * 4 / n.
    """
    x, apart = k.float(), 1
    while apart < rotation_block(k.shape[-1]):
        a, b = x.unflatten(-1, (-1, 2, apart)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        apart *= 2
    return x / 4


def rotate_back(kept: torch.Tensor) -> torch.Tensor:
    """K [..., D] from what ``rotate`` made of it, rounded to kept's dtype once."""
    n = rotation_block(kept.shape[-1])
    return (kept.unflatten(-1, (-1, n)) @ _back(n, kept.dtype, kept.device)).flatten(-2)


@functools.cache
def _back(n: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[n, n]: H * 4 / n."""
    h = torch.ones(1, 1)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return (h * 4 / n).to(device, dtype)


class UnsuitedGroups(NamedTuple):
    """Which groups of 16 values a global scale does not suit, bool [..., D/16] each; `Counts` says how."""

    saturated: torch.Tensor
    underflowed: torch.Tensor


def unsuited_groups(x: torch.Tensor, global_scale: float | torch.Tensor) -> UnsuitedGroups:
    """Masks of the groups of x [..., D]. A group of zeros, or with a NaN, is in neither."""
    scale = x.float().unflatten(-1, (-1, GROUP)).abs().amax(-1) / (6 * global_scale)
    return UnsuitedGroups(scale > E4M3_MAX, (scale > 0) & (scale < E4M3_MIN_NORMAL))


class Counts(NamedTuple):
    """How many groups of 16 values a global scale does not suit."""

    saturated: int
    """The block scale would have to be above 448: the largest values are cut off."""
    underflowed: int
    """The block scale is below e4m3's smallest normal number, 2^-6: it is coarse, or zero and all is lost."""


def count_groups(x: torch.Tensor, global_scale: float) -> Counts:
    """Counts the groups of x [..., D] that the scale does not suit; those of zeros or with a NaN are not."""
    return Counts(*(int(mask.sum()) for mask in unsuited_groups(x, global_scale)))


def e4m3_encode(x: torch.Tensor) -> torch.Tensor:
    """Non-negative float32 of any shape as e4m3 bytes, uint8: rounds to nearest even, saturates at 448."""
    return x.clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def e4m3_decode(x: torch.Tensor) -> torch.Tensor:
    """e4m3 bytes (uint8 of any shape) as float32."""
    return x.view(torch.float8_e4m3fn).float()


def _group_error(magnitude: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """Squared error of groups [..., 16] under block scales s [...], in the ops' order of operations."""
    inverse = torch.where(s > 0, 1.0 / s, 0.0).unsqueeze(-1)
    y = (magnitude * inverse).clamp(max=6.0)
    step = torch.where(y < 2, 0.5, torch.where(y < 4, 1.0, 2.0))
    q = torch.round(y / step) * step
    squares = (magnitude - q * s.unsqueeze(-1)).square()
    parts = squares[..., 0:4]
    for i in (4, 8, 12):
        parts = parts + squares[..., i : i + 4]
    return (parts[..., 0] + parts[..., 1]) + (parts[..., 2] + parts[..., 3])
