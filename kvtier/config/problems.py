"""Says what is wrong with settings: where, which value, what is allowed."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from kvtier.config.fields import text_of

TIER_ORDER = "tier_order"
"""type of the pydantic error that says tiers are in the wrong order"""
_MAX_SHOWN = 80
_SECRET = re.compile("pass|secret|token|auth|credential|key", re.IGNORECASE)
"""in the name of a key: its value is not shown"""
_CREDENTIALS = re.compile(
    r"(?<=://).*@|(?<=^\")[^\"@:/]*:(?!//).*@|(?<=[?&])[^=&\"]*(?:pass|sig|secret|token|auth|credential|key)[^=&\"]*=[^&\"]*", re.IGNORECASE
)
"""user and password inside an address, with or without its scheme, and secrets behind a question mark"""

_NOWHERE = object()
"""in place of a value that the file does not have"""

Location: TypeAlias = tuple[str | int, ...]
"""The way to a value: keys and list positions."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong."""

    location: Location
    reason: str


class Places(Protocol):
    """Knows where settings stand."""

    @property
    def name(self) -> str:
        """What they come from."""

    def where(self, location: Location) -> str:
        """File and line of a location."""


def render(problems: Sequence[Problem], places: Places) -> str:
    """All problems as text, one a line, in the order of the file."""
    lines = list(dict.fromkeys(f"{places.where(each.location)}: {_joined(path_text(each.location), each.reason)}" for each in problems))
    if len(lines) == 1:
        return lines[0]
    return "\n".join([f"{len(lines)} errors in {places.name}:", *(f"  {line}" for line in sorted(lines, key=_line_order))])


def path_text(location: Location) -> str:
    """A location as people write it: ``tiers[1].capacity``."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def explain(error: ValidationError, root: type[BaseModel], data: Any) -> list[Problem]:
    """What pydantic found in ``data``, in the terms of the file."""
    problems = []
    for detail in error.errors(include_url=False):
        if detail["type"] == TIER_ORDER:
            continue  # found earlier, tier by tier
        spot = _resolve(detail["loc"], root, at_default=detail["type"] == "value_error")
        problems.append(Problem(spot.location, _reason(detail, spot, root, data)))
    return problems


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that an annotation such as ``tuple[A | B, ...]`` names."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from models_in(argument)


def fields_of(section: type[BaseModel]) -> dict[str, FieldInfo]:
    """YAML key -> field."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _joined(path: str, reason: str) -> str:
    return f"{path}: {reason}" if path else reason


def _line_order(text: str) -> tuple[int, str]:
    line = text.partition(": ")[0].rpartition(":")[2]
    return (int(line) if line.isdigit() else 0, text)


@dataclass(frozen=True, slots=True)
class _Spot:
    """What a location of pydantic's means."""

    location: Location
    """as in the file"""
    section: type[BaseModel]
    field: FieldInfo | None


def _resolve(loc: Location, root: type[BaseModel], *, at_default: bool) -> _Spot:
    """Finds the field. Pydantic puts the tier's type into its locations, and names a default's field by its attribute."""
    section = root
    field: FieldInfo | None = None
    location: list[str | int] = []
    tagged: Mapping[str, type[BaseModel]] = {}
    for part in loc:
        if isinstance(part, str) and part in tagged:
            section, field, tagged = tagged[part], None, {}
            continue
        location.append(part)
        if isinstance(part, int):
            models = [] if field is None else list(models_in(field.annotation))
            tagged = {str(model.model_fields["type"].default): model for model in models if "type" in model.model_fields}
            continue
        if field is not None:
            section = next(models_in(field.annotation), section)
        field = fields_of(section).get(part)
    # an unknown key of that name has another type of error
    if field is None and at_default and isinstance(loc[-1], str) and loc[-1] in section.model_fields:
        field = section.model_fields[loc[-1]]
        return _Spot((*location[:-1], field.alias or loc[-1]), section, field)
    return _Spot(tuple(location), section, field)


