"""Naive model of ``hazard``: block by block, everything searched for. The statistics proper (``HazardModel``) are tested by themselves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtier.policies.hazard_model import (
    EDGES_S,
    NUM_BINS,
    HazardModel,
    class_of_expectation,
    class_of_extension,
    class_of_first_use,
    class_of_reuse,
)
from kvtier.testing.policy_models import NaivePolicy, parent_of


@dataclass(eq=False)
class NaiveSegment:
    """Blocks that were used together."""

    number: int
    time_s: float
    class_id: int = 0
    num_uses: int = 1
    num_turns: int = 1
    gap_s: float = -1.0
    num_blocks: int = 0
    num_alive: int = 0
    leaves: list[int] = field(default_factory=list)
    origin: NaiveSegment | None = None
    passed: set[int] = field(default_factory=set)
    """bins that it has left"""

    def weight(self, count: int) -> float:
        """Blocks by the root of how many there are."""
        return count / math.sqrt(self.num_blocks)


@dataclass(eq=False)
class Piece:
    """Blocks that are not here."""

    blocks: list[int]
    segment: NaiveSegment
    had_child: bool


class NaiveHazard(NaivePolicy):
    """A block knows its segment (``segments``), whether it ever had a child, and who left behind it last."""

    def __init__(self) -> None:
        super().__init__()
        self.model = HazardModel()
        self.all_segments: list[NaiveSegment] = []
        self.segments: dict[int, NaiveSegment] = {}
        self.had_child: set[int] = set()
        self.following: dict[int, int] = {}
        self.pieces: list[Piece] = []
        self.announced: dict[int, tuple[NaiveSegment, bool]] = {}
        self.fresh: list[int] = []
        self.mean_length = 0.0
        self.num_prompts = 0

    # ---- the protocol -------------------------------------------------------------------------------------------

    def insert(self, block: int, now: float) -> None:
        if self.fresh and (parent_of(self.fresh[-1]) != block or self.now != now):
            self.settle()
        self.now = now
        self.fresh.append(block)

    def put_back(self, blocks: Sequence[int], now: float) -> None:
        self.settle()
        self.now = now
        rest = list(blocks)
        for segment, count, had_child in self.recalled(list(blocks)):
            part, rest = rest[:count], rest[count:]
            if segment is None:
                super().put_back(part, now)
                self.settle()
            else:
                for place, block in enumerate(part, start=1):
                    self.come(block, segment, place < count or had_child)

    def touch(self, blocks: Sequence[int], now: float) -> None:
        self.begin(now, len(set(blocks)))
        path = [block for block in list(dict.fromkeys(blocks))[::-1] if block in self.home]
        groups: list[list[int]] = []
        for block in path:
            if groups and self.segments[groups[-1][0]] is self.segments[block]:
                groups[-1].append(block)
            else:
                groups.append([block])
        before: NaiveSegment | None = None
        for old, group in [(self.segments[group[0]], group) for group in groups]:
            before = self.used_again(old, len(group), before)
            for block in group:
                self.unlist(block)
                self.segments[block] = before
                self.list_leaf(block)

    def expect(self, blocks: Sequence[int], seconds: float, now: float) -> None:
        self.settle()
        self.now = now
        path = [block for block in list(dict.fromkeys(blocks))[::-1] if block in self.home]
        if not path:
            return
        class_id, tip = class_of_expectation(seconds), self.segments[path[-1]]
        groups: list[tuple[NaiveSegment, list[int]]] = []
        for block in path:
            if groups and groups[-1][0] is self.segments[block]:
                groups[-1][1].append(block)
            else:
                groups.append((self.segments[block], [block]))
        for old, group in groups:
            if old.time_s > tip.time_s or (old is not tip and self.index(old) >= self.model.index(class_id, 0.0)):
                continue
            segment = self.new_segment()
            segment.class_id, segment.origin = class_id, old.origin or old
            segment.num_uses, segment.num_turns, segment.gap_s = old.num_uses, old.num_turns, old.gap_s
            segment.num_blocks = segment.num_alive = len(group)
            if old.origin is not None:
                old.num_blocks, old.num_alive = old.num_blocks - len(group), old.num_alive - len(group)
            for block in group:
                self.unlist(block)
                self.segments[block] = segment
                self.list_leaf(block)

    def expired(self, now: float) -> list[int]:
        self.begin(now, 0)
        gone: list[int] = []
        while over := [each for each in self.all_segments if each.leaves and now - each.time_s > self.model.ttl_s(each.class_id)]:
            gone.append(min(over, key=lambda each: (each.class_id, each.number)).leaves[-1])
            self.evict(gone[-1])
        return gone

    def remove(self, block: int) -> None:
        self.settle()
        if block in self.home:
            self.following.pop(parent_of(block) or -1, None)
            self.leave(block)

    def pin(self, block: int) -> None:
        self.settle()
        self.unlist(block)
        self.pinned.add(block)

    def unpin(self, block: int, now: float) -> None:
        self.settle()
        if block in self.pinned:
            self.pinned.discard(block)
            self.list_leaf(block)

    def victims(self, count: int, now: float = 0.0, incoming: Sequence[int] = ()) -> list[int]:
        self.begin(now, count)
        offers = self.offered(incoming)
        chosen: list[int] = []
        while len(chosen) < count and (segment := self.worst()) is not None:
            offer = offers[len(chosen)][0] if len(chosen) < len(offers) else None
            if offer is not None and self.index(segment) > self.model.index(offer.class_id, 0.0):
                break
            chosen.append(segment.leaves[-1])
            self.evict(chosen[-1])
        for position, (block, (segment, had_before)) in enumerate(zip(incoming, offers, strict=True)):
            had_child = had_before or position < len(incoming) - 1
            if position < len(chosen):
                self.announced[block] = (segment, had_child)
            elif position > len(chosen) and self.pieces[-1].segment is segment:
                last = self.pieces[-1]
                self.forget_piece(block)
                last.blocks.append(block)
                last.had_child = had_child
            else:
                self.remember(Piece([block], segment, had_child))
        return chosen

    def state(self) -> dict[str, object]:
        """All that decides what leaves next."""
        every = self.all_segments
        return {
            "segments": {
                each.number: (each.time_s, each.class_id, each.num_uses, each.num_turns, each.gap_s, each.num_blocks, each.num_alive)
                for each in every
            },
            "leaves": {each.number: each.leaves for each in every},
            "blocks": {block: (segment.number, block in self.had_child) for block, segment in self.segments.items()},
            "pieces": {piece.blocks[0]: (piece.blocks, piece.segment.number, piece.had_child) for piece in self.pieces},
            "announced": {block: (segment.number, had_child) for block, (segment, had_child) in self.announced.items()},
            "fresh": self.fresh,
            "learned": {class_id: (seen.hits, seen.risk) for class_id, seen in self.model._seen.items()},
            "table": self.model._table,
        }

    # ---- leaving ------------------------------------------------------------------------------------------------

    def index(self, segment: NaiveSegment) -> float:
        """What its place yields now."""
        return self.model.index(segment.class_id, self.now - segment.time_s)

    def worst(self) -> NaiveSegment | None:
        """Of the least recently used segments of each class the one with the smallest index."""
        first: dict[int, NaiveSegment] = {}
        for segment in self.all_segments:
            if segment.leaves:
                first.setdefault(segment.class_id, segment)
        return min(first.values(), key=lambda segment: (self.index(segment), segment.number), default=None)

    def evict(self, block: int) -> None:
        """Out, and remembered, as one piece with what left behind it."""
        segment, had_child = self.segments[block], block in self.had_child
        blocks = [block]
        behind = self.piece_from(self.following.get(block))
        if behind is not None and behind.segment is segment:
            self.pieces.remove(behind)
            blocks, had_child = blocks + behind.blocks, behind.had_child
        self.remember(Piece(blocks, segment, had_child))
        parent = parent_of(block)
        if parent is not None and parent in self.home:
            self.following[parent] = block
        self.leave(block)

    def remember(self, piece: Piece) -> None:
        """A piece takes the place of one that begins with the same block, of which no use will be seen any more."""
        self.forget_piece(piece.blocks[0])
        self.pieces.append(piece)

    def forget_piece(self, block: int) -> None:
        """The piece that begins with a block, if there is one."""
        old = self.piece_from(block)
        if old is not None:
            self.pieces.remove(old)
            for segment in (old.segment, old.segment.origin):
                if segment is not None:
                    segment.num_blocks -= len(old.blocks)
                    segment.num_alive -= len(old.blocks)

    def leave(self, block: int) -> None:
        """No longer here; its parent may be a leaf."""
        self.unlist(block)
        del self.home[block], self.segments[block]
        for about in (self.pinned, self.had_child):
            about.discard(block)
        self.following.pop(block, None)
        parent = parent_of(block)
        if parent is not None:
            self.list_leaf(parent)

    def list_leaf(self, block: int) -> None:
        """A block that may leave now, unless it is one already."""
        if block in self.home and block not in self.pinned and not self.has_child(block):
            leaves = self.segments[block].leaves
            if block not in leaves:
                leaves.append(block)

    def unlist(self, block: int) -> None:
        """A block that may not leave now."""
        if block in self.home and block in self.segments[block].leaves:
            self.segments[block].leaves.remove(block)

    # ---- learning -----------------------------------------------------------------------------------------------

    def begin(self, now: float, num_blocks: int) -> None:
        """As every use and every eviction begins."""
        self.settle()
        self.now = now
        for position in range(NUM_BINS):
            for segment in self.all_segments:
                if position not in segment.passed and segment.time_s + EDGES_S[position + 1] <= now:
                    segment.passed.add(position)
                    if segment.num_alive > 0:
                        self.model.survived(segment.class_id, position, segment.weight(segment.num_alive))
        self.model.asked_for(num_blocks)

    def new_segment(self) -> NaiveSegment:
        """One whose use is now."""
        self.all_segments.append(NaiveSegment(len(self.all_segments) + 1, self.now))
        return self.all_segments[-1]

    def used_again(self, old: NaiveSegment, count: int, before: NaiveSegment | None) -> NaiveSegment:
        """Known blocks were used."""
        age_s = max(0.0, self.now - old.time_s)
        self.model.reused(old.class_id, age_s, old.weight(count))
        old.num_alive -= count
        if old.origin is not None:
            age_s = max(0.0, self.now - old.origin.time_s)
            self.model.reused(old.origin.class_id, age_s, old.origin.weight(count))
            old.origin.num_alive -= count
        gap_s = age_s if old.gap_s < 0 else math.sqrt(max(age_s, 1e-3) * max(old.gap_s, 1e-3))
        class_id = class_of_reuse(old.num_uses + 1, gap_s)
        if before is None or before.class_id != class_id or before.time_s != self.now:
            before = self.new_segment()
            before.class_id, before.gap_s, before.num_uses = class_id, gap_s, old.num_uses + 1
        before.num_uses = min(before.num_uses, old.num_uses + 1)
        before.num_turns = old.num_turns + 1
        before.num_blocks += count
        before.num_alive += count
        return before

    def used_first(self, count: int, before: NaiveSegment | None, had_child: bool, is_root: bool) -> NaiveSegment:
        """Unknown blocks were used."""
        if before is None or before.num_uses > 1 or is_root:
            self.num_prompts = min(1000, self.num_prompts + 1)
            self.mean_length += (count - self.mean_length) / self.num_prompts
            segment = self.new_segment()
            if before is not None and not had_child:
                segment.num_turns, segment.gap_s = before.num_turns + 1, max(0.0, before.gap_s)
                segment.class_id = class_of_extension(segment.num_turns, segment.gap_s)
            else:
                uses_before = before.num_uses if before is not None else 1
                segment.class_id = class_of_first_use(count / self.mean_length, 0 if is_root else uses_before)
            before = segment
        before.num_blocks += count
        before.num_alive += count
        return before

    def used_now(self, blocks: Sequence[int], parent: int | None) -> list[tuple[NaiveSegment, bool]]:
        """Segment and whether it had a child, of each block that is used and not here."""
        before: NaiveSegment | None = None
        had_child = True
        if parent in self.home:
            before, had_child = self.segments[parent], parent in self.had_child
            self.had_child.add(parent)
        elif parent in self.announced:
            before, had_child = self.announced[parent]
        is_root = parent is None
        out: list[tuple[NaiveSegment, bool]] = []
        for old, count, ends_with_child in self.recalled(list(blocks)):
            before = self.used_first(count, before, had_child, is_root) if old is None else self.used_again(old, count, before)
            had_child, is_root = ends_with_child, False
            out += [(before, True)] * (count - 1) + [(before, had_child)]
        return out

    def recalled(self, blocks: list[int]) -> list[tuple[NaiveSegment | None, int, bool]]:
        """What is remembered of blocks: (segment, how many, whether the last had a child), equal neighbours together."""
        out: list[tuple[NaiveSegment | None, int, bool]] = []
        while blocks:
            piece = self.piece_from(blocks[0])
            if piece is None:
                segment, count, had_child = None, 1, False
            else:
                self.pieces.remove(piece)
                count = next(
                    (n for n, pair in enumerate(zip(piece.blocks, blocks, strict=False)) if pair[0] != pair[1]),
                    min(len(piece.blocks), len(blocks)),
                )
                segment, had_child = piece.segment, piece.had_child or count < len(piece.blocks)
                if count < len(piece.blocks):
                    self.remember(Piece(piece.blocks[count:], piece.segment, piece.had_child))
            blocks = blocks[count:]
            if out and out[-1][0] is segment:
                count += out.pop()[1]
            out.append((segment, count, had_child))
        return out

    def piece_from(self, block: int | None) -> Piece | None:
        """The piece that begins with a block."""
        return next((piece for piece in self.pieces if piece.blocks[0] == block), None)

    def offered(self, incoming: Sequence[int]) -> list[tuple[NaiveSegment, bool]]:
        """Segments of what wants to come."""
        for block in incoming:
            self.announced.pop(block, None)
        return self.used_now(incoming, parent_of(incoming[0])) if incoming else []

    # ---- coming -------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """What came gets its segments and its place."""
        blocks, self.fresh = self.fresh[::-1], []
        known = [self.announced.pop(block, None) for block in blocks]
        while blocks:
            count = next((n for n, what in enumerate(known) if what != known[0]), len(known))
            first = known[0]
            parts = self.used_now(blocks[:count], parent_of(blocks[0])) if first is None else [first] * count
            for block, (segment, had_child) in zip(blocks[:count], parts, strict=True):
                self.come(block, segment, had_child)
            blocks, known = blocks[count:], known[count:]

    def come(self, block: int, segment: NaiveSegment, had_child: bool) -> None:
        """Here, a leaf unless it has children."""
        self.home[block], self.segments[block] = 0, segment
        if had_child or self.has_child(block):
            self.had_child.add(block)
        parent = parent_of(block)
        if parent is not None and parent in self.home:
            self.unlist(parent)
            self.had_child.add(parent)
            self.following.pop(parent, None)
        self.list_leaf(block)
