"""What a store must be able to do to serve as a tier: small, synchronous, and over by a deadline."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from kvtier.tiers.remote.deadline import Deadline


class Answer(enum.Enum):
    """What the store said to one item of a call."""

    DONE = "done"
    """put: the value is there, written now or before; get: the buffers hold the value"""
    ABSENT = "absent"
    """get: there is no value of this name"""
    OTHER_SIZE = "other size"
    """get: there is a value, of another length than the buffers"""
    REFUSED = "refused"
    """put: the store is full, or does not take values of this size, or from this user"""


class Reply(NamedTuple):
    """An answer, and the store's own words where it refused."""

    answer: Answer
    detail: str = ""
    checksum: bytes | None = None
    """get: the xxh3-128 of what was read into ``payload``, where the client took it on the way"""


DONE = Reply(Answer.DONE)
ABSENT = Reply(Answer.ABSENT)
OTHER_SIZE = Reply(Answer.OTHER_SIZE)


class Put(NamedTuple):
    """A value to write under a name, in two parts that follow each other."""

    name: str
    header: bytes
    payload: memoryview


class Get(NamedTuple):
    """A name, and where its value belongs: exactly ``header`` and then ``payload``. Undefined content unless the answer is DONE."""

    name: str
    header: memoryview
    payload: memoryview


class RemoteClient(Protocol):
    """Values under names in a server. Values are immutable: writing one that is there changes nothing.

    Called from several threads at once. Every call ends by its deadline, whatever the server does, and touches no buffer after that: it
    answers, or raises RemoteError, which names the server (host, port, user), never a secret. Nothing else is raised.
    """

    address: str
    """the server for messages, without secrets"""
    max_value_bytes: int | None
    """the longest value the store takes; None: any"""

    def ping(self, deadline: Deadline) -> None:
        """Returns where the server answers and lets this user in."""

    def put(self, items: Sequence[Put], deadline: Deadline) -> Iterator[Reply]:
        """Writes each item where there is none of its name. Answers in the order of the items, as they come."""

    def get_into(self, items: Sequence[Get], deadline: Deadline) -> Iterator[Reply]:
        """Reads each item into its buffers. Answers in the order of the items, as they come."""

    def sizes(self, names: Sequence[str], deadline: Deadline) -> list[int | None]:
        """The length of each value; None: there is none."""

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        """Deletes; absent names are fine."""

    def take_events(self) -> dict[str, int]:
        """What happened inside the client since the last call (hedged reads, ...) and how often, by counter name."""

    def abort(self) -> None:
        """Makes running calls and all later ones end at once, with RemoteError. Thread-safe."""

    def close(self) -> None:
        """Releases everything. No call may be running. Idempotent."""
