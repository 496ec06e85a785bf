"""`kvtier serve`: the daemon as a process."""

from __future__ import annotations

import logging
import signal
from pathlib import Path

from kvtier.config import Config
from kvtier.errors import ConfigError
from kvtier.serve.daemon import Daemon


def serve(config: Config, path: Path | None) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        ConfigError: no socket is named, or a tier in device memory, which no daemon can own.
        DaemonError: the socket cannot be had.
    """
    path = path or config.daemon.socket
    if path is None:
        raise ConfigError("daemon.socket is null and there is no --socket; allowed: the path of a Unix socket")
    if config.gpu is not None:
        raise ConfigError("tiers[0].type is gpu; allowed for a daemon: host and what is below it, since device memory is the engine's")
    logging.basicConfig(level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    daemon = Daemon(config, path.absolute())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.stop())
    daemon.run()
