"""KV events of vLLM (``kv_events_config``) as JSON lines.

A line is one event (``{"type": "BlockStored", "ts": ..., ...}``), or a batch, as an object (``{"ts": ..., "events": [...]}``) or in the
array form that vLLM encodes (``[ts, [event, ...], rank]``). Events without a time have that of the line before.

Events tell what was stored, not what was asked: a ``BlockStored`` is taken as a request for its blocks and all before them. One that
continues where another one ended at most ``JOIN_S`` seconds ago is the same request (chunked prefill, decoding). A request that found all
of its blocks in the engine leaves no event, so hit rates from such a trace are too low.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvtier.sim.readers.lines import BadLineError, an_object, count_of, ids_of, number_of, read_lines
from kvtier.sim.trace import Trace, TraceBuilder

JOIN_S = 2.0
"""a later event that continues a request is a new request (the next turn of a chat)"""
_KINDS = ("AllBlocksCleared", "BlockRemoved", "BlockStored")
_DEVICE = (None, "GPU", "gpu")

Hash = int | str


@dataclass(slots=True)
class _Growing:
    """A request of which more may come."""

    first_s: float
    last_s: float
    blocks: list[Hash]


class _Requests:
    """Puts requests together from events."""

    def __init__(self) -> None:
        self.block_tokens: int | None = None
        self.done: list[tuple[float, list[Hash]]] = []
        self._parents: dict[Hash, Hash | None] = {}
        self._growing: dict[Hash, _Growing] = {}
        self._now = 0.0

    def take(self, value: Any) -> None:
        """One line."""
        if isinstance(value, list):
            if len(value) < 2 or not isinstance(value[1], list):
                raise BadLineError("expected a batch as [time, [event, ...], rank]")
            value = {"ts": value[0], "events": value[1]}
        record = an_object(value)
        if "ts" in record:
            self._now = max(self._now, number_of(record, "ts"))
        events = record.get("events", [record])
        if not isinstance(events, list):
            raise BadLineError("expected `events` to be a list")
        checked = [self._check(an_object(event)) for event in events]
        for event in checked:
            if event is not None:
                self._store(*event)

    def _check(self, event: dict[str, Any]) -> tuple[Hash | None, list[Hash]] | None:
        """Parent and blocks of a store in the engine's own memory."""
        kind = event.get("type")
        if kind not in _KINDS:
            raise BadLineError(f"expected `type` to be one of {', '.join(_KINDS)}, found {kind!r:.60}")
        if kind == "AllBlocksCleared":
            return None
        hashes = ids_of(event, "block_hashes", texts=True)
        if kind == "BlockRemoved":
            return None
        block_tokens = count_of(event, "block_size", low=1)
        parent = event.get("parent_block_hash")
        if parent is not None and (not isinstance(parent, (int, str)) or isinstance(parent, bool)):
            raise BadLineError("expected `parent_block_hash` to be null, a whole number or a text")
        if event.get("medium") not in _DEVICE or event.get("group_idx") not in (None, 0):
            return None
        if self.block_tokens not in (None, block_tokens):
            raise BadLineError(f"expected `block_size` to be {self.block_tokens} as before, found {block_tokens}")
        self.block_tokens = block_tokens
        if parent in hashes or len(set(hashes)) < len(hashes):
            raise BadLineError("expected each block of an event to be another one")
        return parent, hashes

    def _store(self, parent: Hash | None, hashes: list[Hash]) -> None:
        if not hashes:
            return
        request = None if parent is None else self._growing.pop(parent, None)
        if request is not None and self._now - request.last_s > JOIN_S:
            self._end(request)
            request = None
        if request is None:
            request = _Growing(self._now, self._now, self._path(parent))
        before = parent
        for block in hashes:
            self._parents.setdefault(block, before)
            before = block
        request.blocks += hashes
        request.last_s = self._now
        other = self._growing.pop(hashes[-1], None)
        if other is not None:
            self._end(other)
        self._growing[hashes[-1]] = request

    def _path(self, block: Hash | None) -> list[Hash]:
        path: list[Hash] = []
        seen: set[Hash] = set()
        while block is not None and block not in seen:
            seen.add(block)
            path.append(block)
            block = self._parents.get(block)
        return path[::-1]

    def _end(self, request: _Growing) -> None:
        self.done.append((request.first_s, request.blocks))

    def finish(self) -> None:
        """Nothing more comes."""
        for request in self._growing.values():
            self._end(request)
        self._growing.clear()


def read_kv_events(path: Path, *, group: int = 1, skip_bad: bool = False) -> Trace:
    """Reads a file of vLLM's KV events. The tokens of a request are those of its full blocks. Raises TraceError."""
    requests = _Requests()
    num_skipped = read_lines(path, requests.take, skip_bad=skip_bad)
    requests.finish()
    block_tokens = requests.block_tokens or 1
    builder = TraceBuilder(block_tokens, group=group)
    builder.num_skipped = num_skipped
    for time_s, blocks in sorted(requests.done, key=lambda item: item[0]):
        builder.add(time_s, blocks, len(blocks) * block_tokens, 0)
    return builder.build(path.stem)
