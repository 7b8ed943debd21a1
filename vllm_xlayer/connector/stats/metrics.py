"""What Prometheus is told: vLLM's metrics of its OffloadingConnector, and these (vLLM's labels come first).

| name (vllm:xlayer_...) | labels                  | unit    | meaning                                       |
|------------------------|-------------------------|---------|-----------------------------------------------|
| transfer_bytes_total   | direction, tier         | bytes   | moved. store, host: GPU to host memory;       |
|                        |                         |         | store, disk: host memory to disk; load is the |
|                        |                         |         | way back                                      |
| transfer_rows_total    | direction, tier         | rows    | the same: one block of one TP rank is a row   |
| transfer_seconds_total | direction, tier         | seconds | spent on it, added up over TP ranks: bytes by |
|                        |                         |         | seconds is the rate of one rank, or of the    |
|                        |                         |         | disk                                          |
| hit_tokens_total       |                         | tokens  | of admitted requests, in host memory          |
| miss_tokens_total      | reason                  | tokens  | of admitted requests, neither in the device's |
|                        |                         |         | cache nor in host memory: absent, late (from  |
|                        |                         |         | the disk), starting (not pinned yet), off     |
| hits_total             | tier                    | chunks  | disk: read into host memory; when a request   |
|                        |                         |         | then finds it, its tokens count as hits       |
| misses_total           | tier, reason            | chunks  | disk: it had an entry, and could not use it:  |
|                        |                         |         | short, format, old format, damaged header,    |
|                        |                         |         | damaged payload, other <field>, absent        |
|                        |                         |         | (another engine just evicted it), not a file  |
| failures_total         | direction, tier, reason | chunks  | not moved. host: copy. disk: disk error, off, |
|                        |                         |         | no room, disk too slow, disk hangs (off until |
|                        |                         |         | a call to it returns), in the way (of an      |
|                        |                         |         | entry is something else), items not named by  |
|                        |                         |         | content                                       |
| queue_depth            | direction, tier         | chunks  | in transfers that are under way or wait       |
| disk_used_bytes        |                         | bytes   | entries in the disk tier's folder, of all     |
|                        |                         |         | engines                                       |
| disk_limit_bytes       |                         | bytes   | what they may be                              |

A chunk is what the tiers treat as one: blocks_per_chunk blocks (1 unless configured) of all TP ranks. vLLM's
own vllm:kv_offload_{store,load}_{bytes,time,size} go on: the host tier's transfers under other names.

All this is counted in the scheduler's process (activity.py), and travels once a step with vLLM's scheduler
statistics to the front end; that side is here.
"""

from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingMetricMetadata,
)

PREFIX = "vllm:xlayer_"
# Prometheus' client adds _total to the names of counters.
BYTES, ROWS, SECONDS = (f"{PREFIX}transfer_{unit}" for unit in ("bytes", "rows", "seconds"))
HIT_TOKENS, MISS_TOKENS = (f"{PREFIX}{what}_tokens" for what in ("hit", "miss"))
HITS, MISSES, FAILURES = (f"{PREFIX}{what}" for what in ("hits", "misses", "failures"))
QUEUE = f"{PREFIX}queue_depth"
DISK_USED, DISK_LIMIT = f"{PREFIX}disk_used_bytes", f"{PREFIX}disk_limit_bytes"

_WAY = ("direction", "tier")
DEFINITIONS: dict[str, OffloadingMetricMetadata] = {
    BYTES: OffloadingCounterMetadata("Bytes of KV cache moved, of all TP ranks.", _WAY),
    ROWS: OffloadingCounterMetadata("Rows of KV cache moved: one block of one TP rank, all layers.", _WAY),
    SECONDS: OffloadingCounterMetadata("Seconds spent moving KV cache, added up over TP ranks.", _WAY),
    HIT_TOKENS: OffloadingCounterMetadata("Tokens of admitted requests that were in host memory."),
    MISS_TOKENS: OffloadingCounterMetadata("Tokens of admitted requests that were in no cache.", ("reason",)),
    HITS: OffloadingCounterMetadata("Chunks found in a tier.", ("tier",)),
    MISSES: OffloadingCounterMetadata("Chunks that were not found, or not usable.", ("tier", "reason")),
    FAILURES: OffloadingCounterMetadata("Chunks that could not be moved.", (*_WAY, "reason")),
    QUEUE: OffloadingGaugeMetadata("Chunks in transfers under way or waiting to be.", _WAY),
    DISK_USED: OffloadingGaugeMetadata("Bytes of the entries in the disk tier's folder."),
    DISK_LIMIT: OffloadingGaugeMetadata("Bytes that the disk tier's folder may hold."),
}


class RowConnectorStats(OffloadingConnectorStats):
    """What one engine reports; vLLM sends its ``data`` to the front end, and logs ``reduce()`` every 10 s."""

    def reduce(self) -> dict[str, int | float]:
        """Without ours: they have a line of their own (activity.py), which can be read."""
        return {name: value for name, value in super().reduce().items() if not name.startswith(PREFIX)}
