"""Values as objects, one for each, by obstore: written only where there is none of the name, read in one request."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import MemoryStore, from_url

from kvtier.errors import RemoteError
from kvtier.io import start_thread
from kvtier.tiers.remote import Answer, Deadline, Get, Put, Reply
from kvtier.tiers.remote.client import ABSENT, DONE, OTHER_SIZE

MULTIPART_BYTES = 64 << 20
"""from this size on an object is written in parts; that cannot be made conditional, so it is asked for first"""
_PART_BYTES = 16 << 20
RANGE_BYTES = 8 << 20
"""at least of each request where several at once read an object, since one connection rarely has a server's whole rate"""
_MAX_MESSAGE = 300
_MAX_QUESTIONS = 64
"""requests under way at once that ask for lengths: they are small, but a server counts them all the same"""
_ABSENT_ERRORS = (NotFoundError, FileNotFoundError)
_PRESENT_ERRORS = (AlreadyExistsError, PreconditionError, FileExistsError)
_REFUSED_ERRORS = (UnauthenticatedError, PermissionDeniedError, PermissionError)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectAccess:
    """Where the bucket is and how to get in. ``repr`` shows no secret."""

    url: str
    """``s3://bucket/path``, ``gs://``, ``az://``, ``file:///path``, ``memory:///``"""
    endpoint: str | None = None
    """address of a server that is not the provider's own, such as ``http://127.0.0.1:8333``"""
    region: str | None = None
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    connect_timeout_s: float = 2.0
    request_timeout_s: float = 10.0

    @property
    def address(self) -> str:
        """For messages."""
        where = self.url if self.endpoint is None else f"{self.url} at {self.endpoint}"
        return f"{where} (access key {self.access_key or 'from the environment'})"

    def open(self) -> Any:
        """The store as obstore knows it. Raises RemoteError where the URL or a setting is wrong."""
        try:
            if self.url.startswith("memory:"):
                return MemoryStore()
            if self.url.startswith("file:"):
                return from_url(self.url, mkdir=True)
            return from_url(self.url, config=self._config(), client_options=self._client_options(), retry_config=_NO_RETRIES)
        except (BaseError, ValueError, OSError) as error:
            raise RemoteError("connect_errors", f"{self.address}: {error}"[:_MAX_MESSAGE], may_pass=False) from error

    def _config(self) -> Any:
        config = {"endpoint": self.endpoint, "region": self.region, "access_key_id": self.access_key, "secret_access_key": self.secret_key}
        return {name: value for name, value in config.items() if value is not None}

    def _client_options(self) -> Any:
        options: dict[str, Any] = {
            "connect_timeout": timedelta(seconds=self.connect_timeout_s),
            "timeout": timedelta(seconds=self.request_timeout_s),
        }
        if self.endpoint is not None and self.endpoint.startswith("http://"):
            options["allow_http"] = True
        return options


_NO_RETRIES: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}


