"""An engine on a daemon, to be killed at any moment: a scheduler and, in a process of its own, a worker that outlives it for a while.

Usage: python serve_victim.py SOCKET NAME SEED
Says ``open`` on standard output once it stores and loads. The worker copies slowly, and after its scheduler has died it goes on
writing to the slots that it was told last, as a worker of an engine may that has not noticed yet.
Exits with 3 where a load gave wrong bytes.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

from kvtier.testing.daemons import BLOCK_BYTES, EngineWithoutModel, payload_of
from kvtier.types import BlockKey, SlotRef

NUM_PROMPTS = 60
BLOCKS_PER_PROMPT = 8
PIECE_BYTES = 1024
OUTLIVES_S = 0.3
"""how long the worker goes on writing after its scheduler's death"""
WRONG = 3


def victim_keys(prompt: int) -> list[BlockKey]:
    """The blocks of one of the prompts, the same for all engines."""
    return [BlockKey(prompt.to_bytes(8, "little") + position.to_bytes(8, "little")) for position in range(1, BLOCKS_PER_PROMPT + 1)]


class SlowEngine(EngineWithoutModel):
    """One that writes piece by piece, so that a kill falls into the middle of a copy."""

    def write(self, keys: list[BlockKey], slots: list[SlotRef]) -> None:  # type: ignore[override]
        assert self.arena is not None
        for at in range(0, BLOCK_BYTES, PIECE_BYTES):
            for key, ref in zip(keys, slots, strict=True):
                self.arena.view(ref.slot * 4096 + at, PIECE_BYTES)[:] = payload_of(key)[at : at + PIECE_BYTES]
            time.sleep(0.0005)


def work(path: Path, name: str, seed: int) -> None:
    """The scheduler: stores and loads without end, by way of its worker."""
    worker = subprocess.Popen(
        [sys.executable, __file__, str(path), name, "worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stdout.readline() == "waiting\n"
    engine = EngineWithoutModel(path, name, has_worker=False)
    assert worker.stdout.readline() == "mapped\n"
    engine.wait_until_usable()
    choose = random.Random(seed)
    os.write(1, b"open\n")
    while True:
        keys = victim_keys(choose.randrange(NUM_PROMPTS))
        load = engine.cache.begin_load(keys)
        store = engine.cache.begin_store(keys, 0)
        orders = [("load", key, ref) for key, ref in zip(keys, load.slots, strict=False)]
        orders += [("store", keys[position], ref) for position, ref in zip(store.positions, store.slots, strict=True)]
        worker.stdin.write(" ".join(f"{kind}:{key.hex()}:{ref.slot}:{ref.generation}" for kind, key, ref in orders) + "\n")
        if worker.stdout.readline() != "right\n":
            os._exit(WRONG)
        engine.cache.end_load(load.job_id)
        engine.cache.commit_store(store.job_id)
        engine.cache.poll()


def copy(path: Path, name: str) -> None:
    """The worker: copies what it is told, and for a while after nobody tells it any more."""
    engine = SlowEngine.__new__(SlowEngine)
    os.write(1, b"waiting\n")
    engine.attach_worker_of(path, name)
    os.write(1, b"mapped\n")
    stores: list[tuple[BlockKey, SlotRef]] = []
    for line in sys.stdin:
        orders = [order.split(":") for order in line.split()]
        refs = [(kind, BlockKey(bytes.fromhex(key)), SlotRef(int(slot), int(generation))) for kind, key, slot, generation in orders]
        loads = [(key, ref) for kind, key, ref in refs if kind == "load"]
        is_right = engine.is_right([key for key, _ in loads], [ref for _, ref in loads])
        stores = [(key, ref) for kind, key, ref in refs if kind == "store"]
        engine.write([key for key, _ in stores], [ref for _, ref in stores])
        try:
            os.write(1, b"right\n" if all(is_right) else b"wrong\n")
            stores = []  # reported: nobody writes there any more
        except BrokenPipeError:
            break
    until = time.monotonic() + OUTLIVES_S
    while time.monotonic() < until and stores:
        assert engine.arena is not None
        for _, ref in stores:
            engine.arena.view(ref.slot * 4096, BLOCK_BYTES)[:] = b"\xee" * BLOCK_BYTES
        time.sleep(0.002)


if __name__ == "__main__":
    if sys.argv[3] == "worker":
        copy(Path(sys.argv[1]), sys.argv[2])
    else:
        work(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
