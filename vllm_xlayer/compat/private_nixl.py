"""XLayerNixlConnector's part of the table in `private`: names of vLLM's NIXL connector."""

from .dependence import Private
from .extension_points import TIERED_NIXL_CONNECTOR

NIXL_FEATURE = "XLayerNixlConnector"
_NIXL = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"

DEPENDENCES = (
    Private(
        NIXL_FEATURE,
        f"{_NIXL}.pull_worker:NixlPullConnectorWorker",
        why="vLLM would send a page where a row can go, and compare names where bytes must mean the same",
        how="overridden: registration, given rows, and what is checked before a peer is added",
        remove_when="vLLM makes one region of rows, and compares weights and scales",
        methods={
            "register_kv_caches": "self kv_caches",
            "add_remote_agent": "self nixl_agent_meta remote_tp_rank remote_tp_size remote_dcp_size",
        },
        attributes=(
            "kv_caches_base_addr", "block_len_per_layer", "block_stride_per_layer", "compat_hash",
            "xfer_handshake_metadata", "region_members", "tp_rank", "num_blocks", "nixl_wrapper",
            "nixl_memory_type", "nixl_backends", "_registered_descs",
        ),
    ),
    Private(
        NIXL_FEATURE,
        f"{_NIXL}.pull_worker:NixlPullConnectorWorker",
        why="a read would go into the KV cache, where it could be neither checked nor given up",
        how="overridden: what posts a request's read, what asks which are over, and what forgets a peer; the "
        "rest is called and read as vLLM's own methods do",
        remove_when="vLLM's reads have a deadline and a checksum, and are staged",
        methods={
            "_engines_with_inflight_transfers": "self",
            "_read_blocks": "self read_spec dst_engine_id request_id remote_request_id "
            "local_xfer_side_handle local_dram_handle remote_xfer_side_handle expected_consumers "
            "awaiting_kvs",
            "_pop_done_transfers": "self transfers",
            "_cleanup_remote_engine": "self engine_id log_eviction",
            "_apply_prefix_caching": "self decode_block_ids prefill_block_ids decode_physical_per_logical "
            "prefill_physical_per_logical",
            "_handle_failed_transfer": "self req_id handle",
            "_send_pending_recv_notifs": "self req_id",
            "start_load_kv": "self metadata",
            "get_transfer_results": "self",
        },
        attributes=("_remote_agents", "_pending_recv_notifs", "xfer_stats"),
    ),
    Private(
        NIXL_FEATURE,
        f"{_NIXL}.pull_worker:NixlPullConnectorWorker",
        why="rows of another tensor-parallel size would be cut by bytes, that is by layers, or refused",
        how="overridden: the check of a peer, and the descriptors of parts of rows, which become whole ones",
        remove_when="vLLM cuts rows by heads, NVFP4 included",
        methods={
            "_validate_remote_agent_handshake": "self nixl_agent_meta remote_tp_size remote_dcp_size",
            "_build_fa_remote": "self plan nixl_agent_meta block_size_ratio",
            "_build_local_splits_from_plan": "self plan src_blocks_data num_fa_descs block_size_ratio",
        },
    ),
    Private(
        NIXL_FEATURE,
        f"{_NIXL}.pull_scheduler:NixlPullConnectorScheduler",
        why="workers would not know which rows to seal, nor what seals to expect",
        how="overridden: public methods; read: the requests that are about to be read",
        remove_when="as above",
        methods={"get_exchange_clipped_blocks": "self block_ids"},
        attributes=("_reqs_need_recv",),
    ),
    Private(
        NIXL_FEATURE,
        f"{_NIXL}.pull_scheduler:NixlPullConnectorScheduler",
        why="one message that it does not understand would end the thread that answers handshakes",
        how="overridden and called: what that thread runs, again after an error",
        remove_when="vLLM's listener outlives such messages",
        methods={"_nixl_handshake_listener": "encoded_data ready_event stop_event host port"},
    ),
    Private(
        TIERED_NIXL_CONNECTOR,
        f"{_NIXL}.pull_scheduler:NixlPullConnectorScheduler",
        why="the link would write to blocks that the tiers load",
        how="relied on: of a request it reads the blocks that it is shown and that have no hash, no others",
        remove_when="vLLM lets two connectors load parts of a prompt",
        upstream="vllm-project/vllm#54240",
        methods={"update_state_after_alloc": "self request blocks num_external_tokens"},
        attributes=("get_unhashed_block_ids_all_groups",),
    ),
    Private(
        NIXL_FEATURE,
        f"{_NIXL}.connector:NixlPullConnector",
        why="the worker would not know which rows a step has completed",
        how="read: what the scheduler's side said for this step",
        remove_when="wait_for_save is given the step's metadata",
        attributes=("_connector_metadata",),
    ),
    Private(
        NIXL_FEATURE,
        f"{_NIXL}.stats:NixlPromMetrics",
        why="rows and failures would not reach Prometheus",
        how="called: the class of counters that vLLM chose",
        remove_when="the base class offers it by a public name",
        attributes=("_counter_cls",),
    ),
    Private(
        NIXL_FEATURE,
        f"{_NIXL}.base_worker",
        why="over CUDA IPC, copies of a chunk would wait for functions that UCX puts between them",
        how="replaced while our worker is made: the class of NIXL's agent, by one whose UCX has one thread "
        "that takes all transfers",
        remove_when="vLLM or NIXL lets UCX's threads take transfers of few descriptors",
        attributes=("NixlWrapper",),
    ),
    Private(
        NIXL_FEATURE,
        f"{_NIXL}.metadata",
        why="engines of other versions of vLLM's protocol could not be told apart",
        how="read; in what two engines compare first",
        remove_when="never",
        attributes=("NIXL_CONNECTOR_VERSION",),
    ),
)  # fmt: skip
