"""Traces with one request a line and the ids of its blocks: Mooncake's and Qwen-Bailian's.

Mooncake (FAST'25 release): ``timestamp`` in ms, ``input_length``, ``output_length``, ``hash_ids`` of 512 tokens each.
Qwen-Bailian: the same with ``timestamp`` in seconds, blocks of 16 tokens, and ``chat_id``, ``parent_chat_id`` (-1: none), ``type``,
``turn``.
In both the last id may stand for a block that is not full; it is left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvtier.sim.readers.lines import an_object, count_of, ids_of, number_of, read_lines
from kvtier.sim.trace import Trace, TraceBuilder

MOONCAKE_BLOCK_TOKENS = 512
BAILIAN_BLOCK_TOKENS = 16


def read_mooncake(path: Path, *, group: int = 1, skip_bad: bool = False) -> Trace:
    """Reads a file of the Mooncake release. Raises TraceError."""
    builder = TraceBuilder(MOONCAKE_BLOCK_TOKENS, group=group)

    def take(value: Any) -> None:
        record = an_object(value)
        time_s = number_of(record, "timestamp") / 1000
        input_tokens, output_tokens = count_of(record, "input_length"), count_of(record, "output_length")
        builder.add(time_s, ids_of(record, "hash_ids")[: input_tokens // MOONCAKE_BLOCK_TOKENS], input_tokens, output_tokens)

    builder.num_skipped = read_lines(path, take, skip_bad=skip_bad)
    return builder.build(path.stem)


def read_bailian(path: Path, *, group: int = 1, skip_bad: bool = False) -> Trace:
    """Reads a file of the Qwen-Bailian release. A session is a chat with all that follows from it. Raises TraceError."""
    builder = TraceBuilder(BAILIAN_BLOCK_TOKENS, group=group)
    sessions: dict[int, int] = {}

    def take(value: Any) -> None:
        record = an_object(value)
        time_s = number_of(record, "timestamp")
        input_tokens, output_tokens = count_of(record, "input_length"), count_of(record, "output_length")
        chat, parent = count_of(record, "chat_id", low=-1), count_of(record, "parent_chat_id", low=-1, default=-1)
        blocks = ids_of(record, "hash_ids")[: input_tokens // BAILIAN_BLOCK_TOKENS]
        session = sessions[chat] = sessions.get(parent, chat)
        builder.add(time_s, blocks, input_tokens, output_tokens, session=session)

    builder.num_skipped = read_lines(path, take, skip_bad=skip_bad)
    return builder.build(path.stem)
