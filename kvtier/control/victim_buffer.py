"""The victim buffer: what host memory's policy has let go, still readable, until it is written down or its room is needed.

A policy chooses what is worth least, and that is often what has just come and was not written yet. So between the policy and the room it
makes there is a bounded queue: what the policy lets go is written before all else, and its room is given away when that is done. While
the first ones wait, the policy is asked for others. Only where the queue is full of what was not written, its oldest blocks are lost.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from typing import NamedTuple, Protocol

from kvtier.control.index import Entry
from kvtier.policies.base import EvictionPolicy
from kvtier.types import BlockKey, BlockMeta

VICTIM_SHARE = 0.125
"""of host memory's blocks, so many may wait to be written after they were let go"""

_MAX_STALE = 1000
"""entries of the ranking that are out of date, beside as many as are not, until it is made anew"""


class WriteState(enum.Enum):
    """What stands between a block and its room."""

    NOTHING = "nothing"
    """no tier wants it, or those that do have it"""
    WAITING = "waiting"
    """it is to be written"""
    WRITING = "writing"
    """a write reads its slot"""


class Writes(Protocol):
    """What the buffer must know of the tiers below."""

    def state_of(self, entry: Entry) -> WriteState:
        """What a block is waiting for."""

    def hurry(self, entries: Sequence[Entry], now: float) -> None:
        """Blocks have been let go: they are to be written before others, in the given order."""


class LetGo(NamedTuple):
    """A block that the policy has let go."""

    entry: Entry
    number: int
    """a later one has a higher number"""
    worth: float | None
    """what the first of the order was worth then (:meth:`EvictionPolicy.index_of`)"""


