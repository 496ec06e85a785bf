"""A trace: the requests of a workload with the identity of their blocks, compact in memory.

Block ids are dense (0, 1, 2, ... in the order of first appearance) and stand for whole prefixes: a block has one parent. So a prompt
is a few runs of consecutive ids, and that is how it is kept: 40,000 prompts of 450 blocks take some megabytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

NO_SESSION = -1
UNKNOWN_S = float("nan")
_NO_PARENT = -1


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. ``blocks`` are the ids of its full blocks, the first block of the prompt first.

    Those beyond ``input_tokens // block_tokens`` were filled while generating; most traces do not know them.
    """

    time_s: float
    blocks: Sequence[int]
    input_tokens: int
    output_tokens: int
    session: int | None = None
    pause_s: float | None = None
    """how long the session paused before this request (a tool ran, a user typed), where the trace knows it"""
    service_s: float | None = None
    """how long the recorded system took to answer"""


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """The requests in the order of time, as columns. Immutable, so threads may share it."""

    name: str
    block_tokens: int
    num_unique: int
    """block ids are 0 ... num_unique - 1"""
    time_s: NDArray[np.float64]
    input_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    session: NDArray[np.int64]
    """``NO_SESSION``: unknown"""
    pause_s: NDArray[np.float64]
    """NaN: unknown"""
    service_s: NDArray[np.float64]
    run_offsets: NDArray[np.int64]
    """the runs of request i are those from ``run_offsets[i]`` to before ``run_offsets[i + 1]``"""
    run_starts: NDArray[np.int64]
    run_lengths: NDArray[np.int64]
    num_skipped: int = 0
    """broken lines that were left out"""

    def __len__(self) -> int:
        return len(self.time_s)

    def __getitem__(self, index: int) -> TraceRequest:
        session, pause_s, service_s = int(self.session[index]), float(self.pause_s[index]), float(self.service_s[index])
        return TraceRequest(
            time_s=float(self.time_s[index]),
            blocks=[block for start, length in self.runs(index) for block in range(start, start + length)],
            input_tokens=int(self.input_tokens[index]),
            output_tokens=int(self.output_tokens[index]),
            session=None if session == NO_SESSION else session,
            pause_s=None if np.isnan(pause_s) else pause_s,
            service_s=None if np.isnan(service_s) else service_s,
        )

    def __iter__(self) -> Iterator[TraceRequest]:
        return (self[index] for index in range(len(self)))

    def runs(self, index: int) -> list[tuple[int, int]]:
        """The blocks of a request as (first id, number of ids)."""
        part = slice(self.run_offsets[index], self.run_offsets[index + 1])
        return list(zip(self.run_starts[part].tolist(), self.run_lengths[part].tolist(), strict=True))

    @property
    def num_accesses(self) -> int:
        """Blocks of all requests."""
        return int(self.run_lengths.sum())

    @property
    def span_s(self) -> float:
        """Seconds from the first request to the last."""
        return float(self.time_s[-1] - self.time_s[0]) if len(self) else 0.0


class Chains:
    """Dense ids for chains of block ids. An id that appears behind different blocks counts as different blocks.

    So it does not matter whether a trace's ids stand for whole prefixes or only for the tokens of the block.
    """

    def __init__(self) -> None:
        self._ids: dict[int | str, int] = {}
        self._parents = array("q")
        self._others: dict[tuple[int, int | str], int] = {}

    def __len__(self) -> int:
        return len(self._parents)

    def of(self, blocks: Sequence[int | str]) -> list[int]:
        """The dense ids of a prompt's blocks."""
        ids, parents = self._ids, self._parents
        parent = _NO_PARENT
        out: list[int] = []
        for block in blocks:
            found = ids.get(block)
            if found is None:
                found = ids[block] = len(parents)
                parents.append(parent)
            elif parents[found] != parent:
                found = self._other(parent, block)
            out.append(found)
            parent = found
        return out

    def _other(self, parent: int, block: int | str) -> int:
        found = self._others.get((parent, block))
        if found is None:
            found = self._others[parent, block] = len(self._parents)
            self._parents.append(parent)
        return found


