"""A forest of blocks in runs: blocks behind one another of which only the last may have several children, or none.

The forest of :mod:`~kvtier.policies.forest` has a node for each block. Where a policy treats whole stretches of a prompt alike, it is
enough to keep stretches: coming, using and leaving then cost a few steps a stretch, and eight bytes and a place in a table a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvtier.policies.segments import Segment
from kvtier.types import BlockKey


class Run:
    """Blocks in a row, all of one segment. What is said of the run's end is said of its last block."""

    __slots__ = ("children", "following", "had_child", "is_listed", "is_pinned", "keys", "parent", "parent_key", "segment")

    def __init__(self, keys: list[BlockKey], parent_key: BlockKey | None, segment: Segment[Run], had_child: bool) -> None:
        self.keys = keys
        """in the order of the prompt; the run's own list"""
        self.parent: Run | None = None
        """the run whose last block is before the first one; None: it is not here, or there is none"""
        self.parent_key = parent_key
        self.children: dict[Run, None] = {}
        self.segment = segment
        self.had_child = had_child
        """some prompt went on behind its end, so that another one branches off"""
        self.is_pinned = False
        """its end is"""
        self.is_listed = False
        """whether it is among its segment's leaves: it ends in no other run and is not pinned"""
        self.following: BlockKey | None = None
        """the block behind its end that was evicted last, while nothing has come there since"""


