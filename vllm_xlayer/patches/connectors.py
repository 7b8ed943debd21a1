"""Connectors that wish for different layouts: vLLM says how many wishes there are, this says whose."""

import functools

from ..compat.dependence import Patch
from ..compat.extension_points import CONNECTOR
from .wrapping import wrap


def _apply() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    wrap(KVConnectorFactory, "get_connector_class", explain_different_wishes, "vllm")


def explain_different_wishes(original, cls, kv_transfer_config):
    """vLLM's answer. MultiConnector is seen to on the way: importing it takes seconds, and few have one."""
    connector = original(cls, kv_transfer_config)
    if connector.__name__ == "MultiConnector":
        if (
            kv_transfer_config.has_connector(CONNECTOR)
            and kv_transfer_config.kv_load_failure_policy == "fail"
        ):
            _say_that_requests_end()
        wrap(connector, "get_required_kvcache_layout", name_the_wishes, "vllm")
    return connector


@functools.cache
def _say_that_requests_end() -> None:
    """XLayerConnector cannot choose for the others: the policy is MultiConnector's."""
    from vllm.logger import init_logger

    init_logger(__name__).warning(
        "MultiConnector: kv_load_failure_policy is fail: a request whose load fails ends with an error, also "
        "one of %s. With kv_load_failure_policy recompute, beside kv_connector, it is computed.", CONNECTOR,
    )  # fmt: skip


def name_the_wishes(original, cls, vllm_config) -> str | None:
    """The layout that all children wish for.

    Raises:
        ValueError: they wish for different ones; names them, and the way out.
    """
    try:
        return original(cls, vllm_config)
    except ValueError as error:
        children = cls._get_connector_classes_and_configs(vllm_config)
        wishes = {child.__name__: child.get_required_kvcache_layout(config) for child, config in children}
        if CONNECTOR not in wishes:
            raise
        said = ", ".join(f"{name} asks for {layout}" for name, layout in wishes.items() if layout)
        raise ValueError(
            f"MultiConnector: expected one KV cache layout, got {said}. {CONNECTOR} works with "
            f"{wishes[CONNECTOR]} only: if the others can too, set "
            f"VLLM_KV_CACHE_LAYOUT={wishes[CONNECTOR]}, which goes before every connector's wish"
        ) from error


PATCH = Patch(
    feature="MultiConnector's reasons",
    owner="vllm.distributed.kv_transfer.kv_connector.factory:KVConnectorFactory",
    why="MultiConnector would end with the number of layouts asked for, without names or a way out",
    how="adds to MultiConnector's error who asked for which layout, and what can be done",
    remove_when="MultiConnector names the connectors that disagree",
    methods={"get_connector_class": "kv_transfer_config"},
    apply=_apply,
)
