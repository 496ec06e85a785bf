"""Every exception kvtier raises.

::

    KVTierError
    +-- ConfigError (ValueError)        a setting is wrong: names the field, the value, what is allowed
    +-- UnsupportedModelError (ValueError)  a layout or feature kvtier would get wrong, refused at start
    +-- TierError (OSError)             a tier cannot be opened: says what and how to mend it
    |   +-- TierBusyError               another process holds the directory: names it
    |   +-- TierFormatError             the directory is of another format or damaged beyond use
    |   +-- RemoteError                 a remote store does not answer, or refuses: names it, the user and the cause, no secret
    +-- DaemonError (OSError)           the node daemon cannot be reached or refuses: names the socket and the cause
    +-- ArenaError (OSError)            the arena cannot be made or mapped (too little /dev/shm, ...)
    +-- TraceError (ValueError)         a trace cannot be read: names file, line and what was expected
    +-- ClosedError (ValueError)        used after close()
    +-- ControlError (ValueError)       a verb of the control API is refused: names the argument, the value, what is allowed
    |   +-- QuotaError                  it would take more than its share
    |   +-- UnknownSessionError         a hint for a session that kvtier has never seen
    +-- JobCancelledError               the result of a job that was cancelled was asked for
    +-- JobTimeoutError (TimeoutError)  a job is not over yet
    +-- BlendRefusedError (ValueError)  this request's chunks cannot be reused: says why; ordinary prefill serves it
    +-- InvariantError (AssertionError) kvtier has a bug

After start nothing of this reaches an engine: what goes wrong then becomes a miss and a counted event.
"""

from __future__ import annotations

import enum


class KVTierError(Exception):
    """Base of all errors raised by kvtier."""


class ConfigError(KVTierError, ValueError):
    """A setting is wrong. The message names the field, the value and what is allowed."""


class UnsupportedModelError(KVTierError, ValueError):
    """The model or engine uses something kvtier does not support yet; refused at start, by name."""


class TierError(KVTierError, OSError):
    """A tier cannot be opened. The message says what is wrong and how to mend it."""


class TierBusyError(TierError):
    """Another process holds the tier's directory. The message names the holder."""


class TierFormatError(TierError):
    """The directory was written by another format version, or its index is damaged beyond use."""


class RemoteError(TierError):
    """A remote store does not answer, or refuses. Raised at start; later it becomes an outcome and a counted event.

    ``event`` is the counter's name; ``may_pass`` says whether the same call may work if it is repeated at once, ``is_failure`` whether the
    store is the worse for it: one that answers, and refuses one thing, may do all others.
    """

    def __init__(self, event: str, message: str, *, may_pass: bool = True, is_failure: bool = True) -> None:
        super().__init__(message)
        self.event = event
        self.may_pass = may_pass
        self.is_failure = is_failure


class ArenaError(KVTierError, OSError):
    """The arena cannot be created or mapped."""


class DaemonError(KVTierError, OSError):
    """The node daemon cannot be started, cannot be reached, or refuses this engine. The message names the socket and the cause."""


class TraceError(KVTierError, ValueError):
    """A trace cannot be read. The message names the file, the line and what was expected there."""


class ClosedError(KVTierError, ValueError):
    """An object was used after ``close()``."""


class ControlError(KVTierError, ValueError):
    """A verb of the control API is refused. The message names the argument, the value and what is allowed."""


class QuotaError(ControlError):
    """A pin or a hint would take more than its share. The message names the share."""


class UnknownSessionError(ControlError):
    """A hint names a session that no request has named."""


class JobCancelledError(KVTierError):
    """The result of a job was asked for that was cancelled."""


class JobTimeoutError(KVTierError, TimeoutError):
    """A job is not over after the time that its caller wanted to wait. It goes on."""


class RefusalReason(enum.Enum):
    """Why a request's chunks are not reused; the values are the labels of its metrics."""

    SPANS_OVERLAP = "spans_overlap"
    SPAN_OUTSIDE_PROMPT = "span_outside_prompt"
    TOKENS_DIFFER = "tokens_differ"
    RATIO = "ratio"
    MODEL = "model"
    METHOD = "method"
    BOUNDARIES = "boundaries"
    """its messages were to be the chunks, and nobody knows what a message of this model begins with; or what lies between separators that
    are a text, and the model has no tokenizer"""
    FORMAT = "format"
    """what was asked is not a mapping with the right keys and kinds of values"""
    OFF = "off"
    """asked for, but not switched on in the configuration"""
    LOAD = "load"
    """nothing may be loaded for the request: it says so itself, or wants to see its whole prompt computed"""
    MARGIN = "margin"
    """a least margin that is none"""
    UNSURE = "unsure"
    """with its chunks reused the model is less sure of the first token than was asked for"""


class BlendRefusedError(KVTierError, ValueError):
    """The chunks of one request cannot be reused. The request itself is served by ordinary prefill."""

    def __init__(self, reason: RefusalReason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class InvariantError(KVTierError, AssertionError):
    """An internal promise was broken: kvtier has a bug."""
