"""Ids of the ways in which a payload can be stored. The id is part of every record, so an id never changes its meaning.

This version stores payloads as they are.  A reader that meets an id it does not know must treat the record as unreadable.
"""

from __future__ import annotations

import enum

__all__ = ["CodecId", "is_known_codec"]


class CodecId(enum.IntEnum):
    """The registry. New codecs get new numbers; numbers are never reused."""

    RAW = 0
    """stored bytes = payload bytes"""


_KNOWN = frozenset(int(codec) for codec in CodecId)


def is_known_codec(codec_id: int) -> bool:
    """Whether this version can decode ``codec_id``."""
    return codec_id in _KNOWN
