"""vLLM 0.26: how its KV cache groups, backends and connectors translate to `layout`'s terms."""

import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.kv_cache_interface import (
    AttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
)

from ..layout import (
    Allocation,
    BackendOffer,
    CacheSpec,
    ConnectorWish,
    Decision,
    Layout,
    NegotiationError,
    Refusal,
    allocation_of,
    negotiate,
)
from ..nvfp4 import ScaleOrder

CONNECTOR = "XLayerConnector"


def share_loggers() -> None:
    """vLLM configures only the logger "vllm": gives ours its handlers and level."""
    import vllm.logger  # noqa: F401  configures it

    theirs, ours = logging.getLogger("vllm"), logging.getLogger("vllm_xlayer")
    if theirs.handlers and not ours.handlers:
        ours.handlers, ours.propagate = theirs.handlers, theirs.propagate
        ours.setLevel(theirs.level)


def register_connector() -> None:
    """Makes XLayerConnector known by name; does nothing where it is."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "vllm_xlayer.connector.connector", CONNECTOR)


def extension_points() -> dict[str, str]:
    """What this package registered with vLLM, and the platform vLLM chose, for `doctor`."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.platforms import current_platform

    known = CONNECTOR in KVConnectorFactory._registry
    return {
        "platform": type(current_platform).__name__,
        "connector": f"{CONNECTOR}: {'registered' if known else 'not registered'}",
    }


def asks_for_rows(vllm_config: VllmConfig) -> bool:
    """Whether the user configured XLayerConnector, directly or inside a MultiConnector."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None:
        return False
    children = transfer.kv_connector_extra_config.get("connectors", ())
    return CONNECTOR in (transfer.kv_connector, *(child.get("kv_connector") for child in children))


def negotiate_rows(vllm_config: VllmConfig, groups: Sequence[KVCacheGroupSpec]) -> Decision:
    """The layout for a model served with XLayerConnector, which works with rows only.

    Raises:
        NegotiationError: a party refuses rows; names it, with its reason.
    """
    wish = ConnectorWish(CONNECTOR, (Layout.BLHNC, Layout.BLNHC), required=True)
    if unsupported := [g for g in groups if not _is_plain_attention(g.kv_cache_spec)]:
        kinds = sorted({type(g.kv_cache_spec).__name__ for g in unsupported})
        reason = "rows hold pages of full or sliding-window attention, got "
        raise NegotiationError([Refusal(Layout.BLHNC, "model", reason + kind) for kind in kinds])
    return negotiate([group_spec(group) for group in groups], [offer_of(groups)], wish)


def groups_with_own_pages(kv_cache_config: KVCacheConfig) -> list[KVCacheGroupSpec]:
    """The groups without layers that reuse another layer's pages (the runners add those to the groups)."""
    own = {name for tensor in kv_cache_config.kv_cache_tensors for name in tensor.layers}
    return [
        replace(group, layer_names=[name for name in group.layer_names if name in own])
        for group in kv_cache_config.kv_cache_groups
    ]


def allocations(kv_caches: Mapping[str, torch.Tensor]) -> dict[str, Allocation]:
    """What the engine allocated for each layer, as `layout.check_allocation` compares it."""
    return {name: allocation_of(tensor) for name, tensor in kv_caches.items()}


def _is_plain_attention(spec: KVCacheSpec) -> bool:
    return isinstance(spec, FullAttentionSpec | SlidingWindowSpec) and not isinstance(spec, MLAAttentionSpec)


def group_spec(group: KVCacheGroupSpec) -> CacheSpec:
    """vLLM's spec of one group of attention layers, in this package's terms."""
    assert isinstance(group.kv_cache_spec, AttentionSpec)
    return cache_spec(group.layer_names, group.kv_cache_spec)


