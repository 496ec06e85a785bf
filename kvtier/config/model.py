"""The settings as frozen models. Attribute names carry units (``capacity_bytes``); the YAML keys are shorter (``capacity``)."""

from __future__ import annotations

import enum
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from kvtier.config.fields import (
    AUTO_IS_NONE,
    LIST_AS_TUPLE,
    ON_OFF,
    REQUIRED,
    Duration,
    ExpandedPath,
    OptionalDuration,
    Section,
    Size,
    WriteMode,
    setting,
    write_path,
)
from kvtier.config.problems import TIER_ORDER, Problem, explain, render
from kvtier.config.remote import ObjectTierConfig, RedisTierConfig
from kvtier.config.source import Dumper, Source, read_source
from kvtier.errors import ConfigError
from kvtier.units import format_duration, format_size

_PAGE_BYTES = 4096
_MAX_SEGMENT_BYTES = 1 << 32
_SIZE = "`8GiB`, `500MB`, or bytes"
_TTL = "null, or more than 0: `30s`, `5min`, `2h`, or seconds"
_TTL_ABOUT = "A block is dropped this long after it was stored or used (see `ttl_mode`). null: never."
_TTL_MODE_ABOUT = "From when `ttl` counts. `sliding`: the last use. `fixed`: the time of storing."
_POLICY_ABOUT = "Which block leaves a full tier first. `lru`: the one unused for longest. `fifo`: the oldest."
_TIERS = "a list: at most one tier of type gpu, then one of type host, then at most one each of type disk, redis, object"
_TIER_ORDER = ("gpu", "host", "disk", "redis", "object")


class GpuTierConfig(Section):
    """Memory of each GPU: new blocks pass through it, and the latest stay, so that a hit need not cross the bus."""

    type: Literal["gpu"] = setting("gpu", kind="name", allowed="`gpu`", about="Makes this tier memory of the engine's devices.")
    capacity_bytes: Size = setting(
        REQUIRED, key="capacity", kind="size", allowed=f"more than 0: {_SIZE}", about="Memory for blocks, on each GPU.", gt=0
    )
    policy: Literal["lru", "fifo"] = setting("lru", kind="name", allowed="`lru`, `fifo`", about=_POLICY_ABOUT)
    ttl_s: OptionalDuration = setting(None, key="ttl", kind="duration", allowed=_TTL, about=_TTL_ABOUT, gt=0)
    ttl_mode: Literal["sliding", "fixed"] = setting("sliding", kind="name", allowed="`sliding`, `fixed`", about=_TTL_MODE_ABOUT)


class HostTierConfig(Section):
    """Host memory: the arena that engine and workers share. Always there."""

    type: Literal["host"] = setting("host", kind="name", allowed="`host`", about="Makes this tier host memory.")
    capacity_bytes: Size = setting(
        REQUIRED, key="capacity", kind="size", allowed=f"more than 0: {_SIZE}", about="Host memory for blocks, of all ranks together.", gt=0
    )
    policy: Literal["lru", "fifo"] = setting("lru", kind="name", allowed="`lru`, `fifo`", about=_POLICY_ABOUT)
    ttl_s: OptionalDuration = setting(None, key="ttl", kind="duration", allowed=_TTL, about=_TTL_ABOUT, gt=0)
    ttl_mode: Literal["sliding", "fixed"] = setting("sliding", kind="name", allowed="`sliding`, `fixed`", about=_TTL_MODE_ABOUT)
    huge_pages: bool = setting(True, kind="boolean", allowed="`true`, `false`", about="Ask the kernel for huge pages: faster copies.")
    numa_node: int | None = setting(
        None, kind="integer", allowed="null, or a whole number from 0", about="The NUMA node to prefer. null: the kernel decides.", ge=0
    )


