"""In which order to run a batch so that requests with a common prefix follow each other, after BatchLLM (arXiv 2412.03594)."""

from __future__ import annotations

from collections.abc import Sequence

from kvtier.types import BlockKey


def order(chains: Sequence[Sequence[BlockKey]]) -> list[int]:
    """The indexes of the chains, those that share blocks next to each other: a walk through the tree of prefixes.

    Where the tree parts, the branch with more chains comes first, then the one that was asked for first; a chain that ends
    comes before those that go on. Linear in the number of blocks.
    """
    ordered: list[int] = []
    pending: list[tuple[list[int], int]] = [(list(range(len(chains))), 0)]
    while pending:
        members, depth = pending.pop()
        if len(members) == 1:
            ordered += members
            continue
        ordered += [member for member in members if len(chains[member]) == depth]
        branches: dict[BlockKey, list[int]] = {}
        for member in members:
            if len(chains[member]) > depth:
                branches.setdefault(chains[member][depth], []).append(member)
        # last in, first out
        pending += [(branch, depth + 1) for branch in sorted(branches.values(), key=lambda branch: (len(branch), -branch[0]))]
    return ordered
