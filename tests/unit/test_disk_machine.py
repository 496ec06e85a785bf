"""The disk tier behaves like a dict that survives crashes."""

from __future__ import annotations

import pytest

from kvtier.testing.disk_machine import STEPS, DiskMachine


@pytest.fixture(autouse=True, scope="module")
def parent_directory(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The machines' directories go where pytest cleans up, whatever ends this process."""
    DiskMachine.parent_directory = tmp_path_factory.mktemp("disk-machine")


TestDisk = DiskMachine.TestCase
TestDisk.settings = STEPS


class DurableDiskMachine(DiskMachine):
    """The same with every acknowledgement synced, and past the page cache."""

    durable = True


TestDurableDisk = DurableDiskMachine.TestCase
TestDurableDisk.settings = STEPS
