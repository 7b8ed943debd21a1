"""reshape_and_cache_nvfp4 against the independent reference."""

import numpy as np
import pytest
import torch
from reference import nvfp4_ref as ref
from reference.groups import write_groups
from reference.pools import POISON, Pool, make_pool, put_token, scalar, strided_rows

from vllm_xlayer import nvfp4, ops
from vllm_xlayer.nvfp4 import ScaleChoice, ScaleOrder

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def write(
    pool: Pool,
    key,
    value,
    slots,
    k_scale=1.0,
    v_scale=1.0,
    order=ScaleOrder.LINEAR,
    choice=ScaleChoice.AMAX_6,
):
    device = pool.raw.device
    slots = torch.as_tensor(slots, dtype=torch.int64).to(device)
    ops.reshape_and_cache_nvfp4(
        key, value, pool.cache, slots, scalar(k_scale, device), scalar(v_scale, device), order, choice
    )


def groups_of(x: torch.Tensor, global_scale: float) -> np.ndarray:
    """Scaled inputs of x [T, H, D] as the reference wants them: [groups, 16]."""
    return ref.scale_input(x.float().cpu().numpy(), global_scale).reshape(-1, ref.GROUP)


@pytest.mark.parametrize("head_size", [16, 64, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pad", [16, 3], ids=["aligned", "odd-strides"])
def test_every_byte_of_the_pool(device, head_size, dtype, pad):
    """Cross-layer pool, gaps between heads, skipped slots, padding tokens: each byte is as it must be."""
    generator = torch.Generator().manual_seed(head_size + pad)
    swizzled = head_size % 64 == 0
    pool = make_pool(device, head_size=head_size, block_size=32)
    tokens, padding = 21, 3
    x = torch.randn(2, tokens + padding, pool.heads, head_size, generator=generator) * 3
    x[:, tokens:] = torch.nan  # never read: past the slot mapping
    key, value = (strided_rows(part.to(dtype).to(device), pad) for part in x)
    slots = torch.randperm(5 * 32, generator=generator)[:tokens]
    slots[[2, 7]] = -1
    write(pool, key, value, slots, 0.37, 1.9, ScaleOrder(swizzled))

    expected = np.full(tuple(pool.raw.shape), POISON, np.uint8)
    start = pool.layer * pool.page_bytes
    for is_v, source, scale in ((False, key, 0.37), (True, value, 1.9)):
        nibbles, scales = ref.encode_amax_6(groups_of(source[:tokens], scale))
        nibbles = nibbles.reshape(tokens, pool.heads, head_size)
        scales = scales.reshape(tokens, pool.heads, -1)
        for t, slot in enumerate(slots.tolist()):
            if slot >= 0:
                page = expected[slot // 32, start : start + pool.page_bytes]
                put_token(page, pool, is_v, slot % 32, nibbles[t], scales[t], swizzled)
    assert np.array_equal(pool.raw.cpu().numpy(), expected)


@pytest.mark.parametrize("choice", list(ScaleChoice))
def test_searched_scale_is_the_best_and_data_are_nearest(device, choice):
    generator = torch.Generator().manual_seed(7)
    groups = torch.randn(4096, 16, generator=generator) * torch.logspace(-3, 3, 4096).unsqueeze(1)
    nibbles, scale = write_groups(device, groups, choice)
    scaled = groups.numpy()
    candidates = ref.candidate_scales(scaled, int(choice))
    assert (candidates == scale).any(0).all()
    assert np.array_equal(nibbles, ref.quantise(scaled, scale))
    best = np.min([ref.errors(scaled, c) for c in candidates], 0)
    # The op adds 16 squares in float32: 16 roundings of 2^-24 and those inside a square.
    assert (ref.errors(scaled, scale) <= best * (1 + 32 * 2.0**-24)).all()


@pytest.mark.parametrize("choice", list(ScaleChoice))
def test_ties_go_to_the_divisor_6(device, choice):
    """Zero error under amax/6 and under another divisor: amax/6 stays."""
    group = torch.tensor([6.0, 4.0, 2.0, 1.0, 0.0] + [0.0] * 11)
    exact_with_both = torch.tensor([6.0, 3.0, 1.5] + [0.0] * 13)  # scale 1 (amax/6) and 1.5 (amax/4)
    _, scale = write_groups(device, torch.stack((group, exact_with_both)), choice)
    assert scale.tolist() == [0x38, 0x38]  # 1.0


@pytest.mark.parametrize("choice", list(ScaleChoice))
@pytest.mark.parametrize("dtype", DTYPES)
def test_op_equals_the_torch_codec_bit_for_bit(device, choice, dtype):
    generator = torch.Generator().manual_seed(3)
    pool = make_pool(device, head_size=128, blocks=9)
    x = torch.randn(2, 9 * 16, pool.heads, 128, generator=generator) * 10
    key, value = x.to(dtype).to(device)
    write(pool, key, value, range(9 * 16), 0.25, 3.0, choice=choice)
    views = nvfp4.page_views(pool.cache)
    for source, scale, data_view, scale_view in (
        (key, 0.25, views.k_data, views.k_scale),
        (value, 3.0, views.v_data, views.v_scale),
    ):
        data, scales = nvfp4.encode(source.cpu(), scale, choice)
        assert torch.equal(data_view.transpose(1, 2).flatten(0, 1).cpu(), nvfp4.pack(data))
        assert torch.equal(scale_view.transpose(1, 2).flatten(0, 1).cpu(), scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [16, 80, 128])
def test_few_tokens_at_a_time_give_the_same_bytes_as_many(device, dtype, head_size):
    """The CUDA kernel shares a group among several threads where there are few."""
    generator = torch.Generator().manual_seed(23)
    tokens, heads = {16: 1280, 80: 256, 128: 160}[head_size], 8  # 20,480 groups
    x = torch.randn(2, tokens, heads, head_size, generator=generator) * 3
    x[0, 5, 0, 1], x[1, 6, 0, 2] = torch.nan, torch.inf
    key, value = x.to(dtype).to(device)
    slots = torch.randperm(tokens, generator=generator)
    slots[7] = -1
    many, few = (
        make_pool(device, blocks=tokens // 16, heads=heads, head_size=head_size, layers=1, layer=0)
        for _ in range(2)
    )
    write(many, key, value, slots, 0.37, 1.9, choice=ScaleChoice.BEST_OF_9)
    for start in range(0, tokens, 19):
        part = slice(start, start + 19)
        write(few, key[part], value[part], slots[part], 0.37, 1.9, choice=ScaleChoice.BEST_OF_9)
    assert torch.equal(many.raw, few.raw)


@pytest.mark.parametrize("head_size", [16, 64, 80, 96, 256])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [21, 700], ids=["few", "many"])  # the CUDA kernel has a form for each
def test_rotated_keys(device, head_size, dtype, tokens):
    """Pages hold K times the matrix of the definition, V as ever; the newest tokens' memory, too."""
    generator = torch.Generator().manual_seed(head_size)
    pool = make_pool(device, head_size=head_size, blocks=48)
    # Eighths up to 8: sums of 32 are exact, and their quarters numbers of every dtype or a rounding away.
    x = torch.randint(-64, 65, (2, tokens, pool.heads, head_size), generator=generator) / 8
    key, value = x.to(dtype).to(device)
    slots = torch.randperm(48 * 16, generator=generator)[:tokens]
    newest = torch.full((tokens, 2, pool.heads, 16, head_size), torch.nan, dtype=dtype, device=device)
    ops.reshape_and_cache_nvfp4(
        key, value, pool.cache, slots.to(device), scalar(0.37, device), scalar(1.9, device),
        scale_choice=ScaleChoice.AMAX_6, newest=newest, rotated_keys=True,
        newest_slots=torch.arange(0, 16 * tokens, 16, device=device) + 5,
    )  # fmt: skip
    kept = x[0].double().numpy() @ ref.kept_keys(head_size)
    start = pool.layer * pool.page_bytes
    expected = np.full((48, pool.page_bytes), POISON, np.uint8)
    for is_v, source, scale in ((False, torch.from_numpy(kept), 0.37), (True, x[1], 1.9)):
        nibbles, scales = ref.encode_amax_6(groups_of(source, scale))
        nibbles, scales = (y.reshape(tokens, pool.heads, -1) for y in (nibbles, scales))
        for t, slot in enumerate(slots.tolist()):
            put_token(expected[slot // 16], pool, is_v, slot % 16, nibbles[t], scales[t], False)
    assert np.array_equal(pool.raw[:, start : start + pool.page_bytes].cpu().numpy(), expected)
    assert torch.equal(newest[:, 0, :, 5].cpu(), torch.from_numpy(kept).to(dtype))
    assert torch.equal(newest[:, 1, :, 5].cpu(), x[1].to(dtype))
    assert newest[:, :, :, [*range(5), *range(6, 16)]].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_keys_equal_the_torch_codec_bit_for_bit(device, dtype):
    """Also where sums of float32 are rounded; and a NaN or Inf takes its whole block, no other."""
    generator = torch.Generator().manual_seed(3)
    pool = make_pool(device, head_size=128, blocks=9)
    key = torch.randn(9 * 16, pool.heads, 128, generator=generator)
    key *= torch.logspace(-3, 2, 9 * 16).view(-1, 1, 1) * torch.logspace(-2, 2, 128)
    key[3, 1, 40], key[4, 0, 127] = torch.nan, torch.inf
    key = key.to(dtype).to(device)
    one = scalar(1.0, device)
    slots = torch.arange(9 * 16, device=device)
    ops.reshape_and_cache_nvfp4(key, key, pool.cache, slots, one, one, rotated_keys=True)
    views = nvfp4.page_views(pool.cache)
    data, scales = nvfp4.encode(nvfp4.rotate(key.cpu()))
    assert torch.equal(views.k_data.transpose(1, 2).flatten(0, 1).cpu(), nvfp4.pack(data))
    assert torch.equal(views.k_scale.transpose(1, 2).flatten(0, 1).cpu(), scales)
    kept = nvfp4.decode(data, scales)
    assert kept[3, 1, 32:64].isnan().all() and kept.isnan().sum() == 32
    assert (kept[4, 0, 96:].abs() == 2688).all() and (kept[4].abs() == 2688).sum() == 32


def test_rotation_lowers_the_error_of_scores_where_large_channels_meet(device):
    """What it is for: channels that are large in a model's K are large in its queries, too, and NVFP4's error
    is in proportion to the value. Rotated, it is spread over channels of which most count for little."""
    generator = torch.Generator().manual_seed(29)
    pool = make_pool(device, head_size=64, blocks=16)
    key = torch.randn(256, 2, 64, generator=generator)
    query = torch.randn(64, 64, generator=generator)
    sizes = torch.randn(64, generator=generator).exp()
    key, query = key * sizes, query * sizes
    key = key.to(device)
    one, slots, errors = scalar(1.0, device), torch.arange(256, device=device), []
    for rotated in (False, True):
        out = torch.empty(2, 256, 2, 64, device=device)
        ops.reshape_and_cache_nvfp4(key, key, pool.cache, slots, one, one, rotated_keys=rotated)
        table = torch.arange(16, dtype=torch.int32, device=device)[None]
        starts = torch.tensor([0], dtype=torch.int32, device=device)
        ends = torch.tensor([0, 256], dtype=torch.int32, device=device)
        ops.gather_nvfp4(pool.cache, table, starts, ends, one, one, *out, rotated_keys=rotated)
        errors.append(float(((out[0] - key).cpu() @ query.T).square().mean()))
    assert errors[1] < errors[0] / 1.5, errors


# NVFP4.md's table on Gaussian data; 2^20 values put the standard error of these below 1e-4.
@pytest.mark.parametrize(
    ("choice", "rmse"),
    [(ScaleChoice.AMAX_6, 0.0951), (ScaleChoice.FOUR_OVER_SIX, 0.0869), (ScaleChoice.BEST_OF_9, 0.0823)],
)
def test_error_on_gaussian_data(device, choice, rmse):
    generator = torch.Generator().manual_seed(11)
    groups = torch.randn(1 << 16, 16, generator=generator)
    nibbles, scale = write_groups(device, groups, choice)
    error = ref.dequantise(nibbles, scale) - groups.double().numpy()
    relative = np.linalg.norm(error) / np.linalg.norm(groups.double().numpy())
    assert relative == pytest.approx(rmse, abs=4e-4)


def all_fp16_extremes() -> torch.Tensor:
    """[65536, 16] float16: every fp16 value, with 15 fractions of it, as the largest of its group."""
    largest = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    fractions = torch.linspace(-1, 1, 15, dtype=torch.float16)
    groups = largest.unsqueeze(1) * fractions
    return torch.cat((largest.unsqueeze(1), groups), 1)


def test_all_fp16_values_as_group_extremes(device):
    groups = all_fp16_extremes()
    nibbles, scale = write_groups(device, groups, ScaleChoice.AMAX_6)
    expected_nibbles, expected_scale = ref.encode_amax_6(groups.float().numpy())
    assert np.array_equal(scale, expected_scale)
    assert np.array_equal(nibbles, expected_nibbles)


@pytest.mark.parametrize("choice", [ScaleChoice.FOUR_OVER_SIX, ScaleChoice.BEST_OF_9])
def test_all_fp16_values_with_search_equal_the_torch_codec(device, choice):
    groups = all_fp16_extremes()
    nibbles, scale = write_groups(device, groups, choice)
    data, expected_scale = nvfp4.encode(groups, 1.0, choice)
    assert np.array_equal(scale, expected_scale.flatten().numpy())
    assert np.array_equal(nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), data.numpy())


def with_neighbours(x: np.ndarray) -> np.ndarray:
    """[..., 3] float32: the value below, the value, the value above."""
    x = x.astype(np.float32)
    return np.stack((np.nextafter(x, np.float32(0)), x, np.nextafter(x, np.float32(np.inf))), -1)


def test_scales_at_every_tie(device):
    """Largest elements at 6 times each midpoint of two e4m3 values, and one float32 step beside it."""
    midpoints = (ref.E4M3_POSITIVE[1:] + ref.E4M3_POSITIVE[:-1]) / 2
    largest = with_neighbours(6 * midpoints).reshape(-1, 1)
    groups = np.concatenate((largest, np.zeros((largest.size, 15), np.float32)), 1)
    nibbles, scale = write_groups(device, torch.from_numpy(groups), ScaleChoice.AMAX_6)
    expected_nibbles, expected_scale = ref.encode_amax_6(groups)
    assert np.array_equal(scale, expected_scale)
    assert np.array_equal(nibbles, expected_nibbles)


def test_data_at_every_tie(device):
    """Under each e4m3 scale: elements at each midpoint of two e2m1 values, and one float32 step beside it."""
    scales = ref.E4M3_POSITIVE[1:]
    midpoints = np.outer(scales, (ref.E2M1[1:] + ref.E2M1[:-1]) / 2)  # exact in float32
    elements = np.pad(with_neighbours(midpoints).reshape(len(scales), 21), ((0, 0), (0, 9))).reshape(-1, 15)
    groups = np.concatenate((np.repeat(6 * scales, 2).reshape(-1, 1), elements), 1).astype(np.float32)
    nibbles, scale = write_groups(device, torch.from_numpy(groups), ScaleChoice.AMAX_6)
    assert np.array_equal(ref.E4M3[scale], np.repeat(scales, 2))
    assert np.array_equal(nibbles, ref.quantise(groups, scale))


@pytest.mark.parametrize("choice", list(ScaleChoice))
@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_stay_in_their_group(device, choice, dtype):
    generator = torch.Generator().manual_seed(5)
    clean = torch.randn(1, 2, 64, generator=generator).to(dtype)
    dirty = clean.clone()
    dirty[0, 0, 3] = torch.nan
    dirty[0, 1, 20] = torch.inf
    dirty[0, 1, 40] = -torch.inf
    decoded = []
    for x in (clean, dirty):
        pool = make_pool(device)
        write(pool, x.to(device), x.to(device), [17], choice=choice)
        views = nvfp4.page_views(pool.cache)
        for data, scale in ((views.k_data, views.k_scale), (views.v_data, views.v_scale)):
            usual = nvfp4.unpack(data[1, :, 1])
            decoded.append(nvfp4.decode(usual, scale[1, :, 1]).cpu().unflatten(-1, (4, 16)))
    for before, after in zip(decoded[:2], decoded[2:], strict=True):
        assert after[0, 0].isnan().all()
        assert after[1, 1, 4] == 2688 and after[1, 2, 8] == -2688
        untouched = [(0, 1), (0, 2), (0, 3), (1, 0), (1, 3)]
        for h, s in untouched:
            assert torch.equal(before[h, s], after[h, s])


def test_values_beyond_the_format_saturate(device):
    pool = make_pool(device, head_size=16)
    key = torch.full((1, 2, 16), 1e30, device=device)
    write(pool, key, -key, [0], k_scale=0.5, v_scale=2.0)
    views = nvfp4.page_views(pool.cache)
    assert (nvfp4.decode(nvfp4.unpack(views.k_data[0, :, 0]), views.k_scale[0, :, 0], 0.5) == 1344).all()
    assert (nvfp4.decode(nvfp4.unpack(views.v_data[0, :, 0]), views.v_scale[0, :, 0], 2.0) == -5376).all()


@pytest.mark.parametrize("tokens", [0, 4])
def test_nothing_to_write(device, tokens):
    pool = make_pool(device)
    key = torch.randn(tokens, 2, 64, device=device)
    write(pool, key, key, [])
    write(pool, key, key, [-1] * tokens)
    assert (pool.raw == POISON).all()


def test_block_stride_beyond_32_bits(device):
    content, stride = 16 * 9 // 8, (1 << 31) + 16
    page = 16 * content
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 3 * stride:
        pytest.skip(f"needs {3 * stride} bytes of free GPU memory, got {torch.cuda.mem_get_info()[0]}")
    storage = torch.empty(2 * stride + page, dtype=torch.uint8, device=device)  # touched only in its pages
    cache = storage.as_strided((3, 1, 16, content), (stride, page, content, 1))
    key = torch.randn(3, 1, 16, device=device)
    slots = torch.tensor([5, 16 + 6, 32 + 7], device=device)
    one = scalar(1.0, device)
    ops.reshape_and_cache_nvfp4(key, key, cache, slots, one, one)
    data, scale = nvfp4.encode(key.cpu())
    views = nvfp4.page_views(cache)
    for t, slot in enumerate(slots.tolist()):
        assert torch.equal(views.k_data[slot // 16, :, slot % 16].cpu(), nvfp4.pack(data[t]))
        assert torch.equal(views.v_scale[slot // 16, :, slot % 16].cpu(), scale[t])

    out = torch.empty(2, 1, 1, 16, device=device)
    table = torch.tensor([[0, 1, 2]], dtype=torch.int32, device=device)
    start = torch.tensor([39], dtype=torch.int32, device=device)
    cumulative = torch.tensor([0, 1], dtype=torch.int32, device=device)
    ops.gather_nvfp4(cache, table, start, cumulative, one, one, out[0], out[1])
    assert torch.equal(out[1].cpu(), nvfp4.decode(data[2:], scale[2:]))
