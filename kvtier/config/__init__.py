"""The settings: one YAML file, checked completely before anything starts."""

from __future__ import annotations

from kvtier.config.model import Config
from kvtier.config.sections import ConnectorConfig, ControlConfig, RecordConfig
from kvtier.config.template import commented_defaults
from kvtier.config.tiers import DiskTierConfig, GpuTierConfig, HostTierConfig, WriteMode

__all__ = [
    "Config",
    "ConnectorConfig",
    "ControlConfig",
    "DiskTierConfig",
    "GpuTierConfig",
    "HostTierConfig",
    "RecordConfig",
    "WriteMode",
    "commented_defaults",
]
