"""The books of the control plane, checked against each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from kvtier.control.host_space import HostSpace
from kvtier.control.index import HOST, Index
from kvtier.control.residency import Residency


def audit(index: Index, space: HostSpace, residencies: Mapping[int, Residency]) -> list[str]:
    """Broken promises in words; empty = healthy. ``residencies``: bit in the index's masks -> tier. Reads every entry."""
    problems = space.check()
    for bit, residency in residencies.items():
        readable = sum(1 for entry in index if entry.readable & bit)
        if readable != len(residency):
            problems.append(f"{residency.name}: the index knows {readable} blocks, the policy {len(residency)}")
    children = Counter(entry.parent for entry in index)
    for entry in index:
        if entry.num_children != children[entry.key]:
            problems.append(f"{entry.key.hex()} counts {entry.num_children} blocks that continue it, there are {children[entry.key]}")
        if not entry.readable and not entry.busy:
            problems.append(f"{entry.key.hex()} is nowhere")
        if bool((entry.readable | entry.busy) & HOST) != (entry.slot >= 0):
            problems.append(f"{entry.key.hex()}: slot {entry.slot} with readable {entry.readable:b}, busy {entry.busy:b}")
    return problems
