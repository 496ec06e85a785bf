"""kvtier's counters in vLLM's own metrics: its log line and its Prometheus endpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from kvtier.stats import COUNTERS


@dataclass
class KVTierStats(KVConnectorStats):
    """Growth of the counters of :data:`kvtier.stats.COUNTERS` since the last report."""

    data: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        self.data = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        return dict(self.data)

    def is_empty(self) -> bool:
        return not any(self.data.values())


class KVTierPromMetrics(KVConnectorPromMetrics):
    """One counter per name: ``kvtier:host_stored_blocks`` and so on."""

    def __init__(self, vllm_config: Any, metric_types: Any, labelnames: list[str], per_engine_labelvalues: dict[int, list[object]]) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters: dict[str, Any] = {
            name: self._counter_cls(name="kvtier:" + name.replace(".", "_"), documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        for name, value in transfer_stats_data.items():
            counter = self._counters.get(name)
            if counter is not None and value > 0:  # below 0 would be a mistake of ours; Prometheus raises then, in the engine's step
                counter.labels(*self.per_engine_labelvalues[engine_idx]).inc(value)


__all__ = ["KVTierPromMetrics", "KVTierStats"]
