"""Changes to vLLM where it has no extension point: a registry, and one file a target."""

from . import (
    attention,
    block_copies,
    cli,
    connectors,
    flushes,
    item_names,
    kv_scales,
    model_backends,
    newest,
    partial_hits,
    sleep,
)

PATCHES = (
    attention.PATCH,
    block_copies.PATCH,
    cli.PATCH,
    connectors.PATCH,
    flushes.PATCH,
    kv_scales.PATCH,
    model_backends.PATCH,
    newest.PATCH,
    newest.HYBRIDS,
    partial_hits.PATCH,
    *item_names.PATCHES,
    *sleep.PATCHES,
)
