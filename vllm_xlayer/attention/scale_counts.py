"""Debug mode's counts of what the global scales do not suit, as K and V are written to the cache.

Counted on the layers' device, without waiting for it: a captured CUDA graph counts each time that it is
replayed. Read between steps, where a step's metadata is made, never inside a graph.
"""

import time
from collections.abc import Iterable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.logger import init_logger

from ..config import Config
from ..nvfp4 import GROUP, ROTATED_KEYS, Counts, rotate, unsuited_groups

logger = init_logger(__name__)

FIRST_PAUSE = 60.0
"""Seconds from the first line to the second; each pause is twice as long as the one before."""
NAMED = 3
"""Layers that a line names: the worst."""


class ScaleCounts:
    """Counts of groups that the global scales of one layer of a rank do not suit.

    Attributes:
        counts: int64 [K and V, (all groups, saturated, underflowed)].
    """

    def __init__(self, device: Any) -> None:
        self.counts = torch.zeros(2, 3, dtype=torch.int64, device=device)

    def add(self, layer: Any, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        """Adds the tokens of key and value [>= T, H, D] that have a slot in slots int64 [T]."""
        written = (slots >= 0)[:, None, None]
        key, value = key[: len(slots)], value[: len(slots)]
        kept = rotate(key) if ROTATED_KEYS else key
        for counts, x, scale in zip(
            self.counts, (kept, value), (layer._k_scale, layer._v_scale), strict=True
        ):
            unsuited = unsuited_groups(x, scale)
            groups = written.expand_as(unsuited.saturated)
            counts += torch.stack([(mask & written).sum() for mask in (groups, *unsuited)])


class ScaleReport:
    """Says what the layers of a KV cache group have counted: when there is something, then ever more rarely,
    as long as there is more.

    Args:
        layers: vLLM's, whose impl has a `ScaleCounts`.
    """

    def __init__(self, layers: Iterable[Any]) -> None:
        self._layers = list(layers)
        self._said = 0
        self._due, self._pause = 0.0, FIRST_PAUSE

    def say(self) -> None:
        """Waits for the device, except in a pause and while a graph is captured."""
        counts = [layer.impl.scale_counts.counts for layer in self._layers]
        now = time.monotonic()
        if now < self._due or not counts:
            return
        if counts[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return
        found = []
        for layer, kv in zip(self._layers, torch.stack(counts).tolist(), strict=True):
            for which, scale, (groups, *unsuited) in zip(
                "KV", (layer._k_scale, layer._v_scale), kv, strict=True
            ):
                if sum(unsuited):
                    found.append((sum(unsuited), _line(layer.layer_name, which, scale, groups, unsuited)))
        total = sum(count for count, _ in found)
        if total == self._said:
            return
        self._said, self._due, self._pause = total, now + self._pause, 2 * self._pause
        found.sort(reverse=True)
        logger.warning(
            "NVFP4 KV cache: of the groups of %d values written so far, the global scales do not suit: %s%s. "
            "Saturated: values beyond 6 x 448 x the scale are cut off. Underflowed: the block scale is "
            "coarse, or zero. `vllm-xlayer quality MODEL --calibrate FILE` finds better scales, which "
            "VLLM_XLAYER_KV_SCALES=FILE puts into use",
            GROUP, "; ".join(line for _, line in found[:NAMED]),
            f"; and K or V of {len(found) - NAMED} more" if len(found) > NAMED else "",
        )  # fmt: skip


def make_report(config: VllmConfig, layer_names: list[str]) -> ScaleReport | None:
    """For the layers of an NVFP4 KV cache group, in debug mode."""
    if not Config.load().debug:
        return None
    layers = config.compilation_config.static_forward_context
    return ScaleReport(layers[name] for name in layer_names)


def _line(layer: str, which: str, scale: torch.Tensor, groups: int, unsuited: list[int]) -> str:
    """As "model.layers.0: K, scale 1: 12 of 4096 saturated (0.293 %)"."""
    parts = [
        f"{count} of {groups} {name} ({100 * count / groups:.3g} %)"
        for name, count in Counts(*unsuited)._asdict().items()
        if count
    ]
    return f"{layer}: {which}, scale {float(scale):g}: {', '.join(parts)}"
