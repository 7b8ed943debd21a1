"""How fast copy engine and kernel are here: measured once a machine, when a connector's worker starts, then
kept in the user's cache folder.

Measured on the calling thread, before the engine serves: CUDA calls of another thread could spoil a graph
that vLLM captures.
"""

import functools
import hashlib
import json
import logging
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import __version__, ops
from ..ops import CopyMethod
from .copy_choice import CopyTimes, Sample, Way

logger = logging.getLogger(__name__)

FORMAT = 2
SIZES = tuple(4096 << i for i in range(10))
"""Bytes of a piece, 4 KiB to 2 MiB."""
MOVED = 16 << 20
"""Bytes of a measured copy, at most; host memory that is pinned for it."""
PIECES = 1024
"""Of a measured copy, at most: at 4 KiB a copy engine takes more than a microsecond for each."""
ON_DEVICE = 32 << 20
REPEATS = 3
NOISE = 0.05
"""Of a long copy's time: a short copy that takes less than this less says nothing of what a piece takes."""


@functools.cache
def times_here(device: torch.device) -> CopyTimes | None:
    """What is known of this machine, else measured now (under a second); None if that fails."""
    found = cached(device)
    if found is not None:
        return found
    try:
        started = time.perf_counter()
        times = measure(device)
        took = time.perf_counter() - started
    except Exception as error:  # whatever it is: the copy engine always works
        logger.warning("XLayerConnector: copies could not be measured, the copy engine is used: %s", error)
        return None
    where = keep(times, device)
    logger.info("XLayerConnector: copies measured in %.2f s (%s): %s", took, where, told(times))
    return times


def told(times: CopyTimes) -> str:
    """What is chosen, for the log."""
    parts = []
    for way in Way:
        at = times.crossover(way)
        chosen = "kernel" if at is None else f"copy engine from {at:,} bytes a piece" if at else "copy engine"
        parts.append(f"{way.value}: {chosen}")
    return "; ".join(parts)


def measure(device: torch.device) -> CopyTimes:
    """Times both methods, every way, on a stream of its own.

    Raises:
        RuntimeError: no memory, or a copy fails.
    """
    host = torch.empty(MOVED, dtype=torch.uint8, pin_memory=True)
    near, far = torch.empty((2, ON_DEVICE), dtype=torch.uint8, device=device)
    ends = {Way.H2D: (host, near), Way.D2H: (near, host), Way.D2D: (near, far)}
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    try:
        with torch.cuda.stream(stream):
            samples = {
                (way, method): [_sample(*ends[way], size, method) for size in SIZES]
                for way in Way
                for method in CopyMethod
            }
    finally:
        stream.synchronize()  # the memory is given back
    return CopyTimes(samples)


def _sample(src: torch.Tensor, dst: torch.Tensor, size: int, method: CopyMethod) -> Sample:
    many = min(PIECES, MOVED // size)
    few = max(1, many // 8)
    src, dst = src.view(-1, size), dst.view(-1, size)

    def copy(count: int) -> Callable[[], None]:
        src_ids, dst_ids = (torch.randperm(len(p))[:count] for p in (src, dst))  # others each time
        return lambda: ops.copy_blocks(src, dst, src_ids, dst_ids, method)

    def seconds(count: int) -> float:
        copy(count)()  # loads the kernel, pins the memory for the ids
        return statistics.median(_seconds(copy(count), copy(count)) for _ in range(REPEATS))

    short, long = seconds(few), seconds(many)
    # Where noise has the last word, all of it goes to the pieces.
    each = (long - short) / (many - few) if long - short > NOISE * long else long / many
    return Sample(size, max(0.0, long - each * many), each)


def _seconds(first: Callable[[], None], second: Callable[[], None]) -> float:
    """Of the second copy, behind the first: submitting it counts as far as it takes longer than copying."""
    torch.cuda.current_stream().synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first()
    begin.record()
    second()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on."""
    driver = Path("/proc/driver/nvidia/version")
    return {
        "host": platform.node(),
        "gpu": torch.cuda.get_device_name(device),
        "driver": driver.read_text().splitlines()[0] if driver.exists() else "unknown",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "vllm-xlayer": __version__,
    }


def cache_file(of: dict[str, Any]) -> Path:
    """Where a machine's times are kept."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
    return Path(root) / "vllm-xlayer" / f"copy-times-{name}.json"


def cached(device: torch.device) -> CopyTimes | None:
    """What was kept of this machine; None if nothing was, or it is damaged."""
    here = machine(device)
    path = cache_file(here)
    try:
        data = json.loads(path.read_text())
        if data["format"] != FORMAT or data["machine"] != here:
            raise ValueError(f"expected format {FORMAT} of this machine")
        return CopyTimes.from_json(data["times"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("XLayerConnector: %s is not used: %s", path, error)
        return None


def keep(times: CopyTimes, device: torch.device) -> str:
    """Writes what `cached` reads; says where, or why not. Several workers may do so at once."""
    here = machine(device)
    path = cache_file(here)
    data = {"format": FORMAT, "machine": here, "times": times.to_json()}
    written = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written.write_text(json.dumps(data))
        os.replace(written, path)
    except OSError as error:
        return f"not kept: {error}"
    return f"kept in {path}"
