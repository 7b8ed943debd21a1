"""Global scales of NVFP4 layers: a default that suits V, or what `vllm-xlayer quality --calibrate` wrote."""

from collections.abc import Mapping
from typing import Any

from ..compat.dependence import Patch
from ..config import Config
from ..kv_scales import Scales, scales_of
from .wrapping import wrap


def _apply() -> None:
    from vllm.model_executor.layers.attention import Attention

    wrap(Attention, "process_weights_after_loading", set_scales, "vllm")


def set_scales(original: Any, layer: Any, act_dtype: Any) -> None:
    """Attention.process_weights_after_loading, which leaves the checkpoint's scales or 1.0; then ours, in
    layers whose cache this package writes and reads.

    Raises:
        ScalesError: VLLM_XLAYER_KV_SCALES names a file that does not fit.
    """
    original(layer, act_dtype)
    ours = getattr(layer.impl, "uses_global_scales", False)
    if not ours or layer._k_scale.numel() != 1:  # those that a checkpoint has a head are refused by the ops
        return
    config = layer.impl.vllm_config
    checkpoint = Scales(float(layer._k_scale), float(layer._v_scale))
    scales = _of_shared_pages(layer, config.compilation_config.static_forward_context)
    if scales is None:
        # A drafter's layers are not among those of the model, of which the file is.
        is_complete = config.speculative_config is None
        scales = scales_of(layer.layer_name, checkpoint, Config.load().kv_scales, is_complete)
    layer._k_scale.fill_(scales.k)
    layer._v_scale.fill_(scales.v)


def _of_shared_pages(layer: Any, layers: Mapping[str, Any]) -> Scales | None:
    """The scales of the layer whose pages this one reads, which was loaded before; None: it has its own."""
    target = layers.get(layer.kv_sharing_target_layer_name)
    if target is None or target._k_scale.numel() != 1:
        return None
    return Scales(float(target._k_scale), float(target._v_scale))


PATCH = Patch(
    feature="global KV scales",
    owner="vllm.model_executor.layers.attention:Attention",
    why="vLLM's global scale of 1 where a checkpoint has none loses V below a standard deviation of 0.03",
    how="wrapped: fills in the scales after vLLM has loaded a layer's weights",
    remove_when="vLLM loads KV scales from a file beside the checkpoint",
    methods={"process_weights_after_loading": "self act_dtype"},
    apply=_apply,
)
