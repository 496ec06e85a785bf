"""kvtier's own recordings (``record:`` in the configuration); :mod:`kvtier.recording` has the format."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from kvtier.recording import HEADER, VERSION
from kvtier.sim.readers.lines import BadLineError, an_object, count_of, number_of, read_lines
from kvtier.sim.trace import Trace, TraceBuilder

Runs = list[int]


@dataclass(frozen=True, slots=True)
class Line:
    """One line behind the header: ``values`` as the format has them."""

    kind: str
    time_s: float
    values: list[Any]


@dataclass(slots=True)
class _Seen:
    """What is known of a request."""

    time_s: float
    prompt_tokens: int
    output_tokens: int = 0
    blocks: array[int] = field(default_factory=lambda: array("q"))

    def learn(self, place: int, runs: Runs) -> None:
        """Blocks from a place on; where a line before was lost, what follows is of no use."""
        if place <= len(self.blocks):
            self.blocks[place:] = array("q", numbers_of(runs))


class RecordingReader:
    """Checks the lines of a recording and puts its requests together.

    Args:
        on_line: told each line that is right, in order
    """

    FIELDS: ClassVar[Mapping[str, str]] = {
        "ask": "nnnnnnnr",
        "start": "nnnj",
        "store": "nnnjnr",
        "end": "e",
        "evict": "tr",
        "finish": "nn",
        "reset": "",
        "lost": "n",
    }
    """kind -> what follows the time: a number, a job, runs, a tier, ended jobs"""

    def __init__(self, on_line: Callable[[Line], None] = lambda _line: None) -> None:
        self.header: dict[str, Any] | None = None
        self.block_tokens = 1
        self._on_line = on_line
        self._seen: dict[int, _Seen] = {}

    def take(self, value: Any) -> None:
        """One line. Raises BadLineError."""
        if self.header is None:
            self._take_header(value)
            return
        line = self._checked(value)
        if line.kind == "ask":
            request, prompt_tokens = line.values[0], line.values[1]
            self._seen.setdefault(request, _Seen(line.time_s, prompt_tokens)).learn(*line.values[6:])
        elif line.kind == "store":
            self._known(line.values[0]).learn(*line.values[4:])
        elif line.kind == "finish":
            self._known(line.values[0]).output_tokens = line.values[1]
        self._on_line(line)

    def trace(self, name: str, num_skipped: int, group: int) -> Trace:
        """The requests that were asked for."""
        builder = TraceBuilder(self.block_tokens, group=group)
        builder.num_skipped = num_skipped
        for seen in self._seen.values():
            total = min(len(seen.blocks), (seen.prompt_tokens + seen.output_tokens) // self.block_tokens)
            builder.add(seen.time_s, seen.blocks[:total], seen.prompt_tokens, seen.output_tokens)
        return builder.build(name)

    def _take_header(self, value: Any) -> None:
        header = an_object(value)
        if header.get(HEADER) != VERSION:
            raise BadLineError(f"expected `{HEADER}` to be {VERSION}")
        self.block_tokens = count_of(header, "block_tokens", low=1)
        for name in ("engine_block_tokens", "block_bytes", "host_blocks"):
            count_of(header, name, low=1)
        count_of(header, "max_pinned_blocks")
        self.header = header

    def _checked(self, value: Any) -> Line:
        if not isinstance(value, list) or len(value) < 2 or value[0] not in self.FIELDS:
            raise BadLineError(f"expected a list that begins with one of {', '.join(self.FIELDS)}")
        kind = value[0]
        time_s = number_of({"time": value[1]}, "time")
        fields, values = self.FIELDS[kind], value[2:]
        if len(values) != len(fields):
            raise BadLineError(f"expected {len(fields) + 2} values in a line `{kind}`, found {len(value)}")
        for position, (is_right, item) in enumerate(zip(map(_CHECKS.__getitem__, fields), values, strict=True), 2):
            if not is_right(item):
                raise BadLineError(f"expected value {position} of `{kind}` to be {_NAMES[fields[position - 2]]}, found {item!r:.60}")
        return Line(kind, time_s, values)

    def _known(self, request: int) -> _Seen:
        if request not in self._seen:
            raise BadLineError(f"expected a request that was asked for before, found {request}")
        return self._seen[request]


def numbers_of(runs: Runs) -> list[int]:
    """The numbers that runs stand for."""
    return [number for start, count in zip(runs[::2], runs[1::2], strict=True) for number in range(start, start + count)]


def read_recording(path: Path, *, group: int = 1, skip_bad: bool = False) -> Trace:
    """Reads a recording as a trace: what was asked and when, not what the tiers had. Raises TraceError."""
    reader = RecordingReader()
    num_skipped = read_lines(path, reader.take, skip_bad=skip_bad)
    return reader.trace(path.stem, num_skipped, group)


_MAX_NUMBER = 1 << 40
_MAX_BLOCKS = 1 << 24


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_NUMBER


def _is_job(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER


def _is_runs(value: Any) -> bool:
    if not isinstance(value, list) or len(value) % 2 or not all(map(_is_number, value)):
        return False
    return sum(value[1::2]) <= _MAX_BLOCKS and len(set(numbers_of(value))) == sum(value[1::2])


def _is_ended(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, list) and len(item) == 2 and _is_job(item[0]) and isinstance(item[1], list) and all(map(_is_number, item[1]))
        for item in value
    )


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "n": _is_number,
    "j": _is_job,
    "r": _is_runs,
    "t": lambda value: isinstance(value, str),
    "e": _is_ended,
}
_NAMES = {"n": "a whole number of at least 0", "j": "a job", "r": "runs of blocks", "t": "the name of a tier", "e": "a list of jobs"}
