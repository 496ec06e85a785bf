"""A real Valkey behind a proxy, and everything that can go wrong with such a store, by name."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from kvtier.testing.fault_proxy import FaultProxy
from kvtier.testing.servers import ValkeyServer

SLOW_BYTES_PER_S = 1e6
_SECRET = "another-secret"


class FaultyValkey:
    """A server and the proxy through which clients reach it (``url``). ``begin`` and ``end`` one fault after the other; close it."""

    def __init__(self, directory: Path) -> None:
        self.server = ValkeyServer(directory).start()
        self.proxy = FaultProxy(self.server.socket_path)
        self.url = self.proxy.url

    def begin(self, fault: str) -> None:
        """From now on. ``fault``: one of ``FAULTS``."""
        _FAULTS[fault](self, True)

    def end(self, fault: str) -> None:
        """All is well again."""
        _FAULTS[fault](self, False)

    def close(self) -> None:
        """Ends both."""
        self.proxy.close()
        self.server.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _slow(self, is_on: bool) -> None:
        self.proxy.bytes_per_s = SLOW_BYTES_PER_S if is_on else None

    def _garbage(self, is_on: bool) -> None:
        self.proxy.garbage = b"\x00garbage\r\n" * 100 if is_on else None

    def _frozen(self, is_on: bool) -> None:
        (self.server.freeze if is_on else self.server.thaw)()

    def _auth(self, is_on: bool) -> None:
        password = _SECRET if is_on else ""
        self.server.command("CONFIG", "SET", "requirepass", password, password="" if is_on else _SECRET)
        self.proxy.is_refusing = True  # those who are in would stay in
        time.sleep(0.2)
        self.proxy.is_refusing = False

    def _full(self, is_on: bool) -> None:
        self.server.command("CONFIG", "SET", "maxmemory", "1mb" if is_on else "0")

    def _cut(self, is_on: bool) -> None:
        self.proxy.is_refusing = is_on

    def _killed(self, is_on: bool) -> None:
        if is_on:
            self.server.kill()
        else:
            self.server.start()


_FAULTS: Mapping[str, Callable[[FaultyValkey, bool], None]] = {
    "slow": FaultyValkey._slow,
    "garbage": FaultyValkey._garbage,
    "frozen": FaultyValkey._frozen,
    "auth": FaultyValkey._auth,
    "full": FaultyValkey._full,
    "cut": FaultyValkey._cut,
    "killed": FaultyValkey._killed,
}
FAULTS = tuple(_FAULTS)
"""slowed to 1 MB/s; answers garbage; SIGSTOP; lets nobody in; out of memory; connections end at once; kill -9, which empties it"""
