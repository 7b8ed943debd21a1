"""What both model runners allocate, byte for byte, against the negotiated layout: their own code, on CPU tensors.

The engine tests run V1 only (V2 needs Triton); V2's allocation functions run without it.
"""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.config import KVTransferConfig
from vllm.v1.core import kv_cache_utils
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVQuantMode,
    SlidingWindowSpec,
)

from vllm_xlayer import plugin
from vllm_xlayer.attention.backend import NVFP4Backend
from vllm_xlayer.attention.cpu import CpuReferenceBackend
from vllm_xlayer.compat import v0_26
from vllm_xlayer.layout import AllocationError, check_allocation, page_view

NUM_BLOCKS = 5


def attention(cls, dtype: str, **more):
    nvfp4 = dtype == "nvfp4"
    return cls(
        block_size=16, num_kv_heads=2, head_size=64,
        dtype=torch.uint8 if nvfp4 else getattr(torch, dtype),
        kv_quant_mode=KVQuantMode.NVFP4 if nvfp4 else KVQuantMode.NONE,
        indexes_kv_by_block_stride=True, **more,
    )  # fmt: skip


def one_group(dtype):
    return [KVCacheGroupSpec([f"layers.{i}" for i in range(3)], attention(FullAttentionSpec, dtype))]


def hybrid(dtype):
    window = attention(SlidingWindowSpec, dtype, sliding_window=32)
    return [
        KVCacheGroupSpec(["full.0", "full.1"], attention(FullAttentionSpec, dtype)),
        KVCacheGroupSpec(["window.0", "window.1"], window),
        KVCacheGroupSpec(["window.2"], window),
    ]


def with_connector(name: str | None):
    """As much of a VllmConfig as the functions under test read."""
    transfer = KVTransferConfig(kv_connector=name, kv_role="kv_both") if name else None
    return SimpleNamespace(
        kv_transfer_config=transfer, cache_config=SimpleNamespace(num_gpu_blocks_override=NUM_BLOCKS)
    )


def planned(config, groups):
    plugin.register()
    return kv_cache_utils.get_kv_cache_config_from_groups(config, groups, available_memory=1 << 30)


def backend_of(dtype):
    return NVFP4Backend if dtype == "nvfp4" else CpuReferenceBackend


def allocated_by_v2(plan, dtype) -> dict[str, torch.Tensor]:
    from vllm.v1.worker.gpu import attn_utils

    raw = attn_utils._allocate_kv_cache(plan, {}, torch.device("cpu"))
    groups = [
        SimpleNamespace(
            kv_cache_group_id=i, kv_cache_spec=g.kv_cache_spec, layer_names=g.layer_names,
            backend=backend_of(dtype),
        )
        for i, g in enumerate(plan.kv_cache_groups)
    ]  # fmt: skip
    sizes = [g.kv_cache_spec.block_size for g in plan.kv_cache_groups]
    return attn_utils._reshape_kv_cache(groups, raw, "nvfp4" if dtype == "nvfp4" else "auto", sizes, {}, plan)


def allocated_by_v1(plan, dtype) -> dict[str, torch.Tensor]:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    groups = [
        SimpleNamespace(
            kv_cache_group_id=i, kv_cache_spec=g.kv_cache_spec, layer_names=g.layer_names,
            backend=backend_of(dtype),
        )
        for i, g in enumerate(plan.kv_cache_groups)
    ]  # fmt: skip
    runner = SimpleNamespace(
        device=torch.device("cpu"), kv_cache_config=plan, runner_only_attn_layers=set(),
        cache_config=SimpleNamespace(cache_dtype="nvfp4" if dtype == "nvfp4" else "auto"),
        _kv_cache_spec_attn_group_iterator=lambda: iter(groups),
        _has_mixed_attention_kv_layout=lambda sizes: False,
    )  # fmt: skip
    raw = GPUModelRunner._allocate_kv_cache_tensors(runner, plan)
    sizes = [g.kv_cache_spec.block_size for g in plan.kv_cache_groups]
    return GPUModelRunner._reshape_kv_cache_tensors(runner, raw, sizes)


@pytest.mark.parametrize("allocate", [allocated_by_v1, allocated_by_v2])
@pytest.mark.parametrize("make_groups", [one_group, hybrid])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "nvfp4"])
def test_allocation_is_the_decision(allocate, make_groups, dtype):
    config, groups = with_connector("XLayerConnector"), make_groups(dtype)
    layout = v0_26.negotiate_rows(config, groups).descriptor
    caches = allocate(planned(config, groups), dtype)
    check_allocation(layout, v0_26.allocations(caches))
    pool = next(iter(caches.values()))
    pool = torch.empty(0, dtype=torch.uint8).set_(pool.untyped_storage())
    assert pool.numel() == NUM_BLOCKS * layout.row_bytes
    for name, cache in caches.items():
        view = page_view(pool, layout, name)
        assert (view.data_ptr(), view.shape, view.stride()) == (cache.data_ptr(), cache.shape, cache.stride())


@pytest.mark.parametrize("allocate", [allocated_by_v1, allocated_by_v2])
@pytest.mark.parametrize("dtype", ["bfloat16", "nvfp4"])
@pytest.mark.parametrize("connector", [None, "OffloadingConnector"])
def test_without_our_connector_every_layer_has_its_own_tensor(allocate, dtype, connector):
    groups = one_group(dtype)
    caches = allocate(planned(with_connector(connector), groups), dtype)
    assert len({cache.untyped_storage().data_ptr() for cache in caches.values()}) == 3
    assert all(cache.is_contiguous() for cache in caches.values())
    layout = v0_26.negotiate_rows(with_connector("XLayerConnector"), groups).descriptor
    with pytest.raises(AllocationError, match=r"layers\.1: expected"):
        check_allocation(layout, v0_26.allocations(caches))