class RunForest:
    """The runs. Pure. ``listed`` is told of segments that have got a leaf."""

    __slots__ = ("_listed", "_orphans", "runs")

    def __init__(self, listed: Callable[[Segment[Run]], None]) -> None:
        self.runs: dict[BlockKey, Run] = {}
        """each block's run"""
        self._orphans: dict[BlockKey, dict[Run, None]] = {}
        """block that is not here -> the runs behind it"""
        self._listed = listed

    def add(self, keys: list[BlockKey], parent_key: BlockKey | None, segment: Segment[Run], *, had_child: bool) -> None:
        """New blocks in a row, at least one, behind ``parent_key``, which need not be here. ``had_child``: as :attr:`Run.had_child`."""
        parent = None if parent_key is None else self.ending_with(parent_key)
        if parent is not None and parent.segment is segment and not parent.children and not parent.is_pinned:
            self._unlist(parent)
            parent.keys += keys
            parent.had_child, parent.following = had_child, None
            run = parent
        else:
            run = Run(keys, parent_key, segment, had_child)
            if parent is not None:
                self._unlist(parent)
                run.parent = parent
                parent.children[run] = None
                parent.had_child, parent.following = True, None
            elif parent_key is not None:
                self._orphans.setdefault(parent_key, {})[run] = None
        self.runs.update(dict.fromkeys(keys, run))
        last = keys[-1]
        if self._orphans:
            for key in [key for key in keys if key in self._orphans]:
                self._adopt(key)
        self._list(self.runs[last])

    def ending_with(self, key: BlockKey) -> Run | None:
        """The run whose last block is this one, cut there if need be. None: it is not here."""
        run = self.runs.get(key)
        if run is not None and run.keys[-1] != key:
            self._split(run, run.keys.index(key) + 1)
        return run

    def along(self, path: Sequence[BlockKey]) -> list[Run]:
        """The blocks of a path that are here as runs, cut where the path does not have all of a run."""
        found: list[Run] = []
        runs = self.runs
        position = 0
        while position < len(path):
            run = runs.get(path[position])
            if run is None:
                position += 1
                continue
            if run.keys[0] != path[position]:
                run = self._split(run, run.keys.index(path[position]))
            asked = path[position : position + len(run.keys)]
            if run.keys != asked:
                is_same = [mine == other for mine, other in zip(run.keys, asked, strict=False)]
                self._split(run, is_same.index(False) if False in is_same else len(asked))
            found.append(run)
            position += len(run.keys)
        return found

    def give(self, run: Run, segment: Segment[Run]) -> None:
        """Puts a run into another segment."""
        self._unlist(run)
        run.segment = segment
        self._list(run)

    def join(self, run: Run) -> Run:
        """Makes one run of this one and the one before it, where they belong together. Returns it."""
        before = run.parent
        if before is None or before.segment is not run.segment or len(before.children) > 1 or before.is_pinned:
            return run
        self.runs.update(dict.fromkeys(run.keys, before))
        before.keys += run.keys
        self._pass_on(run, before)
        return before

    def cut(self, run: Run, count: int) -> list[BlockKey]:
        """Takes blocks from the end of a leaf, in the order of the prompt. One that has none left is gone, and what was before it may be a
        leaf."""
        gone = run.keys[-count:]
        del run.keys[-count:]
        for key in gone:
            del self.runs[key]
        if run.keys:
            run.had_child, run.following = True, gone[0]
        else:
            self._unlist(run)
            self._detach(run, gone[0])
        return gone

    def remove(self, key: BlockKey) -> None:
        """Takes out any block; an absent one is fine. What is behind it stays."""
        run = self.ending_with(key)
        if run is None:
            return
        if len(run.keys) > 1:
            run = self._split(run, len(run.keys) - 1)
        self._unlist(run)
        del self.runs[key]
        for child in run.children:
            child.parent = None
        if run.children:
            self._orphans[key] = run.children
        self._detach(run, None)

    def pin(self, key: BlockKey) -> None:
        """Its run is no leaf, and nothing before it is; an absent block is fine."""
        run = self.ending_with(key)
        if run is not None:
            self._unlist(run)
            run.is_pinned = True

    def unpin(self, key: BlockKey) -> None:
        """It may be a leaf again; a block that is absent or not pinned is fine."""
        run = self.runs.get(key)
        if run is None or not run.is_pinned or run.keys[-1] != key:
            return
        run.is_pinned = False
        self._list(run)
        if len(run.children) == 1:
            self.join(next(iter(run.children)))

    # ---- inside -------------------------------------------------------------------------------------------------

    def _split(self, run: Run, position: int) -> Run:
        """Cuts a run in two. Returns the second part; the first keeps its identity."""
        tail = Run(run.keys[position:], run.keys[position - 1], run.segment, run.had_child)
        del run.keys[position:]
        self.runs.update(dict.fromkeys(tail.keys, tail))
        self._pass_on(run, tail)
        tail.parent = run
        run.children = {tail: None}
        run.had_child, run.following, run.is_pinned = True, None, False
        return tail

    def _pass_on(self, run: Run, other: Run) -> None:
        """What is said of a run's end holds for another one now."""
        other.children = run.children
        for child in other.children:
            child.parent = other
        other.had_child, other.following, other.is_pinned = run.had_child, run.following, run.is_pinned
        if run.is_listed:
            leaves = run.segment.leaves
            leaves[leaves.index(run)] = other
            run.is_listed, other.is_listed = False, True

    def _adopt(self, key: BlockKey) -> None:
        """A block has come that others were waiting for."""
        run = self.ending_with(key)
        assert run is not None, "it has just come"
        self._unlist(run)
        for child in self._orphans.pop(key):
            child.parent = run
            run.children[child] = None
        run.had_child, run.following = True, None

    def _detach(self, run: Run, first: BlockKey | None) -> None:
        """A run is gone. ``first``: its first block, where it was evicted."""
        parent = run.parent
        if parent is not None:
            del parent.children[run]
            parent.following = first
            self._list(parent)
        elif run.parent_key is not None:
            waiting = self._orphans[run.parent_key]
            del waiting[run]
            if not waiting:
                del self._orphans[run.parent_key]

    def _list(self, run: Run) -> None:
        if not run.children and not run.is_pinned and not run.is_listed:
            run.is_listed = True
            run.segment.leaves.append(run)
            self._listed(run.segment)

    def _unlist(self, run: Run) -> None:
        if run.is_listed:
            run.is_listed = False
            run.segment.leaves.remove(run)
