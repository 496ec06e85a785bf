"""Who is using which slot, so that none is freed while bytes still move. Pure: no I/O, no clock, no threads.

A lease ends when its owner says that the copy has finished, or when the owner is known to be dead, never by a timer.
"""

from __future__ import annotations

from kvtier.errors import InvariantError


class LeaseTable:
    """Counted leases of slots by owner. O(1) per lease; not thread-safe.

    A slot whose content is given up is *retired*: nobody can lease it again, and whoever ends its last lease is told to
    free it.  Exactly one call says so for each retirement: ``retire`` itself, ``release`` or ``release_owner``.

    >>> leases = LeaseTable()
    >>> leases.lease(7, owner=1)
    >>> leases.retire(7), leases.release(7, owner=1)
    (False, True)
    """

    __slots__ = ("_counts", "_owners", "_retired")

    def __init__(self) -> None:
        self._owners: dict[int, dict[int, int]] = {}
        """owner -> slot -> how often; no empty entries"""
        self._counts: dict[int, int] = {}
        """slot -> leases of all owners; no zeros"""
        self._retired: set[int] = set()
        """retired slots that are still leased"""

    def lease(self, slot: int, owner: int) -> None:
        """Keeps ``slot`` from being freed until ``owner`` releases it as often as it leased it.

        Raises InvariantError where the slot is retired: what the caller looked for is gone.
        """
        if slot in self._retired:
            raise InvariantError(f"slot {slot} was leased by {owner} after it was retired")
        self._counts[slot] = self._counts.get(slot, 0) + 1
        slots = self._owners.get(owner)
        if slots is None:
            slots = self._owners[owner] = {}
        slots[slot] = slots.get(slot, 0) + 1

    def release(self, slot: int, owner: int) -> bool:
        """Ends one lease. True: the slot was retired and this was its last lease; the caller must free it now.

        Raises InvariantError where ``owner`` has no lease of ``slot``.
        """
        slots = self._owners.get(owner)
        if slots is None or slot not in slots:
            raise InvariantError(f"owner {owner} released slot {slot}, which it had not leased")
        count = slots[slot] - 1
        if count:
            slots[slot] = count
        else:
            del slots[slot]
            if not slots:
                del self._owners[owner]
        return self._drop(slot, 1)

    def release_owner(self, owner: int) -> list[int]:
        """Ends all leases of ``owner``, which may have none. Returns the slots the caller must free now. O(its leases)."""
        slots = self._owners.pop(owner, None)
        return [slot for slot, count in slots.items() if self._drop(slot, count)] if slots is not None else []

    def retire(self, slot: int) -> bool:
        """Gives up the content of ``slot``. True: nobody leases it and the caller frees it now; False: a release will say so.

        Raises InvariantError where it is retired already.
        """
        if slot not in self._counts:
            return True
        if slot in self._retired:
            raise InvariantError(f"slot {slot} was retired twice")
        self._retired.add(slot)
        return False

    def is_leased(self, slot: int) -> bool:
        """Whether anybody leases ``slot``."""
        return slot in self._counts

    def is_retired(self, slot: int) -> bool:
        """Whether ``slot`` is given up and only waits for its last lease to end."""
        return slot in self._retired

    @property
    def num_leased(self) -> int:
        """How many slots are leased."""
        return len(self._counts)

    @property
    def num_retired(self) -> int:
        """How many slots are given up and not free yet."""
        return len(self._retired)

    def check(self) -> list[str]:
        """Every broken promise in words; empty = healthy. O(leases)."""
        problems = [f"owner {owner} is listed without a lease" for owner, slots in self._owners.items() if not slots]
        counted: dict[int, int] = {}
        for owner, slots in self._owners.items():
            for slot, count in slots.items():
                counted[slot] = counted.get(slot, 0) + count
                if count <= 0:
                    problems.append(f"owner {owner} leases slot {slot} {count} times")
        if counted != self._counts:
            different = sorted(slot for slot in counted.keys() | self._counts if counted.get(slot) != self._counts.get(slot))
            problems.append(f"leases miscounted for slots {different}")
        problems += [f"slot {slot} waits for a lease that nobody holds" for slot in sorted(self._retired - self._counts.keys())]
        return problems

    def _drop(self, slot: int, count: int) -> bool:
        """Takes ``count`` leases away; True where the slot was retired and is unleased now."""
        left = self._counts[slot] - count
        if left:
            self._counts[slot] = left
            return False
        del self._counts[slot]
        if slot in self._retired:
            self._retired.remove(slot)
            return True
        return False
