"""Changes to vLLM where it has no extension point: a registry, and one file a target."""

from . import attention, cli, connectors

PATCHES = (attention.PATCH, cli.PATCH, connectors.PATCH)
