"""The rows that a model would have, without its weights: for `doctor`.

vLLM decides on groups and pages by asking the model's layers, so these are built, on the meta device, where
nothing is allocated.
"""

import importlib
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheConfig, KVCacheSpec

from ..layout import RowDecision
from .extension_points import CONNECTOR
from .rows import ROWS, negotiate_rows


@dataclass(frozen=True)
class ModelRows:
    """What `doctor` shows of a model.

    Args:
        plan: of one block.
        layers: names of those that have a page, in the model's order.
        assumed: why its layers could not be built; the rows are then those of like full-attention layers.
    """

    config: VllmConfig
    plan: KVCacheConfig
    decision: RowDecision
    layers: tuple[str, ...]
    assumed: str = ""


def rows_of_model(model: str, kv_cache_dtype: str, block_size: int | None) -> ModelRows:
    """The rows a model would get with XLayerConnector, on one GPU.

    Raises:
        ValueError: vLLM refuses the model or the dtype.
        NegotiationError: a party refuses rows.
    """
    from vllm.config import KVTransferConfig, set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    settings: dict[str, Any] = dict(
        model=model, kv_cache_dtype=kv_cache_dtype, block_size=block_size, skip_tokenizer_init=True,
        kv_transfer_config=KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_both"),
    )  # fmt: skip
    config, assumed = EngineArgs(**settings).create_engine_config(), ""
    with set_current_vllm_config(config):
        try:
            specs = _built_specs(config)
        except ValueError:
            raise
        except Exception as error:  # a model's constructor may do anything
            config.compilation_config.static_forward_context.clear()
            specs, assumed = _assumed_specs(config, error), f"{type(error).__name__}: {error}"
        plan = _plan(config, specs)
    return ModelRows(config, plan, negotiate_rows(config, plan), tuple(specs), assumed)


def _built_specs(config: VllmConfig) -> dict[str, KVCacheSpec]:
    """The cache spec of every layer that has a page, as vLLM's workers give it."""
    from vllm.config import get_layers_from_vllm_config
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.platforms import current_platform
    from vllm.utils.torch_utils import set_default_torch_dtype

    dtype = cast(torch.dtype, config.model_config.dtype)
    with _process_groups(), set_default_torch_dtype(dtype), torch.device("meta"):
        initialize_model(config)
        current_platform.update_block_size_for_backend(config)  # needs the layers' backends
    layers = get_layers_from_vllm_config(config, cast(type[Any], AttentionLayerBase))
    specs = {}
    for name, layer in layers.items():
        shares = getattr(layer, "kv_sharing_target_layer_name", None)
        if not shares and (spec := layer.get_kv_cache_spec(config)) is not None:
            specs[name] = _customized(layer.get_attn_backend(), spec)
    return specs


def _assumed_specs(config: VllmConfig, reason: Exception) -> dict[str, KVCacheSpec]:
    """As if all layers were alike, with full attention. ValueError of models that say they are not."""
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.attention.selector import get_attn_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    model, parallel, dtype = config.model_config, config.parallel_config, config.cache_config.cache_dtype
    if model.is_hybrid or model.use_mla:
        raise ValueError(
            f"the layers of {model.model} could not be built without weights: {type(reason).__name__}: "
            f"{reason}; an engine with XLayerConnector says at its start what their rows are"
        )
    backend = get_attn_backend(model.get_head_size(), cast(torch.dtype, model.dtype), dtype)
    spec = FullAttentionSpec(
        block_size=config.cache_config.block_size or 16,
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        dtype=kv_cache_dtype_str_to_dtype(dtype, model),
        kv_quant_mode=get_kv_quant_mode(dtype),
    )
    return dict.fromkeys(
        (f"layer {i}" for i in range(model.get_num_layers(parallel))), _customized(backend, spec)
    )


def _customized(backend: Any, spec: KVCacheSpec) -> KVCacheSpec:
    return backend.customize_spec(spec) if isinstance(spec, AttentionSpec) else spec


def _plan(config: VllmConfig, specs: dict[str, KVCacheSpec]) -> KVCacheConfig:
    """vLLM's plan of one block in rows."""
    moved = importlib.util.find_spec("vllm.v1.core.kv_cache_planning") is not None
    planning = importlib.import_module(f"vllm.v1.core.{'kv_cache_planning' if moved else 'kv_cache_utils'}")
    config.cache_config.num_gpu_blocks_override = 1
    config.cache_config.kv_cache_layout = ROWS[0].value
    groups = planning.get_kv_cache_groups(config, specs)
    plan = planning.get_kv_cache_config_from_groups(config, groups, 1 << 40)
    plan.kv_cache_layout = ROWS[0].value
    return plan


@contextmanager
def _process_groups() -> Iterator[None]:
    """vLLM's groups of one process, which layers ask for their share; an engine's are left as they are."""
    from vllm.distributed import parallel_state

    if parallel_state.model_parallel_is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        parallel_state.init_distributed_environment(1, 0, f"file://{folder}/store", 0, "gloo")
        try:
            parallel_state.ensure_model_parallel_initialized(1, 1)
            yield
        finally:
            parallel_state.destroy_model_parallel()
            parallel_state.destroy_distributed_environment()
