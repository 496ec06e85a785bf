"""Hazard: learns when blocks are used again, and keeps those whose place pays most hits per second. kvtier's own.

Reuse of KV is the return of conversations, agents and shared prefixes. How soon a block is used again depends on how it was used
before: how often, how long apart, whether it continues a conversation, how long its prompt is. Blocks that were last used
together (a *segment*) share these figures. The model (:mod:`~kvtier.policies.hazard_model`) learns for each class of them the
probability of a use at each age, also from blocks that are not here (:mod:`~kvtier.policies.ghosts`), and gives Gittins' index: the best
ratio of the probability of a use to the time the place is held. The segment of the smallest index leaves first, its last block
first; of each class only the least recently used segment is asked, because within a class age decides. A new block enters only
where its index is not below that of the block that would leave.

Ideas used: survival estimates of reuse as in LHD (Beckmann, Chen, Cidon, NSDI 2018), ghost entries as in ARC, the index of Gittins
(1979), the Kaplan-Meier estimate (1958).

When to use it: everywhere, unless what it learns is worthless: it needs some hundreds of requests to be better than its prior.
When not: tiers of which every block is used about equally often and soon; there LRU does the same for less.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush
from itertools import groupby
from math import sqrt

from kvtier.policies.ghosts import Ghosts
from kvtier.policies.hazard_model import (
    NUM_CLASSES,
    HazardModel,
    class_of_expectation,
    class_of_extension,
    class_of_first_use,
    class_of_reuse,
)
from kvtier.policies.run_forest import Run, RunForest
from kvtier.policies.segments import Segment, SegmentLog
from kvtier.types import BlockKey, BlockMeta

MAX_ANNOUNCED = 1 << 16
"""admitted blocks that were not inserted yet, at most"""
_MAX_PROMPTS = 1000
"""the mean length of prompts is over about so many"""

RunSegment = Segment[Run]
Announced = tuple[RunSegment, bool]
"""the segment of an admitted block, and whether its prompt went on behind it"""
Part = tuple[RunSegment, int, bool]
"""blocks in a row: their segment, how many, whether some prompt went on behind the last of them"""


class HazardPolicy:
    """Evicts the leaf of the smallest Gittins index; turns away what is worth less than that.

    Implements :class:`~kvtier.policies.base.EvictionPolicy`. Of one segment the leaf that became one last leaves first.
    ``capacity_blocks``: blocks that the tier holds; None: as many as there are when room is asked for.
    """

    __slots__ = (
        "_announced",
        "_forest",
        "_fresh",
        "_fresh_keys",
        "_ghosts",
        "_log",
        "_mean_length",
        "_model",
        "_now",
        "_num_prompts",
        "_queues",
        "_ranking",
        "num_declined",
    )

    def __init__(self, capacity_blocks: int | None = None) -> None:
        self._forest = RunForest(self._has_leaf)
        self._model = HazardModel()
        self._log: SegmentLog[Run] = SegmentLog()
        self._ghosts: Ghosts[Run] = Ghosts()
        self._resize(capacity_blocks or 0)
        self._queues: list[list[tuple[int, RunSegment]]] = [[] for _ in range(NUM_CLASSES)]
        """per class the segments with leaves, a heap by id: the least recently used first; some have no leaf any more"""
        self._announced: dict[BlockKey, Announced] = {}
        self._fresh: list[BlockMeta] = []
        """blocks of one chain that came since the last call of another kind, the last one of the prompt first"""
        self._fresh_keys: set[BlockKey] = set()
        self._ranking: list[tuple[float, int, RunSegment]] | None = None
        """while victims are chosen: (index, id, segment) of the first segment of each class, a heap; some may be out of date"""
        self._mean_length = 0.0
        self._num_prompts = 0
        self.num_declined = 0
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._forest.runs) + len(self._fresh)

    def __contains__(self, key: object) -> bool:
        return key in self._forest.runs or key in self._fresh_keys

    def insert(self, block: BlockMeta, now: float) -> None:
        fresh = self._fresh
        if fresh and (fresh[-1].parent != block.key or self._now != now):
            self._settle()
        self._now = now
        self._fresh.append(block)
        self._fresh_keys.add(block.key)

    def put_back(self, blocks: Sequence[BlockMeta], now: float) -> None:
        """Blocks that are remembered come into the segments that they were in; of others it is their first use."""
        self._settle()
        self._now = now
        keys, parent, first = [block.key for block in blocks], blocks[0].parent, 0
        for known in self._ghosts.take(keys):
            part = keys[first : first + known.num_blocks]
            if known.segment is not None and self._log.remembers(known.segment):
                self._forest.add(part, parent, known.segment, had_child=known.had_child)
            else:
                for block in reversed(blocks[first : first + known.num_blocks]):
                    self.insert(block, now)
                self._settle()
            first, parent = first + known.num_blocks, part[-1]

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        """As the protocol has it; keys that are not here teach it nothing (``incoming`` does), and one named twice counts once."""
        path = list(dict.fromkeys(keys))
        path.reverse()
        self._begin(now, len(path))
        forest = self._forest
        segment: RunSegment | None = None
        for old, runs in [(old, list(runs)) for old, runs in groupby(forest.along(path), _segment_of)]:
            segment = self._used_again(old, sum(len(run.keys) for run in runs), segment)
            for run in runs:
                forest.give(run, segment)
                forest.join(run)

    def expect(self, keys: Sequence[BlockKey], seconds: float, now: float) -> None:
        """Such blocks are of a class of their own by how soon they are expected; what becomes of them is learned of that class and of the
        one they were in. What others used since the prompt's end was used is left alone, and so is what has a better index as it is."""
        self._settle()
        self._now = now
        path = list(dict.fromkeys(keys))
        path.reverse()
        runs = self._forest.along(path)
        if not runs:
            return
        class_id = class_of_expectation(seconds)
        index, tip = self._model.index(class_id, 0.0), runs[-1].segment
        for old, group in [(old, list(group)) for old, group in groupby(runs, _segment_of)]:
            if old.time_s > tip.time_s or (old is not tip and self._model.index(old.class_id, now - old.time_s) >= index):
                continue
            segment = self._log.new(now)
            segment.class_id = class_id
            segment.origin = old.origin or old
            segment.num_uses, segment.num_turns, segment.gap_s = old.num_uses, old.num_turns, old.gap_s
            segment.num_blocks = segment.num_alive = sum(len(run.keys) for run in group)
            if old.origin is not None:
                old.num_blocks -= segment.num_blocks
                old.num_alive -= segment.num_blocks
            for run in group:
                self._forest.give(run, segment)
                self._forest.join(run)

    def remove(self, key: BlockKey) -> None:
        self._settle()
        self._forest.remove(key)

    def pin(self, key: BlockKey) -> None:
        self._settle()
        self._forest.pin(key)

    def unpin(self, key: BlockKey, now: float) -> None:
        self._settle()
        self._forest.unpin(key)

    def index_of(self, key: BlockKey | None, now: float) -> float | None:
        self._settle()
        if key is None:
            first = [queue[0][1] for queue in self._queues if _trim(queue)]
            return min((self._model.index(segment.class_id, now - segment.time_s) for segment in first), default=None)
        run = self._forest.runs.get(key)
        return None if run is None else self._model.index(run.segment.class_id, now - run.segment.time_s)

    def expired(self, now: float) -> list[BlockKey]:
        """Those of which, at their age, fewer than ``MIN_CHANCE`` are used again as far as the statistics reach. They are remembered, so
        that it is learned when that is no longer so."""
        self._begin(now, 0)
        gone: list[BlockKey] = []
        class_id = 0
        while class_id < NUM_CLASSES:
            queue = self._queues[class_id]
            if not _trim(queue) or now - queue[0][1].time_s <= self._model.ttl_s(class_id):
                class_id += 1
                continue
            run = queue[0][1].leaves[-1]
            gone += reversed(self._cut(run, len(run.keys)))
            class_id = 0  # what was before it may be a leaf now, of any class
        return gone

    # ---- leaving ------------------------------------------------------------------------------------------------

    def victims(self, num_blocks: int, now: float, incoming: Sequence[BlockMeta] = ()) -> list[BlockKey]:
        self._begin(now, num_blocks)
        self._resize(len(self))
        offers = self._offered(incoming)
        chosen: list[BlockKey] = []
        ranking = self._ranking = []
        for class_id, queue in enumerate(self._queues):
            if queue:
                self._rank_first(class_id)
        while len(chosen) < num_blocks and ranking:
            index, _, segment = ranking[0]
            queue = self._queues[segment.class_id]
            if not queue or queue[0][1] is not segment or not segment.leaves:
                heappop(ranking)
                continue
            end = self._admitted(offers, index, len(chosen), num_blocks)
            if end == len(chosen):
                self.num_declined += num_blocks - end
                break
            run = segment.leaves[-1]
            chosen += reversed(self._cut(run, min(len(run.keys), end - len(chosen))))
            if not segment.leaves:
                self._rank_first(segment.class_id)
        self._ranking = None
        self._announce(incoming, offers, len(chosen))
        return chosen

    def _admitted(self, offers: Sequence[Part], index: float, position: int, num_blocks: int) -> int:
        """Up to where, from ``position`` on, what comes is worth at least ``index``. Behind the end of the offers everything is."""
        end = 0
        for segment, count, _ in offers:
            if end + count > position and index > self._model.index(segment.class_id, 0.0):
                return min(num_blocks, max(end, position))
            end += count
        return num_blocks

    def _cut(self, run: Run, count: int) -> list[BlockKey]:
        """Blocks leave from the end of a leaf, and are remembered."""
        segment, had_child, following = run.segment, run.had_child, run.following
        gone = self._forest.cut(run, count)
        self._ghosts.put(gone, segment, had_child=had_child, following=following)
        return gone

    def _rank_first(self, class_id: int) -> None:
        """Ranks the least recently used segment of a class that has a leaf."""
        queue = self._queues[class_id]
        if _trim(queue) and self._ranking is not None:
            segment_id, segment = queue[0]
            heappush(self._ranking, (self._model.index(class_id, self._now - segment.time_s), segment_id, segment))

    def _has_leaf(self, segment: RunSegment) -> None:
        """A segment has got a leaf."""
        if not segment.is_queued:
            segment.is_queued = True
            heappush(self._queues[segment.class_id], (segment.id, segment))
        if self._ranking is not None:
            self._rank_first(segment.class_id)

    # ---- learning -----------------------------------------------------------------------------------------------

    def _begin(self, now: float, num_blocks: int) -> None:
        self._settle()
        self._now = now
        self._log.advance(now, self._model)
        self._model.asked_for(num_blocks)

    def _used_again(self, old: RunSegment, num_blocks: int, before: RunSegment | None) -> RunSegment:
        """Blocks of a segment were used. Their new one: that of the blocks before them in the prompt, where it is of the same class."""
        age_s = max(0.0, self._now - old.time_s)
        self._model.reused(old.class_id, age_s, old.weight_of(num_blocks))
        old.num_alive -= num_blocks
        if old.origin is not None:
            origin = old.origin
            age_s = max(0.0, self._now - origin.time_s)
            self._model.reused(origin.class_id, age_s, origin.weight_of(num_blocks))
            origin.num_alive -= num_blocks
        gap_s = age_s if old.gap_s < 0.0 else sqrt(max(age_s, 1e-3) * max(old.gap_s, 1e-3))
        num_uses = old.num_uses + 1
        class_id = class_of_reuse(num_uses, gap_s)
        if before is not None and before.class_id == class_id and before.time_s == self._now:
            segment = before
            segment.num_uses = min(segment.num_uses, num_uses)
        else:
            segment = self._log.new(self._now)
            segment.class_id = class_id
            segment.num_uses = num_uses
            segment.gap_s = gap_s
        segment.num_turns = old.num_turns + 1
        segment.num_blocks += num_blocks
        segment.num_alive += num_blocks
        return segment

    def _used_first(self, num_blocks: int, before: RunSegment | None, *, is_extension: bool, is_root: bool) -> RunSegment:
        """Blocks that nothing is known of were used, behind blocks of ``before``."""
        if before is not None and before.num_uses == 1 and not is_root:
            # Whoever uses a prompt again touches it first: here the same prompt goes on.
            before.num_blocks += num_blocks
            before.num_alive += num_blocks
            return before
        self._num_prompts = min(_MAX_PROMPTS, self._num_prompts + 1)
        self._mean_length += (num_blocks - self._mean_length) / self._num_prompts
        segment = self._log.new(self._now)
        segment.num_blocks = segment.num_alive = num_blocks
        if is_extension and before is not None:
            segment.num_turns = before.num_turns + 1
            segment.gap_s = max(0.0, before.gap_s)
            segment.class_id = class_of_extension(segment.num_turns, segment.gap_s)
        else:
            parent_uses = 0 if is_root else 1 if before is None else before.num_uses
            segment.class_id = class_of_first_use(num_blocks / self._mean_length, parent_uses)
        return segment

    def _used(self, keys: Sequence[BlockKey], parent: BlockKey | None) -> list[Part]:
        """The segments of blocks in a row behind ``parent`` that were used now and are not here."""
        out: list[Part] = []
        before, had_child = (None, False) if parent is None else self._find(parent)
        is_root = parent is None
        for known in self._ghosts.take(keys):
            if known.segment is not None and self._log.remembers(known.segment):
                before = self._used_again(known.segment, known.num_blocks, before)
            else:
                before = self._used_first(known.num_blocks, before, is_extension=not had_child, is_root=is_root)
            had_child, is_root = known.had_child, False
            num_joined = out.pop()[1] if out and out[-1][0] is before else 0
            out.append((before, num_joined + known.num_blocks, had_child))
        run = None if parent is None else self._forest.runs.get(parent)
        if run is not None and run.keys[-1] == parent:
            run.had_child = True
        return out

    def _find(self, key: BlockKey) -> tuple[RunSegment | None, bool]:
        """What is known of the block before a new one."""
        run = self._forest.runs.get(key)
        if run is not None:
            return run.segment, run.had_child or run.keys[-1] != key
        return self._announced.get(key) or (None, True)

    def _resize(self, num_blocks: int) -> None:
        self._log.resize(num_blocks)
        self._ghosts.resize(num_blocks)

    # ---- coming -------------------------------------------------------------------------------------------------

    def _offered(self, incoming: Sequence[BlockMeta]) -> list[Part]:
        """The new segments of blocks that want to come, which were used."""
        if not incoming:
            return []
        keys = [block.key for block in incoming]
        announced = self._announced
        if announced:
            for key in keys:
                announced.pop(key, None)
        return self._used(keys, incoming[0].parent)

    def _announce(self, incoming: Sequence[BlockMeta], offers: Sequence[Part], num_admitted: int) -> None:
        """Admitted blocks will be inserted; the others are remembered as ghosts."""
        keys = [block.key for block in incoming]
        announced = self._announced
        first = 0
        for segment, count, had_before in offers:
            end = first + count
            had_child = had_before or end < len(keys)
            middle = min(end, max(first, num_admitted))
            announced.update(dict.fromkeys(keys[first:middle], (segment, True)))
            if middle == end > first:
                announced[keys[end - 1]] = (segment, had_child)
            if middle < end:
                self._ghosts.put(keys[middle:end], segment, had_child=had_child)
            first = end
        while len(announced) > MAX_ANNOUNCED:
            del announced[next(iter(announced))]

    def _settle(self) -> None:
        """Blocks that came since the last call get their places, those that were not announced their segments too."""
        if not self._fresh:
            return
        keys = [block.key for block in reversed(self._fresh)]
        parent = self._fresh[-1].parent
        self._fresh = []
        self._fresh_keys.clear()
        announced = self._announced
        known = [announced.pop(key, None) for key in keys] if announced else [None] * len(keys)
        first = 0
        for what, group in groupby(known):
            count = sum(1 for _ in group)
            part = keys[first : first + count]
            parts = self._used(part, parent) if what is None else [(what[0], count, what[1])]
            for segment, length, had_child in parts:
                self._forest.add(keys[first : first + length], parent, segment, had_child=had_child)
                parent = keys[first + length - 1]
                first += length


def _trim(queue: list[tuple[int, RunSegment]]) -> bool:
    """Makes the first segment one with a leaf. False: there is none."""
    while queue and not queue[0][1].leaves:
        heappop(queue)[1].is_queued = False
    return bool(queue)


def _segment_of(run: Run) -> RunSegment:
    return run.segment
