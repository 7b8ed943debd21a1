"""What this package registers with vLLM."""

import logging

CONNECTOR = "XLayerConnector"
NIXL_CONNECTOR = "XLayerNixlConnector"
TIERED_NIXL_CONNECTOR = "XLayerTieredNixlConnector"
_MODULES = {
    CONNECTOR: "vllm_xlayer.connector.connector",
    NIXL_CONNECTOR: "vllm_xlayer.connector.nixl.connector",
    TIERED_NIXL_CONNECTOR: "vllm_xlayer.connector.nixl.tiered",
}


def share_loggers() -> None:
    """vLLM configures only the logger "vllm": gives ours its handlers and level."""
    import vllm.logger  # noqa: F401  configures it

    theirs, ours = logging.getLogger("vllm"), logging.getLogger("vllm_xlayer")
    if theirs.handlers and not ours.handlers:
        ours.handlers, ours.propagate = theirs.handlers, theirs.propagate
        ours.setLevel(theirs.level)


def register_connectors() -> None:
    """Makes our connectors known by name; does nothing where they are."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    known = known_connectors()
    for name, module in _MODULES.items():
        if name not in known:
            KVConnectorFactory.register_connector(name, module, name)


def known_connectors() -> list[str]:
    """Names of the KV connectors that vLLM can create, sorted."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    return sorted(KVConnectorFactory._registry)


def report() -> dict[str, str]:
    """The platform that vLLM chose and whether the connectors are known, for `doctor`."""
    from vllm.platforms import current_platform

    known = known_connectors()
    said = (f"{name}: {'registered' if name in known else 'not registered'}" for name in _MODULES)
    return {"platform": type(current_platform).__name__, "connectors": ", ".join(said)}
