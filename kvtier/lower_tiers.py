"""Opens the tiers below host memory that a configuration names, and says how the planner is to treat them."""

from __future__ import annotations

from kvtier.config import Config, DiskTierConfig
from kvtier.control.admission import Admission
from kvtier.control.expiry import ExpiryQueue
from kvtier.control.lower import MAX_KNOWN_BLOCKS, LowerTierSpec, WriteMode
from kvtier.control.residency import Residency
from kvtier.errors import ConfigError
from kvtier.io import PAGE_BYTES, round_up_to_page
from kvtier.memory.arena import Arena
from kvtier.policies import create_policy
from kvtier.remote_tiers import open_remote, open_sealer
from kvtier.tiers.base import SharedTier, Tier
from kvtier.tiers.disk import DiskTier


def open_lower_tiers(config: Config, arena: Arena, block_bytes: int) -> list[Tier]:
    """All of them, in their order; ``arena`` is what their blocks are moved to and from.

    Raises:
        ConfigError: a tier holds no block of this size, a secret cannot be read, or an extra is not installed.
        TierError: a tier cannot be opened; those before it are closed again.
    """
    opened: list[Tier] = []
    try:
        for section in config.lower:
            if isinstance(section, DiskTierConfig):
                opened.append(_open_disk(section, config, arena, block_bytes))
            else:
                opened.append(open_remote(section, (arena.address, arena.capacity_bytes)))
    except BaseException:
        for tier in opened:
            tier.close()
        raise
    return opened


def residency(name: str, policy: str, ttl_s: float | None, ttl_mode: str) -> Residency:
    """The books of a tier."""
    expiry = None if ttl_s is None else ExpiryQueue(ttl_s, sliding=ttl_mode == "sliding")
    return Residency(name, lambda: create_policy(policy), expiry, expires_by_policy=ttl_mode == "auto")


def spec_of(tier: Tier, config: Config) -> LowerTierSpec:
    """What the planner is told of a tier below host memory."""
    section = next((each for each in config.lower if each.type == tier.name), None)
    if section is None or isinstance(tier, SharedTier):
        ttl_s, write, in_flight_bytes = None, WriteMode.THROUGH, 256 << 20
        if section is not None and not isinstance(section, DiskTierConfig):
            ttl_s, write, in_flight_bytes = section.server_ttl_s, WriteMode(section.write.value), section.max_in_flight_bytes
        is_shared = isinstance(tier, SharedTier)
        max_blocks = (lambda _: MAX_KNOWN_BLOCKS) if is_shared else tier.max_blocks
        return LowerTierSpec(residency(tier.name, "lru", ttl_s, "fixed"), max_blocks, write, in_flight_bytes, is_shared=is_shared)
    assert isinstance(section, DiskTierConfig), "what is not shared is a disk"
    books = residency(tier.name, config.policy_of(section), section.ttl_s, section.ttl_mode)
    admission = Admission.of(section.admit, section.daily_writes_bytes)
    write = WriteMode(section.write.value)
    return LowerTierSpec(books, tier.max_blocks, write, section.max_in_flight_bytes, admission, is_exclusive=section.exclusive)


def _open_disk(disk: DiskTierConfig, config: Config, arena: Arena, block_bytes: int) -> Tier:
    tier = DiskTier(
        disk.path,
        disk.capacity_bytes,
        segment_bytes=disk.segment_bytes,
        direct_io=disk.direct_io,
        io_engine=disk.io_engine,
        queue_depth=disk.queue_depth,
        io_threads=disk.io_threads,
        max_in_flight_bytes=disk.max_in_flight_bytes,
        durable=disk.durable,
        memory=(arena.address, arena.capacity_bytes),
        sealer=open_sealer(disk),
    )
    if not tier.max_blocks(block_bytes):
        tier.close()
        least = round_up_to_page(block_bytes) + 2 * PAGE_BYTES
        raise ConfigError(
            f"tiers[{config.tiers.index(disk)}].segment: {disk.segment_bytes} bytes hold no block; one block of this model has "
            f"{block_bytes} bytes. Allowed: at least {least} bytes, and a directory whose segments are as large, or an empty one"
        )
    return tier
