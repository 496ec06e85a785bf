"""What a request that has ended says of the next one of its session."""

from __future__ import annotations

import contextlib

from kvtier.cache import Cache
from kvtier.connectors.requests import Request
from kvtier.control.hints import Hint, NextUse, ToolCall
from kvtier.errors import ControlError


def hint_end(engine: Cache, request: Request, block_tokens: int) -> None:
    """Tells the cache. A refusal is counted there, and changes nothing for anybody."""
    options = request.options
    if not options.session and options.priority != "high":
        return
    num_tokens = len(request.token_ids)
    keys = request.keys(num_tokens // block_tokens, block_tokens)
    if options.priority == "high":
        engine.hint_keep(keys)
    if not options.session:
        return
    engine.hint_ended(options.session, keys, num_tokens)
    hints: list[Hint] = [ToolCall(options.session, options.tool, options.expected_s)] if options.tool else []
    hints += [] if options.next_use_s is None else [NextUse(options.session, options.next_use_s)]
    for hint in hints:
        with contextlib.suppress(ControlError):
            engine.hint(hint)
