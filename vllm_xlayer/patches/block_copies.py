"""Parts of blocks that vLLM finds in a hybrid model's cache (``--prefix-match-unit``): copied whole.

A request that goes on inside a found block gets a copy of the block. vLLM copies the views of the layers, and
of several that begin at one address only the first. A state's view ends where the state does, an attention
layer's at the page's end: where a layer with a state comes first, as in LFM2, Qwen3-Next and Nemotron-H, the
rest of the other layers' pages is not copied. That is so on every device, where layers have regions of their
own. A block that is one row is copied as one piece.

It is mended where attention is ours: on the CPU reference platform, and in processes with NVFP4 layers, whose
default layout has such regions. What vLLM does with other caches on GPUs is left alone: nothing changes for
those who did not ask. Rows are what to ask for.
"""

import sys
from typing import Any

from ..compat.dependence import Patch
from .wrapping import wrap

OUR_LAYERS = "vllm_xlayer.attention.impl"
"""The module of NVFP4 layers on a GPU, imported with the first of them."""


def copy_longest_views(original: Any, kv_caches: Any, *args: Any, **kwargs: Any) -> None:
    """The original, which meets the longest view at an address first."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu() or OUR_LAYERS in sys.modules:
        kv_caches = sorted(kv_caches, key=lambda cache: cache.nbytes, reverse=True)
    original(kv_caches, *args, **kwargs)


def _apply() -> None:
    from vllm.v1.worker import utils

    wrap(utils, "copy_kv_cache_blocks_inplace", copy_longest_views, "vllm")


PATCH = Patch(
    feature="partial hits of hybrid models",
    owner="vllm.v1.worker.utils",
    why="with --prefix-match-unit a hybrid model may answer from pages that vLLM copied in part; not so in "
    "rows: set VLLM_KV_CACHE_LAYOUT=BLHNC, or take XLayerConnector",
    how="wrapped: gives it views in order of their size, as it copies the first at an address, on "
    "the CPU platform and with NVFP4",
    remove_when="it copies pages whose first layer has a state in full",
    methods={"copy_kv_cache_blocks_inplace": "kv_caches num_blocks kv_cache_block_copies"},
    apply=_apply,
)