class ObjectClient:
    """Implements :class:`~kvtier.tiers.remote.client.RemoteClient`.

    The requests of all threads run on one event loop, as many at once as calls are made. obstore receives each object into memory of its
    own, from which the calling thread copies it, so that nothing touches a buffer after its call.
    """

    max_value_bytes: int | None = None

    def __init__(self, access: ObjectAccess, store: Any = None) -> None:
        """``store``: an obstore store instead of the one that ``access`` names.

        Raises RemoteError where a setting is wrong, or no thread begins.
        """
        self.address = access.address
        self._store = access.open() if store is None else store
        self._lock = threading.Lock()
        self._running: set[Future[Any]] = set()
        self._is_aborted = False
        self._loop = asyncio.new_event_loop()
        try:
            self._thread = start_thread(self._loop.run_forever, "kvtier-object-loop")
        except OSError as error:
            self._loop.close()
            raise RemoteError("connect_errors", f"{self.address}: {error}") from error

    def ping(self, deadline: Deadline) -> None:
        self.sizes(["kvtier-ping"], deadline)

    def put(self, items: Sequence[Put], deadline: Deadline) -> Iterator[Reply]:
        return self._each([self._put(item) for item in items], deadline)

    def get_into(self, items: Sequence[Get], deadline: Deadline) -> Iterator[Reply]:
        coroutines = [self._get(item.name, len(item.header) + len(item.payload)) for item in items]
        for item, found in zip(items, self._each(coroutines, deadline), strict=True):
            if isinstance(found, Reply):
                yield found
                continue
            _fill(item, found)
            yield DONE

    def sizes(self, names: Sequence[str], deadline: Deadline) -> list[int | None]:
        found: list[int | None] = []
        for start in range(0, len(names), _MAX_QUESTIONS):
            found += self._each([self._size(name) for name in names[start : start + _MAX_QUESTIONS]], deadline)
        return found

    def delete(self, names: Sequence[str], deadline: Deadline) -> None:
        for start in range(0, len(names), _MAX_QUESTIONS):
            list(self._each([self._delete(name) for name in names[start : start + _MAX_QUESTIONS]], deadline))

    def take_events(self) -> dict[str, int]:
        return {}

    def abort(self) -> None:
        with self._lock:
            self._is_aborted = True
            for future in self._running:
                future.cancel()

    def close(self) -> None:
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            given_up = asyncio.all_tasks(self._loop)
            for task in given_up:
                task.cancel()
            if given_up:
                self._loop.run_until_complete(asyncio.wait(given_up))
            self._loop.close()

    def _each(self, coroutines: Sequence[Coroutine[Any, Any, _T]], deadline: Deadline) -> Iterator[_T]:
        """Runs requests side by side; their answers in order."""
        futures: list[Future[_T]] = []
        try:
            with self._lock:
                futures += [asyncio.run_coroutine_threadsafe(coroutine, self._loop) for coroutine in coroutines]
                self._running.update(futures)
                if self._is_aborted:
                    raise RemoteError("connect_errors", f"{self.address}: the tier is closing", may_pass=False)
            for future in futures:
                yield self._answer(future, deadline)
        finally:
            with self._lock:
                self._running.difference_update(futures)
            for future in futures:
                future.cancel()

    def _answer(self, future: Future[_T], deadline: Deadline) -> _T:
        try:
            return future.result(deadline.remaining_s())
        except CancelledError as error:
            raise RemoteError("connect_errors", f"{self.address}: the tier is closing", may_pass=False) from error
        except TimeoutError as error:
            raise RemoteError("timeouts", f"{self.address}: not done within the total deadline", may_pass=False) from error
        except (BaseError, OSError) as error:
            raise self._failure(error) from error

    async def _put(self, item: Put) -> Reply:
        value = b"".join((item.header, item.payload))
        try:
            if len(value) < MULTIPART_BYTES:
                await obstore.put_async(self._store, item.name, value, mode="create", use_multipart=False)
            elif await self._size(item.name) is None:
                await obstore.put_async(self._store, item.name, value, use_multipart=True, chunk_size=_PART_BYTES)
        except _PRESENT_ERRORS:
            return DONE
        except _REFUSED_ERRORS as error:
            return Reply(Answer.REFUSED, self._text(error))
        return DONE

    async def _get(self, name: str, num_bytes: int) -> Reply | list[memoryview]:
        """What a value consists of, in order."""
        step = -(-num_bytes // max(1, num_bytes // RANGE_BYTES))  # equal ones: a header's few bytes are no range of their own
        spans = [(start, min(start + step, num_bytes)) for start in range(0, num_bytes, step)]
        reads = [self._get_range(name, span if len(spans) > 1 else None, num_bytes) for span in spans]
        pieces: list[memoryview] = []
        for found in await asyncio.gather(*reads, return_exceptions=True):  # one that is too short fails for what lies behind its end
            if isinstance(found, BaseException):
                raise found
            if isinstance(found, Reply):
                return found
            pieces.append(found)
        return pieces

    async def _get_range(self, name: str, span: tuple[int, int] | None, num_bytes: int) -> Reply | memoryview:
        """A part of a value, or all of it."""
        try:
            result = await obstore.get_async(self._store, name, options={} if span is None else {"range": span})
        except _ABSENT_ERRORS:
            return ABSENT
        if result.meta["size"] != num_bytes:
            return OTHER_SIZE
        first, end = span or (0, num_bytes)
        size = end - first
        piece = memoryview(b"")
        async for chunk in result.stream(min_chunk_size=max(1, size)):  # not all of the body: one that goes on and on would fill the memory
            if piece or len(chunk) != size:
                return OTHER_SIZE
            piece = memoryview(chunk)
        return piece if len(piece) == size else OTHER_SIZE

    async def _size(self, name: str) -> int | None:
        try:
            return (await obstore.head_async(self._store, name))["size"]
        except _ABSENT_ERRORS:
            return None

    async def _delete(self, name: str) -> None:
        with contextlib.suppress(*_ABSENT_ERRORS):
            await obstore.delete_async(self._store, name)

    def _failure(self, error: Exception) -> RemoteError:
        if isinstance(error, _REFUSED_ERRORS):
            return RemoteError("auth_errors", self._text(error), may_pass=False)
        event = "timeouts" if "timed out" in str(error).lower() or "timeout" in str(error).lower() else "server_errors"
        return RemoteError(event, self._text(error))

    def _text(self, error: Exception) -> str:
        return f"{self.address}: {' '.join(str(error).split())}"[:_MAX_MESSAGE]


def _fill(item: Get, pieces: Sequence[memoryview]) -> None:
    """Copies what a value consists of to where it belongs; the header lies in the first piece."""
    header_bytes = len(item.header)
    item.header[:] = pieces[0][:header_bytes]
    position = 0
    for piece in (pieces[0][header_bytes:], *pieces[1:]):
        item.payload[position : position + len(piece)] = piece
        position += len(piece)
