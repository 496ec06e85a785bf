"""The books of the control plane, checked against each other."""

from __future__ import annotations

from collections.abc import Mapping

from kvtier.control.host_space import HostSpace
from kvtier.control.index import HOST, Index, children_of
from kvtier.control.residency import Residency
from kvtier.types import BlockKey


def audit(index: Index, space: HostSpace, residencies: Mapping[int, Residency]) -> list[str]:
    """Broken promises in words; empty = healthy. ``residencies``: bit in the index's masks -> tier. Reads every entry."""
    problems = space.check()
    for bit, residency in residencies.items():
        readable = sum(1 for entry in index if entry.readable & bit)
        if readable != len(residency):
            problems.append(f"{residency.name}: the index knows {readable} blocks, the policy {len(residency)}")
    children: dict[BlockKey | None, set[BlockKey]] = {}
    for entry in index:
        children.setdefault(entry.parent, set()).add(entry.key)
    problems += _tenants(index, residencies)
    for entry in index:
        if {child.key for child in children_of(entry)} != children.get(entry.key, set()):
            problems.append(f"{entry.key.hex()} does not know the blocks that continue it")
        if not entry.readable and not entry.busy:
            problems.append(f"{entry.key.hex()} is nowhere")
        if bool((entry.readable | entry.busy) & HOST) != (entry.slot >= 0):
            problems.append(f"{entry.key.hex()}: slot {entry.slot} with readable {entry.readable:b}, busy {entry.busy:b}")
    return problems


def _tenants(index: Index, residencies: Mapping[int, Residency]) -> list[str]:
    """Where a tier's bytes by tenant are not those of its blocks."""
    problems: list[str] = []
    for bit, residency in residencies.items():
        by_tenant: dict[str, int] = {}
        for entry in index:
            if entry.readable & bit:
                by_tenant[entry.tenant] = by_tenant.get(entry.tenant, 0) + entry.num_bytes
        if by_tenant != residency.bytes_by_tenant():
            problems.append(f"{residency.name}: tenants have {by_tenant} bytes, counted were {residency.bytes_by_tenant()}")
        if sum(by_tenant.values()) != residency.num_bytes:
            problems.append(f"{residency.name}: {sum(by_tenant.values())} bytes, counted were {residency.num_bytes}")
    return problems
