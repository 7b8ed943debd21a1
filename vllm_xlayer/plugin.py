"""The entry point that vLLM calls in each of its processes. Nothing raised here may reach vLLM."""

import logging

CONNECTOR = ("XLayerConnector", "vllm_xlayer.connector.connector", "XLayerConnector")
"""Name, module and class, as KVConnectorFactory wants them."""


def register() -> None:
    """Applies the patches and registers the extension points. Called several times a process."""
    try:
        _log_as_vllm_does()
        _register()
    except Exception as error:  # an exception here would end every user's vLLM
        logging.getLogger("vllm_xlayer").warning(
            "vllm_xlayer is not active: %s: %s. Nothing was changed; run `vllm-xlayer doctor` for details.",
            type(error).__name__, error,
        )  # fmt: skip


def _log_as_vllm_does() -> None:
    """vLLM configures only the logger "vllm": give ours its handlers and level."""
    import vllm.logger  # noqa: F401  configures it

    theirs, ours = logging.getLogger("vllm"), logging.getLogger("vllm_xlayer")
    if theirs.handlers and not ours.handlers:
        ours.handlers, ours.propagate = theirs.handlers, theirs.propagate
        ours.setLevel(theirs.level)


def _register() -> None:
    from . import compat
    from .patches import FEATURES
    from .patches.registry import REGISTRY, Phase

    compat.current()
    known = {record.feature for record in REGISTRY.report()}
    for feature, patches in FEATURES.items():
        if feature not in known:
            REGISTRY.add(feature, *patches)
    _register_connector()
    REGISTRY.apply(Phase.PLUGIN, wanted=tuple(FEATURES))


def _register_connector() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR[0] not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(*CONNECTOR)
