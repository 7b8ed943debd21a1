"""The files that a model's weights are in: a digest, and whether they may be others than those in memory."""

import functools
import hashlib
import json
import uuid
from pathlib import Path

import psutil
from vllm.logger import init_logger

logger = init_logger(__name__)
SAMPLES, SAMPLE_BYTES = 64, 4096
SUFFIXES = ("safetensors", "bin", "pt", "gguf")
THIS_LIFE = uuid.uuid4().hex
"""Names this process among all that read the same disk."""


class NoIdentity(ValueError):
    """KV of this engine must not outlive it; says why."""


def loaded_weights(folder: Path) -> str:
    """`weights_digest` of a folder that this process has loaded weights from.

    If it may have loaded them before they were written, another for each process: no other finds its KV.
    """
    digest = weights_digest(folder)
    if not written_in_this_life(folder):
        return digest
    logger.warning(
        "XLayerConnector: weights in %s were written since this engine began to start, and it may have "
        "loaded others: what it keeps on the disk no other engine finds. Start it again for that.",
        folder,
    )
    return hashlib.sha256((digest + THIS_LIFE).encode()).hexdigest()[: len(digest)]


def weights_digest(folder: Path, of_this_copy: bool = True) -> str:
    """32 hex digits over the weight files of a model folder.

    Covers every file's name, size, time of last change, safetensors header (names, shapes, dtypes, offsets),
    the first 4 KiB of each of its tensors and 64 samples of 4 KiB spread over it, and for files of Hugging
    Face's cache the name of the blob, which is a hash of all of it. So an update, a fine-tune with equal
    shapes and a file written anew are seen. Not seen: a change that hits none of the samples and keeps the
    time of last change. A copy of a folder with new times counts as another model, which costs misses only.

    Args:
        of_this_copy: False leaves out times and blobs' names, which differ between hosts that hold the same
            files; then a change that hits none of the samples is not seen.

    Raises:
        NoIdentity: there are no weight files.
    """
    files = weight_files(folder)
    if not files:
        raise NoIdentity(f"expected weight files in {folder}, found none")
    digest = hashlib.sha256()
    for path in files:
        real = path.resolve()
        stat = real.stat()
        facts = [path.name, stat.st_size]
        if of_this_copy:
            facts = [path.name, real.name, stat.st_size, stat.st_mtime_ns]
        digest.update(json.dumps(facts).encode())
        with real.open("rb") as file:
            if path.suffix == ".safetensors":
                length = int.from_bytes(file.read(8), "little")
                digest.update(header := file.read(min(length, stat.st_size)))
                for begin, end in _tensors(header):
                    file.seek(8 + length + begin)
                    digest.update(file.read(min(SAMPLE_BYTES, end - begin)))
            for i in range(SAMPLES):
                file.seek(max(0, stat.st_size - SAMPLE_BYTES) * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def _tensors(header: bytes) -> list[tuple[int, int]]:
    """(first byte, byte after the last) of each tensor, counted from the end of a safetensors header; none
    where that is damaged."""
    try:
        facts = json.loads(header)
        return sorted(tuple(fact["data_offsets"]) for name, fact in facts.items() if name != "__metadata__")
    except (ValueError, KeyError, TypeError, AttributeError):
        return []


def weight_files(folder: Path) -> list[Path]:
    """In the order of their names within each kind."""
    return sorted(path for suffix in SUFFIXES for path in folder.glob(f"*.{suffix}"))


def written_in_this_life(folder: Path) -> bool:
    """Whether a weight file was written, replaced or linked anew since this process began.

    It may then have been loaded before or after. Nothing is loaded in a process's first second, so that the
    grain of its start, of one, does not matter; a file system whose clock is behind this host's hides what
    happened for so long.
    """
    began = process_began()
    times = [stat for path in weight_files(folder) for stat in (path.lstat(), path.stat())]
    return any(max(stat.st_mtime, stat.st_ctime) > began for stat in times)


@functools.cache
def process_began() -> float:
    """In seconds since the epoch."""
    return float(psutil.Process().create_time())