class DiskTierConfig(Section):
    """A directory on a local disk. At most one, after the host tier."""

    type: Literal["disk"] = setting("disk", kind="name", allowed="`disk`", about="Makes this tier a directory on a disk.")
    path: ExpandedPath = setting(
        REQUIRED,
        kind="path",
        allowed="a directory that one process may use; `~`, `$NAME` and `${NAME}` are expanded",
        about="The tier's directory; made if missing. A relative one counts from the working directory. `$$` is a dollar sign.",
    )
    capacity_bytes: Size = setting(
        REQUIRED, key="capacity", kind="size", allowed=f"more than 0: {_SIZE}", about="Disk space for everything in the directory.", gt=0
    )
    segment_bytes: Size = setting(
        64 << 20,
        key="segment",
        kind="size",
        allowed="a multiple of 4KiB, from 8KiB to below 4GiB, not above `capacity`",
        about="Size of one log segment, the unit in which disk space is reclaimed. At least a block must fit.",
        validate_default=True,
    )
    policy: Literal["lru", "fifo"] = setting("lru", kind="name", allowed="`lru`, `fifo`", about=_POLICY_ABOUT)
    ttl_s: OptionalDuration = setting(None, key="ttl", kind="duration", allowed=_TTL, about=_TTL_ABOUT, gt=0)
    ttl_mode: Literal["sliding", "fixed"] = setting("sliding", kind="name", allowed="`sliding`, `fixed`", about=_TTL_MODE_ABOUT)
    write: WriteMode = setting(
        WriteMode.THROUGH,
        kind="name",
        allowed="`through`, `back`, `on_evict`",
        about="When blocks are written. `through`: at once. `back`: 5 s later. `on_evict`: as they leave host memory.",
        strict=False,
    )
    direct_io: Annotated[Literal["auto", "on", "off"], ON_OFF] = setting(
        "auto",
        kind="name",
        allowed="`auto`, `on`, `off`",
        about="Whether to bypass the page cache. `auto`: where the file system can. `on`: refuse to start where it cannot.",
    )
    io_engine: Literal["auto", "io_uring", "threads"] = setting(
        "auto",
        kind="name",
        allowed="`auto`, `io_uring`, `threads`",
        about="How to read and write. `auto`: io_uring where the system allows it, else threads. `io_uring`: refuse to start without it.",
    )
    queue_depth: int = setting(
        8, kind="integer", allowed="a whole number from 1 to 256", about="Reads and writes under way at once.", ge=1, le=256
    )
    io_threads: int = setting(
        2, kind="integer", allowed="a whole number from 1 to 64", about="Threads that compute and verify checksums.", ge=1, le=64
    )
    max_in_flight_bytes: Size = setting(
        256 << 20, key="max_in_flight", kind="size", allowed=f"more than 0: {_SIZE}", about="Bytes being read or written at once.", gt=0
    )
    durable: bool = setting(True, kind="boolean", allowed="`true`, `false`", about="Blocks outlive a power cut, not only a crash.")

    @field_validator("segment_bytes")
    @classmethod
    def _segment_fits(cls, segment_bytes: int, info: ValidationInfo) -> int:
        if segment_bytes % _PAGE_BYTES or not 2 * _PAGE_BYTES <= segment_bytes < _MAX_SEGMENT_BYTES:
            raise ValueError("not a size that a segment can have")
        # absent where capacity itself is wrong
        capacity_bytes = info.data.get("capacity_bytes")
        if capacity_bytes is not None and segment_bytes > capacity_bytes:
            raise ValueError(f"{format_size(segment_bytes)} is more than the tier's capacity of {format_size(capacity_bytes)}")
        return segment_bytes


class ConnectorConfig(Section):
    """How the engine's requests use the tiers."""

    store: bool = setting(True, kind="boolean", allowed="`true`, `false`", about="Store what requests compute.")
    load: bool = setting(True, kind="boolean", allowed="`true`, `false`", about="Load what is stored, instead of computing it again.")
    store_decode_blocks: bool = setting(
        True, kind="boolean", allowed="`true`, `false`", about="Store blocks of generated tokens too, not only those of prompts."
    )
    async_load: bool = setting(
        False, kind="boolean", allowed="`true`, `false`", about="Load while other requests run. false: in the step that needs the blocks."
    )
    layerwise: Annotated[Literal["auto", "on", "off"], ON_OFF] = setting(
        "auto",
        kind="name",
        allowed="`auto`, `on`, `off`",
        about="Whether copies follow the forward pass layer by layer: a layer waits for its own part of a load only, and on a GPU is "
        "stored as soon as it is computed. `auto`: on where a GPU copies beside the computation, off on a CPU.",
    )
    promote_wait_s: Duration = setting(
        2.0,
        key="promote_wait",
        kind="duration",
        allowed="0 or more: `2s`, `500ms`, or seconds",
        about="How long a request may wait for blocks from the disk before they are computed instead.",
    )
    max_pinned_fraction: float = setting(
        0.5, kind="number", allowed="0 to 1", about="Share of host memory that pinned blocks may take.", ge=0, le=1
    )
    gpu_copy: Literal["auto", "dma", "bulk", "staged"] = setting(
        "auto",
        kind="name",
        allowed="`auto`, `dma`, `bulk`, `staged`",
        about="How blocks are copied to and from a GPU. `auto`: for each direction and size the way that was the fastest at start. "
        "`dma`: the copy engines alone. `bulk`: a kernel straight to host memory (Hopper and later). `staged`: a kernel and a buffer.",
    )
    copy_threads: int = setting(
        2,
        kind="integer",
        allowed="a whole number from 1 to 16",
        about="Threads that share a large copy between the engine's memory and host memory on a CPU; not more than it has CPUs.",
        ge=1,
        le=16,
    )


LowerTierConfig = DiskTierConfig | RedisTierConfig | ObjectTierConfig
TierConfig = Annotated[GpuTierConfig | HostTierConfig | LowerTierConfig, Field(discriminator="type")]