def cache_spec(layers: Iterable[str], spec: AttentionSpec) -> CacheSpec:
    """vLLM's spec of one group, in this package's terms."""
    dtype = "nvfp4" if spec.kv_quant_mode.is_nvfp4 else str(spec.dtype).removeprefix("torch.")
    if spec.dtype == torch.uint8 and dtype != "nvfp4":
        dtype = "fp8"
    return CacheSpec(
        layers=tuple(layers),
        num_kv_heads=spec.num_kv_heads,
        head_size_k=spec.head_size,
        head_size_v=getattr(spec, "head_size_v", spec.head_size),
        block_size=spec.block_size,
        dtype=dtype,
        page_bytes=spec.unpadded_page_size_bytes,
        page_bytes_padded=spec.page_size_padded,
    )


def physical_orders(dtype: str) -> tuple[Layout, Layout]:
    """(layer-major, rows) in the order of heads and tokens in effect.

    XLayerConnector asks vLLM for heads outside tokens; the environment can override that.
    """
    if dtype != "nvfp4" and os.environ.get("VLLM_KV_CACHE_LAYOUT") == "NHD":
        return Layout.LBNHC, Layout.BLNHC
    return Layout.LBHNC, Layout.BLHNC


def offer_of(groups: Sequence[KVCacheGroupSpec]) -> BackendOffer:
    """What the attention backends said of their kernels when they filled in the specs."""
    strides = {group_spec(group).dtype: True for group in groups}  # the engine core resolved it
    return _offer("of " + groups[0].layer_names[0], strides)


def offer_of_backend(backend: type[AttentionBackend], dtype: str) -> BackendOffer:
    """What a backend class accepts (for `doctor`, where no engine has filled in specs)."""
    return _offer(backend.__name__, {dtype: _reads_rows(backend)})


def _reads_rows(backend: type[AttentionBackend]) -> bool:
    layouts = backend.supported_kv_cache_layouts()
    return layouts is None or any(layout.name == "BLHNC" for layout in layouts)


def _offer(name: str, by_block_stride: Mapping[str, bool]) -> BackendOffer:
    """``by_block_stride``: for each dtype, whether the kernels read pages by the block stride."""
    accepts: dict[str, frozenset[Layout]] = {}
    refuses = {}
    for dtype, by_stride in by_block_stride.items():
        layer_major, rows = physical_orders(dtype)
        reason = None if by_stride else "does not read pages by the block stride"
        if dtype == "nvfp4" and scale_order() is ScaleOrder.SWIZZLED:
            reason = (
                "rows of NVFP4 pages have not been tried with upstream's kernels for compute capability 10.x"
            )
        accepts[dtype] = frozenset({layer_major} if reason else {layer_major, rows})
        if reason:
            refuses[dtype, rows] = reason
    return BackendOffer(name, accepts, refuses, (scale_order(),))


def scale_order() -> ScaleOrder:
    """The order of V's scales that the kernels on this machine read: trtllm-gen on sm_100 swizzles them."""
    from vllm.platforms import current_platform

    sm_100 = current_platform.is_cuda() and current_platform.is_device_capability_family(100)
    return ScaleOrder.SWIZZLED if sm_100 else ScaleOrder.LINEAR


