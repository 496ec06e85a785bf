"""Reads back what a remote store is believed to hold, and verifies it."""

from __future__ import annotations

from collections.abc import Iterable

from kvtier.errors import RemoteError
from kvtier.tiers.remote.client import Answer, Get, RemoteClient
from kvtier.tiers.remote.deadline import Deadline
from kvtier.tiers.remote.ledger import Known
from kvtier.tiers.remote.records import HEADER_BYTES, Records, name_of
from kvtier.types import Damage, Outcome


def check_values(client: RemoteClient, records: Records, prefix: str, known: Iterable[Known], timeout_s: float) -> list[Damage]:
    """What is wrong with the values of blocks. One that is gone is none: the store may evict."""
    found: list[Damage] = []
    for meta, namespace in known:
        payload = memoryview(bytearray(meta.num_bytes))
        get = Get(name_of(prefix, namespace, meta.key), memoryview(bytearray(HEADER_BYTES)), records.room_for(payload))
        try:
            (reply,) = client.get_into([get], Deadline(timeout_s))
        except RemoteError as error:
            return [*found, Damage(client.address, str(error))]
        if reply.answer is Answer.OTHER_SIZE:
            found.append(Damage(get.name, "the value has another length than the block", meta.key))
        elif reply.answer is Answer.DONE:
            verdict = records.verify(get, payload, meta, namespace, reply.checksum)
            if verdict.outcome is Outcome.CORRUPT:
                found.append(Damage(get.name, verdict.error or "", meta.key))
    return found
