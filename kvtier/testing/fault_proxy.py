"""A proxy between a client and a real server that delays, throttles, cuts, corrupts, and leaves connections half open."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from pathlib import Path

_PIECE_BYTES = 1 << 16
_TICK_S = 0.05

Address = Path | tuple[str, int]


class FaultProxy:
    """Listens on a loopback port and passes bytes to the server and back. Faults may be changed at any time, for what passes then."""

    def __init__(self, server: Address, tls: ssl.SSLContext | None = None) -> None:
        """``tls``: speaks TLS with the client, and not with the server."""
        self._server = server
        self._tls = tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.delay_s = 0.0
        """before each piece of a reply"""
        self.bytes_per_s: float | None = None
        """how fast replies and requests pass"""
        self.cut_after_bytes: int | None = None
        """of replies, counted from when it is set; then all connections end"""
        self.corrupt_at: int | None = None
        """one byte of the replies, counted from when it is set, is flipped; then it is None again"""
        self.garbage: bytes | None = None
        """instead of replies"""
        self.is_half_open = False
        """connections are accepted and stay, and nothing passes"""
        self.is_refusing = False
        """connections are closed at once, those that are there too"""
        self.num_connections = 0
        self._closing = False
        self._threads = [threading.Thread(target=self._accept, name="fault-proxy", daemon=True)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        """For a Redis client."""
        return f"redis://127.0.0.1:{self.port}/0"

    def heal(self) -> None:
        """No more faults."""
        self.delay_s, self.bytes_per_s, self.cut_after_bytes, self.corrupt_at, self.garbage = 0.0, None, None, None, None
        self.is_half_open = self.is_refusing = False

    def close(self) -> None:
        """Ends all connections and threads."""
        self._closing = True
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._closing:
            if not select.select([self._listener], [], [], _TICK_S)[0]:
                continue
            client = self._listener.accept()[0]
            self.num_connections += 1
            thread = threading.Thread(target=self._serve, args=(client,), name="fault-proxy", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, accepted: socket.socket) -> None:
        family = socket.AF_UNIX if isinstance(self._server, Path) else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family) as server, self._greeted(accepted) as client:
            server.connect(str(self._server) if isinstance(self._server, Path) else self._server)
            while not (self._closing or self.is_refusing):
                has_more = isinstance(client, ssl.SSLSocket) and client.pending()
                ready = [client] if has_more else select.select([client, server], [], [], _TICK_S)[0]
                if self.is_half_open:
                    time.sleep(_TICK_S)
                    continue
                for source in ready:
                    if not self._pass(source, client, server):
                        return

    def _greeted(self, client: socket.socket) -> socket.socket:
        return client if self._tls is None else self._tls.wrap_socket(client, server_side=True)

    def _pass(self, source: socket.socket, client: socket.socket, server: socket.socket) -> bool:
        """Passes one piece on; whether the connection goes on."""
        limit = _PIECE_BYTES if self.bytes_per_s is None else max(1, int(self.bytes_per_s * _TICK_S))
        piece = source.recv(limit)
        if not piece:
            return False
        if self.bytes_per_s is not None:
            time.sleep(len(piece) / self.bytes_per_s)
        if source is client:
            server.sendall(piece)
            return True
        return self._reply(piece, client)

    def _reply(self, piece: bytes, client: socket.socket) -> bool:
        time.sleep(self.delay_s)
        if self.garbage is not None:
            client.sendall(self.garbage)
            return True
        if self.corrupt_at is not None:
            position, self.corrupt_at = self.corrupt_at, self.corrupt_at - len(piece)
            if position < len(piece):
                piece = piece[:position] + bytes([piece[position] ^ 0x55]) + piece[position + 1 :]
                self.corrupt_at = None
        if self.cut_after_bytes is not None:
            client.sendall(piece[: self.cut_after_bytes])
            self.cut_after_bytes -= min(len(piece), self.cut_after_bytes)
            return self.cut_after_bytes > 0
        client.sendall(piece)
        return True