def negotiate_for_model(
    model: str, kv_cache_dtype: str, block_size: int | None, layer: int
) -> tuple[Decision, str]:
    """The layout a model would get with XLayerConnector, from its configuration alone.

    Layers are named by index; hybrid models are shown as the one group their full-attention
    layers form, as vLLM decides the others only when it loads the model.

    Returns:
        The decision, and the name of layer ``layer``.

    Raises:
        ValueError: vLLM refuses the model or the dtype, or there is no such layer.
        NegotiationError: a party refuses rows.
    """
    from vllm.config import KVTransferConfig, set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.attention.selector import get_attn_backend
    from vllm.v1.kv_cache_interface import get_kv_quant_mode

    settings: dict[str, Any] = dict(
        model=model, kv_cache_dtype=kv_cache_dtype, block_size=block_size, skip_tokenizer_init=True,
        kv_transfer_config=KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_both"),
    )  # fmt: skip
    config = EngineArgs(**settings).create_engine_config()
    model_config, parallel = config.model_config, config.parallel_config
    names = [f"layer {i}" for i in range(model_config.get_num_layers(parallel))]
    if not 0 <= layer < len(names):
        raise ValueError(f"--layer: expected 0 to {len(names) - 1}, got {layer}")
    with set_current_vllm_config(config):
        backend = get_attn_backend(
            model_config.get_head_size(), cast(torch.dtype, model_config.dtype),
            config.cache_config.cache_dtype,
            use_mla=model_config.use_mla,
        )  # fmt: skip
        spec = FullAttentionSpec(
            block_size=config.cache_config.block_size or 16,
            num_kv_heads=model_config.get_num_kv_heads(parallel),
            head_size=model_config.get_head_size(),
            dtype=kv_cache_dtype_str_to_dtype(config.cache_config.cache_dtype, model_config),
            kv_quant_mode=get_kv_quant_mode(config.cache_config.cache_dtype),
        )
        cache = cache_spec(names, spec)
        wish = ConnectorWish(CONNECTOR, (Layout.BLHNC, Layout.BLNHC, Layout.BHLNC), required=True)
        return negotiate([cache], [offer_of_backend(backend, cache.dtype)], wish), names[layer]


def cache_geometry(llm) -> tuple[int, int, bool, int, int]:
    """(layers, page bytes, whether in rows, tokens the cache holds, block size) of a running engine
    whose core is in this process and whose KV cache groups have equal pages."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    config = scheduler.kv_cache_config
    layers = sum(len(t.layers) for t in config.kv_cache_tensors)
    spec = config.kv_cache_groups[0].kv_cache_spec
    rows = config.kv_cache_tensors[0].block_stride > config.kv_cache_tensors[0].layer_stride
    return layers, spec.page_size_bytes, rows, config.num_blocks * spec.block_size, spec.block_size


def rows_loaded() -> int:
    """Rows that XLayerConnector has loaded from its host tier in this process."""
    return connector().connector_worker.worker.rows_loaded


def connector() -> Any:
    """The XLayerConnector of this process's worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    return get_kv_transfer_group()


def come_to_rest(llm, seconds: float = 60.0) -> None:
    """Steps a running engine, whose core is in this process, until nothing is under way.

    After the last answer a step may be that was scheduled ahead of it, and transfers; after the start, the
    pinning of the host tier. Only steps of the engine find out that it no longer is.

    Raises:
        TimeoutError: something still is after ``seconds``.
    """
    core = llm.llm_engine.engine_core.engine_core
    deadline = time.monotonic() + seconds
    while core.scheduler.has_requests() or core.batch_queue:
        if time.monotonic() > deadline:
            raise TimeoutError(f"expected all steps and transfers to end within {seconds} s; some have not")
        llm.llm_engine.step()
        time.sleep(0.001)


def empty_device_cache(llm, seconds: float = 60.0) -> None:
    """Forgets what the device's prefix cache holds, of a running engine whose core is in this process.

    vLLM forgets no block that is in use, so the engine comes to rest first.

    Raises:
        TimeoutError: as come_to_rest.
        RuntimeError: vLLM refuses, though nothing is under way.
    """
    come_to_rest(llm, seconds)
    if not llm.reset_prefix_cache():
        raise RuntimeError("the device's prefix cache could not be emptied")


def use_stable_block_hashes() -> None:
    """Lets this engine's block hashes be those of any other process with the same content.

    vLLM starts its chain of hashes from a random number unless PYTHONHASHSEED is set; this is its own switch.
    To be called before the engine core hashes: it reads the variable after it has made the scheduler. Where
    the user has set it, engines with different values find nothing of each other, which is safe.
    """
    os.environ.setdefault("PYTHONHASHSEED", "0")
