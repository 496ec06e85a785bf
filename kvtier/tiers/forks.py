"""A forked child has none of its parent's threads and shares its files and connections: it leaves alone what its parent has open."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class Inherited(Protocol):
    """Something that a process has open and its children must not use."""

    def forget_in_child(self) -> None:
        """Called in a forked child: from now on it counts as closed there. Takes no lock: a thread of the parent may have held it."""


_inherited: weakref.WeakSet[Inherited] = weakref.WeakSet()


def leave_to_parent(inherited: Inherited) -> None:
    """Has children that are forked from now on forget something, as long as it lives."""
    _inherited.add(inherited)


def _forget_in_child() -> None:
    for inherited in list(_inherited):
        inherited.forget_in_child()


os.register_at_fork(after_in_child=_forget_in_child)
