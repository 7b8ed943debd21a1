"""Stores that a step must wait for, waited for before vLLM writes to their blocks on model runner V2, too.

The runner is not imported for this: it takes seconds, and is there where it runs once a worker's connector
is made.
"""

import sys
from typing import Any

from ..compat.dependence import Patch
from ..compat.extension_points import CONNECTOR, TIERED_NIXL_CONNECTOR
from ..compat.private_connector import RUNNER_V2
from .wrapping import wrap


def flush_first(original: Any, runner: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the original, which zeroes new blocks and copies into others, after what must come before."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    metadata = scheduler_output.kv_connector_metadata
    if metadata is not None and has_kv_transfer_group():
        connector = get_kv_transfer_group()
        parts = [(connector, metadata)]
        if hasattr(connector, "_connectors"):  # MultiConnector
            parts = list(zip(connector._connectors, metadata.metadata, strict=True))
        for one, its in parts:
            if hasattr(one, "before_blocks_change"):
                one.before_blocks_change(its)
    return original(runner, scheduler_output, *args, **kwargs)


def see_to_the_runner(original: Any, cls: Any, config: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls the original, which makes a connector; before one of ours sees to the runner of this process."""
    from ..connector.flushes import expect_flushes_first

    module, _, name = RUNNER_V2.owner.partition(":")
    transfer = config.kv_transfer_config
    ours = transfer is not None and any(map(transfer.has_connector, (CONNECTOR, TIERED_NIXL_CONNECTOR)))
    if ours and module in sys.modules and RUNNER_V2.problem() is None:
        wrap(getattr(sys.modules[module], name), "update_requests", flush_first, "vllm")
        expect_flushes_first()
    return original(cls, config, *args, **kwargs)


def _apply() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    wrap(KVConnectorFactory, "create_connector", see_to_the_runner, "vllm")


PATCH = Patch(
    feature=RUNNER_V2.feature,
    owner="vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory",
    why=RUNNER_V2.why,
    how="sees to model runner V2 where a connector is made",
    remove_when=RUNNER_V2.remove_when,
    methods={"create_connector": "config role"},
    apply=_apply,
)
