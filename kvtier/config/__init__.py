"""The settings: one YAML file, checked completely before anything starts."""

from __future__ import annotations

from kvtier.config.model import Config, ConnectorConfig, DiskTierConfig, GpuTierConfig, HostTierConfig, RecordConfig, WriteMode
from kvtier.config.template import commented_defaults

__all__ = [
    "Config",
    "ConnectorConfig",
    "DiskTierConfig",
    "GpuTierConfig",
    "HostTierConfig",
    "RecordConfig",
    "WriteMode",
    "commented_defaults",
]
