"""Ids of the ways in which a payload can be stored. The id is part of every record, so an id never changes its meaning.

A reader that meets an id it does not know must treat the record as unreadable.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping

__all__ = ["KEY_ID_BYTES", "NO_KEY", "CodecId", "is_known_codec", "overhead_of"]

KEY_ID_BYTES = 8
NO_KEY = bytes(KEY_ID_BYTES)
"""the key's id of payloads that are not encrypted"""


class CodecId(enum.IntEnum):
    """The registry. New codecs get new numbers; numbers are never reused."""

    RAW = 0
    """stored bytes = payload bytes"""
    AES_GCM = 1
    """stored bytes = nonce (12 bytes), payload encrypted with AES-256-GCM, tag (16 bytes)"""


_KNOWN = frozenset(int(codec) for codec in CodecId)
_OVERHEAD: Mapping[int, int] = {CodecId.RAW: 0, CodecId.AES_GCM: 28}


def is_known_codec(codec_id: int) -> bool:
    """Whether this version knows what ``codec_id`` means."""
    return codec_id in _KNOWN


def overhead_of(codec_id: int) -> int:
    """By how many bytes what is stored is longer than the payload."""
    return _OVERHEAD[codec_id]
