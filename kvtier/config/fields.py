"""What a setting is made of: its YAML key, its default, what is allowed, what it is for."""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.fields import FieldInfo

from kvtier.units import parse_duration, parse_size

REQUIRED: Any = ...
"""In place of a default: the setting must be given."""

SIZES = "`8GiB`, `500MB`, or bytes"
"""How a size may be written."""
OPTIONAL_DURATIONS = "null, or more than 0: `30s`, `5min`, `2h`, or seconds"
"""How a duration may be written that may be left out."""

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


def write_mode() -> Any:
    """The setting that says when blocks go from host memory to the tier."""
    return setting(
        WriteMode.THROUGH,
        kind="name",
        allowed="`through`, `back`, `on_evict`",
        about="When blocks are written. `through`: at once. `back`: 5 s later. `on_evict`: as they leave host memory.",
        strict=False,
    )


def max_in_flight(about: str) -> Any:
    """The setting that bounds what is under way between host memory and the tier."""
    return setting(256 << 20, key="max_in_flight", kind="size", allowed=f"more than 0: {SIZES}", about=about, gt=0)


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


def _size_or_null(value: object) -> int | None:
    return None if value is None else parse_size(value)


def _sizes_by_name(value: object) -> dict[str, int]:
    if not isinstance(value, Mapping):
        raise ValueError("not a mapping of names to sizes")  # noqa: TRY004 - what a user wrote is wrong, not the call
    sizes: dict[str, int] = {}
    for name, size in value.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"{name!r} is no name; a name is a text that is not empty")
        try:
            sizes[name] = parse_size(size)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return sizes


def _duration_or_null(value: object) -> float | None:
    return None if value is None else parse_duration(value)


def _path_or_null(value: object) -> Path | None:
    return None if value is None else expand_path(value)


Size = Annotated[int, BeforeValidator(parse_size)]
Duration = Annotated[float, BeforeValidator(parse_duration)]
OptionalDuration = Annotated[float | None, BeforeValidator(_duration_or_null)]
OptionalSize = Annotated[int | None, BeforeValidator(_size_or_null)]
SizesByName = Annotated[Mapping[str, int], BeforeValidator(_sizes_by_name)]
ExpandedPath = Annotated[Path, BeforeValidator(expand_path)]
OptionalPath = Annotated[Path | None, BeforeValidator(_path_or_null)]
AUTO_IS_NONE = BeforeValidator(_auto_is_none)
ON_OFF = BeforeValidator(_switch)
LIST_AS_TUPLE = BeforeValidator(_as_tuple)
