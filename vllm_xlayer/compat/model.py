"""The layout that a model's KV cache would have, from its configuration alone: for `doctor`."""

from typing import Any, cast

import torch

from ..layout import ConnectorWish, Decision, negotiate
from .extension_points import CONNECTOR
from .plan import cache_spec
from .rows import ROWS, offer_of


def negotiate_for_model(
    model: str, kv_cache_dtype: str, block_size: int | None, layer: int
) -> tuple[Decision, str]:
    """The layout a model would get with XLayerConnector.

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
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

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
        cache = cache_spec(names, backend.customize_spec(spec))
        wish = ConnectorWish(CONNECTOR, ROWS, required=True)
        return negotiate([cache], [offer_of(backend, [cache.dtype])], wish), names[layer]
