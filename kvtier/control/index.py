"""The index: which block is where. One entry a block, whatever number of tiers hold it.

``readable`` and ``busy`` are bit masks over tiers; bit 0 is host memory, bit ``i`` the i-th tier below it.  ``readable``: the bytes are
there. ``busy``: a copy into that tier is under way (host: from the engine or from a lower tier).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence

from kvtier.types import BlockKey, BlockMeta, PrefixMatch

HOST = 1
"""bit of host memory in ``readable`` and ``busy``"""


class Entry:
    """All the control plane knows of one block."""

    __slots__ = ("busy", "children", "key", "num_bytes", "parent", "readable", "slot", "tenant")

    def __init__(self, key: BlockKey, parent: BlockKey | None, num_bytes: int, tenant: str) -> None:
        self.key = key
        self.parent = parent
        self.num_bytes = num_bytes
        self.readable = 0
        self.busy = 0
        self.slot = -1
        self.tenant = tenant
        """whose block it is; empty: nobody's in particular"""
        self.children: Entry | set[Entry] | None = None
        """known blocks that continue it, in whichever tier"""

    @property
    def meta(self) -> BlockMeta:
        """The block as tiers and policies know it."""
        return BlockMeta(self.key, self.parent, self.num_bytes)


Children = Entry | set[Entry] | None
"""Nearly all blocks are continued by one other at most; a set for each would cost more than the entry."""


def children_of(entry: Entry) -> Collection[Entry]:
    """The known blocks that continue a block."""
    children = entry.children
    return () if children is None else (children,) if isinstance(children, Entry) else children


class Index:
    """Keys -> entries. An entry exists while some tier holds the block or a copy of it is under way."""

    __slots__ = ("_entries", "_orphans", "get")

    def __init__(self) -> None:
        self._entries: dict[BlockKey, Entry] = {}
        self._orphans: dict[BlockKey, Children] = {}
        """unknown block -> known blocks that continue it"""
        self.get = self._entries.get

    def ensure(self, key: BlockKey, parent: BlockKey | None, num_bytes: int, tenant: str = "") -> Entry:
        """The entry of a key, made where there is none."""
        entry = self.get(key)
        if entry is None:
            entry = self._entries[key] = Entry(key, parent, num_bytes, tenant)
            if self._orphans:
                entry.children = self._orphans.pop(key, None)
            if parent is not None:
                before = self.get(parent)
                if before is not None and before.children is None:
                    before.children = entry
                else:
                    self._adopt(parent, entry)
        return entry

    def drop_if_gone(self, entry: Entry) -> None:
        """Forgets an entry that is nowhere and on its way nowhere."""
        if not entry.readable and not entry.busy:
            del self._entries[entry.key]
            if entry.children is not None:
                self._orphans[entry.key] = entry.children
            if entry.parent is not None:
                before = self.get(entry.parent)
                if before is not None and before.children is entry:
                    before.children = None
                else:
                    self._disown(entry.parent, entry)

    def tenant_of(self, key: BlockKey) -> str:
        """Whose a known block is; empty for an unknown one."""
        entry = self.get(key)
        return "" if entry is None else entry.tenant

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

    def subtree(self, entry: Entry) -> list[Entry]:
        """All known blocks that continue a block, and the block itself, which comes last: children before their parents."""
        found, pending = [], [entry]
        while pending:
            found.append(pending.pop())
            pending += children_of(found[-1])
        return found[::-1]

    def _adopt(self, parent: BlockKey, child: Entry) -> None:
        entry = self.get(parent)
        children = self._orphans.get(parent) if entry is None else entry.children
        if children is None:
            children = child
        elif isinstance(children, Entry):
            children = {children, child}
        else:
            children.add(child)
        if entry is None:
            self._orphans[parent] = children
        else:
            entry.children = children

    def _disown(self, parent: BlockKey, child: Entry) -> None:
        entry = self.get(parent)
        children = self._orphans.get(parent) if entry is None else entry.children
        if isinstance(children, set):
            children.discard(child)
            if children:
                return
        if entry is None:
            del self._orphans[parent]
        else:
            entry.children = None

    def __getitem__(self, key: BlockKey) -> Entry:
        return self._entries[key]

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def __contains__(self, key: object) -> bool:
        return key in self._entries
