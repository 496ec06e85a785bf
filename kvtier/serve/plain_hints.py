"""Hints as plain values, for the way to the daemon."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

from kvtier.control.hints import Hint, NextUse, SessionOver, ToolCall, Workflow
from kvtier.control.steps import StepGraph

HintKind = Literal["ToolCall", "NextUse", "SessionOver", "Workflow"]


def hint_of(kind: str, fields: Mapping[str, Any]) -> Hint:
    """A hint out of plain values; the inverse of :func:`plain_hint`. Raises what wrong values make the dataclasses raise."""
    if kind == "Workflow":
        graph = fields["graph"]
        before = {str(agent): tuple(map(str, others)) for agent, others in graph["before"].items()}
        return Workflow(StepGraph(before, frozenset(map(str, graph["joins"]))), tuple(map(str, fields["running"])))
    kinds: Mapping[str, Callable[..., Hint]] = {"ToolCall": ToolCall, "NextUse": NextUse, "SessionOver": SessionOver}
    return kinds[kind](**fields)


def plain_hint(hint: Hint) -> tuple[HintKind, dict[str, Any]]:
    """The kind of a hint and its fields as plain values."""
    if isinstance(hint, Workflow):
        before = {agent: list(others) for agent, others in hint.graph.before.items()}
        return "Workflow", {"graph": {"before": before, "joins": sorted(hint.graph.joins)}, "running": list(hint.running)}
    kind: HintKind = "ToolCall" if isinstance(hint, ToolCall) else "NextUse" if isinstance(hint, NextUse) else "SessionOver"
    return kind, dataclasses.asdict(hint)
