"""What the tiers did, for people: increments for vLLM's statistics, and a line in the log once a minute.

The tiers keep totals; what is here asks them once a step and passes on what was added. In the scheduler's
process, on its thread: an engine that has come to rest says the rest with its next step, or when it is shut
down.
"""

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import TransferStats
from vllm.v1.kv_offload.base import OffloadKey

from ..disk.tier import DiskTier
from ..host.manager import HostTierManager
from .metrics import (
    BYTES,
    DISK_LIMIT,
    DISK_USED,
    FAILURES,
    HIT_TOKENS,
    HITS,
    MISS_TOKENS,
    MISSES,
    QUEUE,
    ROWS,
    SECONDS,
    RowConnectorStats,
)

logger = logging.getLogger(__name__)

LOG_SECONDS = 60.0

Sample = tuple[str, tuple[str, ...]]
"""A metric's name and the values of its labels."""


@dataclass
class Lookups:
    """What requests found in host memory. Each counts when it is admitted, however often it had to ask.

    Attributes:
        hits: Tokens.
        misses: Tokens, by reason.
    """

    hits: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    _last: dict[str, tuple[int, int, str]] = field(default_factory=dict)

    def answered(self, request_id: str, hits: int, misses: int, reason: str) -> None:
        self._last[request_id] = (hits, misses, reason)

    def admitted(self, request_id: str) -> None:
        hits, misses, reason = self._last.pop(request_id, (0, 0, ""))
        self.hits += hits
        if misses:
            self.misses[reason] += misses

    def forget(self, request_id: str) -> None:
        self._last.pop(request_id, None)


class TierActivity:
    """Passes on what happened since it was asked last.

    Args:
        host, disk: the tiers; no disk if None.
        row_bytes: of one TP rank.
    """

    def __init__(self, host: HostTierManager, disk: DiskTier | None, row_bytes: int):
        self.lookups = Lookups()
        self._host, self._disk, self._row_bytes = host, disk, row_bytes
        self._moved: dict[Sample, float] = defaultdict(float)
        self._reported: dict[Sample, float] = {}
        self._minute: dict[Sample, float] = defaultdict(float)
        self._minute_began = 0.0

    def moved(self, transfers: TransferStats, rows_stored: int, rows_loaded: int) -> None:
        """Adds what the workers say they moved between device and host; a failed transfer is not in it."""
        for direction, done, rows in (
            ("store", transfers.store, rows_stored),
            ("load", transfers.load, rows_loaded),
        ):
            if done.is_empty():
                continue
            self._moved[BYTES, (direction, "host")] += done.bytes
            self._moved[ROWS, (direction, "host")] += rows
            self._moved[SECONDS, (direction, "host")] += done.time

    def report(self, queues: Mapping[tuple[str, str], int]) -> RowConnectorStats:
        """What changed since the last call; everything once, so that a scrape shows zeros from the start.

        Args:
            queues: chunks under way or waiting, by direction and tier.
        """
        stats = RowConnectorStats()
        for sample, total in self._totals():
            added = total - self._reported.get(sample, 0)
            if added or sample not in self._reported:
                stats.increase_counter(sample[0], added, sample[1])
                self._reported[sample] = total
            if added:
                if not self._minute:
                    self._minute_began = time.monotonic()
                self._minute[sample] += added
        for sample, value in self._gauges(queues):
            if self._reported.get(sample) != value:
                stats.set_gauge(sample[0], value, sample[1])
                self._reported[sample] = value
        if self._minute and time.monotonic() - self._minute_began >= LOG_SECONDS:
            self.log()
        return stats

    def log(self) -> None:
        """Says what happened since the last line; nothing if nothing did."""
        if self._minute:
            seconds = time.monotonic() - self._minute_began
            use = None if self._disk is None else (self._disk.used, self._disk.limit)
            logger.info("XLayerConnector: in %.0f s %s", seconds, summary(self._minute, use))
            self._minute.clear()

    def _totals(self) -> Iterable[tuple[Sample, float]]:
        for unit in (BYTES, ROWS, SECONDS):
            for direction in ("store", "load"):
                yield (unit, (direction, "host")), self._moved[unit, (direction, "host")]
        yield (HIT_TOKENS, ()), self.lookups.hits
        for reason, tokens in self.lookups.misses.items():
            yield (MISS_TOKENS, (reason,)), tokens
        yield (FAILURES, ("store", "host", "copy")), self._host.stores_failed
        yield (FAILURES, ("load", "host", "copy")), self._host.loads_failed
        if self._disk is not None:
            yield from _disk_totals(self._disk, self._row_bytes)

    def _gauges(self, queues: Mapping[tuple[str, str], int]) -> Iterable[tuple[Sample, float]]:
        for labels, chunks in queues.items():
            yield (QUEUE, labels), chunks
        if self._disk is not None:
            yield (DISK_USED, ()), self._disk.used
            yield (DISK_LIMIT, ()), self._disk.limit