class TraceBuilder:
    """Collects requests, in any order of time, into a :class:`Trace`. One thread.

    Args:
        block_tokens: tokens of a block of the source
        group: so many blocks of the source become one
    """

    def __init__(self, block_tokens: int, *, group: int = 1) -> None:
        self.block_tokens = block_tokens * group
        self.num_skipped = 0
        self._group = group
        self._chains = Chains()
        self._groups = Chains()
        self._columns: tuple[array[Any], ...] = (array("d"), array("q"), array("q"), array("q"), array("d"), array("d"))
        self._run_offsets = array("q", [0])
        self._run_starts = array("q")
        self._run_lengths = array("q")

    def add(
        self,
        time_s: float,
        blocks: Sequence[int | str],
        input_tokens: int,
        output_tokens: int,
        *,
        session: int = NO_SESSION,
        pause_s: float = UNKNOWN_S,
        service_s: float = UNKNOWN_S,
    ) -> None:
        """Takes a request with the source's ids of its full blocks."""
        ids = self._chains.of(blocks)
        if self._group > 1:
            ids = self._groups.of(ids[self._group - 1 :: self._group])
        self.add_dense(time_s, ids, input_tokens, output_tokens, session=session, pause_s=pause_s, service_s=service_s)

    def add_dense(
        self,
        time_s: float,
        ids: Sequence[int],
        input_tokens: int,
        output_tokens: int,
        *,
        session: int = NO_SESSION,
        pause_s: float = UNKNOWN_S,
        service_s: float = UNKNOWN_S,
    ) -> None:
        """Takes a request whose ids are dense and stand for whole prefixes already."""
        expected = None
        for block in ids:
            if block == expected:
                self._run_lengths[-1] += 1
            else:
                self._run_starts.append(block)
                self._run_lengths.append(1)
            expected = block + 1
        self._end(time_s, input_tokens, output_tokens, session, pause_s, service_s)

    def add_runs(  # noqa: PLR0913 - by keyword
        self,
        time_s: float,
        starts: Sequence[int],
        lengths: Sequence[int],
        input_tokens: int,
        output_tokens: int,
        *,
        session: int = NO_SESSION,
        pause_s: float = UNKNOWN_S,
        service_s: float = UNKNOWN_S,
    ) -> None:
        """Takes a request whose blocks are runs of dense ids."""
        self._run_starts.extend(starts)
        self._run_lengths.extend(lengths)
        self._end(time_s, input_tokens, output_tokens, session, pause_s, service_s)

    def _end(self, *values: float) -> None:
        for column, value in zip(self._columns, values, strict=True):
            column.append(value)
        self._run_offsets.append(len(self._run_starts))

    def build(self, name: str) -> Trace:
        """The trace, ordered by time; requests of the same time keep their order."""
        time_s, inputs, outputs, sessions, pauses, services = (np.array(column) for column in self._columns)
        offsets, starts, lengths = (np.array(column, dtype=np.int64) for column in (self._run_offsets, self._run_starts, self._run_lengths))
        if len(time_s) > 1 and np.any(np.diff(time_s) < 0):
            order = np.argsort(time_s, kind="stable")
            counts = np.diff(offsets)[order]
            places = np.repeat(offsets[:-1][order], counts) + _ramps(counts)
            time_s, inputs, outputs, sessions, pauses, services = (
                column[order] for column in (time_s, inputs, outputs, sessions, pauses, services)
            )
            starts, lengths = starts[places], lengths[places]
            offsets = np.concatenate([[0], np.cumsum(counts)])
        num_unique = int((starts + lengths).max()) if len(starts) else 0
        return Trace(
            name,
            self.block_tokens,
            num_unique,
            time_s,
            inputs,
            outputs,
            sessions,
            pauses,
            services,
            offsets,
            starts,
            lengths,
            self.num_skipped,
        )


def _ramps(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 ... count - 1 for each count, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
