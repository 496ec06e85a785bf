"""What a request asks of kvtier beside its tokens (``kv_transfer_params["kvtier"]``). What makes no sense is left out, never raised."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvtier.connectors.messages import RequestOptions

MAX_NAME = 256
"""characters of a session's, tenant's or tool's name"""
PRIORITIES = ("low", "normal", "high")
_NAME = f"a text of 1 to {MAX_NAME} characters, none a lone surrogate"
_SECONDS = "seconds, 0 or more and finite"


@dataclass(frozen=True, slots=True)
class _Option:
    """One key of the mapping."""

    allowed: str
    is_right: Callable[[Any], bool]


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME and not any("\ud800" <= character <= "\udfff" for character in value)


def _is_seconds(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _is_tool_call(value: Any) -> bool:
    if not isinstance(value, Mapping) or not _is_name(value.get("name")):
        return False
    return set(value) <= {"name", "expected_s"} and (value.get("expected_s") is None or _is_seconds(value["expected_s"]))


OPTIONS: Mapping[str, _Option] = {
    "load": _Option("true or false", lambda value: isinstance(value, bool)),
    "store": _Option("true or false", lambda value: isinstance(value, bool)),
    "store_only_prefix": _Option(
        "a whole number of tokens from 0", lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0
    ),
    "priority": _Option(", ".join(PRIORITIES), lambda value: isinstance(value, str) and value in PRIORITIES),
    "tenant": _Option(_NAME, _is_name),
    "session": _Option(_NAME, _is_name),
    "tool_call": _Option(f"a mapping with name ({_NAME}) and expected_s ({_SECONDS})", _is_tool_call),
    "next_use_s": _Option(_SECONDS, _is_seconds),
    "blend": _Option("a mapping, see docs/explanation/chunk-reuse.md", lambda _: True),  # refused by name where it is something else
}
"""key of the request's mapping -> what is allowed"""


def parse_options(asked: object) -> tuple[RequestOptions, list[str]]:
    """The options of a request, and in words what of it was left out because it makes no sense."""
    if not isinstance(asked, Mapping):
        return RequestOptions(num_problems=1), [f"{asked!r}; allowed: a mapping with {', '.join(OPTIONS)}"]
    problems: list[str] = []
    taken: dict[str, Any] = {}
    for name, value in asked.items():
        option = OPTIONS.get(name)
        if option is None:
            problems.append(f"[{name!r}] is unknown; allowed: {', '.join(OPTIONS)}")
        elif not option.is_right(value):
            problems.append(f"[{name!r}] is {value!r}; allowed: {option.allowed}")
        else:
            taken[name] = value
    for name in ("tool_call", "next_use_s"):
        if name in taken and "session" not in taken:
            problems.append(f"[{name!r}] needs a session; allowed: session beside it")
            del taken[name]
    call = taken.pop("tool_call", None)
    if call is not None:
        taken |= {"tool": call["name"], "expected_s": call.get("expected_s")}
    return RequestOptions(**taken, num_problems=len(problems)), problems
