"""How KV blocks lie in memory: axes, strides, byte maps, and who agreed to them.

Pure Python: imports neither vLLM nor the compiled extension (torch only when a view is built).

    spec         the axes, and what a KV cache group of the model asks for
    descriptor   one agreed layout in bytes, its dict form and fingerprint
    rows         one row of any model, as the engine allocated it: several groups, opaque pages
    bytemap      which byte holds which element, and the torch views that say the same
    allocation   compares what an engine allocated with the descriptor
    negotiation  model, attention backends and connector agree on a layout, or say who refused it
    drawing      the same for people: a log line, and a picture for ``vllm-xlayer doctor``
"""

from vllm_xlayer.layout.allocation import Allocation, AllocationError, allocation_of, check_allocation
from vllm_xlayer.layout.bytemap import Place, byte_offset, page_view, scale_offset
from vllm_xlayer.layout.descriptor import LayoutDescriptor, Slot
from vllm_xlayer.layout.drawing import draw, row_line
from vllm_xlayer.layout.negotiation import (
    MODEL,
    BackendOffer,
    ConnectorWish,
    Decision,
    NegotiationError,
    Refusal,
    negotiate,
)
from vllm_xlayer.layout.row_drawing import draw_row
from vllm_xlayer.layout.rows import Opaque, Page, RowDecision, RowDescriptor, RowGroup
from vllm_xlayer.layout.spec import CacheSpec, Layout

__all__ = [
    "MODEL",
    "Allocation",
    "AllocationError",
    "BackendOffer",
    "CacheSpec",
    "ConnectorWish",
    "Decision",
    "Layout",
    "LayoutDescriptor",
    "NegotiationError",
    "Opaque",
    "Page",
    "Place",
    "Refusal",
    "RowDecision",
    "RowDescriptor",
    "RowGroup",
    "Slot",
    "allocation_of",
    "byte_offset",
    "check_allocation",
    "draw",
    "draw_row",
    "negotiate",
    "page_view",
    "row_line",
    "scale_offset",
]
