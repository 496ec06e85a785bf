"""The settings: one YAML file, checked completely before anything starts."""

from __future__ import annotations

from kvtier.config.fields import WriteMode
from kvtier.config.model import Config, ConnectorConfig, DiskTierConfig, GpuTierConfig, HostTierConfig, LowerTierConfig
from kvtier.config.remote import ObjectTierConfig, RedisTierConfig, RemoteTierConfig
from kvtier.config.template import commented_defaults

__all__ = [
    "Config",
    "ConnectorConfig",
    "DiskTierConfig",
    "GpuTierConfig",
    "HostTierConfig",
    "LowerTierConfig",
    "ObjectTierConfig",
    "RedisTierConfig",
    "RemoteTierConfig",
    "WriteMode",
    "commented_defaults",
]
