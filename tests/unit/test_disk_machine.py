"""The disk tier behaves like a dict that survives crashes."""

from __future__ import annotations

from kvtier.testing.disk_machine import STEPS, DiskMachine

TestDisk = DiskMachine.TestCase
TestDisk.settings = STEPS


class DurableDiskMachine(DiskMachine):
    """The same with every acknowledgement synced."""

    durable = True


TestDurableDisk = DurableDiskMachine.TestCase
TestDurableDisk.settings = STEPS
