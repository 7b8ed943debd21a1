"""What this package needs of vLLM that is not public: declared, listed by `doctor`, and probed before use.

One record an owner (a class or a module): the methods that are wrapped, overridden or called, and the
attributes that are read or set. A feature whose records do not all fit the installed vLLM is off, and
whoever asks for it is told which name is missing. Patches (`patches`) are records that also change something.
"""

import functools

from .dependence import (
    ATTENTION_FEATURE,
    CONNECTOR_FEATURE,
    PARTIAL_HITS_FEATURE,
    PLATFORM_FEATURE,
    TOOLS_FEATURE,
    FeatureUnavailable,
    Private,
)


def table() -> tuple[Private, ...]:
    """Every record but those of the patches."""
    from . import private_connector, private_nixl

    return (*_OWN, *private_connector.DEPENDENCES, *private_nixl.DEPENDENCES)


@functools.cache
def _problems_of(feature: str) -> tuple[str, ...]:
    return tuple(p for record in table() if record.feature == feature and (p := record.problem()))


def require(feature: str) -> None:
    """Returns if everything private that a feature needs is there.

    Raises:
        FeatureUnavailable: with all that is missing.
    """
    if problems := _problems_of(feature):
        raise FeatureUnavailable(f"{feature} does not work with this vLLM: {'; '.join(problems)}")


_KV_SCALES = "vllm.model_executor.layers.attention.attention"
_OWN = (
    Private(
        ATTENTION_FEATURE,
        _KV_SCALES,
        why="the global scales of K and V would not be found",
        how="read from the layer when pages are written and read",
        remove_when="the layer's scales have public names",
        attributes=("_k_scale", "_v_scale"),
    ),
    Private(
        CONNECTOR_FEATURE,
        "vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory",
        why="registering a connector twice is an error, and --kv-connector could not name the known ones",
        how="read: which connectors are registered",
        remove_when="the factory lists its connectors",
        attributes=("_registry",),
    ),
    Private(
        "MultiConnector's reasons",
        "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector:MultiConnector",
        why="nobody could say which of its connectors asks for which layout",
        how="called where they disagree; get_required_kvcache_layout is wrapped",
        remove_when="MultiConnector names the connectors that disagree",
        methods={
            "_get_connector_classes_and_configs": "vllm_config",
            "get_required_kvcache_layout": "vllm_config",
        },
    ),
    Private(
        TOOLS_FEATURE,
        "vllm.v1.engine.core:EngineCore",
        why="the demo could not wait for transfers, nor tell what the cache's memory looks like",
        how="read, where the core is in this process",
        remove_when="LLM tells whether transfers are under way",
        attributes=("scheduler", "batch_queue"),
    ),
    Private(
        PLATFORM_FEATURE,
        "vllm.platforms.cpu:CpuPlatform",
        why="vLLM's CUDA wheel has no CPU kernels, and no engine would start",
        how="inherited; these are overridden",
        remove_when="vLLM's CUDA wheel runs without a GPU",
        upstream="vllm-project/vllm#57684",
        methods={
            "import_kernels": "",
            "get_attn_backend_cls": "selected_backend attn_selector_config num_heads",
            "check_and_update_config": "vllm_config",
            "update_block_size_for_backend": "vllm_config",
            "discover_numa_topology": "",
        },
    ),
    Private(
        PLATFORM_FEATURE,
        "vllm.v1.worker.cpu_worker:CPUWorker",
        why="the worker would warm up compiled kernels that are not there",
        how="inherited; these are overridden",
        remove_when="vLLM's CUDA wheel runs without a GPU",
        upstream="vllm-project/vllm#57684",
        methods={
            "__init__": "vllm_config local_rank rank distributed_init_method is_driver_worker",
            "init_device": "self",
            "determine_available_memory": "self",
        },
    ),
    Private(
        PLATFORM_FEATURE,
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner",
        why="nobody would say which requests start, and newest tokens could be another request's",
        how="_update_states is overridden and calls vLLM's; the batch's requests are read",
        remove_when="model runner V1 gives builders req_idx, or is gone",
        methods={"_update_states": "scheduler_output"},
        attributes=("input_batch",),
    ),
    Private(
        PLATFORM_FEATURE,
        "vllm.v1.worker.gpu_worker",
        why="the worker could not set up its process groups",
        how="called as the CPU worker does",
        remove_when="vLLM's CUDA wheel runs without a GPU",
        upstream="vllm-project/vllm#57684",
        methods={
            "init_worker_distributed_environment": "vllm_config rank distributed_init_method local_rank"
        },
    ),
    Private(
        PLATFORM_FEATURE,
        "vllm.utils.cpu_triton_utils",
        why="with speculative decoding temperatures of sampled requests would be lost",
        how="replaced: it writes to a copy of tensors that are not int64",
        remove_when="it writes to its output whatever that is",
        methods={"_expand_kernel_impl": "output input_val cu_num_tokens replace_from replace_to"},
    ),
    Private(
        PLATFORM_FEATURE,
        "vllm.v1.worker.mamba_utils",
        why="with speculative decoding states would not come to a step's block, nor to one that is full",
        how="others stand in for these kernels of Triton's, and take what they take, in this order",
        remove_when="vLLM has them for CPUs",
        attributes=("precopy_mamba_align_fused_kernel", "postprocess_mamba_fused_kernel"),
    ),
    Private(
        PARTIAL_HITS_FEATURE,
        "vllm.v1.core.kv_cache_utils:KVCacheBlock",
        why="a block that gets its hash in a step would not be told from one that has it",
        how="read before and after vLLM gives blocks their hashes",
        remove_when="the patch of that name goes",
        attributes=("block_hash_num_tokens",),
    ),
)
