"""Anything that can happen to a connector, in any order, with the fake engine looking at every byte."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hypothesis import settings

from kvtier.testing.connector_machine import ConnectorMachine
from kvtier.testing.fake_system import FakeSystemOptions
from kvtier.tiers.base import Tier
from kvtier.tiers.disk import DiskTier


class DiskMachine(ConnectorMachine):
    """With a disk tier below a host memory that holds next to nothing."""

    def make_options(self, draw: FakeSystemOptions) -> FakeSystemOptions:
        return dataclasses.replace(draw, host_blocks=min(draw.host_blocks, 8))

    def make_tier(self, directory: Path) -> Tier | None:
        return DiskTier(directory / "disk", 1400 << 10, segment_bytes=64 << 10, durable=False)


class AsyncMachine(ConnectorMachine):
    """Two ranks whose copies take several steps: blocks are held, and read late."""

    def make_options(self, draw: FakeSystemOptions) -> FakeSystemOptions:
        return dataclasses.replace(draw, num_ranks=2, num_polls=max(draw.num_polls, 2))


TestHostMemory = ConnectorMachine.TestCase
TestDisk = DiskMachine.TestCase
TestAsyncCopies = AsyncMachine.TestCase

TestHostMemory.settings = settings(stateful_step_count=40)
TestDisk.settings = settings(stateful_step_count=30)
TestAsyncCopies.settings = settings(stateful_step_count=40)
