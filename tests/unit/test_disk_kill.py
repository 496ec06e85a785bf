"""kill -9 at random moments: nothing acknowledged is lost, nothing torn appears, every reopening succeeds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvtier.testing import disk_victim
from kvtier.testing.disk_victim import NAMESPACE, victim_meta, victim_payload
from kvtier.tiers.disk import DiskTier, check_path
from kvtier.types import BlockIO, JobKind, Outcome, TransferJob

SEGMENT_BYTES = 256 << 10
CAPACITY_BYTES = (1 << 20) + (32 << 10) + 6 * SEGMENT_BYTES
NUM_KILLS = 200


def run_victim(directory: Path, seed: int, lifetime_s: float) -> list[str]:
    """Starts a storing process, kills it after a while, returns what it had said."""
    command = [sys.executable, disk_victim.__file__, str(directory), str(seed), str(CAPACITY_BYTES), str(SEGMENT_BYTES)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONDONTWRITEBYTECODE": "1"}
    # bufsize=0: communicate() would not see what readline() had buffered
    with subprocess.Popen(command, bufsize=0, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as victim:
        assert victim.stdout is not None
        assert victim.stderr is not None
        if lifetime_s >= 0:
            assert b"open\n" == victim.stdout.readline(), victim.stderr.read().decode()
        time.sleep(abs(lifetime_s))
        victim.send_signal(signal.SIGKILL)
        said, complaints = victim.communicate()
        assert -signal.SIGKILL == victim.wait(), complaints.decode()
    return [line for line in said.decode().splitlines() if line[0] in "+-"]


def verify(tier: DiskTier, acknowledged: set[int]) -> set[int]:
    """All acknowledged blocks are there, all blocks that are there have the right bytes; returns them."""
    found = {int.from_bytes(meta.key, "little"): meta for meta in tier.entries()}
    assert acknowledged <= found.keys(), f"acknowledged blocks are lost: {acknowledged - found.keys()}"
    assert all(meta == victim_meta(number) for number, meta in found.items())
    blocks = tuple(BlockIO(meta, memoryview(bytearray(meta.num_bytes))) for meta in found.values())
    tier.submit(TransferJob(1, JobKind.LOAD, NAMESPACE, blocks))
    (result,) = tier.poll(10.0)
    assert {Outcome.OK} >= set(result.outcomes)
    assert all(victim_payload(block.meta) == block.buffer for block in blocks)
    assert [] == tier.check()
    return set(found)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_kill_at_random_moments(tmp_path: Path) -> None:
    """200 kills while storing and removing, some of them while opening: no acknowledged block is lost, no block is torn."""
    choose = random.Random(20)
    acknowledged: set[int] = set()
    num_stored = 0
    for seed in range(NUM_KILLS):
        is_early = choose.random() < 0.2
        lifetime_s = -choose.uniform(0.02, 0.2) if is_early else choose.uniform(0.0, 0.06)
        for line in run_victim(tmp_path, seed, lifetime_s):
            number = int(line[1:])
            num_stored += line[0] == "+"
            (acknowledged.add if line[0] == "+" else acknowledged.discard)(number)
        if choose.random() < 0.5:
            tier = DiskTier(tmp_path, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, durable=False)
            acknowledged = verify(tier, acknowledged)
            if choose.random() < 0.5:
                tier.close()
                assert [] == check_path(tmp_path)
            else:
                tier.abandon()
    assert num_stored > NUM_KILLS, "the victims hardly lived long enough to store anything"
