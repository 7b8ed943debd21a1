"""What this package registers with vLLM."""

import logging

CONNECTOR = "XLayerConnector"
_MODULE = "vllm_xlayer.connector.connector"


def share_loggers() -> None:
    """vLLM configures only the logger "vllm": gives ours its handlers and level."""
    import vllm.logger  # noqa: F401  configures it

    theirs, ours = logging.getLogger("vllm"), logging.getLogger("vllm_xlayer")
    if theirs.handlers and not ours.handlers:
        ours.handlers, ours.propagate = theirs.handlers, theirs.propagate
        ours.setLevel(theirs.level)


def register_connector() -> None:
    """Makes XLayerConnector known by name; does nothing where it is."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in known_connectors():
        KVConnectorFactory.register_connector(CONNECTOR, _MODULE, CONNECTOR)


def known_connectors() -> list[str]:
    """Names of the KV connectors that vLLM can create, sorted."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    return sorted(KVConnectorFactory._registry)


def report() -> dict[str, str]:
    """The platform that vLLM chose and whether the connector is known, for `doctor`."""
    from vllm.platforms import current_platform

    known = CONNECTOR in known_connectors()
    return {
        "platform": type(current_platform).__name__,
        "connector": f"{CONNECTOR}: {'registered' if known else 'not registered'}",
    }
