"""How many steps of a workflow are left until an agent runs, after KVFlow (arXiv 2507.07400).

Agents are nodes. An agent runs one step after any of the agents before it (a branch: the least of their steps counts), or after all
of them (a join: the greatest). Agents that run now are at 0.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepGraph:
    """Who may run after whom. Cycles are fine."""

    before: Mapping[str, Collection[str]]
    """agent -> the agents after which it runs"""
    joins: frozenset[str] = frozenset()
    """agents that wait for all of those, not for any"""

    def agents(self) -> set[str]:
        """Everybody named."""
        return {*self.before, *(agent for others in self.before.values() for agent in others)}

    def steps(self, running: Iterable[str]) -> dict[str, int]:
        """Steps until each agent runs; 0 for those that do. Who cannot be reached is left out."""
        after: dict[str, list[str]] = {}
        missing: dict[str, int] = {}
        for agent, others in self.before.items():
            distinct = set(others)
            missing[agent] = len(distinct) if agent in self.joins else min(1, len(distinct))
            for other in distinct:
                after.setdefault(other, []).append(agent)
        found = dict.fromkeys(running, 0)
        level = list(found)
        while level:
            following: list[str] = []
            for agent in level:
                for other in after.get(agent, ()):
                    missing[other] -= 1
                    if missing[other] == 0 and other not in found:
                        found[other] = found[agent] + 1
                        following.append(other)
            level = following
        return found
