"""The settings of each kind of tier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import ValidationInfo, field_validator

from kvtier.config.fields import (
    ON_OFF,
    OPTIONAL_DURATIONS,
    REQUIRED,
    SIZES,
    ExpandedPath,
    OptionalDuration,
    OptionalSize,
    Section,
    Size,
    SizesByName,
    WriteMode,
    max_in_flight,
    setting,
    write_mode,
)
from kvtier.config.secrets import key_file, key_variable, one_key, read_secret
from kvtier.units import format_size

_PAGE_BYTES = 4096
_MAX_SEGMENT_BYTES = 1 << 32
_TTL_ABOUT = "A block is dropped this long after it was stored or used (see `ttl_mode`). null: never."
_TTL_MODE_ABOUT = (
    "From when `ttl` counts. `sliding`: the last use. `fixed`: the time of storing. `auto`: each kind of block has a time to live of its "
    "own, as learned: the age from which on fewer than one in a hundred are used within ten hours."
)
TtlMode = Literal["sliding", "fixed", "auto"]
_TTL_MODES = "`sliding`, `fixed`, `auto`; `auto` with `ttl: null` and the policies `hazard`, `default` only"
PolicyName = Literal["auto", "default", "lru", "fifo", "arc", "lru2", "s3fifo", "sieve", "gdsf", "hazard"]
_POLICY_NAMES = "`auto`, `default`, `lru`, `fifo`, `arc`, `lru2`, `s3fifo`, `sieve`, `gdsf`, `hazard`"
_POLICY_ABOUT = (
    "Which block leaves a full tier first. `lru`: the one unused for longest. `fifo`: the oldest. `hazard`: the one least likely to be "
    "used soon, as learned; new blocks worth less are not taken. `default`: the best over recorded workloads, now `hazard`. "
    "`auto`: `default` where host memory has no tier below it, else `lru`. The others are described under policies."
)
_QUOTAS = "tenants and sizes, such as `{acme: 2GiB}`, together not more than `capacity`"


def _stand_alone(ttl_mode: str, info: ValidationInfo) -> str:
    if ttl_mode == "auto" and info.data.get("ttl_s") is not None:
        raise ValueError("`ttl` is set")
    return ttl_mode


def _fit_into_capacity(quotas: Mapping[str, int], info: ValidationInfo) -> Mapping[str, int]:
    # absent where capacity itself is wrong
    capacity_bytes = info.data.get("capacity_bytes")
    total_bytes = sum(quotas.values())
    if capacity_bytes is not None and total_bytes > capacity_bytes:
        raise ValueError(f"{format_size(total_bytes)} in all, more than the tier's capacity of {format_size(capacity_bytes)}")
    return quotas


class GpuTierConfig(Section):
    """Memory of each GPU: new blocks pass through it, and the latest stay, so that a hit need not cross the bus."""

    type: Literal["gpu"] = setting("gpu", kind="name", allowed="`gpu`", about="Makes this tier memory of the engine's devices.")
    capacity_bytes: Size = setting(
        REQUIRED, key="capacity", kind="size", allowed=f"more than 0: {SIZES}", about="Memory for blocks, on each GPU.", gt=0
    )
    policy: PolicyName = setting("auto", kind="name", allowed=_POLICY_NAMES, about=_POLICY_ABOUT)
    ttl_s: OptionalDuration = setting(None, key="ttl", kind="duration", allowed=OPTIONAL_DURATIONS, about=_TTL_ABOUT, gt=0)
    ttl_mode: TtlMode = setting("sliding", kind="name", allowed=_TTL_MODES, about=_TTL_MODE_ABOUT)

    _ttl_mode_fits = field_validator("ttl_mode")(_stand_alone)


class HostTierConfig(Section):
    """Host memory: the arena that engine and workers share. Always there."""

    type: Literal["host"] = setting("host", kind="name", allowed="`host`", about="Makes this tier host memory.")
    capacity_bytes: Size = setting(
        REQUIRED, key="capacity", kind="size", allowed=f"more than 0: {SIZES}", about="Host memory for blocks, of all ranks together.", gt=0
    )
    policy: PolicyName = setting("auto", kind="name", allowed=_POLICY_NAMES, about=_POLICY_ABOUT)
    ttl_s: OptionalDuration = setting(None, key="ttl", kind="duration", allowed=OPTIONAL_DURATIONS, about=_TTL_ABOUT, gt=0)
    ttl_mode: TtlMode = setting("sliding", kind="name", allowed=_TTL_MODES, about=_TTL_MODE_ABOUT)
    quotas: SizesByName = setting(
        {},
        kind="mapping",
        allowed=_QUOTAS,
        about="What tenants can always have here. What they leave unused others borrow, and give back.",
    )
    victim_share: float = setting(
        0.125,
        key="victim_buffer",
        kind="number",
        allowed="more than 0, to 0.5",
        about="Share of the blocks here that may wait to be written to a tier below after the policy has let them go. They are hits until "
        "then; what does not fit is dropped without being written (`disk.skipped_blocks`).",
        gt=0,
        le=0.5,
    )
    huge_pages: bool = setting(True, kind="boolean", allowed="`true`, `false`", about="Ask the kernel for huge pages: faster copies.")
    numa_node: int | None = setting(
        None, kind="integer", allowed="null, or a whole number from 0", about="The NUMA node to prefer. null: the kernel decides.", ge=0
    )

    _quotas_fit = field_validator("quotas")(_fit_into_capacity)
    _ttl_mode_fits = field_validator("ttl_mode")(_stand_alone)


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
        REQUIRED, key="capacity", kind="size", allowed=f"more than 0: {SIZES}", about="Disk space for everything in the directory.", gt=0
    )
    segment_bytes: Size = setting(
        64 << 20,
        key="segment",
        kind="size",
        allowed="a multiple of 4KiB, from 8KiB to below 4GiB, not above `capacity`",
        about="Size of one log segment, the unit in which disk space is reclaimed. At least a block must fit.",
        validate_default=True,
    )
    policy: PolicyName = setting("auto", kind="name", allowed=_POLICY_NAMES, about=_POLICY_ABOUT)
    ttl_s: OptionalDuration = setting(None, key="ttl", kind="duration", allowed=OPTIONAL_DURATIONS, about=_TTL_ABOUT, gt=0)
    ttl_mode: TtlMode = setting("sliding", kind="name", allowed=_TTL_MODES, about=_TTL_MODE_ABOUT)
    write: WriteMode = write_mode()
    quotas: SizesByName = setting(
        {},
        kind="mapping",
        allowed=_QUOTAS,
        about="What tenants can always have here. What they leave unused others borrow, and give back.",
    )
    admit: Literal["all", "second_use", "index"] = setting(
        "all",
        kind="name",
        allowed="`all`, `second_use`, `index`; `index` where the policies of host memory and of the disk are `hazard` or `default` only",
        about="Which blocks are written. `second_use`: those that were used again after they were stored, to spare the disk. `index`: "
        "those that host memory's policy takes to be worth as much as what leaves a full disk for them.",
    )
    daily_writes_bytes: OptionalSize = setting(
        None, key="daily_writes", kind="size", allowed=f"null, or more than 0: {SIZES}", about="Bytes written a day at most.", gt=0
    )
    exclusive: bool = setting(
        False,
        kind="boolean",
        allowed="`true`, `false`; true with `write: on_evict` only",
        about="What is loaded from the disk leaves it, so that disk and host memory hold more together, at the price of more writes.",
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
    max_in_flight_bytes: Size = max_in_flight("Bytes being read or written at once.")
    durable: bool = setting(True, kind="boolean", allowed="`true`, `false`", about="Blocks outlive a power cut, not only a crash.")
    encryption_key_env: str | None = key_variable()
    encryption_key_file: ExpandedPath | None = key_file()

    _quotas_fit = field_validator("quotas")(_fit_into_capacity)
    _ttl_mode_fits = field_validator("ttl_mode")(_stand_alone)

    _one_key = field_validator("encryption_key_file")(one_key)

    def encryption_key(self) -> str | None:
        """Read now. Raises ConfigError where the variable or file is not there."""
        return read_secret(self.type, "encryption_key", self.encryption_key_env, self.encryption_key_file)

    @field_validator("exclusive")
    @classmethod
    def _has_the_write_mode(cls, exclusive: bool, info: ValidationInfo) -> bool:
        # absent where the write mode itself is wrong
        if exclusive and info.data.get("write", WriteMode.ON_EVICT) is not WriteMode.ON_EVICT:
            raise ValueError(f"the write mode is {info.data['write'].value}")
        return exclusive

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
