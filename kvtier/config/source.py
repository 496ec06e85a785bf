"""Reads YAML into plain values and remembers on which line each stands."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kvtier.config.problems import Location, Problem, path_text
from kvtier.errors import ConfigError

_MAX_FILE_BYTES = 1 << 20
_HINTS: Mapping[str, str] = {
    r"cannot start any token.*'\\t'|found character '\\t'": "YAML does not allow tabs for indentation; use spaces",
    "mapping values are not allowed here": "is the indentation right? A value that contains ': ' must be in quotes",
    "expected <block end>": "the lines of one mapping or list must begin in the same column",
    "could not find expected ':'": "write `key: value`, with a colon and a space",
    "expected a single document": "keep to one document: no second `---`",
    "while scanning a quoted scalar": "is a closing quote missing?",
    "expected ',' or": "is a closing bracket missing?",
    "found undefined alias": "a value that begins with * must be in quotes",
    "cannot start any token": "a value that begins with this character must be in quotes",
}

_RESOLVERS = (
    ("tag:yaml.org,2002:null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("tag:yaml.org,2002:int", r"[-+]?[0-9]{1,30}", list("-+0123456789")),
    ("tag:yaml.org,2002:float", r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
)


class Loader(yaml.SafeLoader):
    """YAML 1.2's plain values: ``on`` and ``no`` are words, ``010`` is ten, nothing is a date."""


class Dumper(yaml.SafeDumper):
    """Quotes what :class:`Loader` would take for something else than text."""


for _class in (Loader, Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _RESOLVERS:
        _class.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$", re.ASCII), _first)


@dataclass(frozen=True, slots=True)
class Source:
    """Settings as plain values, and where they come from."""

    name: str
    """the file, or what to call settings that come from none"""
    data: Any
    lines: Mapping[Location, int] = field(default_factory=dict)
    """location -> line, from 1"""
    problems: tuple[Problem, ...] = ()
    """what is wrong with the file whatever its settings mean"""

    def where(self, location: Location) -> str:
        """``file:line`` of a location, or of the nearest thing around it."""
        for length in range(len(location), -1, -1):
            if location[:length] in self.lines:
                return f"{self.name}:{self.lines[location[:length]]}"
        return self.name


def read_source(path: Path) -> Source:
    """Reads one file. Raises ConfigError where it cannot be read or is no YAML."""
    name, text = os.fspath(path), _read_text(path)
    try:
        node = yaml.compose(text, Loader=Loader)
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_syntax_message(name, text, error)) from None
    except yaml.YAMLError as error:
        position = getattr(error, "position", 0)  # of yaml's ReaderError
        line = text.count("\n", 0, position) + 1
        raise ConfigError(f"{name}:{line}: not YAML: a forbidden character; write it as an escape in double quotes") from None
    except RecursionError:
        raise ConfigError(f"{name}: not a kvtier configuration: nested far too deeply") from None
    reader = _Reader(name)
    data = {} if node is None else reader.value(node, ())
    return Source(name, data, reader.lines or {(): 1}, tuple(reader.problems))


def _read_text(path: Path) -> str:
    try:
        with path.expanduser().open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file (working directory: {Path.cwd()})") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: a directory; name the YAML file in it") from None
    except PermissionError:
        raise ConfigError(f"{path}: this user may not read it (user id {os.geteuid()}); change its permissions or owner") from None
    except (OSError, RuntimeError, ValueError) as error:  # also: no home directory for ~, a null character in the path
        raise ConfigError(f"{str(path)!r}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: more than 1MiB; this cannot be a kvtier configuration")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 text (byte 0x{content[error.start]:02x})") from None


def _syntax_message(name: str, text: str, error: yaml.MarkedYAMLError) -> str:
    what = ": ".join(part for part in (error.context, error.problem) if part)
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return f"{name}: not YAML: {what}"
    begun = error.context_mark
    since = f" (begun on line {begun.line + 1})" if begun is not None and begun.line != mark.line else ""
    lines = text.splitlines()
    shown = lines[mark.line] if mark.line < len(lines) else ""
    shown = f"\n    {shown}\n    {' ' * mark.column}^" if 0 < len(shown) <= 200 else ""
    hint = next((f"; {hint}" for pattern, hint in _HINTS.items() if re.search(pattern, what)), "")
    return f"{name}:{mark.line + 1}: not YAML: {what}{since}{hint}{shown.replace(chr(9), ' ')}"


class _Reader:
    """Turns YAML's nodes into values, one tree."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.lines: dict[Location, int] = {}
        self.problems: list[Problem] = []
        self._open: set[int] = set()

    def value(self, node: yaml.Node, at: Location) -> Any:
        self.lines.setdefault(at, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, at)
        if id(node) in self._open:
            line = self.lines[at]
            raise ConfigError(f"{self._name}:{line}: {path_text(at)}: an alias that contains itself; write the value out")
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.value(item, (*at, index)) for index, item in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode)
            return self._mapping(node, at)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: yaml.MappingNode, at: Location) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(at, f"line {line} has a key that is a list or a mapping; keys are words"))
                continue
            key = str(key_node.value)
            here = (*at, key)
            if key in values:
                self.problems.append(Problem(here, f"given twice, on lines {self.lines[here]} and {line}; keep one"))
                continue
            # an empty value has no place of its own
            self.lines[here] = line
            values[key] = self.value(value_node, here)
        return values

    def _scalar(self, node: yaml.ScalarNode, at: Location) -> Any:
        text = str(node.value)
        match node.tag.rpartition(":")[2]:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text)
            case "float":
                return float(text)
            case "str":
                return text
        self.problems.append(Problem(at, f"the tag {node.tag} is not allowed; write the plain value"))
        return text
