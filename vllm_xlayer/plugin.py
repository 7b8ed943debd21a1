"""The entry point that vLLM calls in each of its processes. Nothing raised here may reach vLLM."""

import logging


def register() -> None:
    """Applies the patches and registers the extension points. Called several times a process."""
    try:
        _register()
    except Exception as error:  # an exception here would end every user's vLLM
        logging.getLogger("vllm_xlayer").warning(
            "vllm_xlayer is not active: %s: %s. Nothing was changed; run `vllm-xlayer doctor` for details.",
            type(error).__name__, error,
        )  # fmt: skip


def _register() -> None:
    from . import compat
    from .patches import FEATURES
    from .patches.registry import REGISTRY, Phase

    api = compat.current()
    api.share_loggers()
    api.register_connector()
    known = {record.feature for record in REGISTRY.report()}
    for feature, patches in FEATURES.items():
        if feature not in known:
            REGISTRY.add(feature, *patches)
    REGISTRY.apply(Phase.PLUGIN, wanted=tuple(FEATURES))