class Config(Section):
    """All settings. Frozen, comparable, and complete: what the file leaves out has its default."""

    block_tokens: Annotated[int | None, AUTO_IS_NONE] = setting(
        None,
        kind="integer",
        allowed="`auto`, or a whole number of at least 1",
        about="Tokens of one kvtier block: a multiple of the engine's block size. `auto`: the engine's.",
        ge=1,
    )
    namespace_salt: str = setting(
        "", kind="text", allowed="any text", about="Only engines with the same salt share blocks. No secret: it is shown."
    )
    tiers: Annotated[tuple[TierConfig, ...], LIST_AS_TUPLE] = setting(REQUIRED, kind="list", allowed=_TIERS, about="Fastest first.")
    connector: ConnectorConfig = setting(ConnectorConfig(), kind="mapping", allowed="a mapping", about="How requests use the tiers.")
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info",
        kind="name",
        allowed="`debug`, `info`, `warning`, `error`",
        about="The least severe of kvtier's own messages that the process may log.",
    )

    @field_validator("tiers")
    @classmethod
    def _in_order(cls, tiers: tuple[TierConfig, ...]) -> tuple[TierConfig, ...]:
        problems = _order_problems([tier.type for tier in tiers])
        if problems:
            raise PydanticCustomError(TIER_ORDER, "{reason}", {"reason": "; ".join(reason for _, reason in problems)})
        return tiers

    @property
    def gpu(self) -> GpuTierConfig | None:
        """The tier in device memory, if there is one."""
        return next((tier for tier in self.tiers if isinstance(tier, GpuTierConfig)), None)

    @property
    def host(self) -> HostTierConfig:
        """The host tier."""
        return next(tier for tier in self.tiers if isinstance(tier, HostTierConfig))

    @property
    def disk(self) -> DiskTierConfig | None:
        """The disk tier, if there is one."""
        return next((tier for tier in self.tiers if isinstance(tier, DiskTierConfig)), None)

    @property
    def lower(self) -> tuple[LowerTierConfig, ...]:
        """The tiers below host memory, fastest first."""
        return tuple(tier for tier in self.tiers if isinstance(tier, LowerTierConfig))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads a YAML file.

        Raises:
            ConfigError: the file cannot be read, is no YAML, or holds wrong settings: all are named at once, with their lines.
        """
        return cls._checked(read_source(Path(path)))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """Takes the settings themselves, shaped as in the file, or ``{"config": path}`` to read a file.

        Raises:
            ConfigError: as :meth:`load`, or ``config`` stands beside other settings.
        """
        if "config" not in mapping:
            return cls._checked(Source("settings", dict(mapping)))
        path = mapping["config"]
        others = sorted(str(key) for key in mapping if key != "config")
        if others:
            raise ConfigError(f"settings: config names a file, so {', '.join(others)} must be set in that file, not beside it")
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise ConfigError(f"settings: config is {path!r}; allowed: the path of a YAML file")
        return cls.load(path)

    @classmethod
    def _checked(cls, source: Source) -> Self:
        tiers = source.data.get("tiers") if isinstance(source.data, dict) else None
        problems = [*source.problems]
        if isinstance(tiers, (list, tuple)):
            # asked here too, because pydantic asks only once each tier is right
            kinds = [tier.get("type") if isinstance(tier, Mapping) else None for tier in tiers]
            problems += [Problem(("tiers", *at), reason) for at, reason in _order_problems(kinds)]
        config: Self | None = None
        try:
            config = cls.model_validate(source.data)
        except ValidationError as error:
            problems += explain(error, cls, source.data)
        if config is None or problems:
            # without the cause: pydantic's own account says the same again, in its terms
            raise ConfigError(render(problems, source)) from None
        return config

    def effective(self) -> str:
        """All settings as YAML, defaults included. ``Config.load`` of a file with this text gives an equal object."""
        return yaml.dump(plain_of(self), Dumper=Dumper, sort_keys=False, allow_unicode=False, width=1 << 20)


def _order_problems(kinds: Sequence[object]) -> list[tuple[tuple[int, ...], str]]:
    """What is wrong with the order and number of tiers: (index, reason), unknown types (reported elsewhere) aside."""
    problems: list[tuple[tuple[int, ...], str]] = []
    if "host" not in kinds and all(kind in _TIER_ORDER for kind in kinds):
        problems.append(((), f"there is no tier of type host; allowed: {_TIERS}"))
    for rank, kind in enumerate(_TIER_ORDER):
        places = [index for index, each in enumerate(kinds) if each == kind]
        problems += [((index,), f"a second tier of type {kind}, after tiers[{places[0]}]; allowed: {_TIERS}") for index in places[1:]]
        slower = [index for index, each in enumerate(kinds) if each in _TIER_ORDER[rank + 1 :]]
        if places and slower and slower[0] < places[0]:
            problems.append(((places[0],), f"the tier of type {kind} must stand before tiers[{slower[0]}]; allowed: {_TIERS}"))
    return problems


def plain_of(section: Section) -> dict[str, Any]:
    """A section under its YAML keys, as values that YAML has."""
    plain: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        plain[field.alias or name] = _plain_value(name, getattr(section, name))
    return plain


def _plain_value(name: str, value: Any) -> Any:
    match value:
        case Section():
            return plain_of(value)
        case tuple():
            return [plain_of(tier) for tier in value]
        case Path():
            return write_path(value)
        case enum.Enum():
            return value.value
        case None if name == "block_tokens":
            return "auto"
        case int() if name.endswith("_bytes"):
            return format_size(value)
        case float() if name.endswith("_s"):
            return format_duration(value)
    return value
