"""A load that fails is computed: vLLM's policy, which it reads after its connector has been made."""

from vllm.config import VllmConfig
from vllm.logger import init_logger

logger = init_logger(__name__)


def recompute_failed_loads(vllm_config: VllmConfig, connector: str) -> None:
    """vLLM ends requests whose load failed, unless told otherwise."""
    transfer = vllm_config.kv_transfer_config
    assert transfer is not None
    if transfer.kv_load_failure_policy != "recompute":
        logger.info(
            "%s: kv_load_failure_policy is recompute (was %s): no request ends because "
            "its KV could not be loaded", connector, transfer.kv_load_failure_policy,
        )  # fmt: skip
        transfer.kv_load_failure_policy = "recompute"
