"""gather_nvfp4 against the independent reference."""

import numpy as np
import pytest
import torch
from reference import nvfp4_ref as ref
from reference.pools import Pool, make_pool, put_token, scalar

from vllm_xlayer import ops
from vllm_xlayer.nvfp4 import ScaleOrder

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def int32(values, device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def fill(pool: Pool, order: ScaleOrder, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random nibbles and finite scales in every token of the pool's layer; their exact values as K and V
    [B * N, H, D] float64."""
    generator = np.random.default_rng(seed)
    tokens = pool.raw.shape[0] * pool.block_size
    scales_per_head = pool.head_size // ref.GROUP
    values = np.zeros((2, tokens, pool.heads, pool.head_size))
    start = pool.layer * pool.page_bytes
    pages = pool.raw.cpu().numpy()
    for t in range(tokens):
        for is_v in (False, True):
            nibbles = generator.integers(0, 16, (pool.heads, pool.head_size), dtype=np.uint8)
            scales = generator.integers(0, 0x7F, (pool.heads, scales_per_head), dtype=np.uint8)
            page = pages[t // pool.block_size, start : start + pool.page_bytes]
            put_token(page, pool, is_v, t % pool.block_size, nibbles, scales, order == ScaleOrder.SWIZZLED)
            exact = ref.dequantise(nibbles.reshape(-1, ref.GROUP), scales.reshape(-1))
            values[int(is_v), t] = exact.reshape(pool.heads, pool.head_size)
    pool.raw.copy_(torch.from_numpy(pages))
    return values[0], values[1]


def expected_output(exact: np.ndarray, global_scale: float, dtype: torch.dtype) -> torch.Tensor:
    """float32(exact product) * global in float32, rounded once to dtype."""
    assert np.array_equal(exact.astype(np.float32), exact, equal_nan=True)
    return torch.from_numpy(exact.astype(np.float32) * np.float32(global_scale)).to(dtype)


def gather_every_byte(
    device, dtype: torch.dtype, global_scale: float
) -> tuple[np.ndarray, list[torch.Tensor]]:
    """256 tokens of one group: token t has scale byte t and all 16 nibbles. Returns their exact values
    [256, 16] without the global scale, and what the op made of them as K and as V."""
    pool = make_pool(device, blocks=1, heads=1, block_size=256, head_size=16, layers=1, layer=0)
    page = pool.raw.cpu().numpy()[0]
    nibbles = np.arange(16, dtype=np.uint8).reshape(1, 16)
    for t in range(256):
        for is_v in (False, True):
            put_token(page, pool, is_v, t, nibbles, np.array([[t]], np.uint8), False)
    pool.raw[0] = torch.from_numpy(page)
    out = torch.zeros(2, 256, 1, 16, dtype=dtype, device=device)
    scale = scalar(global_scale, device)
    indices = (int32([[0]], device), int32([0], device), int32([0, 256], device))
    ops.gather_nvfp4(pool.cache, *indices, scale, scale, *out)
    exact = ref.dequantise(np.tile(nibbles, (256, 1)), np.arange(256))
    return exact, [part.view(256, 16).cpu() for part in out]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scale_byte_with_every_nibble_is_exact(device, dtype):
    """Without a global scale all values are exact, also in both 16-bit types; zeros keep their sign."""
    exact, parts = gather_every_byte(device, dtype, 1.0)
    for part in parts:
        got = part.double().numpy()
        assert np.array_equal(got, exact, equal_nan=True)
        finite = ~np.isnan(exact)
        assert np.array_equal(np.signbit(got[finite]), np.signbit(exact[finite]))


# Ties of float16 and of bfloat16 (to even: down, up), float16 subnormals, smaller ones, and Inf in float16.
GLOBAL_SCALES = [
    1 + 2**-11,
    1 + 3 * 2**-11,
    1 + 2**-8,
    1 + 3 * 2**-8,
    0.7 * 2**-16,
    2**-24,
    2**-36,
    1e-38,
    100.3,
]


@pytest.mark.parametrize("global_scale", GLOBAL_SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_scale_byte_with_every_nibble_and_a_global_scale(device, dtype, global_scale):
    exact, parts = gather_every_byte(device, dtype, global_scale)
    expected = expected_output(exact, global_scale, dtype)
    for part in parts:
        torch.testing.assert_close(part, expected, rtol=0, atol=0, equal_nan=True)


LINEAR, SWIZZLED = ScaleOrder  # the swizzled order is defined for multiples of 64 only


@pytest.mark.parametrize(
    ("head_size", "order"),
    [(d, LINEAR) for d in (16, 64, 80, 128, 256)] + [(d, SWIZZLED) for d in (64, 128, 192, 256)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_requests(device, dtype, head_size, order):
    """Lengths with zeros, starts inside blocks, gaps in the output, rows of the output left alone."""
    pool = make_pool(device, blocks=6, heads=3, head_size=head_size)
    k_exact, v_exact = fill(pool, order)
    table = [[4, 1, 99], [-7, -7, -7], [0, 5, 2], [99, 3, 99]]  # 99 and -7: never read
    starts, lengths = [3, 0, 0, 17], [20, 0, 48, 15]
    cumulative = [0, *np.cumsum(lengths).tolist()]
    total = cumulative[-1]
    shape = (total + 2, pool.heads + 1, head_size + 8)
    wide = torch.full((2, *shape), 7.0, dtype=dtype, device=device)
    k_out, v_out = wide[:, :, 1:, 8:]
    ops.gather_nvfp4(
        pool.cache,
        int32(table, device),
        int32(starts, device),
        int32(cumulative, device),
        scalar(0.3, device),
        scalar(2.5, device),
        k_out,
        v_out,
        order,
    )
    positions = [
        table[r][p // 16] * 16 + p % 16 for r in range(4) for p in range(starts[r], starts[r] + lengths[r])
    ]
    for out, exact, scale in ((k_out, k_exact, 0.3), (v_out, v_exact, 2.5)):
        assert torch.equal(out[:total].cpu(), expected_output(exact[positions], scale, dtype))
    untouched = wide.clone()
    untouched[:, :total, 1:, 8:] = 7.0
    assert (untouched == 7.0).all()


@pytest.mark.parametrize("head_size", [16, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [1, 2, 5, 8])
def test_rotated_keys_come_out_as_they_were(device, head_size, heads):
    """K is rotated back; V, and a page written without rotation, are as ever."""
    pool = make_pool(device, blocks=3, heads=heads, head_size=head_size)
    k_exact, v_exact = fill(pool, ScaleOrder.LINEAR)
    back = torch.from_numpy(ref.keys_from_kept(head_size))
    exact = torch.as_tensor(k_exact).double() @ back * 0.5
    table, ends = int32([[2, 0, 1]], device), int32([0, 45], device)
    positions = [2 * 16 + i for i in range(2, 16)] + [*range(16)] + [16 + i for i in range(15)]
    results = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = torch.full((2, 46, heads, head_size), 7.0, dtype=dtype, device=device)
        ops.gather_nvfp4(
            pool.cache, table, int32([2], device), ends, scalar(0.5, device), scalar(1.0, device), *out,
            rotated_keys=True,
        )  # fmt: skip
        assert (out[:, 45] == 7.0).all()
        assert torch.equal(out[1, :45].cpu(), expected_output(v_exact[positions], 1.0, dtype))
        results[dtype] = out[0, :45].cpu()
    # 31 additions in float32, of terms that are at most the largest element.
    largest = float(torch.as_tensor(k_exact).abs().max())
    error = (results[torch.float32].double() - exact[positions]).abs().max()
    assert error <= 64 * 2.0**-24 * largest
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(results[dtype], results[torch.float32].to(dtype))


def test_reading_with_the_wrong_order_is_wrong(device):
    """The order matters: V read linearly from swizzled pages differs, K does not."""
    pool = make_pool(device, blocks=1, head_size=128)
    k_exact, v_exact = fill(pool, ScaleOrder.SWIZZLED)
    out = torch.zeros(2, 16, 2, 128, device=device)
    one = scalar(1.0, device)
    arguments = (int32([[0]], device), int32([0], device), int32([0, 16], device), one, one, *out)
    ops.gather_nvfp4(pool.cache, *arguments, ScaleOrder.LINEAR)
    assert torch.equal(out[0].cpu(), expected_output(k_exact, 1.0, torch.float32))
    assert not torch.equal(out[1].cpu(), expected_output(v_exact, 1.0, torch.float32))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
def test_nothing_to_gather(device, lengths):
    pool = make_pool(device)
    out = torch.full((2, 4, 2, 64), 7.0, device=device)
    one = scalar(1.0, device)
    table = torch.zeros(len(lengths), 1, dtype=torch.int32, device=device)
    starts = int32([0] * len(lengths), device)
    ops.gather_nvfp4(pool.cache, table, starts, int32([0, *np.cumsum(lengths)], device), one, one, *out)
    assert (out == 7.0).all()


def test_many_requests_of_random_lengths(device):
    """600 requests: the search for a token's request, with runs of empty ones."""
    generator = np.random.default_rng(1)
    pool = make_pool(device, blocks=4, heads=1, head_size=16, layers=1, layer=0)
    k_exact, v_exact = fill(pool, ScaleOrder.LINEAR)
    lengths = np.where(generator.random(600) < 0.4, 0, generator.integers(1, 5, 600))
    starts = generator.integers(0, 60, 600)
    table = np.stack([generator.permutation(4) for _ in range(600)])
    cumulative = np.concatenate(([0], np.cumsum(lengths)))
    out = torch.full((2, int(cumulative[-1]), 1, 16), torch.nan, device=device)
    one = scalar(1.0, device)
    ops.gather_nvfp4(
        pool.cache, int32(table, device), int32(starts, device), int32(cumulative, device), one, one, *out
    )
    rows = [
        table[r][p // 16] * 16 + p % 16 for r in range(600) for p in range(starts[r], starts[r] + lengths[r])
    ]
    assert torch.equal(out[0].cpu(), expected_output(k_exact[rows], 1.0, torch.float32))
    assert torch.equal(out[1].cpu(), expected_output(v_exact[rows], 1.0, torch.float32))
