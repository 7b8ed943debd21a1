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
    from .compat import check_vllm, extension_points
    from .patches import PATCHES
    from .patches.registry import REGISTRY

    check_vllm()
    extension_points.share_loggers()
    extension_points.register_connectors()
    REGISTRY.apply(PATCHES)
