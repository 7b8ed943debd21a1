"""Changes to vLLM where it has no extension point: a registry, and one file a target."""

from . import attention, cli, item_names, load_errors, rows

FEATURES = {module.FEATURE: module.PATCHES for module in (attention, rows, load_errors, item_names, cli)}
"""Feature -> its patches; a feature is applied whole or not at all."""