def _disk_totals(disk: DiskTier, row_bytes: int) -> Iterable[tuple[Sample, float]]:
    counts = dict(disk.counts)  # in one step: the disk's threads go on counting
    for direction, name in (("store", "stored"), ("load", "hit")):
        moved = counts.get(name, 0) * disk.chunk_bytes
        yield (BYTES, (direction, "disk")), moved
        yield (ROWS, (direction, "disk")), moved // row_bytes
        yield (SECONDS, (direction, "disk")), disk.seconds[direction]
    yield (HITS, ("disk",)), counts.get("hit", 0)
    for name, chunks in counts.items():
        what, _, reason = name.partition(": ")
        if what == "miss":
            yield (MISSES, ("disk", reason)), chunks
        elif what in ("not stored", "not loaded"):
            direction = "store" if what == "not stored" else "load"
            yield (FAILURES, (direction, "disk", reason)), chunks


def queues(
    transfers: Iterable[tuple[Collection[OffloadKey], bool]],
    behind: Iterable[tuple[Collection[OffloadKey], bool]],
) -> dict[tuple[str, str], int]:
    """Chunks under way or waiting, by direction and tier.

    Args:
        transfers: between device and host: keys, and whether it is a load.
        behind: between host and disk, likewise.
    """
    depth = {(direction, tier): 0 for tier in ("host", "disk") for direction in ("store", "load")}
    for tier, jobs in (("host", transfers), ("disk", behind)):
        for keys, is_load in jobs:
            depth["load" if is_load else "store", tier] += len(keys)
    return depth


def summary(added: Mapping[Sample, float], disk_use: tuple[int, int] | None) -> str:
    """A minute in one line: "stored 12 rows, 0.20 GB at 52.1 GB/s; ...; hits 75 % of 256 tokens; ...".

    Args:
        added: what each counter went up by.
        disk_use: bytes in the folder, and their bound.
    """
    parts = [*_transfers(added), *_hit_share(added)]
    for what, metric in (("tokens missed", MISS_TOKENS), ("misses", MISSES), ("failures", FAILURES)):
        found = [(labels, n) for (name, labels), n in sorted(added.items()) if name == metric]
        if found:
            named = (f"{' '.join((*where, f'({reason})'))} {n:.0f}" for (*where, reason), n in found)
            parts.append(f"{what}: {', '.join(named)}")
    if disk_use is not None:
        parts.append(f"disk {disk_use[0] / 1e9:.2f} of {disk_use[1] / 1e9:.2f} GB")
    return "; ".join(parts)


def _transfers(added: Mapping[Sample, float]) -> Iterable[str]:
    for verb, *way in (
        ("stored", "store", "host"),
        ("loaded", "load", "host"),
        ("written to disk", "store", "disk"),
        ("read from disk", "load", "disk"),
    ):
        rows, moved, seconds = (added.get((unit, tuple(way)), 0) for unit in (ROWS, BYTES, SECONDS))
        if rows:
            rate = f" at {moved / seconds / 1e9:.1f} GB/s" if seconds else ""
            yield f"{verb} {rows:.0f} rows, {moved / 1e9:.2f} GB{rate}"


def _hit_share(added: Mapping[Sample, float]) -> Iterable[str]:
    hits = added.get((HIT_TOKENS, ()), 0)
    asked = hits + sum(n for (name, _), n in added.items() if name == MISS_TOKENS)
    if asked:
        yield f"hits {100 * hits / asked:.0f} % of {asked:.0f} tokens"
