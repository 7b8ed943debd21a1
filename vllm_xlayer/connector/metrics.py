"""What Prometheus is told: vLLM's metrics of its OffloadingConnector, and those of a second tier.

vLLM registers the metrics of the spec that the user's configuration names, which is CPUOffloadingSpec. With a
disk tier its manager reports those of TieringOffloadingSpec as well, and vLLM's front end asserts that it
knows every metric it is sent: without the definitions here the engine would die of its first report.
"""

from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import PromMetric, PromMetricT
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadPromMetrics
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec


class RowPromMetrics(OffloadPromMetrics):
    """Takes what OffloadPromMetrics takes; lives in the front end's process."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        metric_types: dict[type[PromMetric], type[PromMetricT]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ):
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        definitions: dict[str, Any] = TieringOffloadingSpec.build_metric_definitions({})
        for name, metadata in definitions.items():
            if name not in self._offloading_metric_metadata:
                self._offloading_metric_metadata[name] = metadata
                self._offloading_metric_defs[name] = self._create_metric(name, metadata)
