"""What a setting is made of: its YAML key, its default, what is allowed, what it is for."""

from __future__ import annotations

import enum
import os
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from kvtier.units import parse_duration, parse_size

REQUIRED: Any = ...
"""In place of a default: the setting must be given."""

_VARIABLE = re.compile(r"\$(?:(\$)|(\w+)|\{(\w+)\})", re.ASCII)


class WriteMode(enum.Enum):
    """When a block goes from host memory to the tier below."""

    THROUGH = "through"
    BACK = "back"
    ON_EVICT = "on_evict"


class Section(BaseModel):
    """A group of settings: strict, frozen, and closed to unknown keys."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


def setting(default: Any, *, kind: str, allowed: str, about: str, key: str | None = None, **limits: Any) -> Any:
    """A field with what the reference page and the error messages need. ``limits`` are pydantic's (``gt``, ``le``, ...)."""
    return Field(default, alias=key, description=about, json_schema_extra={"kind": kind, "allowed": allowed}, **limits)


def text_of(field: FieldInfo, name: str) -> str:
    """``kind`` or ``allowed`` of a field made by :func:`setting`."""
    extra = field.json_schema_extra
    return str(extra.get(name, "")) if isinstance(extra, dict) else ""


def expand_path(value: object) -> Path:
    """The absolute path that a text with ``~``, ``$NAME`` and ``${NAME}`` means; ``$$`` stands for one dollar sign.

    Raises:
        ValueError: no text, or a variable or a home directory that does not exist.
    """
    if not isinstance(value, (str, Path)) or not str(value):
        raise ValueError("not a path")
    expanded = os.path.expanduser(_VARIABLE.sub(_variable, str(value)))
    if expanded.startswith("~"):
        raise ValueError(f"no home directory is known for {expanded.partition('/')[0]}")
    if "\0" in expanded:
        raise ValueError("a path cannot hold a null character")
    try:
        expanded.encode()
    except UnicodeEncodeError:
        raise ValueError("a path must be valid Unicode") from None
    # normalised without asking the file system: the directory need not exist yet
    return Path(os.path.abspath(expanded))


def write_path(path: Path) -> str:
    """The text that :func:`expand_path` reads back as this absolute path."""
    return str(path).replace("$", "$$")


def _variable(match: re.Match[str]) -> str:
    if match[1]:
        return "$"
    name = match[2] or match[3]
    if name not in os.environ:
        raise ValueError(f"the environment variable {name} is not set (write $$ for a dollar sign)")
    return os.environ[name]


def _auto_is_none(value: object) -> object:
    if value is None:
        raise ValueError("not a number of tokens")
    return None if value == "auto" else value


def _switch(value: object) -> object:
    # other readers of YAML turn a bare `on` into true
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _duration_or_null(value: object) -> float | None:
    return None if value is None else parse_duration(value)


Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
OptionalDuration = Annotated[float | None, BeforeValidator(_duration_or_null)]
ExpandedPath = Annotated[Path, BeforeValidator(expand_path)]
AUTO_IS_NONE = BeforeValidator(_auto_is_none)
ON_OFF = BeforeValidator(_switch)
LIST_AS_TUPLE = BeforeValidator(_as_tuple)
