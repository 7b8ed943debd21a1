"""The record of a running engine, and the engines that cannot hand over rows."""

import json
from collections.abc import Iterator
from typing import Any

from vllm.config import VllmConfig

from ...layout import LayoutDescriptor
from ...layout.spec import CacheSpec
from ..disk.identity import shaping_settings, weights_folder
from ..disk.weight_files import weights_digest
from .link import Link
from .record import Record

PATHS = ("_name_or_path",)
"""Keys of a model's configuration that say where it lies, not what it is."""


def problems(vllm_config: VllmConfig) -> Iterator[str]:
    """Why this engine's rows must not go to another, or cannot; each a sentence."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    if vllm_config.lora_config is not None:
        yield "LoRA adapters are known by name, and two engines may have different weights under one name"
    if vllm_config.speculative_config is not None:
        yield "with speculative decoding rows may hold a draft model's KV"
    if parallel.world_size != parallel.tensor_parallel_size:
        yield (
            f"expected tensor parallelism only, got {parallel.world_size} ranks with "
            f"tensor_parallel_size {parallel.tensor_parallel_size}"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield "context parallelism puts a block's tokens on several ranks"
    if getattr(cache, "calculate_kv_scales", False):
        yield "calculate_kv_scales takes global scales from the first prompts, which other engines do not see"
    if vllm_config.model_config.enable_sleep_mode:
        yield "sleep mode gives back memory that another engine may be reading"


def record_of(
    vllm_config: VllmConfig, layout: LayoutDescriptor, vllms_hash: str, tp_rank: int, blocks: int, seals: int
) -> Record:
    """The record of a rank whose weights are loaded.

    Args:
        vllms_hash: what vLLM's own connectors compare.
        seals: as in `Record`.

    Raises:
        NoIdentity: the model's weights are not found, or come from elsewhere than its folder.
    """
    tp_size = vllm_config.parallel_config.tensor_parallel_size
    settings = shaping_settings(vllm_config)
    settings["config"] = {key: v for key, v in settings["config"].items() if key not in PATHS}
    must_equal = {
        "weights": _weights(vllm_config, settings),
        "global_scales": global_scales(vllm_config, layout),
        "groups": [_group(spec, vllm_config) for spec in layout.groups],
        "settings": settings,
        # Last in the alphabet, so that whatever else differs is named first.
        "vllm's hash (its version, NIXL's protocol, the model's name, attention backend)": vllms_hash,
    }
    # Through JSON: what cannot be said in it, as dtypes, is said as text on both sides.
    plain = json.loads(json.dumps(must_equal, default=str))
    return Record(plain, layout.to_dict(), tp_size, tp_rank, blocks, seals, Link.here().to_dict())


def _weights(vllm_config: VllmConfig, settings: dict[str, Any]) -> str:
    if settings["load_format"] == "dummy":
        return "dummy"  # what they are, the seed among the settings says
    return weights_digest(weights_folder(vllm_config), of_this_copy=False)


def _group(spec: CacheSpec, vllm_config: VllmConfig) -> dict[str, Any]:
    """A group without what depends on the number of ranks."""
    return {
        "layers": list(spec.layers),
        "kv_heads": vllm_config.model_config.get_total_num_kv_heads(),
        "head_size": [spec.head_size_k, spec.head_size_v],
        "block_size": spec.block_size,
        "dtype": spec.dtype,
    }


def global_scales(vllm_config: VllmConfig, layout: LayoutDescriptor) -> dict[str, list[float]]:
    """{layer: [scale of K, scale of V]} of quantised layers; empty for 16 and 32 bits."""
    layers = vllm_config.compilation_config.static_forward_context
    return {
        name: [float(layers[name]._k_scale), float(layers[name]._v_scale)]
        for spec in layout.groups
        if spec.item_bytes == 1
        for name in spec.layers
    }
