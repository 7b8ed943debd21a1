"""What XLayerConnector does not do for a model, said before the engine serves it."""

from collections.abc import Iterator

from vllm.config import VllmConfig
from vllm.distributed.utils import get_pp_indices
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec, iter_layer_specs

from ..layout import RowDescriptor
from .disk.identity import drafter_with_kv


class NotServedError(ValueError):
    """XLayerConnector cannot serve this engine; says what is missing and how to go on."""


def check_served(vllm_config: VllmConfig, plan: KVCacheConfig, layout: RowDescriptor, ours: bool) -> None:
    """Raises NotServedError with every reason; nothing if the connector serves this engine.

    ours: whether this package's spec moves the rows; else one that the user named.
    """
    if problems := list(_problems(vllm_config, plan, layout, ours)):
        raise NotServedError(
            "XLayerConnector cannot serve this engine: " + "; ".join(problems) + ". Without --kv-connector "
            "the engine serves the model, with its cache on the device only"
        )


def _problems(
    vllm_config: VllmConfig, plan: KVCacheConfig, layout: RowDescriptor, ours: bool
) -> Iterator[str]:
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    if plan.hisparse_host_num_blocks is not None or any(g.host_resident for g in plan.kv_cache_groups):
        yield "HiSparse keeps a part of the KV cache in host memory by itself, outside the rows"
    if layout.uniform is None and not ours:
        yield (
            "its pages are not of one kind, which only this package's spec moves: leave spec_name out of "
            "kv_connector_extra_config"
        )
    if len(set(counts := _layers_of_ranks(vllm_config))) > 1:
        yield (
            f"pipeline parallelism with ranks of {', '.join(map(str, counts))} layers: their rows differ in "
            "bytes, and the tiers count in those of the first. Set VLLM_PP_LAYER_PARTITION to as many for "
            "each, or another --pipeline-parallel-size"
        )
    if parallel.pipeline_parallel_size > 1 and drafter_with_kv(vllm_config) is not None:
        yield (
            f"pipeline parallelism (got {parallel.pipeline_parallel_size}) with a drafter that has a KV "
            "cache: the last rank's rows are larger, and the tiers count in those of the first"
        )
    specs = [spec for group in plan.kv_cache_groups for spec in iter_layer_specs(group.kv_cache_spec)]
    modes = {spec.mamba_cache_mode for spec in specs if isinstance(spec, MambaSpec)}
    if not modes:
        return
    if not cache.enable_prefix_caching or modes != {"align"}:
        yield (
            "a hybrid model's states can be found again only with prefix caching and mamba_cache_mode "
            f"'align', got enable_prefix_caching={cache.enable_prefix_caching} and mode "
            f"{', '.join(sorted(modes))}: set --enable-prefix-caching and leave the mode to vLLM"
        )
    if parallel.decode_context_parallel_size > 1:
        yield (
            f"hybrid models with decode context parallelism (got {parallel.decode_context_parallel_size}): "
            "a block has another number of tokens in each group"
        )
    if parallel.pipeline_parallel_size > 1:
        yield (
            f"hybrid models with pipeline parallelism (got {parallel.pipeline_parallel_size}): the rows of "
            "the ranks differ in bytes, and the host tier counts in those of the first"
        )
    transfer = vllm_config.kv_transfer_config
    extra = {} if transfer is None else transfer.kv_connector_extra_config
    unit = getattr(cache, "prefix_match_unit", None)
    for name, one_block in (("blocks_per_chunk", 1), ("block_size", cache.block_size)):
        if unit is not None and int(extra.get(name, one_block)) > one_block:
            yield (
                f"prefix_match_unit {unit} finds parts of a block, and {name} {extra[name]} stores several "
                "blocks as one: set only one of them"
            )


def _layers_of_ranks(vllm_config: VllmConfig) -> list[int]:
    """Of each rank of a pipeline, as vLLM divides them."""
    ranks = vllm_config.parallel_config.pipeline_parallel_size
    if ranks == 1:
        return []
    layers = vllm_config.model_config.get_total_num_hidden_layers()
    return [end - start for start, end in (get_pp_indices(layers, rank, ranks) for rank in range(ranks))]
