"""The control API over a daemon, for a program beside the engines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kvtier.config import DaemonConfig
from kvtier.controller import Controller
from kvtier.hashing import Namespace
from kvtier.serve.channel import Attaching
from kvtier.serve.client import ServedCache
from kvtier.serve.messages import Hello


class DaemonController(Controller):
    """The control API of a daemon's cache, with a connection of its own."""

    def close(self) -> None:
        """Ends all jobs, the connection and the pins made by it. Idempotent."""
        super().close()
        self._engine.close()


def connect(path: str | os.PathLike[str], *, timeout_s: float = 5.0) -> DaemonController:
    """The control API of the daemon at ``path``. Its verbs are carried out at once on the thread that called this; ``close`` ends it.

    The same verbs as beside an engine, but for ``move``. A pin ends with its connection. A daemon that does not answer for ``timeout_s``
    makes a verb raise DaemonError; later ones find it again.

    Raises:
        DaemonError: there is no daemon, or no engine has come to it yet.
    """
    settings: Any = {"socket": Path(path).absolute(), "deadline": timeout_s, "attach_timeout": timeout_s, "reconnect": 0.1}
    hello = Hello("control", "", "", {})
    cache = ServedCache(Attaching(DaemonConfig(**settings), hello))
    namespace: dict[str, Any] = dict(cache.welcome.namespace)
    return DaemonController(cache, namespace=Namespace(**namespace), block_tokens=cache.welcome.block_tokens)
