"""Replays a recording event by event and compares: were the same blocks hits, and did the same blocks leave, in the same order?

For recordings of host memory alone: with a disk the moments at which transfers end decide as well, and a recording does not have them. Nor
does it have what the control API, hints and quotas did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvtier.errors import TraceError
from kvtier.policies import POLICIES
from kvtier.sim.readers.lines import BadLineError, read_lines
from kvtier.sim.readers.recording import Line, RecordingReader, numbers_of
from kvtier.sim.serving import Served, Serving
from kvtier.sim.setup import Setup, TierSetup
from kvtier.stats import Stats
from kvtier.types import KEY_BYTES, BlockKey

MAX_DIFFERENCES = 20
_NO_PARENT = -1


@dataclass(slots=True)
class Verdict:
    """What was compared, and the first differences in words."""

    num_answers: int = 0
    num_hit_blocks: int = 0
    """blocks that were loaded, in both"""
    num_evicted_blocks: int = 0
    differences: list[str] = field(default_factory=list)


def verify(path: Path) -> Verdict:
    """Compares a recording with the simulator. Raises TraceError where it cannot be read or is of a kind that cannot be compared."""
    verifier: list[_Verifier] = []

    def take(line: Line) -> None:
        if not verifier:
            verifier.append(_Verifier(path, reader.header or {}))
        verifier[0].take(line)

    reader = RecordingReader(take)
    read_lines(path, reader.take, skip_bad=False)
    return verifier[0].finish() if verifier else Verdict()


class _Verifier:
    """Carries lines out on a planner of the recorded size."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        if header.get("disk_bytes"):
            raise TraceError(f"{path}: only recordings of host memory alone can be compared event by event; this one has a disk")
        policy = header.get("host_policy", "lru")
        if policy not in POLICIES:
            raise TraceError(f"{path}:1: expected `host_policy` to be one of {', '.join(POLICIES)}, found {policy!r:.60}")
        host = TierSetup(header["host_blocks"], policy, header.get("host_ttl_s"), header.get("host_ttl_mode", "sliding"))
        setup = Setup(host)
        self._block_bytes = header["block_bytes"]
        self._planner = setup.planner(self._block_bytes, Stats(), events=True)
        self._serving = Serving(
            self._planner,
            lambda: self._planner.draining_blocks(self._block_bytes),
            lambda: None,
            max_pinned_blocks=header["max_pinned_blocks"],
            promote_wait_s=0.0,
            block_bytes=self._block_bytes,
        )
        self._path = path
        self._now = 0.0
        self._requests: dict[int, Served] = {}
        self._keys: dict[int, list[BlockKey]] = {}
        self._parents: dict[int, int] = {}
        self._jobs: dict[int, tuple[int, int]] = {}
        """recorded job -> the planner's, and its blocks"""
        self._evicted: list[int] = []
        self._recorded_evicted: list[int] = []
        self._verdict = Verdict()

    def take(self, line: Line) -> None:
        """One line."""
        if line.kind == "lost":
            raise TraceError(f"{self._path}: {line.values[0]} lines were lost while recording, so events cannot be compared")
        if line.kind == "evict":
            self._recorded_evicted += numbers_of(line.values[1])
            return
        self._now = max(self._now, line.time_s)
        getattr(self, f"_{line.kind}")(self._now, *line.values)
        self._evicted += [_number_of(event.meta.key) for event in self._planner.take_events() if not event.stored]

    def finish(self) -> Verdict:
        """All lines are carried out."""
        verdict = self._verdict
        pairs = zip(self._evicted, self._recorded_evicted, strict=False)
        for place, (ours, theirs) in enumerate(pairs):
            if ours != theirs:
                self._differ(f"eviction {place}: block {theirs} left, the simulator evicted {ours}")
                break
            verdict.num_evicted_blocks += 1
        if len(self._evicted) != len(self._recorded_evicted):
            self._differ(f"{len(self._recorded_evicted)} blocks left, the simulator evicted {len(self._evicted)}")
        return verdict

    def _ask(
        self, now: float, number: int, _prompt_tokens: int, first: int, limit: int, ready: int, _promised: int, place: int, runs: list[int]
    ) -> None:
        request = self._requests.get(number)
        if first > limit:
            raise BadLineError(f"expected the first block to be at most the limit, found {first} and {limit}")
        keys = self._learn(number, place, runs)
        if request is not None and request.first_block == first and request.limit_block == limit and not request.is_admitted:
            request.keys = keys
            self._serving.look_once_more(request, now)
        else:
            if request is not None:
                self._serving.release(request, now)
            request = self._requests[number] = Served(number, keys, limit, first)
            self._serving.look(request, now)
        self._verdict.num_answers += 1
        if request.num_ready != ready:
            self._differ(f"{now:.3f} s: request {number} found {ready} blocks, in the simulator {request.num_ready}")

    def _start(self, now: float, number: int, _first: int, num_loaded: int, job: int) -> None:
        request = self._under_way(number)
        plan = self._serving.admit(request, now, loads=job != 0)
        loaded = 0 if plan is None else len(plan.slots)
        if plan is not None:
            self._jobs[job] = (plan.job_id, loaded)
        if loaded != num_loaded:
            self._differ(f"{now:.3f} s: request {number} loaded {num_loaded} blocks, in the simulator {loaded}")
        self._verdict.num_hit_blocks += min(loaded, num_loaded)

    def _store(self, now: float, number: int, first: int, end: int, job: int, place: int, runs: list[int]) -> None:
        request = self._under_way(number)
        request.keys = self._learn(number, place, runs)
        if not first < end <= len(request.keys):
            raise BadLineError(f"expected to store a part of {len(request.keys)} blocks, found {first} to {end}")
        request.store_from = first
        plan = self._serving.store(request, end, now)
        if bool(plan.slots) != bool(job):
            stored = "something" if job else "nothing"
            self._differ(f"{now:.3f} s: request {number} stored {stored}, in the simulator {len(plan.slots)} blocks")
        if plan.slots:
            self._jobs[job] = (plan.job_id, len(plan.slots))

    def _end(self, now: float, jobs: Sequence[tuple[int, list[int]]]) -> None:
        for job, failed in jobs:
            if job in self._jobs:
                job_id, num_blocks = self._jobs.pop(job)
                self._serving.end_job(job_id, [position for position in failed if position < num_blocks], now)
        self._serving.tick(now)

    def _finish(self, now: float, number: int, _output_tokens: int) -> None:
        self._serving.release(self._under_way(number), now)
        del self._requests[number], self._keys[number]

    def _reset(self, now: float) -> None:
        for request in self._requests.values():
            self._serving.release(request, now)
        self._planner.reset(now)
        self._planner.take_commands()

    def _learn(self, number: int, place: int, runs: list[int]) -> list[BlockKey]:
        """The keys of a request that are known by now."""
        keys = self._keys.get(number, [])
        if place > len(keys):
            raise BadLineError(f"expected blocks from place {len(keys)} on, found {place}")
        parent = _number_of(keys[place - 1]) if place else _NO_PARENT
        for block in numbers_of(runs):
            if self._parents.setdefault(block, parent) != parent:
                raise BadLineError(f"expected block {block} to follow the block that it followed before")
            parent = block
        keys = self._keys[number] = keys[:place] + [_key_of(block) for block in numbers_of(runs)]
        return keys

    def _under_way(self, number: int) -> Served:
        if number not in self._requests:
            raise BadLineError(f"expected a request that is under way, found {number}")
        return self._requests[number]

    def _differ(self, text: str) -> None:
        if len(self._verdict.differences) < MAX_DIFFERENCES:
            self._verdict.differences.append(text)


def _key_of(number: int) -> BlockKey:
    return BlockKey(number.to_bytes(KEY_BYTES, "little"))


def _number_of(key: BlockKey) -> int:
    return int.from_bytes(key, "little")
