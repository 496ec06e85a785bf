"""Hazard: learns when blocks are used again, and keeps those whose place pays most hits per second. kvtier's own.

Reuse of KV is the return of conversations, agents and shared prefixes. How soon a block is used again depends on how it was used
before: how often, how long apart, whether it continues a conversation, how long its prompt is. Blocks that were last used
together (a *segment*) share these figures. The model (:mod:`~kvtier.policies.hazard_model`) learns for each class of them the
probability of a use at each age, also from blocks that are not here (a compact ghost table), and gives Gittins' index: the best
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
from math import sqrt

from kvtier.policies.forest import CANDIDATE, Forest, Node
from kvtier.policies.hazard_model import (
    NUM_CLASSES,
    HazardModel,
    class_of_extension,
    class_of_first_use,
    class_of_reuse,
)
from kvtier.policies.segments import GhostTable, Segment, SegmentLog, runs_of
from kvtier.types import BlockKey, BlockMeta

MAX_ANNOUNCED = 1 << 16
"""admitted blocks that were not inserted yet, at most"""
_MAX_PROMPTS = 1000
"""the mean length of prompts is over about so many"""


class HazardNode(Node):
    """A block and the segment it is in."""

    __slots__ = ("had_child", "segment")

    def __init__(self, key: BlockKey) -> None:
        super().__init__(key)
        self.segment: Segment[HazardNode] | None = None
        self.had_child = False
        """some prompt went on behind it, so that another one branches off"""


HazardSegment = Segment[HazardNode]
Known = tuple[HazardSegment | None, bool]
"""what is remembered of a block: its segment, and whether it had a child"""


class HazardPolicy(Forest[HazardNode]):
    """Evicts the leaf of the smallest Gittins index; turns away what is worth less than that.

    ``capacity_blocks``: blocks that the tier holds; None: as many as there are when room is asked for.
    """

    __slots__ = (
        "_announced",
        "_emptying",
        "_fresh",
        "_ghosts",
        "_log",
        "_mean_length",
        "_model",
        "_now",
        "_num_declined",
        "_num_prompts",
        "_queues",
        "_ranking",
    )

    def __init__(self, capacity_blocks: int | None = None) -> None:
        super().__init__(HazardNode)
        self._model = HazardModel()
        self._log: SegmentLog[HazardNode] = SegmentLog()
        self._ghosts = GhostTable(self._log)
        self._resize(capacity_blocks or 0)
        self._queues: list[list[tuple[int, HazardSegment]]] = [[] for _ in range(NUM_CLASSES)]
        """per class the segments with leaves, a heap by id: the least recently used first"""
        self._announced: dict[BlockKey, Known] = {}
        self._fresh: list[tuple[HazardNode, Known]] = []
        """unannounced blocks of one chain, the last one first, with what was remembered of them"""
        self._ranking: list[tuple[float, int, HazardSegment]] | None = None
        """while victims are chosen: (index, id, segment) of the first segment of each class, a heap; some may be out of date"""
        self._emptying: HazardSegment | None = None
        """the segment that blocks are being evicted from"""
        self._mean_length = 0.0
        self._num_prompts = 0
        self._num_declined = 0
        self._now = 0.0

    @property
    def num_declined(self) -> int:
        return self._num_declined

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        """As the protocol has it; keys that are not here teach it nothing (``incoming`` does)."""
        self._begin(now)
        runs: list[tuple[HazardSegment, list[HazardNode]]] = []
        segment: HazardSegment | None = None
        nodes = self._nodes
        for key in keys:
            node = nodes.get(key)
            if node is None:
                continue
            if node.segment is not segment or segment is None:
                segment = node.segment
                assert segment is not None, "a block that is here has a segment"
                run: list[HazardNode] = []
                runs.append((segment, run))
            run.append(node)
        last: HazardSegment | None = None
        for old, run in reversed(runs):
            last = self._used_again(old, len(run), last)
            for node in run:
                node.segment = last
                if not node.num_children:
                    self._add_leaf(node)

    def victims(self, num_blocks: int, now: float, incoming: Sequence[BlockMeta] = ()) -> list[BlockKey]:
        self._begin(now)
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
            if not queue or queue[0][1] is not segment or _leaf_of(segment) is None:
                heappop(ranking)
                self._rank_first(segment.class_id)
            elif not self._evict_from(segment, index, num_blocks, offers, chosen):
                self._num_declined += num_blocks - len(chosen)
                break
        self._ranking = self._emptying = None
        self._announce(incoming, offers, len(chosen))
        return chosen

    def _evict_from(
        self, segment: HazardSegment, index: float, num_blocks: int, offers: Sequence[HazardSegment], chosen: list[BlockKey]
    ) -> bool:
        """Evicts blocks of a segment, as many as it has and are asked for. False: what would come is worth less."""
        self._emptying = segment
        put = self._ghosts.put
        offer: HazardSegment | None = None
        for position in range(len(chosen), num_blocks):
            if position < len(offers) and offers[position] is not offer:
                offer = offers[position]
                if index > self._model.index(offer.class_id, 0.0):
                    return False
            leaf = _leaf_of(segment)
            if leaf is None:
                break
            segment.leaves.pop()
            put(leaf.key, segment, had_child=leaf.had_child)
            self._forget(leaf)
            chosen.append(leaf.key)
        return True

    def _rank_first(self, class_id: int) -> None:
        """Ranks the least recently used segment of a class that has a leaf."""
        queue = self._queues[class_id]
        while queue and _leaf_of(queue[0][1]) is None:
            heappop(queue)[1].is_queued = False
        if queue and self._ranking is not None:
            segment_id, segment = queue[0]
            heappush(self._ranking, (self._model.index(class_id, self._now - segment.time_s), segment_id, segment))

    def _add_leaf(self, node: HazardNode) -> None:
        """A block may leave if it is a candidate."""
        segment = node.segment
        if segment is None or node.state != CANDIDATE:
            return
        segment.leaves.append(node)
        if not segment.is_queued:
            segment.is_queued = True
            heappush(self._queues[segment.class_id], (segment.id, segment))

    def _became_leaf(self, node: HazardNode) -> None:
        segment = node.segment
        if segment is not None and segment is self._emptying:
            segment.leaves.append(node)
            return
        self._add_leaf(node)
        if self._ranking is not None and segment is not None:
            self._rank_first(segment.class_id)

    def _removed(self, node: HazardNode) -> None:
        """Nothing to do: leaves are looked at again before they are taken."""

    def _came_back(self, node: HazardNode, now: float) -> None:
        if not node.num_children:
            self._add_leaf(node)

    def _forget(self, node: HazardNode) -> None:
        node.segment = None
        Forest._forget(self, node)

    def remove(self, key: BlockKey) -> None:
        self._settle()
        super().remove(key)

    # ---- learning -----------------------------------------------------------------------------------------------

    def _begin(self, now: float) -> None:
        self._settle()
        self._now = now
        self._log.advance(now, self._model)
        self._model.end_request()

    def _used_again(self, old: HazardSegment, num_blocks: int, before: HazardSegment | None) -> HazardSegment:
        """Blocks of a segment were used. Their new one: that of the blocks before them in the prompt, where it is of the same class."""
        age_s = max(0.0, self._now - old.time_s)
        self._model.reused(old.class_id, age_s, old.weight_of(num_blocks))
        old.num_alive -= num_blocks
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

    def _used_first(self, num_blocks: int, before: HazardSegment | None, *, is_extension: bool, is_root: bool) -> HazardSegment:
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
            segment.class_id = class_of_first_use(num_blocks / self._mean_length, is_branch=not is_root)
        return segment

    def _offered(self, incoming: Sequence[BlockMeta]) -> list[HazardSegment]:
        """The new segments of blocks that were used and are not here, in the order of the prompt."""
        if not incoming:
            return []
        known = [self._recall(block.key) for block in incoming]
        first_parent = incoming[0].parent
        before, had_child = (None, False) if first_parent is None else self._find(first_parent)
        out: list[HazardSegment] = []
        position = 0
        for old, count in runs_of([segment for segment, _ in known]):
            if position:
                had_child = known[position - 1][1]
            if old is not None:
                before = self._used_again(old, count, before)
            else:
                is_root = incoming[position].parent is None
                before = self._used_first(count, before, is_extension=not had_child, is_root=is_root)
            out += [before] * count
            position += count
        self._had_child(first_parent)
        return out

    def _announce(self, incoming: Sequence[BlockMeta], offers: Sequence[HazardSegment], num_admitted: int) -> None:
        """Admitted blocks will be inserted; the others are remembered as ghosts."""
        announced = self._announced
        last = len(incoming) - 1
        for position, (block, segment) in enumerate(zip(incoming, offers, strict=True)):
            if position < num_admitted:
                announced[block.key] = (segment, position < last)
            else:
                self._ghosts.put(block.key, segment, had_child=position < last)
        while len(announced) > MAX_ANNOUNCED:
            del announced[next(iter(announced))]

    def _recall(self, key: BlockKey) -> Known:
        """What is remembered of a block that is not here; then it is forgotten."""
        return (self._announced.pop(key, None) if self._announced else None) or self._ghosts.pop(key)

    def _find(self, key: BlockKey) -> Known:
        """What is known of the block before a new one."""
        node = self._nodes.get(key)
        if node is not None:
            return node.segment, node.had_child
        return self._announced.get(key) or (None, True)

    def _had_child(self, key: BlockKey | None) -> None:
        node = None if key is None else self._nodes.get(key)
        if node is not None:
            node.had_child = True

    def _resize(self, num_blocks: int) -> None:
        self._log.resize(num_blocks)
        self._ghosts.resize(num_blocks)

    # ---- coming -------------------------------------------------------------------------------------------------

    def insert(self, block: BlockMeta, now: float) -> None:
        if self._fresh:
            last = self._fresh[-1][0].parent
            if self._now != now or last is None or last.key != block.key:
                self._settle()
        self._now = now
        super().insert(block, now)

    def _came(self, node: HazardNode, now: float) -> None:
        announced = self._announced.pop(node.key, None) if self._announced else None
        if announced is None:
            known = self._ghosts.pop(node.key)
            node.had_child = known[1] or node.num_children > 0
            self._fresh.append((node, known))
            return
        node.segment = announced[0]
        node.had_child = announced[1] or node.num_children > 0
        if node.parent is not None:
            node.parent.had_child = True
        if not node.num_children:
            self._add_leaf(node)

    def _settle(self) -> None:
        """Blocks that came without an announcement get their segments, now that the block before the first of them is known."""
        if not self._fresh:
            return
        fresh, self._fresh = self._fresh[::-1], []
        parent = fresh[0][0].parent
        before = None if parent is None else parent.segment
        had_child = parent is None or before is None or parent.had_child
        position = 0
        for old, count in runs_of([known[0] for _, known in fresh]):
            if position:
                had_child = fresh[position - 1][1][1]
            if old is not None:
                before = self._used_again(old, count, before)
            else:
                before = self._used_first(count, before, is_extension=not had_child, is_root=position == 0 and parent is None)
            for node, _ in fresh[position : position + count]:
                node.segment = before
            position += count
        if parent is not None:
            parent.had_child = True
        for node, _ in fresh:
            if not node.num_children:
                self._add_leaf(node)


def _leaf_of(segment: HazardSegment) -> HazardNode | None:
    """The block that leaves first of a segment; what has ceased to be a leaf is dropped from its list."""
    leaves = segment.leaves
    while leaves:
        node = leaves[-1]
        if node.segment is segment and not node.num_children and node.state == CANDIDATE:
            return node
        leaves.pop()
    return None
