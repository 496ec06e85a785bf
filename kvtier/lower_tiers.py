"""Opens the tiers below host memory that a configuration names."""

from __future__ import annotations

from kvtier.config import Config, DiskTierConfig
from kvtier.errors import ConfigError
from kvtier.io import PAGE_BYTES, round_up_to_page
from kvtier.memory.arena import Arena
from kvtier.remote_tiers import open_remote, open_sealer
from kvtier.tiers.base import Tier
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
