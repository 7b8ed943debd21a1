"""XLayerNixlConnector's part of the table in `private`: names of vLLM's NIXL connector."""

from .private import Private

NIXL_FEATURE = "XLayerNixlConnector"
_NIXL = "vllm.distributed.kv_transfer.kv_connector.v1.nixl"

DEPENDENCES = (
    Private(
        NIXL_FEATURE,
        f"{_NIXL}.pull_worker:NixlPullConnectorWorker",
        why="vLLM would send a page where a row can go, and compare names where bytes must mean the same",
        how="overridden: registration, given rows, and what is checked before a peer is added",
        remove_when="vLLM makes one region of rows for grouped-query attention, and compares weights and scales",
        methods={
            "register_kv_caches": "self kv_caches",
            "add_remote_agent": "self nixl_agent_meta remote_tp_rank remote_tp_size remote_dcp_size",
        },
        attributes=(
            "kv_caches_base_addr", "block_len_per_layer", "block_stride_per_layer", "compat_hash",
            "xfer_handshake_metadata", "region_members", "tp_rank", "num_blocks",
        ),
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