class VictimBuffer:
    """An order of eviction of which the first blocks have been let go already. Implements :class:`~kvtier.policies.base.EvictionPolicy`.

    What is used, pinned or expected again goes back into the policy's order; blocks leave only when those behind them have left.
    ``entry_of`` knows each block as long as it is here. ``share``: of the blocks, so many may have been let go. Pure.
    """

    __slots__ = (
        "_children",
        "_clean",
        "_entry_of",
        "_gone",
        "_now",
        "_num_let_go",
        "_order",
        "_ranking",
        "_share",
        "_waiting",
        "_writes",
        "_writing",
    )

    def __init__(self, order: EvictionPolicy, writes: Writes, entry_of: Callable[[BlockKey], Entry], share: float) -> None:
        self._order = order
        self._writes = writes
        self._entry_of = entry_of
        self._share = share
        self._gone: dict[BlockKey, LetGo] = {}
        """in this order"""
        self._waiting: dict[BlockKey, None] = {}
        """those of them that are to be written"""
        self._writing: dict[BlockKey, None] = {}
        """those of them that are being written"""
        self._clean: dict[BlockKey, int] = {}
        """those of them whose room can be had, behind which nothing is -> when they were let go"""
        self._ranking: list[tuple[int, BlockKey]] = []
        """those, a heap by when they were let go; some may be out of date"""
        self._num_let_go = 0
        self._children: dict[BlockKey, int] = {}
        """block -> how many of those behind it have been let go"""
        self._now = 0.0
        """when blocks were let go last"""

    # ---- the protocol -------------------------------------------------------------------------------------------

    @property
    def num_declined(self) -> int:
        return self._order.num_declined

    def insert(self, block: BlockMeta, now: float) -> None:
        if block.parent is not None and block.parent in self._gone:
            self._put_back_path(block.parent, now)
        self._order.insert(block, now)

    def put_back(self, blocks: Sequence[BlockMeta], now: float) -> None:
        parent = blocks[0].parent
        if parent is not None and parent in self._gone:
            self._put_back_path(parent, now)
        self._order.put_back(blocks, now)

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        keys = list(keys)
        self._put_back_those(keys, now)
        self._order.touch(keys, now)

    def expect(self, keys: Sequence[BlockKey], seconds: float, now: float) -> None:
        self._put_back_those(keys, now)
        self._order.expect(keys, seconds, now)

    def index_of(self, key: BlockKey | None, now: float) -> float | None:
        """Blocks that have been let go are worth what the first of the order was worth then."""
        if key is not None and key in self._gone:
            return self._gone[key].worth
        return self._order.index_of(key, now)

    def expired(self, now: float) -> list[BlockKey]:
        """Of those in the policy's order, and what was let go behind them, being written or not. The rest leaves without that."""
        over = self._order.expired(now)
        ends = set(over)
        behind: list[BlockKey] = []
        for key in reversed(list(self._gone)) if over else ():
            if self._gone[key].entry.parent in ends:
                ends.add(key)
                behind.append(key)
        for key in reversed(behind):
            self._take(key)
        return behind[::-1] + over

    def remove(self, key: BlockKey) -> None:
        if key in self._gone:
            self._take(key)
        else:
            self._order.remove(key)

    def pin(self, key: BlockKey) -> None:
        """A pinned block is not one of those let go, and neither is what is before it."""
        if key in self._gone:
            self._put_back_path(key, self._now)
        self._order.pin(key)

    def unpin(self, key: BlockKey, now: float) -> None:
        self._order.unpin(key, now)

    def victims(self, num_blocks: int, now: float, incoming: Sequence[BlockMeta] = ()) -> list[BlockKey]:
        """As the protocol has it, but fewer blocks also where all that could leave is being written. Where there is a buffer nothing that
        comes is turned away: ``incoming`` is not looked at."""
        chosen: list[BlockKey] = []
        while len(chosen) < num_blocks:
            key = self._first_clean()
            if key is None and self._let_go(min(num_blocks - len(chosen), self._room()), now):
                continue
            if key is None:
                # full: what was let go first is worth least
                key = next((key for key in self._waiting if key not in self._children), None)
            if key is None:
                break
            self._take(key)
            chosen.append(key)
        return chosen

    def __len__(self) -> int:
        return len(self._order) + len(self._gone)

    def __contains__(self, key: object) -> bool:
        return key in self._gone or key in self._order

    # ---- what the tiers below do --------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Blocks that have been let go and whose write has not begun."""
        return len(self._waiting)

    @property
    def num_writing(self) -> int:
        """Blocks that have been let go and are being written."""
        return len(self._writing)

    def fill(self, num_free: int, now: float) -> None:
        """Lets blocks go ahead of time: so many that, with ``num_free`` blocks' room that nobody has, half of the share is used."""
        self._let_go(self._bound() // 2 - num_free - len(self._gone), now)

    def written(self, entry: Entry) -> None:
        """A write of a block has begun or ended, well or not, or will not be. One that was not let go is fine."""
        if entry.key in self._gone:
            self._unsort(entry.key)
            self._sort(entry)

    def drain(self, now: float) -> Iterator[BlockKey]:
        """All blocks that are not pinned, in the order in which they would leave. Ends the buffer."""
        yield from list(self._gone)
        for key in list(self._gone):
            self._take(key)
        yield from self._order.victims(len(self._order), now)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _room(self) -> int:
        """How many more may be let go. What is being written is bounded by the tiers below."""
        return self._bound() - len(self._waiting)

    def _bound(self) -> int:
        return max(1, int(len(self) * self._share))

    def _let_go(self, num_blocks: int, now: float) -> int:
        """Takes the policy's next victims. Returns how many there were."""
        if num_blocks <= 0:
            return 0
        self._now = now
        worth = self._order.index_of(None, now)
        entries = [self._entry_of(key) for key in self._order.victims(num_blocks, now)]
        children = self._children
        for entry in entries:
            self._num_let_go += 1
            self._gone[entry.key] = LetGo(entry, self._num_let_go, worth)
            if entry.parent is not None:
                children[entry.parent] = children.get(entry.parent, 0) + 1
            self._sort(entry)
        # a prompt's beginning is of use without its end
        self._writes.hurry(entries[::-1], now)
        return len(entries)

    def _sort(self, entry: Entry) -> None:
        state = self._writes.state_of(entry)
        if state is WriteState.WAITING:
            self._waiting[entry.key] = None
        elif state is WriteState.WRITING:
            self._writing[entry.key] = None
        elif entry.key not in self._children:
            number = self._clean[entry.key] = self._gone[entry.key].number
            heappush(self._ranking, (number, entry.key))
            if len(self._ranking) > 2 * len(self._clean) + _MAX_STALE:
                self._ranking = sorted((number, key) for key, number in self._clean.items())

    def _first_clean(self) -> BlockKey | None:
        while self._ranking:
            number, key = self._ranking[0]
            if self._clean.get(key) == number:
                return key
            heappop(self._ranking)
        return None

    def _unsort(self, key: BlockKey) -> None:
        self._waiting.pop(key, None)
        self._writing.pop(key, None)
        self._clean.pop(key, None)

    def _take(self, key: BlockKey) -> Entry:
        """A block is one of those let go no longer."""
        entry = self._gone.pop(key).entry
        self._unsort(key)
        parent = entry.parent
        if parent is not None:
            left = self._children[parent] - 1
            if left:
                self._children[parent] = left
            else:
                del self._children[parent]
                if parent in self._gone:
                    self._sort(self._gone[parent].entry)
        return entry

    def _put_back_those(self, keys: Sequence[BlockKey], now: float) -> None:
        """Those of a prompt's blocks, its tail first, that have been let go, and what is before them."""
        if self._gone:
            for key in keys:
                if key in self._gone:
                    self._put_back_path(key, now)

    def _put_back_path(self, key: BlockKey | None, now: float) -> None:
        path: list[BlockMeta] = []
        while key is not None and key in self._gone:
            entry = self._take(key)
            path.append(entry.meta)
            key = entry.parent
        self._order.put_back(path[::-1], now)
