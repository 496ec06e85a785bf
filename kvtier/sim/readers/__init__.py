"""Readers of traces, one a format. They read line by line; what they return is compact."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kvtier.errors import TraceError
from kvtier.recording import HEADER
from kvtier.sim.readers.events import read_kv_events
from kvtier.sim.readers.hashed import read_bailian, read_mooncake
from kvtier.sim.readers.lines import BadLineError, numbered_lines, parse
from kvtier.sim.readers.recording import read_recording
from kvtier.sim.readers.sessions import read_sessions
from kvtier.sim.trace import Trace

__all__ = ["FORMATS", "detect_format", "open_trace"]

FORMATS: Mapping[str, Callable[..., Trace]] = {
    "bailian": read_bailian,
    "kv-events": read_kv_events,
    "mooncake": read_mooncake,
    "recording": read_recording,
    "sessions": read_sessions,
}
"""name of a format -> its reader"""

DEFAULT_GROUPS: Mapping[str, int] = {"sessions": 4}
"""so many blocks become one unless another number is asked for"""


def open_trace(
    path: str | os.PathLike[str], *, kind: str | None = None, group: int | None = None, skip_bad: bool = False, **options: Any
) -> Trace:
    """Reads a trace.

    Args:
        path: the file; with the ending ``.gz`` it is unpacked.
        kind: one of ``FORMATS``; None: what the file looks like.
        group: so many blocks of the file become one; None: 4 for ``sessions``, whose blocks have 64 tokens, else 1.
        skip_bad: count broken lines (``Trace.num_skipped``) and go on.
        options: of the format's reader (``sessions``: ``hours``, ``seed``).

    Raises:
        TraceError: the file cannot be read, has a broken line, or holds no request.
        ValueError: ``kind`` or ``group`` is none that is allowed.
    """
    path = Path(path)
    if group is not None and group < 1:
        raise ValueError(f"group is {group}; allowed: a whole number of at least 1")
    if kind is not None and kind not in FORMATS:
        raise ValueError(f"kind is {kind!r}; allowed: {', '.join(FORMATS)}")
    kind = kind or detect_format(path)
    trace = FORMATS[kind](path, group=group or DEFAULT_GROUPS.get(kind, 1), skip_bad=skip_bad, **options)
    if not len(trace):
        skipped = f" ({trace.num_skipped} broken lines were skipped)" if trace.num_skipped else ""
        raise TraceError(f"{path}: expected at least one request, found none{skipped}")
    return trace


def detect_format(path: Path) -> str:
    """The format that the first line that can be read looks like. Raises TraceError where it looks like none."""
    if path.suffix == ".npz":
        return "sessions"
    for number, line in numbered_lines(path):
        try:
            value = parse(line) if line.strip() else None
        except BadLineError:
            value = None
        if isinstance(value, list):
            return "kv-events"
        if isinstance(value, dict):
            for name, field in (
                ("recording", HEADER),
                ("bailian", "chat_id"),
                ("mooncake", "hash_ids"),
                ("kv-events", "events"),
                ("kv-events", "type"),
            ):
                if field in value:
                    return name
        if number > 100:
            break
    raise TraceError(f"{path}: expected one of the formats {', '.join(FORMATS)}; name it if it is one")
