"""The settings: one YAML file, checked completely before anything starts."""

from __future__ import annotations

from kvtier.config.fields import WriteMode
from kvtier.config.model import Config, LowerTierConfig
from kvtier.config.remote import MooncakeTierConfig, ObjectTierConfig, RedisTierConfig, RemoteTierConfig
from kvtier.config.sections import BlendConfig, ConnectorConfig, ControlConfig, DaemonConfig, RecordConfig
from kvtier.config.template import commented_defaults
from kvtier.config.tiers import DiskTierConfig, GpuTierConfig, HostTierConfig

__all__ = [
    "BlendConfig",
    "Config",
    "ConnectorConfig",
    "ControlConfig",
    "DaemonConfig",
    "DiskTierConfig",
    "GpuTierConfig",
    "HostTierConfig",
    "LowerTierConfig",
    "MooncakeTierConfig",
    "ObjectTierConfig",
    "RecordConfig",
    "RedisTierConfig",
    "RemoteTierConfig",
    "WriteMode",
    "commented_defaults",
]
