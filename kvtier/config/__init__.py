"""TEMPORARY stand-in by the lead so that others can run; the config helper's version replaces this file."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40, "MB": 10**6, "GB": 10**9}


def _size(value: Any) -> int:
    if isinstance(value, int):
        return value
    text = str(value)
    number = text.rstrip("KMGTiB")
    return int(float(number) * _UNITS[text[len(number) :]])


def _seconds(value: Any) -> float | None:
    if value is None or isinstance(value, (int, float)):
        return value
    text = str(value)
    for suffix, scale in (("ms", 0.001), ("min", 60.0), ("h", 3600.0), ("s", 1.0)):
        if text.endswith(suffix):
            return float(text[: -len(suffix)]) * scale
    return float(text)


class WriteMode(enum.Enum):
    THROUGH = "through"
    BACK = "back"
    ON_EVICT = "on_evict"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True)


class HostTierConfig(_Model):
    capacity_bytes: int
    policy: str = "lru"
    ttl_s: float | None = None
    ttl_mode: str = "sliding"
    huge_pages: bool = True
    numa_node: int | None = None


class DiskTierConfig(_Model):
    path: Path
    capacity_bytes: int
    segment_bytes: int = 64 << 20
    policy: str = "lru"
    ttl_s: float | None = None
    ttl_mode: str = "sliding"
    write: WriteMode = WriteMode.THROUGH
    direct_io: str = "auto"
    io_threads: int = 2
    max_in_flight_bytes: int = 256 << 20
    durable: bool = True


class ConnectorConfig(_Model):
    store_decode_blocks: bool = True
    async_load: bool = False
    promote_wait_s: float = 2.0
    store: bool = True
    load: bool = True
    max_pinned_fraction: float = 0.5


_RENAME = {"capacity": ("capacity_bytes", _size), "segment": ("segment_bytes", _size), "ttl": ("ttl_s", _seconds),
           "max_in_flight": ("max_in_flight_bytes", _size), "promote_wait": ("promote_wait_s", _seconds)}


def _rename(mapping: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for key, value in mapping.items():
        name, convert = _RENAME.get(key, (key, lambda x: x))
        out[name] = convert(value)
    return out


class Config(_Model):
    block_tokens: int | None = None
    namespace_salt: str = ""
    host: HostTierConfig
    disk: DiskTierConfig | None = None
    connector: ConnectorConfig = ConnectorConfig()

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any]) -> "Config":
        if "config" in mapping:
            return cls.load(mapping["config"])
        parts: dict[str, Any] = {}
        for tier in mapping["tiers"]:
            fields = _rename({key: value for key, value in tier.items() if key != "type"})
            parts[tier["type"]] = fields
        if mapping.get("block_tokens") not in (None, "auto"):
            parts["block_tokens"] = mapping["block_tokens"]
        parts["namespace_salt"] = mapping.get("namespace_salt", "")
        parts["connector"] = _rename(mapping.get("connector", {}))
        return cls.model_validate(parts)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Config":
        return cls.from_mapping(yaml.safe_load(Path(path).read_text()))
