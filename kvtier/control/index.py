"""The index: which block is where. One entry a block, whatever number of tiers hold it.

``readable`` and ``busy`` are bit masks over tiers; bit 0 is host memory, bit ``i`` the i-th tier below it.  ``readable``: the bytes are
there. ``busy``: a copy into that tier is under way (host: from the engine or from a lower tier).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from kvtier.types import BlockKey, BlockMeta, PrefixMatch

HOST = 1
"""bit of host memory in ``readable`` and ``busy``"""


class Entry:
    """All the control plane knows of one block."""

    __slots__ = ("busy", "key", "num_bytes", "num_children", "parent", "readable", "slot", "tenant")

    def __init__(self, key: BlockKey, parent: BlockKey | None, num_bytes: int, tenant: str) -> None:
        self.key = key
        self.parent = parent
        self.num_bytes = num_bytes
        self.readable = 0
        self.busy = 0
        self.slot = -1
        self.tenant = tenant
        """whose block it is; empty: nobody's in particular"""
        self.num_children = 0
        """known blocks that continue it, in whichever tier"""

    @property
    def meta(self) -> BlockMeta:
        """The block as tiers and policies know it."""
        return BlockMeta(self.key, self.parent, self.num_bytes)


class Index:
    """Keys -> entries. An entry exists while some tier holds the block or a copy of it is under way."""

    __slots__ = ("_entries", "_orphans", "get")

    def __init__(self) -> None:
        self._entries: dict[BlockKey, Entry] = {}
        self._orphans: dict[BlockKey, int] = {}
        """unknown block -> known blocks that continue it"""
        self.get = self._entries.get

    def ensure(self, key: BlockKey, parent: BlockKey | None, num_bytes: int, tenant: str = "") -> Entry:
        """The entry of a key, made where there is none."""
        entry = self.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(key, parent, num_bytes, tenant)
            if self._orphans:
                entry.num_children = self._orphans.pop(key, 0)
            self._count_child(parent, 1)
        return entry

    def drop_if_gone(self, entry: Entry) -> None:
        """Forgets an entry that is nowhere and on its way nowhere."""
        if not entry.readable and not entry.busy:
            del self._entries[entry.key]
            if entry.num_children:
                self._orphans[entry.key] = entry.num_children
            self._count_child(entry.parent, -1)

    def match(self, keys: Iterable[BlockKey], visible: int) -> PrefixMatch:
        """The leading run held by the ``visible`` tiers. Stops at the first miss, so ``keys`` may be lazy."""
        get = self._entries.get
        ready = 0
        remaining = iter(keys)
        for key in remaining:
            entry = get(key)
            if entry is None or not entry.readable & HOST:
                break
            ready += 1
        else:
            return PrefixMatch(ready, ready, False)
        hits = ready
        pending = False
        while entry is not None and entry.readable & visible:
            pending = pending or (not entry.readable & HOST and bool(entry.busy & HOST))
            hits += 1
            following = next(remaining, None)
            entry = None if following is None else get(following)
        return PrefixMatch(hits, ready, pending)

    def run(self, keys: Sequence[BlockKey], start: int, mask: int) -> list[Entry]:
        """The leading run of ``keys[start:]`` whose blocks are readable in one of the tiers in ``mask``."""
        get = self._entries.get
        out: list[Entry] = []
        for position in range(start, len(keys)):
            entry = get(keys[position])
            if entry is None or not entry.readable & mask:
                break
            out.append(entry)
        return out

    def prefixes_of(self, tips: Iterable[BlockKey]) -> set[BlockKey]:
        """The blocks and everything before them."""
        found: set[BlockKey] = set()
        for tip in tips:
            key: BlockKey | None = tip
            while key is not None and key not in found:
                found.add(key)
                entry = self._entries.get(key)
                key = None if entry is None else entry.parent
        return found

    def _count_child(self, parent: BlockKey | None, change: int) -> None:
        if parent is None:
            return
        entry = self.get(parent)
        if entry is not None:
            entry.num_children += change
            return
        count = self._orphans.get(parent, 0) + change
        if count:
            self._orphans[parent] = count
        else:
            del self._orphans[parent]

    def __getitem__(self, key: BlockKey) -> Entry:
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, key: object) -> bool:
        return key in self._entries
