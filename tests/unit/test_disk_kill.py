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
from kvtier.testing.disk_victim import NAMESPACE, SIZES, number_of, victim_meta, victim_payload
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
    return said.decode().splitlines()


class Account:
    """What must be there, by what the victims said."""

    def __init__(self) -> None:
        self.acknowledged: set[int] = set()
        self.doubtful: set[int] = set()
        """what a store that a kill cut short while it was handed in may have crowded out, with nobody left to say so"""
        self.num_stored = 0
        self.num_crowded_out = 0
        self.num_cut_short = 0

    def hear(self, lines: list[str]) -> None:
        """Takes in what one victim said."""
        is_handing_in = False
        for line in lines:
            if line in "()":
                is_handing_in = line == "("
            elif line[0] == "+":
                self.num_stored += 1
                self.acknowledged.add(int(line[1:]))
                self.doubtful.discard(int(line[1:]))
            elif line[0] == "-":
                self.num_crowded_out += is_handing_in
                self.acknowledged.discard(int(line[1:]))
        if is_handing_in:
            self.num_cut_short += 1
            self.doubtful |= self.acknowledged


def verify(tier: DiskTier, account: Account) -> None:
    """All acknowledged blocks are there, all blocks that are there have the right bytes."""
    found = {number_of(meta.key): meta for meta in tier.entries()}
    lost = account.acknowledged - found.keys()
    assert lost <= account.doubtful, f"acknowledged blocks are lost: {lost - account.doubtful}"
    assert len(SIZES) > len({number % 3 for number in lost}), "only blocks of other sizes are crowded out"
    account.acknowledged = set(found)
    account.doubtful = set()
    assert all(meta == victim_meta(number) for number, meta in found.items())
    blocks = tuple(BlockIO(meta, memoryview(bytearray(meta.num_bytes))) for meta in found.values())
    tier.submit(TransferJob(1, JobKind.LOAD, NAMESPACE, blocks))
    (result,) = tier.poll(10.0)
    assert {Outcome.OK} >= set(result.outcomes)
    assert all(victim_payload(block.meta) == block.buffer for block in blocks)
    assert [] == tier.check()


@pytest.mark.slow  # a process is started two hundred times
@pytest.mark.timeout(600)
def test_kill_at_random_moments(tmp_path: Path) -> None:
    """200 kills while storing and removing, some of them while opening: no acknowledged block is lost, no block is torn."""
    choose = random.Random(20)
    account = Account()
    num_verified = 0
    for seed in range(NUM_KILLS):
        is_early = choose.random() < 0.2
        account.hear(run_victim(tmp_path, seed, -choose.uniform(0.02, 0.2) if is_early else choose.uniform(0.0, 0.06)))
        if choose.random() < 0.5 or account.doubtful:
            tier = DiskTier(tmp_path, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, direct_io="off", durable=False)
            verify(tier, account)
            num_verified += 1
            if choose.random() < 0.5:
                tier.close()
                assert [] == check_path(tmp_path)
            else:
                tier.abandon()
    said = f"{account.num_stored} stored, {account.num_crowded_out} crowded out, {account.num_cut_short} cut short, {num_verified} verified"
    assert account.num_stored > NUM_KILLS, f"the victims hardly lived long enough to store anything: {said}"
    assert account.num_cut_short < NUM_KILLS / 4, f"most losses would have been excused: {said}"
