"""The compiled ops: one thin typed wrapper each, over ``torch.ops.vllm_xlayer``.

Importing this module never fails. The extension is loaded at the first call of an op, or by ``load()``;
where it is missing, that raises ``ExtensionMissingError`` with what to do.

Every op checks its arguments (device, dtype, layout, shape, in this order) before it writes anything, and
raises ``RuntimeError`` with what was expected and what came. Values that lie in device memory (slots, block
tables, lengths) are checked only with ``VLLM_XLAYER_DEBUG=1``, since reading them waits for the GPU, and not
in CUDA graphs; on the CPU they are always checked.
"""

from .attention import AttentionWorkspace, nvfp4_attention_schedule, nvfp4_paged_attention
from .cache import CopyMethod, copy_blocks, land_rows, reshape_and_cache_nvfp4
from .extension import DEBUG_ENV, ExtensionMissingError, build_info, load
from .gather import gather_nvfp4
from .head_tiles import kernel_q_len
from .newest import newest_step
from .prefix import nvfp4_prefix_attention, nvfp4_prefix_rows

__all__ = [
    "DEBUG_ENV",
    "AttentionWorkspace",
    "CopyMethod",
    "ExtensionMissingError",
    "build_info",
    "copy_blocks",
    "gather_nvfp4",
    "kernel_q_len",
    "land_rows",
    "load",
    "newest_step",
    "nvfp4_attention_schedule",
    "nvfp4_paged_attention",
    "nvfp4_prefix_attention",
    "nvfp4_prefix_rows",
    "reshape_and_cache_nvfp4",
]
