"""The connector's part of the table in `private`: names of vLLM's offloading connector and its tiers."""

from .dependence import CONNECTOR_FEATURE, Private

_OFFLOADING = "vllm.distributed.kv_transfer.kv_connector.v1.offloading"
_TIERS = "vllm.v1.kv_offload"
_BOOKS = "the host tier's books could not be kept right where a transfer failed"

RUNNER_V2 = Private(
    "stores of models whose new blocks are zeroed",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
    why="XLayerConnector refuses those models on model runner V2: zeroed blocks would be kept as if computed",
    how="wrapped: the connector waits for its stores before new blocks are zeroed or copied into",
    remove_when="model runner V2 calls handle_preemptions before it changes blocks",
    methods={"update_requests": "self scheduler_output"},
)

DEPENDENCES = (
    RUNNER_V2,
    Private(
        "disk tier across a sleep and changed weights",
        "vllm.distributed.kv_transfer.kv_connector.v1.multi_connector:MultiConnector",
        why="below MultiConnector nothing is found after a sleep that was written before it",
        how="read: its connectors, which are told of a sleep, and of which some let loads be early",
        remove_when="a connector is told why it is reset",
        attributes=("_connectors",),
    ),
    Private(
        CONNECTOR_FEATURE,
        f"{_OFFLOADING}.scheduler:OffloadingConnectorScheduler",
        why="a request whose load failed would ask the tier for ever, and failed jobs would count as done",
        how="read: jobs and requests under way, whether a group holds states; added to: blocks that another "
        "connector loads into; called: how much of a request can be in a tier",
        remove_when="vLLM's connector takes a failed transfer as its own",
        methods={"_calc_num_offloadable_tokens": "self req_status num_computed_tokens"},
        attributes=(
            "_jobs", "_req_status", "_block_id_to_pending_jobs", "_chunks_being_loaded", "_mamba_align_size",
            "_current_batch_load_jobs", "_current_batch_allocated_block_ids",
        ),
    ),
    Private(
        CONNECTOR_FEATURE,
        f"{_OFFLOADING}.scheduler:OffloadingConnectorScheduler",
        why="a long prompt's first token would wait for a call a chunk",
        how="overridden: chunks that are simply there are counted at once, the rest is asked for as ever",
        remove_when="OffloadingManager looks up many keys in one call",
        methods={"_maximal_prefix_lookup": "self keys req_context req group_config start_chunk_idx"},
    ),
    Private(
        CONNECTOR_FEATURE,
        f"{_OFFLOADING}.scheduler:OffloadingConnectorScheduler",
        why="blocks of a chunk of which some have left the window would be stored in others' places",
        how="overridden: such chunks lose their last block first, without which vLLM stores none",
        remove_when="a store says of each block which place it has",
        methods={"_build_store_jobs": "self scheduler_output"},
        attributes=("_sliding_window_groups", "group_states", "block_ids"),
    ),
    Private(
        CONNECTOR_FEATURE,
        f"{_OFFLOADING}.scheduler:RequestGroupState",
        why="vLLM would look at every running request in every step",
        how="read: whether a request has chunks to store; set back where a load failed",
        remove_when="vLLM leaves requests without news out by itself",
        attributes=("next_stored_chunk_idx",),
    ),
    Private(
        CONNECTOR_FEATURE,
        f"{_OFFLOADING}.worker:OffloadingConnectorWorker",
        why="vLLM asserts that every transfer succeeded, and a failed one would end the engine",
        how="read: which request waits for a load; replaced: what is told to the scheduler",
        remove_when="vLLM's worker reports failed transfers",
        attributes=("_load_jobs", "_connector_worker_meta"),
    ),
    Private(
        CONNECTOR_FEATURE,
        f"{_TIERS}.cpu.spec:CPUOffloadingSpec",
        why="the tier's manager and worker would be vLLM's own",
        how="set where vLLM's get_manager and get_worker keep theirs",
        remove_when="the spec has a hook to make them",
        attributes=("_manager", "_worker"),
    ),
    Private(
        CONNECTOR_FEATURE,
        f"{_TIERS}.cpu.spec:CPUOffloadingSpec",
        why="on the CPU platform each rank would keep its own copy of equal rows",
        how="overridden: ranks can share memory on every platform",
        remove_when="the spec takes the number of copies",
        methods={"_uses_shared_region": "self"},
    ),
    Private(
        CONNECTOR_FEATURE,
        f"{_TIERS}.cpu.manager:CPUOffloadingManager",
        why=_BOOKS,
        how="called and read: chunks of failed transfers are given back, and debug mode checks the books",
        remove_when="complete_load takes success=False",
        methods={
            "_prepare_load": "self keys req_context record_access",
            "_free_chunk": "self chunk",
            "_get_load_store_spec": "self keys chunks",
        },
        attributes=(
            "_policy", "_free_list", "_num_allocated_chunks",
            "_num_evictable_cache_chunks", "_num_write_pending_chunks",
        ),
    ),
    Private(
        CONNECTOR_FEATURE,
        f"{_TIERS}.tiering.manager:TieringOffloadingManager",
        why="what moves between host memory and the disk would not be known to the books",
        how="read: transfers between the tiers; called: so that finished ones are booked",
        remove_when="the manager lists its transfers",
        methods={"_maybe_process_finished_jobs": "self"},
        attributes=("_jobs", "_pending_load_submissions"),
    ),
    Private(
        CONNECTOR_FEATURE,
        f"{_TIERS}.tiering.base:SecondaryTierManager",
        why="the tiering manager could not ask the disk tier for its back pressure",
        how="set to None, since the disk tier bounds its queue itself",
        remove_when="the base class can be initialised without vLLM's settings",
        attributes=("_bp_detector", "locality"),
    ),
)  # fmt: skip
