"""Recorded sessions, run-length coded, in a numpy ``.npz`` file.

Per request: ``sess``, ``t`` (s on the session's own clock), ``in_len``, ``out_len`` (tokens), ``api_time``, ``think_time`` (s),
``run_off`` (one more than requests); per run: ``run_start``, ``run_len``; per session: ``tool_tokens``, ``system_tokens``. Ids are
private to a session; sessions with equal ``tool_tokens`` share that prefix, and with both equal the system prefix behind it.

The recording has no common clock: the sessions are started at uniform random times within ``hours``, and what falls after is dropped.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvtier.errors import TraceError
from kvtier.sim.readers.lines import MAX_TOKENS
from kvtier.sim.trace import UNKNOWN_S, Trace, TraceBuilder

BLOCK_TOKENS = 64
DEFAULT_HOURS = 8.0
DEFAULT_SEED = 7
_PER_REQUEST = ("sess", "t", "in_len", "out_len")
_OPTIONAL = ("api_time", "think_time")
_PER_RUN = ("run_start", "run_len")
_PER_SESSION = ("tool_tokens", "system_tokens")
_MAX_ID = 1 << 26

Columns = Mapping[str, NDArray[Any]]


def read_sessions(
    path: Path, *, group: int = 1, skip_bad: bool = False, hours: float | None = DEFAULT_HOURS, seed: int = DEFAULT_SEED
) -> Trace:
    """Reads a file of sessions. ``hours=None``: all sessions begin at once and nothing is dropped. Raises TraceError."""
    columns = _load(path)
    good = _good_requests(path, columns, skip_bad=skip_bad)
    time_s = columns["t"].astype(np.float64)
    if hours is not None:
        starts = _starts(len(columns["tool_tokens"]), hours, seed)
        time_s = time_s + starts[np.where(good, columns["sess"], 0)]
    taken = np.flatnonzero(good & (time_s < hours * 3600 if hours is not None else True))
    builder = TraceBuilder(BLOCK_TOKENS, group=group)
    builder.num_skipped = int(len(good) - good.sum())
    ids = _Ids(columns, group)
    api_time, think_time = columns.get("api_time"), columns.get("think_time")
    for index in taken.tolist():  # session by session, so that most of a prompt is one run of ids
        runs = ids.runs_of(index)
        if runs is None:
            if not skip_bad:
                raise TraceError(f"{path}: request {index}: expected ids that stand for whole prefixes")
            builder.num_skipped += 1
            continue
        builder.add_runs(
            float(time_s[index]),
            *runs,
            int(columns["in_len"][index]),
            int(columns["out_len"][index]),
            session=int(columns["sess"][index]),
            service_s=UNKNOWN_S if api_time is None else float(api_time[index]),
            pause_s=UNKNOWN_S if think_time is None else float(think_time[index]),
        )
    return builder.build(path.stem)


def _starts(num_sessions: int, hours: float, seed: int) -> NDArray[np.float64]:
    """Sorted uniform times, given to a random permutation of the sessions."""
    generator = np.random.default_rng(seed)
    starts = np.sort(generator.uniform(0, hours * 3600, num_sessions))
    out = np.empty(num_sessions)
    out[generator.permutation(num_sessions)] = starts
    return out


class _Ids:
    """Gives blocks dense ids, over all sessions."""

    def __init__(self, columns: Columns, group: int) -> None:
        self._columns = columns
        self._group = group
        self._dense: dict[int, NDArray[np.int64]] = {}
        """session -> its own id -> the dense one, -1: none yet"""
        self._prefix: dict[int, NDArray[np.int64]] = {}
        """session -> dense ids of the prefix that it shares, with which all requests begin that begin as its first one"""
        self._shared: dict[tuple[int, ...], int] = {}
        self._parents = np.full(1024, -1, np.int64)
        self._num_ids = 0
        self._offsets = columns["run_off"].tolist()
        self._bounds = np.searchsorted(columns["sess"], np.arange(len(columns["tool_tokens"]) + 1))
        """where the requests of each session begin"""

    def runs_of(self, index: int) -> tuple[list[int], list[int]] | None:
        """The blocks of a request as runs of dense ids; None where a block follows another one than before."""
        session = int(self._columns["sess"][index])
        if session not in self._dense:
            self._start(session)
        dense = self._dense[session]
        own = self._own(index)
        ids = dense[own]
        if self._first_id(index) == self._first_id(int(self._bounds[session])):
            shared = self._prefix[session][: len(ids)]
            ids[: len(shared)] = shared
        unknown = np.flatnonzero(ids < 0)
        num_known = len(ids) - len(unknown)
        if not len(ids):
            return [], []
        parents = np.concatenate([[-1], ids[: max(0, num_known - 1)]])[:num_known]
        is_chain = np.array_equal(unknown, np.arange(num_known, len(ids))) and np.array_equal(self._parents[ids[:num_known]], parents)
        if not is_chain or len(np.unique(own[num_known:])) < len(unknown):
            return None
        ids[num_known:] = self._new(len(unknown), int(ids[num_known - 1]) if num_known else -1)
        dense[own[num_known:]] = ids[num_known:]
        begins = np.concatenate([[0], np.flatnonzero(np.diff(ids) != 1) + 1])
        return ids[begins].tolist(), np.diff(begins, append=len(ids)).tolist()

    def _first_id(self, index: int) -> int:
        """The session's id of a request's first block; -1: it has none."""
        first, end = self._offsets[index], self._offsets[index + 1]
        return int(self._columns["run_start"][first]) if first < end else -1

    def _new(self, count: int, parent: int) -> NDArray[np.int64]:
        """Dense ids for a chain of blocks that begins behind ``parent``."""
        first, end = self._num_ids, self._num_ids + count
        while end > len(self._parents):
            self._parents = np.concatenate([self._parents, np.full_like(self._parents, -1)])
        self._parents[first:end] = np.arange(first - 1, end - 1)
        self._parents[first : first + min(1, count)] = parent
        self._num_ids = end
        return np.arange(first, end)

    def _own(self, index: int) -> NDArray[np.int64]:
        """The session's ids of the last block of each group."""
        group = self._group
        parts: list[NDArray[np.int64]] = []
        depth = 0
        for run in range(self._offsets[index], self._offsets[index + 1]):
            start, length = int(self._columns["run_start"][run]), int(self._columns["run_len"][run])
            parts.append(np.arange(start + (-1 - depth) % group, start + length, group))
            depth += length
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _start(self, session: int) -> None:
        """No ids yet but those of the prefix that other sessions share."""
        first, end = self._bounds[session : session + 2].tolist()
        runs = slice(self._offsets[first], self._offsets[end])
        ends = self._columns["run_start"][runs].astype(np.int64) + self._columns["run_len"][runs]
        self._dense[session] = np.full(int(ends.max(initial=0)), -1, np.int64)
        tool_tokens = int(self._columns["tool_tokens"][session])
        system_tokens = int(self._columns["system_tokens"][session])
        size = BLOCK_TOKENS * self._group
        prefix: list[int] = []
        for depth in range(min(len(self._own(first)), (tool_tokens + system_tokens) // size)):
            is_tools = (depth + 1) * size <= tool_tokens
            name = (tool_tokens, depth) if is_tools else (tool_tokens, system_tokens, depth)
            if name not in self._shared:
                self._shared[name] = int(self._new(1, prefix[-1] if prefix else -1)[0])
            prefix.append(self._shared[name])
        self._prefix[session] = np.array(prefix, np.int64)


def _load(path: Path) -> Columns:
    """The file's columns, of the right kind and length."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise TraceError(f"{path}: expected an .npz file of columns, found one array")
            columns = {name: file[name] for name in (*_PER_REQUEST, *_OPTIONAL, *_PER_RUN, *_PER_SESSION, "run_off") if name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, NotImplementedError, MemoryError) as error:
        if isinstance(error, TraceError):
            raise
        # numpy answers a file of another kind by advice to load it unsafely
        what = "not a file of numpy arrays" if "allow_pickle" in str(error) else error
        raise TraceError(f"{path}: expected an .npz file of sessions: {what}") from None
    for name in (*_PER_REQUEST, *_PER_RUN, *_PER_SESSION, "run_off"):
        if name not in columns:
            raise TraceError(f"{path}: expected a column `{name}`, found {', '.join(sorted(columns)) or 'none'}")
    num_requests = len(np.atleast_1d(columns["sess"]))
    lengths = dict.fromkeys((*_PER_REQUEST, *_OPTIONAL), num_requests) | {"run_off": num_requests + 1}
    lengths |= {"run_len": len(np.atleast_1d(columns["run_start"])), "system_tokens": len(np.atleast_1d(columns["tool_tokens"]))}
    for name, column in columns.items():
        kinds = "iuf" if name in ("t", *_OPTIONAL) else "iu"
        if column.ndim != 1 or column.dtype.kind not in kinds or len(column) != lengths.get(name, len(column)):
            shape = f"{column.dtype}{list(column.shape)}"
            raise TraceError(f"{path}: expected `{name}` to be a list of {lengths.get(name, len(column))} numbers, found {shape}")
    return columns


def _good_requests(path: Path, columns: Columns, *, skip_bad: bool) -> NDArray[np.bool_]:
    """Which requests can be taken. Raises TraceError at the first that cannot, unless ``skip_bad``."""
    session, offsets = columns["sess"], columns["run_off"]
    num_runs, num_sessions = len(columns["run_start"]), len(columns["tool_tokens"])
    if num_sessions and (min(columns["tool_tokens"].min(), columns["system_tokens"].min()) < 0):
        raise TraceError(f"{path}: expected `tool_tokens` and `system_tokens` to be numbers of at least 0")
    if len(session) and (np.any(np.diff(session.astype(np.int64)) < 0) or session[0] < 0 or session[-1] >= num_sessions):
        raise TraceError(f"{path}: expected `sess` to ascend within 0 ... {num_sessions - 1}")
    if offsets[0] != 0 or offsets[-1] != num_runs or np.any(np.diff(offsets.astype(np.int64)) < 0):
        raise TraceError(f"{path}: expected `run_off` to ascend from 0 to {num_runs}")
    starts, lengths = columns["run_start"].astype(np.int64), columns["run_len"].astype(np.int64)
    bad_runs = (starts < 0) | (lengths < 1) | (starts > _MAX_ID) | (lengths > _MAX_ID)
    if np.any(bad_runs):
        raise TraceError(f"{path}: run {int(np.argmax(bad_runs))}: expected a start of at least 0 and a length of at least 1")
    totals = np.concatenate([[0], np.cumsum(lengths)])[offsets]
    checks = {
        "`t` to be a finite number of at least 0": np.isfinite(columns["t"]) & (columns["t"] >= 0),
        "`in_len` to be at least the tokens of its blocks": (columns["in_len"] >= np.diff(totals) * BLOCK_TOKENS)
        & (columns["in_len"] <= MAX_TOKENS),
        "`out_len` to be at least 0": (columns["out_len"] >= 0) & (columns["out_len"] <= MAX_TOKENS),
    }
    good = np.ones(len(session), bool)
    for expected, holds in checks.items():
        if not skip_bad and not holds.all():
            raise TraceError(f"{path}: request {int(np.argmin(holds))}: expected {expected}")
        good &= holds
    return good
