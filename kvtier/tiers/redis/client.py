"""Values in Redis or Valkey: one GET or SET a block, a batch of them in one round trip."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from kvtier.errors import RemoteError
from kvtier.tiers.redis.endpoint import Endpoint, RedisAccess
from kvtier.tiers.redis.wire import Wire, command
from kvtier.tiers.remote import Answer, Deadline, Get, Put, Reply
from kvtier.tiers.remote.client import ABSENT, DONE, OTHER_SIZE

_REFUSALS = (b"OOM", b"READONLY", b"NOPERM", b"MISCONF", b"NOREPLICAS")
"""beginnings of errors that say: this is not taken, others may be"""
_WRONG_TYPE = b"-WRONGTYPE"
"""somebody has put a list, a hash or the like under the name"""
_AUTH_ERRORS = (b"NOAUTH", b"WRONGPASS")


class RedisClient:
    """Implements :class:`~kvtier.tiers.remote.client.RemoteClient`.

    ``ttl_s``: after which the server drops a value by itself.  ``hedge_after_s``: where a read has not begun to come after this time, it is
    asked for a second time on another connection, and whichever begins first is taken.
    """

    max_value_bytes: int | None = 512 << 20

    def __init__(self, access: RedisAccess, *, ttl_s: float | None = None, hedge_after_s: float | None = None) -> None:
        """Does not connect. Raises ValueError where the URL is none."""
        self.address = access.address
        self._endpoint = Endpoint(access)
        self._hedge_after_s = hedge_after_s
        expiry = b"" if ttl_s is None else b"$2\r\nPX\r\n" + _bulk(b"%d" % max(1, round(ttl_s * 1000)))
        self._tail = b"\r\n$2\r\nNX\r\n" + expiry
        self._num_arguments = 4 if ttl_s is None else 6
        self._events: Counter[str] = Counter()

    def ping(self, deadline: Deadline) -> None:
        with self._endpoint.wire(self._endpoint.pool_for("", deadline), deadline) as wire:
            wire.send([command(b"PING")], deadline)
            line = wire.read_line(deadline)
            if line != b"+PONG":
                raise self._error(wire, line)

    def put(self, items: Sequence[Put], deadline: Deadline) -> Iterator[Reply]:
        with ExitStack() as stack:
            wires = self._wires(stack, [item.name for item in items], deadline)
            for item, wire in zip(items, wires, strict=True):
                num_bytes = len(item.header) + len(item.payload)
                begin = b"*%d\r\n$3\r\nSET\r\n%b$%d\r\n" % (self._num_arguments, _bulk(item.name.encode()), num_bytes)
                wire.send([begin + item.header, item.payload, self._tail], deadline)
            for wire in wires:
                yield self._put_reply(wire, wire.read_line(deadline))

    def get_into(self, items: Sequence[Get], deadline: Deadline) -> Iterator[Reply]:
        with ExitStack() as stack:
            names = [item.name for item in items]
            wires = self._ask(stack, names, b"GET", deadline)
            if self._hedge_after_s is not None:
                wires = self._hedged(stack, wires, names, deadline)
            for item, wire in zip(items, wires, strict=True):
                yield self._get_reply(wire, item, deadline)

    def sizes(self, names: Sequence[str], deadline: Deadline) -> list[int | None]:
        with ExitStack() as stack:
            wires = self._ask(stack, names, b"STRLEN", deadline)
            return [self._size(wire, deadline) for wire in wires]

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        with ExitStack() as stack:
            refusal = b""
            for wire in self._ask(stack, names, b"UNLINK", deadline):
                line = wire.read_line(deadline)
                if self._is_refusal(line):
                    refusal = line
                else:
                    self._number(wire, line)
            if refusal:  # to this user, or by a replica: values can be read all the same
                raise RemoteError("server_errors", f"{self.address}: {_text(refusal)}", may_pass=False, is_failure=False)

    def take_events(self) -> dict[str, int]:
        events, self._events = self._events, Counter()
        return dict(events)

    def abort(self) -> None:
        self._endpoint.abort()

    def close(self) -> None:
        self._endpoint.close()

    def _wires(self, stack: ExitStack, names: Sequence[str], deadline: Deadline) -> list[Wire]:
        """The wire for each name, one for each server."""
        wire_of: dict[Any, Wire] = {}
        wires = []
        for name in names:
            pool = self._endpoint.pool_for(name, deadline)
            if pool not in wire_of:
                wire_of[pool] = stack.enter_context(self._endpoint.wire(pool, deadline))
            wires.append(wire_of[pool])
        return wires

    def _ask(self, stack: ExitStack, names: Sequence[str], verb: bytes, deadline: Deadline) -> list[Wire]:
        """Sends a command with one name as its argument for each name; the wires on which the replies come, in the order of the names."""
        wires = self._wires(stack, names, deadline)
        _send(wires, names, verb, deadline)
        return wires

    def _hedged(self, stack: ExitStack, wires: list[Wire], names: Sequence[str], deadline: Deadline) -> list[Wire]:
        """The wires to read from, once the servers that have not begun to answer were asked a second time."""
        soon = Deadline(min(self._hedge_after_s or 0.0, deadline.remaining_s()))
        winners: dict[Wire, Wire] = {}
        for first in dict.fromkeys(wires):
            is_begun = first.has_data(soon.remaining_s())
            asked = [name for name, wire in zip(names, wires, strict=True) if wire is first]
            winners[first] = first if is_begun else self._faster(stack, first, asked, deadline)
        return [winners[wire] for wire in wires]

    def _faster(self, stack: ExitStack, first: Wire, names: Sequence[str], deadline: Deadline) -> Wire:
        """Asks on a second wire what was asked on the first one; whichever begins to answer first."""
        self._events["hedged_reads"] += 1
        try:
            soon = Deadline(deadline.remaining_s() / 2)  # the first one may answer meanwhile
            second = stack.enter_context(self._endpoint.wire(self._endpoint.pool_for(names[0], soon), soon))
        except RemoteError:
            return first  # a server that lets no second connection in may still answer on the first one
        _send([second] * len(names), names, b"GET", deadline)
        winner = first.first_of(second, deadline)
        loser = second if winner is first else first
        loser.abort()  # its reply must never be taken for another one's
        return winner

    def _put_reply(self, wire: Wire, line: bytes) -> Reply:
        if line in (b"+OK", b"$-1"):
            return DONE
        if self._is_refusal(line):
            return Reply(Answer.REFUSED, f"{self.address}: {_text(line)}")
        raise self._error(wire, line)

    def _is_refusal(self, line: bytes) -> bool:
        has_new_primary = self._endpoint.has_sentinel and line.startswith(b"-READONLY")
        return line.startswith(b"-") and line[1:].startswith(_REFUSALS) and not has_new_primary

    def _get_reply(self, wire: Wire, item: Get, deadline: Deadline) -> Reply:
        line = wire.read_line(deadline)
        if line == b"$-1":
            return ABSENT
        if line.startswith(_WRONG_TYPE):
            return OTHER_SIZE
        if not line.startswith(b"$") or not line[1:].isdigit():
            raise self._error(wire, line)
        num_bytes = int(line[1:])
        if num_bytes != len(item.header) + len(item.payload):
            wire.drain(num_bytes, deadline)
            return OTHER_SIZE
        return Reply(Answer.DONE, checksum=wire.read_value(item.header, item.payload, deadline))

    def _size(self, wire: Wire, deadline: Deadline) -> int | None:
        line = wire.read_line(deadline)
        return None if line.startswith(_WRONG_TYPE) else self._number(wire, line) or None

    def _number(self, wire: Wire, line: bytes) -> int:
        if not line.startswith(b":") or not line[1:].isdigit():
            raise self._error(wire, line)
        return int(line[1:])

    def _error(self, wire: Wire, line: bytes) -> RemoteError:
        if not line.startswith(b"-"):
            return wire.garbage(f"{line[:40]!r}")
        message = f"{self.address}: {_text(line)}"
        if line[1:].startswith(_AUTH_ERRORS):
            return RemoteError("auth_errors", message, may_pass=False)
        return RemoteError("server_errors", message)


def _send(wires: Sequence[Wire], names: Sequence[str], verb: bytes, deadline: Deadline) -> None:
    texts: Mapping[Wire, list[bytes]] = {wire: [] for wire in wires}
    for wire, name in zip(wires, names, strict=True):
        texts[wire].append(command(verb, name.encode()))
    for wire, commands in texts.items():
        wire.send([b"".join(commands)], deadline)


def _bulk(value: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(value), value)


def _text(line: bytes) -> str:
    return line[1:200].decode("utf-8", "replace")
