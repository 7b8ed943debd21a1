"""What Prometheus is told of the hand-over: vLLM's metrics of its NixlConnector, and these.

| name (vllm:xlayer_handover_...) | labels | meaning                                                        |
|---------------------------------|--------|----------------------------------------------------------------|
| rows_total                      |        | rows that were asked for, by each TP rank of each TP rank      |
| failures_total                  | reason | requests that were computed, as their rows did not come, once  |
|                                 |        | for each TP rank that saw it: late                             |
|                                 |        | (not in read_timeout_seconds), seal (rows of other tokens, or  |
|                                 |        | torn), lost (the other engine or the link is gone), busy (an   |
|                                 |        | earlier read from that engine has not ended), params (a        |
|                                 |        | request's kv_transfer_params do not fit)                       |

A handshake that fails is in vLLM's vllm:nixl_num_failed_transfers.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import PromMetric, PromMetricT
from vllm.distributed.kv_transfer.kv_connector.v1.nixl.stats import NixlKVConnectorStats, NixlPromMetrics

from .reads import REASONS

PREFIX = "vllm:xlayer_handover_"
ROWS = "xlayer_rows"
FAILURES = {reason: f"xlayer_{reason}" for reason in REASONS}


class RowNixlStats(NixlKVConnectorStats):
    """What one rank, or the scheduler, counted since it was last asked; vLLM adds up the lists of all."""

    def reset(self) -> None:
        super().reset()
        self.data |= {key: [] for key in (ROWS, *FAILURES.values())}

    def record_rows(self, rows: int) -> None:
        self.data[ROWS].append(rows)

    def record_failure(self, reason: str) -> None:
        self.data[FAILURES[reason]].append(1)

    def is_empty(self) -> bool:
        return super().is_empty() and not any(self.data[key] for key in (ROWS, *FAILURES.values()))


class RowNixlPromMetrics(NixlPromMetrics):
    """The front end's side."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        rows = self._counter_cls(
            name=f"{PREFIX}rows", documentation="Rows read from prefill engines.", labelnames=labelnames
        )
        failures = self._counter_cls(
            name=f"{PREFIX}failures",
            documentation="Requests that were computed because their rows did not come.",
            labelnames=[*labelnames, "reason"],
        )
        self.rows: dict[int, Any] = {
            engine: rows.labels(*values) for engine, values in per_engine_labelvalues.items()
        }
        self.failures: dict[tuple[int, str], Any] = {
            (engine, reason): failures.labels(*values, reason)
            for engine, values in per_engine_labelvalues.items()
            for reason in REASONS
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        super().observe(transfer_stats_data, engine_idx)
        self.rows[engine_idx].inc(sum(transfer_stats_data[ROWS]))
        for reason, key in FAILURES.items():
            self.failures[engine_idx, reason].inc(len(transfer_stats_data[key]))
