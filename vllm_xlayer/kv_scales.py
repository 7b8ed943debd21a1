"""Global scales of K and V: powers of two a layer, from a file, the checkpoint, or a default.

What a token's KV is must not depend on what an engine saw before, so scales are never taken from requests.
"""

import functools
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

FORMAT = "vllm-xlayer KV scales 1"


class Scales(NamedTuple):
    """The global scales of one layer; a value is e2m1 * block scale * global scale."""

    k: float
    v: float


NONE = Scales(1.0, 1.0)
"""What vLLM's layers say where the checkpoint has none."""

DEFAULT = Scales(1.0, 2.0**-4)
"""Where there are none. K is kept up to 2,688, and from a standard deviation of 0.03 up with all precision
that NVFP4 has; V up to 168, and from 0.002 up. Models have small values and large keys; those of a text's
first token can be huge."""


class ScalesError(ValueError):
    """A file of scales is not one, or does not fit the model."""


def write(path: Path, scales: Mapping[str, Scales]) -> None:
    """Scales by the name of vLLM's layer."""
    layers = {name: {"k": k, "v": v} for name, (k, v) in scales.items()}
    path.write_text(json.dumps({"format": FORMAT, "layers": layers}, indent=2) + "\n", encoding="utf-8")


@functools.cache  # every layer asks
def read(path: Path) -> dict[str, Scales]:
    """Scales by the name of vLLM's layer.

    Raises:
        ScalesError: with what was expected and what came.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScalesError(f"{path}: expected KV scales, got {type(error).__name__}: {error}") from error
    found = content.get("format") if isinstance(content, dict) else content
    if found != FORMAT or not isinstance(content.get("layers"), dict):
        raise ScalesError(f"{path}: expected format {FORMAT!r} with layers, got {found!r}")
    return {name: _checked(path, name, layer) for name, layer in content["layers"].items()}


def _checked(path: Path, name: str, layer: Any) -> Scales:
    values: list[Any] = [layer.get(which) for which in "kv"] if isinstance(layer, dict) else [layer]
    if len(values) != 2 or not all(isinstance(x, int | float) and 0 < x < float("inf") for x in values):
        raise ScalesError(f"{path}: {name}: expected k and v, positive numbers, got {layer!r}")
    return Scales(float(values[0]), float(values[1]))


def scales_of(layer_name: str, checkpoint: Scales, file: Path | None, is_complete: bool = True) -> Scales:
    """The scales of a layer: the file's; where it has none the checkpoint's; else the default.

    is_complete: whether a file has scales of every layer.

    Raises:
        ScalesError: such a file does not have the layer.
    """
    if file is not None:
        if found := read(file).get(layer_name):
            return found
        if is_complete:
            raise ScalesError(f"{file}: expected scales of layer {layer_name}, got none")
        logger.warning("%s: no scales of layer %s, which has what it has without a file", file, layer_name)
    return DEFAULT if checkpoint == NONE else checkpoint


def digest(file: Path | None) -> str:
    """16 hex digits over what decides the scales besides the checkpoint."""
    scales = {"": DEFAULT} if file is None else read(file)
    return hashlib.sha256(json.dumps(scales, sort_keys=True).encode()).hexdigest()[:16]
