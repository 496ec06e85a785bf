"""A slot is never free while it is leased, and somebody is always told to free it in the end."""

from __future__ import annotations

import pytest

from kvtier.errors import InvariantError
from kvtier.memory.leases import LeaseTable
from kvtier.testing.arena_machine import ArenaMachine

TestArenaMachine = ArenaMachine.TestCase


def test_a_slot_that_nobody_leases_is_free_at_once() -> None:
    """Retiring says so, and leaves no trace: the slot's next tenant can be leased and retired as well."""
    leases = LeaseTable()
    assert leases.retire(3)
    assert leases.retire(3)
    leases.lease(3, 1)
    assert not leases.retire(3)
    assert leases.release(3, 1)
    leases.lease(3, 1)
    assert leases.is_leased(3)
    assert not leases.is_retired(3)


def test_the_last_lease_frees_a_retired_slot() -> None:
    """Leases count per owner and over all owners; exactly the last release says to free the slot."""
    leases = LeaseTable()
    for owner in (1, 1, 2):
        leases.lease(3, owner)
    assert not leases.retire(3)
    assert leases.is_retired(3)
    assert [False, False, True] == [leases.release(3, owner) for owner in (1, 2, 1)]
    assert 0 == leases.num_leased == leases.num_retired
    assert [] == leases.check()


def test_a_release_of_a_slot_that_stays_frees_nothing() -> None:
    """A slot whose content is still wanted is not the releaser's to free."""
    leases = LeaseTable()
    leases.lease(3, 1)
    assert not leases.release(3, 1)
    assert not leases.is_leased(3)


def test_a_dead_owners_leases_end_together() -> None:
    """``release_owner`` ends all of them and names the slots to free: retired and leased by nobody else."""
    leases = LeaseTable()
    for slot, owner in ((1, 7), (1, 7), (2, 7), (2, 8), (3, 7)):
        leases.lease(slot, owner)
    assert [False, False] == [leases.retire(1), leases.retire(2)]
    assert [1] == leases.release_owner(7)
    assert [] == leases.release_owner(7)
    assert [2] == leases.release_owner(8)
    assert 0 == leases.num_leased


def test_misuse_is_a_bug() -> None:
    """A lease of a retired slot, a second retirement and a release without a lease raise and change nothing."""
    leases = LeaseTable()
    leases.lease(1, 7)
    leases.retire(1)
    with pytest.raises(InvariantError, match="after it was retired"):
        leases.lease(1, 8)
    with pytest.raises(InvariantError, match="retired twice"):
        leases.retire(1)
    with pytest.raises(InvariantError, match="had not leased"):
        leases.release(1, 8)
    with pytest.raises(InvariantError, match="had not leased"):
        leases.release(2, 7)
    assert [] == leases.check()
    assert leases.release(1, 7)


def test_check_finds_a_broken_book() -> None:
    """``check`` names slots whose leases do not add up."""
    leases = LeaseTable()
    leases.lease(4, 7)
    leases._counts[4] = 2
    leases._retired.add(9)
    assert ["leases miscounted for slots [4]", "slot 9 waits for a lease that nobody holds"] == leases.check()
