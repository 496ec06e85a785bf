"""Ids of the ways in which a payload can be stored. The id is part of every record, so an id never changes its meaning.

A reader that meets an id it does not know must treat the record as unreadable.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Protocol

__all__ = ["KEY_ID_BYTES", "NO_KEY", "TAG_BYTES", "CodecId", "Sealer", "is_known_codec", "overhead_of"]

KEY_ID_BYTES = 8
NO_KEY = bytes(KEY_ID_BYTES)
"""the key's id of payloads that are not encrypted"""
TAG_BYTES = 16
"""behind an encrypted payload"""


class CodecId(enum.IntEnum):
    """The registry. New codecs get new numbers; numbers are never reused."""

    RAW = 0
    """stored bytes = payload bytes"""
    AES_GCM = 1
    """stored bytes = nonce (12 bytes), payload encrypted with AES-256-GCM, tag (16 bytes)"""
    AES_GCM_APART = 2
    """stored bytes = payload encrypted with AES-256-GCM; nonce and tag are in the header"""


_KNOWN = frozenset(int(codec) for codec in CodecId)
_OVERHEAD: Mapping[int, int] = {CodecId.RAW: 0, CodecId.AES_GCM: 28, CodecId.AES_GCM_APART: 0}


def is_known_codec(codec_id: int) -> bool:
    """Whether this version knows what ``codec_id`` means."""
    return codec_id in _KNOWN


def overhead_of(codec_id: int) -> int:
    """By how many bytes what is stored is longer than the payload."""
    return _OVERHEAD[codec_id]


class Sealer(Protocol):
    """Encrypts payloads and opens them again: :class:`kvtier.codecs.aes_gcm.Cipher`. ``context`` must be the same for both."""

    key_id: bytes

    def seal(self, payload: memoryview, namespace: bytes, context: bytes) -> bytearray:
        """Nonce, encrypted payload and tag."""

    def seal_into(self, payload: memoryview, room: memoryview, namespace: bytes, context: bytes) -> bytes:
        """Writes encrypted payload and tag to ``room``, which is ``TAG_BYTES`` longer than the payload. Returns the nonce."""

    def open_into(self, sealed: memoryview, payload: memoryview, namespace: bytes, context: bytes) -> bool:
        """Writes what ``seal`` was given to ``payload``, which is undefined where the answer is False: it was not sealed so."""

    def open_with(self, nonce: bytes, room: memoryview, payload: memoryview, namespace: bytes, context: bytes) -> bool:
        """As ``open_into``, for what ``seal_into`` made."""
