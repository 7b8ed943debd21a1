"""The entry point that vLLM calls in each of its processes. Nothing raised here may reach vLLM."""

import logging

CONNECTOR = ("XLayerConnector", "vllm_xlayer.connector.connector", "XLayerConnector")
"""Name, module and class, as KVConnectorFactory wants them."""


def register() -> None:
    """Applies the patches and registers the extension points. Called several times a process."""
    # vLLM configures only its own loggers; as a child of "vllm" ours are shown the same way.
    log = logging.getLogger("vllm.vllm_xlayer")
    try:
        _register()
    except Exception as error:  # an exception here would end every user's vLLM
        log.warning(
            "vllm_xlayer is not active: %s: %s. Nothing was changed; run `vllm-xlayer doctor` for details.",
            type(error).__name__, error,
        )  # fmt: skip


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
