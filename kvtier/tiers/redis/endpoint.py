"""Connections to a Redis or Valkey server, or to the nodes of a cluster. redis-py makes them: TLS, users, databases, cluster slots."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import redis
import redis.sentinel
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError
from redis.retry import Retry

from kvtier.errors import RemoteError
from kvtier.tiers.redis.wire import Wire


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAccess:
    """Where the server is and how to get in. ``repr`` shows no password."""

    url: str
    """``redis://host:port/db``, ``rediss://...`` (TLS) or ``unix:///path``; no user or password in here"""
    username: str | None = None
    password: str | None = None
    ca_file: str | None = None
    """certificates that vouch for the server; None: the system's"""
    cluster: bool = False
    sentinel: str | None = None
    """name of the primary; ``url`` then names sentinels: ``redis://host:port,host:port/db``"""
    connect_timeout_s: float = 1.0
    stall_timeout_s: float = 1.0
    """longest time without a byte"""

    def __repr__(self) -> str:
        return f"RedisAccess({self.address})"

    @property
    def address(self) -> str:
        """For messages."""
        return f"{self.url} (user {self.username or 'default'})"


class Endpoint:
    """Hands out connected wires. Thread-safe."""

    def __init__(self, access: RedisAccess) -> None:
        """Does not connect. Raises ValueError where the URL is none."""
        self._access = access
        self._options = _options(access)
        self._lock = threading.Lock()
        self._wires: set[Wire] = set()
        self._is_aborted = False
        self._cluster: redis.RedisCluster | None = None
        self._pool = None if access.cluster else _pool(access, self._options)

    def pool_for(self, name: str) -> Any:
        """The connection pool of the server that keeps a name."""
        if self._pool is not None:
            return self._pool
        try:
            if self._cluster is None:
                self._cluster = redis.RedisCluster.from_url(self._access.url, **self._options)
            node = self._cluster.get_node_from_key(name)
        except (RedisError, OSError) as error:
            raise self._failure(error) from error
        if node is None or node.redis_connection is None:
            raise RemoteError("connect_errors", f"{self._access.address}: no node keeps {name}")
        return node.redis_connection.connection_pool

    @contextmanager
    def wire(self, pool: Any) -> Iterator[Wire]:
        """A connection, to itself; given back where nothing was raised, else closed."""
        if self._is_aborted:
            raise RemoteError("connect_errors", f"{self._access.address}: the tier is closing", may_pass=False)
        try:
            connection = pool.get_connection()
        except (RedisError, OSError) as error:
            raise self._failure(error) from error
        wire = Wire(connection._sock, self._access.address, self._access.stall_timeout_s)
        with self._lock:
            self._wires.add(wire)
        is_clean = False
        try:
            yield wire
            is_clean = True
        finally:
            with self._lock:
                self._wires.discard(wire)
            if not is_clean:
                connection.disconnect()
            pool.release(connection)

    @property
    def has_sentinel(self) -> bool:
        """Whether sentinels say who the primary is, each time a connection is made."""
        return self._access.sentinel is not None

    def moved(self) -> None:
        """A name is kept elsewhere now: the next call asks the cluster anew who keeps what."""
        self._cluster = None

    def abort(self) -> None:
        """Makes every wire fail, those to come too."""
        self._is_aborted = True
        with self._lock:
            for wire in self._wires:
                wire.abort()

    def close(self) -> None:
        """Closes what is idle."""
        if self._pool is not None:
            self._pool.disconnect()
        if self._cluster is not None:
            self._cluster.close()

    def _failure(self, error: Exception) -> RemoteError:
        where = self._access.address
        if isinstance(error, (AuthenticationError, AuthorizationError)):
            return RemoteError("auth_errors", f"{where}: the server does not let this user in: {error}", may_pass=False)
        event = "timeouts" if isinstance(error, (redis.TimeoutError, TimeoutError)) else "connect_errors"
        return RemoteError(event, f"{where}: {error}")


def _pool(access: RedisAccess, options: dict[str, Any]) -> redis.ConnectionPool:
    if access.sentinel is None:
        return redis.ConnectionPool.from_url(access.url, **options)
    scheme, _, rest = access.url.partition("://")
    hosts, _, database = rest.partition("/")
    places = [(host, int(port)) for host, _, port in (place.rpartition(":") for place in hosts.split(","))]
    own = {name: options[name] for name in ("socket_connect_timeout", "socket_timeout", "retry")}
    sentinel = redis.sentinel.Sentinel(places, sentinel_kwargs=own)
    more = {"ssl": True} if scheme == "rediss" else {}
    return redis.sentinel.SentinelConnectionPool(access.sentinel, sentinel, db=int(database or 0), **options, **more)


def _options(access: RedisAccess) -> dict[str, Any]:
    options: dict[str, Any] = {
        "socket_connect_timeout": access.connect_timeout_s,
        "socket_timeout": access.stall_timeout_s,
        "username": access.username,
        "password": access.password,
        "protocol": 2,
        "retry": Retry(NoBackoff(), 0),
    }
    if access.ca_file is not None:
        options["ssl_ca_certs"] = access.ca_file
    return options
