"""Hashes in vLLM's prefix cache that no other request can have, for the blocks of those that are put together from chunks."""

from __future__ import annotations

import uuid

from vllm.v1.core.kv_cache_utils import BlockHash
from vllm.v1.request import Request


class OwnHashes:
    """One thread, the scheduler's.

    vLLM enters a request's blocks into its prefix cache when it gives them to it, before it says so: the request must have its own hashes
    when vLLM is told of its chunks. If it then gets no blocks in this step, it goes back to those that it shares with others, or the next
    step would not find what the cache has of its prompt.
    """

    def __init__(self) -> None:
        self._asked: dict[str, Request] = {}
        """those that have their own ones in this step"""
        self._idle: dict[str, tuple[str | None, list[BlockHash]]] = {}
        """of requests that have no blocks: salt and hashes that they could have instead"""
        self._kept: set[str] = set()

    def __len__(self) -> int:
        """Requests that it knows."""
        return len(self._idle) + len(self._kept)

    def give(self, request: Request) -> None:
        """The request has its own ones until the end of the step, or for good. Blocks that vLLM found before stay what they are."""
        if request.request_id not in self._kept and request.request_id not in self._asked:
            self._asked[request.request_id] = request
            self._exchange(request)

    def keep(self, request_id: str) -> None:
        """The request has got its blocks: what it has in this step stays."""
        if self._asked.pop(request_id, None) is not None:
            del self._idle[request_id]
            self._kept.add(request_id)

    def end_step(self) -> None:
        """Nobody gets blocks any more in this step."""
        for request in self._asked.values():
            self._exchange(request)
        self._asked.clear()

    def forget(self, request_id: str) -> None:
        """The request has ended."""
        self._asked.pop(request_id, None)
        self._idle.pop(request_id, None)
        self._kept.discard(request_id)

    def _exchange(self, request: Request) -> None:
        salt, hashes = self._idle.get(request.request_id, (f"kvtier blend {uuid.uuid4().hex}", []))
        self._idle[request.request_id] = request.cache_salt, request.block_hashes[:]
        request.cache_salt, request.block_hashes[:] = salt, hashes
        request.update_block_hashes()  # those that are missing
