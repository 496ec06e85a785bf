"""How the payloads of a directory are stored: as they are, or encrypted, with nonce and tag in the header page."""

from __future__ import annotations

import threading
from collections import Counter

from kvtier.codecs import NO_KEY, TAG_BYTES, CodecId, Sealer
from kvtier.tiers.disk.places import Entry
from kvtier.tiers.record import RecordFields, identity_bytes
from kvtier.types import BlockKey


class Sealing:
    """One directory's way, with or without a key; and what was found to be encrypted in another one. Thread-safe."""

    def __init__(self, sealer: Sealer | None = None) -> None:
        self._sealer = sealer
        self._codec_id = CodecId.RAW if sealer is None else CodecId.AES_GCM_APART
        self._key_id = NO_KEY if sealer is None else sealer.key_id
        self._lock = threading.Lock()
        self._events: Counter[str] = Counter()

    @property
    def is_encrypted(self) -> bool:
        """Whether there is a key."""
        return self._sealer is not None

    def fields(self, key: BlockKey, entry: Entry) -> RecordFields:
        """The record to write to, or to expect at, an entry's place."""
        place, num_bytes, sequence, parent, namespace = entry
        return RecordFields(key, parent, namespace, num_bytes, sequence, place, self._codec_id, self._key_id)

    def is_ours(self, found: RecordFields) -> bool:
        """Whether a record is stored in this way, as far as it says so: the index does not name keys."""
        return found.codec_id == self._codec_id and found.key_id in (NO_KEY, self._key_id)

    def seal(self, fields: RecordFields, payload: memoryview, room: memoryview) -> bytes:
        """Encrypts to the start of ``room``, ``TAG_BYTES`` longer than the payload. Returns what belongs into the header."""
        assert self._sealer is not None
        nonce = self._sealer.seal_into(payload, room, fields.namespace, identity_bytes(fields))
        return nonce + bytes(room[len(payload) :])

    def open(self, fields: RecordFields, seal: bytes, room: memoryview, payload: memoryview) -> bool:
        """Decrypts the start of ``room``, as long as in ``seal``, to ``payload``. ``seal``: from the header. False: it is not ours."""
        assert self._sealer is not None
        nonce, room[len(payload) :] = seal[:-TAG_BYTES], seal[-TAG_BYTES:]
        return self._sealer.open_with(nonce, room, payload, fields.namespace, identity_bytes(fields))

    def count(self, event: str, number: int = 1) -> None:
        """Notes what was found."""
        with self._lock:
            self._events[event] += number

    def take_events(self) -> dict[str, int]:
        """What was noted since the last call."""
        with self._lock:
            events, self._events = self._events, Counter()
        return {name: number for name, number in events.items() if number}