def _reason(detail: Any, spot: _Spot, root: type[BaseModel], data: Any) -> str:
    kind, field = detail["type"], spot.field
    written = _as_written(data, spot.location)
    value = detail["input"] if written is _NOWHERE else written
    if kind == "extra_forbidden":
        return _unknown_key(str(spot.location[-1]), value, spot.section, root)
    if kind == "invalid_key":
        return "a key that is not a text"
    if kind.startswith("union_tag"):
        return _unknown_type(value, field)
    if kind in {"model_type", "model_attributes_type"}:
        return f"{shown(value)} is not a mapping; write `key: value` lines"
    allowed = text_of(field, "allowed").replace("`", "") if field is not None else ""
    if kind == "missing":
        return f"missing; allowed: {allowed}"
    because = f" ({detail['ctx']['error']})" if kind == "value_error" else ""
    subject = "the default" if kind == "value_error" and written is _NOWHERE else shown(value)
    return f"{subject} is wrong{because}; allowed: {allowed}{_meant(value, allowed)}"


def _as_written(data: Any, location: Location) -> object:
    """The value at a location before it was converted; ``_NOWHERE`` where the file has none."""
    for part in location:
        known = range(len(data)) if isinstance(data, (list, tuple)) else data if isinstance(data, Mapping) else ()
        if part not in known:
            return _NOWHERE
        data = data[part]
    return data


def _meant(value: object, allowed: str) -> str:
    """For words that are nearly right."""
    words = [word.strip() for word in allowed.split(",")]
    if not isinstance(value, str):
        return ""
    if {"true", "false"} == set(words):
        return "; write it without quotes, as true or false"
    return did_you_mean(value, [word for word in words if " " not in word])


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """``; did you mean WORD?``, or nothing where no word is near."""
    lowered = {each.lower(): each for each in known}
    near = difflib.get_close_matches(word.lower(), lowered, n=1, cutoff=0.6)
    return f"; did you mean {lowered[near[0]]}?" if near else ""


def _unknown_key(key: str, value: object, section: type[BaseModel], root: type[BaseModel]) -> str:
    keys = list(fields_of(section))
    by_name = [field.alias for name, field in section.model_fields.items() if name == key and field.alias]
    hint = f"; did you mean {by_name[0]}?" if by_name else did_you_mean(key, keys) or _elsewhere(key, section, root)
    given = "" if _SECRET.search(key) else f" (value {shown(value)})"
    return f"unknown key{given}{hint}; allowed: {', '.join(keys)}"


def _elsewhere(key: str, section: type[BaseModel], root: type[BaseModel]) -> str:
    """Where a key belongs that is known in another section."""
    if key in fields_of(root):
        return "; it belongs to the top of the file, not in here"
    for name, field in fields_of(root).items():
        for model in models_in(field.annotation):
            if model is not section and key in fields_of(model):
                tag = model.model_fields.get("type")
                return f"; it belongs to {name}" if tag is None else f"; it belongs to a tier of type {tag.default}"
    return ""


def _unknown_type(tier: object, field: FieldInfo | None) -> str:
    types = [] if field is None else [str(model.model_fields["type"].default) for model in models_in(field.annotation)]
    given = tier.get("type") if isinstance(tier, Mapping) else None
    if given is None:
        return f"type is missing; allowed: {', '.join(types)}"
    return f"type {shown(given)} is unknown; allowed: {', '.join(types)}{did_you_mean(str(given), types)}"


def _hidden(match: re.Match[str]) -> str:
    return "***@" if match[0].endswith("@") else f"{match[0].partition('=')[0]}=***"


def shown(value: object) -> str:
    """A value as it stands in YAML, cut where it is long."""
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = _CREDENTIALS.sub(_hidden, json.dumps(value, default=str, ensure_ascii=False))
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
