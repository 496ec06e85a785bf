"""The contract of an eviction policy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from kvtier.types import BlockKey, BlockMeta


class EvictionPolicy(Protocol):
    """Orders the blocks of one tier for eviction. Pure: no clock, no thread, no I/O.

    Blocks form a forest by their ``parent``. Victims are always leaves at the moment they are taken: a block
    with a child in the same tier is never given before that child, so no child is ever stranded.
    Callers touch and insert the tail of a prompt first, so that among blocks of one request the tail leaves first.
    ``now`` is in seconds and never goes backwards.
    """

    def insert(self, block: BlockMeta, now: float) -> None:
        """Takes a block in as just used. The key must not be present. The parent may be absent or come later."""

    def put_back(self, blocks: Sequence[BlockMeta], now: float) -> None:
        """Takes in blocks in a row, at least one, in the order of their prompt, that come without being used: if they are, ``touch``
        follows. A policy that remembers them has them as they were when they left; others as just used. Else as ``insert``."""

    def touch(self, keys: Iterable[BlockKey], now: float) -> None:
        """Marks blocks as used, in the given order. Absent keys are fine, and pinned blocks stay pinned."""

    def expect(self, keys: Sequence[BlockKey], seconds: float, now: float) -> None:
        """Somebody says that these blocks, of one prompt and its tail first, will be used in so many seconds. Most policies do not listen;
        one that does finds out how much the word is worth. Absent keys are fine."""

    def remove(self, key: BlockKey) -> None:
        """Forgets a block, pinned or not; an absent key is fine."""

    def pin(self, key: BlockKey) -> None:
        """Takes a present block out of the candidates until ``unpin``. Not counted: the planner counts."""

    def unpin(self, key: BlockKey, now: float) -> None:
        """Makes a pinned block a candidate again, where recency decides as just used. An absent or unpinned key is fine."""

    def victims(self, num_blocks: int, now: float, incoming: Sequence[BlockMeta] = ()) -> list[BlockKey]:
        """Chooses and forgets up to ``num_blocks`` blocks, the first to leave first, each a leaf when taken.

        ``incoming`` are the blocks that want the room, in the order of their prompt: the i-th victim makes room for the i-th of
        them. A policy with admission stops where what would leave is worth more than what comes, and may learn from ``incoming``,
        which are uses of blocks that were not here. Without ``incoming``, fewer are returned only where no more candidates exist.
        O(1) amortised per block.
        """

    def index_of(self, key: BlockKey | None, now: float) -> float | None:
        """What the place of a block yields, in uses per second; of the one that would leave first where ``key`` is None. None: it is not
        known, as by most policies, or there is no such block."""

    def expired(self, now: float) -> list[BlockKey]:
        """Chooses and forgets the blocks that are hardly ever used any more at their age, each a leaf when taken. Most know none."""

    @property
    def num_declined(self) -> int:
        """How many ``incoming`` blocks it has turned away so far, because what would have left is worth more. 0 without admission."""

    def __len__(self) -> int:
        """Number of blocks known, pinned ones included."""

    def __contains__(self, key: object) -> bool:
        """Whether the key is known."""
