"""The same work done by LMCache, as a program of its own: ``python -m kvtier.bench.lmcache WORK PARAMETERS``.

``peers.Peer`` starts it, writes the name of a case on its standard input for each round, and reads the seconds. It is a process of its own
because LMCache sets process-wide things (threads, start methods, the garbage collector); whatever it prints goes to standard error.

How LMCache runs here: its engine in this process, without a server; prompts as lists of ints, which it hashes fastest; its default hash,
Python's own; logging and usage reports off, no controller, no events. Chunks are as large as kvtier's blocks where deciding is measured,
and of its default 256 tokens where KV is moved. On a machine without GPU it has no connector for paged memory: ``PagedMemory`` hands its
engine the paged tensors through its own transfer function for CPU tensors, K and V of a layer in one tensor. Where KV is moved it uses one
thread or torch's own number, whichever is faster at first.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import torch
from lmcache import device_ops
from lmcache.lmcache_native import EngineKVFormat, TransferDirection
from lmcache.utils import CacheEngineKey, mock_up_broadcast_fn, mock_up_broadcast_object_fn
from lmcache.v1.cache_engine import LMCacheEngine, LMCacheEngineBuilder
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from lmcache.v1.gpu_connector.mock_gpu_connector import MockGPUConnector
from lmcache.v1.metadata import LMCacheMetadata

GIB = 1 << 30
CHUNK_TOKENS = 256
PUTS_PER_ROUND = 16
S3_SETTINGS = {
    "s3_region": "us-east-1",
    "disable_tls": True,
    "s3_prefer_http2": False,
    "aws_access_key_id": "any",
    "aws_secret_access_key": "any",
    "save_chunk_meta": False,
}
"""of a server of one's own, without TLS; the rest as it is by default"""
Case = Callable[[], float]


def lookups(tokens: int, block_tokens: int, seed: int) -> dict[str, Case]:
    """Looking up a prompt all of which is stored, or nothing of it; a page of KV per chunk."""
    shape = (1, 2, block_tokens, 1, max(1, 1024 // block_tokens))
    engine = _engine(shape, MockGPUConnector(shape), max_local_cpu_size=max(0.125, 2 * tokens // block_tokens * 4096 / GIB))
    prompt = _tokens(tokens, seed)
    other = [token + 1 for token in prompt]
    engine.store(prompt)

    def all_hit() -> None:
        assert tokens == engine.lookup(prompt)

    def pinned() -> None:
        assert tokens == engine.lookup(prompt, lookup_id="r", pin=True)
        engine.lookup_unpin("r")

    def no_hit() -> None:
        assert engine.lookup(other) == 0

    return {"all hit": _timed(all_hit), "pin": _timed(pinned), "no hit": _timed(no_hit)}


def hashing(tokens: int, block_tokens: int, seed: int) -> dict[str, Case]:
    """The keys of a prompt."""
    shape = (1, 2, block_tokens, 1, 8)
    database = _engine(shape, MockGPUConnector(shape), max_local_cpu_size=0.125).token_database
    prompt = _tokens(tokens, seed)

    def keys() -> None:
        assert tokens // block_tokens == sum(1 for _ in database.process_tokens(prompt))

    return {"list": _timed(keys)}


def eviction(resident: int, directory: str) -> dict[str, Case]:
    """Seconds per put of a page into a full disk backend: deciding and removing what is evicted; the write itself not counted."""
    shape = (1, 2, 64, 1, 16)
    limit = (resident + 0.5) * 4096 / GIB
    engine = _engine(
        shape, MockGPUConnector(shape), local_cpu=False, max_local_cpu_size=0.125, local_disk=directory, max_local_disk_size=limit
    )
    assert engine.storage_manager is not None
    disk = engine.storage_manager.storage_backends["LocalDiskBackend"]
    page = engine.storage_manager.allocate(engine.metadata.get_shapes(64), engine.metadata.get_dtypes())
    assert 4096 == page.get_physical_size()
    number = 0

    def put() -> float:
        nonlocal number
        keys = [CacheEngineKey("bench", 1, 0, number + i, torch.bfloat16) for i in range(PUTS_PER_ROUND)]
        number += PUTS_PER_ROUND
        start = time.perf_counter()
        for key in keys:
            disk.submit_put_task(key, page)
        seconds = time.perf_counter() - start
        while any(disk.exists_in_put_tasks(key) for key in keys):
            time.sleep(0.0005)
        assert all(disk.contains(key) for key in keys)
        return seconds / PUTS_PER_ROUND

    while number < resident:
        put()
    assert len(disk.dict) <= resident
    return {"put": put}


def copies(layers: int, heads: int, head_dim: int, block_tokens: int, num_blocks: int) -> dict[str, Case]:
    """The bare copy between paged tensors and its memory objects."""
    memory = PagedMemory(layers, heads, head_dim, block_tokens, 2 * num_blocks)
    num_tokens = num_blocks * block_tokens
    starts = range(0, num_tokens, CHUNK_TOKENS)
    chunks = [torch.ones((2, layers, min(CHUNK_TOKENS, num_tokens - start), heads * head_dim), dtype=torch.bfloat16) for start in starts]
    scattered = np.random.default_rng(1).permutation(2 * num_blocks)[:num_blocks]
    cases = {}
    for order, block_ids in {"in a row": np.arange(num_blocks), "scattered": scattered}.items():
        slots = memory.slots(block_ids)
        for name, direction in (("store", TransferDirection.D2H), ("load", TransferDirection.H2D)):

            def move(slots: torch.Tensor = slots, direction: TransferDirection = direction) -> None:
                for start, chunk in zip(starts, chunks, strict=True):
                    memory.move(chunk, slots[start : start + CHUNK_TOKENS], direction)

            cases[f"{name}, {order}"] = _timed(move)
    _choose_threads(cases)
    return cases


def facade(layers: int, heads: int, head_dim: int, block_tokens: int, num_blocks: int) -> dict[str, Case]:
    """Storing a new prompt and loading it again through the engine; its memory has room for three."""
    memory = PagedMemory(layers, heads, head_dim, block_tokens, num_blocks)
    num_bytes = num_blocks * block_tokens * layers * 2 * heads * head_dim * 2
    shape = (layers, 2, CHUNK_TOKENS, heads, head_dim)
    engine = _engine(shape, memory, max_local_cpu_size=3.1 * num_bytes / GIB, save_unfull_chunk=True)
    slots = memory.slots(np.random.default_rng(4).permutation(num_blocks))
    prompt: list[int] = list(range(num_blocks * block_tokens))

    def store() -> None:
        prompt[0] += 1_000_000
        engine.store(prompt, slot_mapping=slots)

    def load() -> None:
        assert len(prompt) == int(engine.retrieve(prompt, slot_mapping=slots).sum())

    cases = {"store": _timed(store), "load": _timed(load)}
    _choose_threads(cases)
    return cases


def remote(url: str, block_bytes: int, num_blocks: int) -> dict[str, Case]:
    """Writing and reading a batch of chunks by its remote backend; what was written is not there before. Without paged memory."""
    shape = (1, 2, CHUNK_TOKENS, 1, block_bytes // (4 * CHUNK_TOKENS))
    size = (2.2 * num_blocks + 1) * block_bytes / GIB
    extra = S3_SETTINGS if url.startswith("s3:") else None
    engine = _engine(shape, MockGPUConnector(shape), max_local_cpu_size=size, remote_url=url, remote_serde="naive", extra_config=extra)
    assert engine.storage_manager is not None
    backend = engine.storage_manager.storage_backends["RemoteBackend"]
    shapes, dtypes = engine.metadata.get_shapes(CHUNK_TOKENS), engine.metadata.get_dtypes()
    chunks = [engine.storage_manager.allocate(shapes, dtypes) for _ in range(num_blocks)]
    assert block_bytes == chunks[0].get_physical_size()
    keys: list[CacheEngineKey] = []

    def put() -> float:
        for key in keys:
            backend.remove(key)
        first = keys[-1].chunk_hash + 1 if keys else 0
        keys[:] = [CacheEngineKey("bench", 1, 0, first + number, torch.bfloat16) for number in range(num_blocks)]
        written = threading.Semaphore(0)
        start = time.perf_counter()
        backend.batched_submit_put_task(keys, chunks, on_complete_callback=lambda _: written.release())
        for _ in keys:
            assert written.acquire(timeout=60.0)
        return time.perf_counter() - start

    def get() -> float:
        start = time.perf_counter()
        found = backend.batched_get_blocking(keys)
        seconds = time.perf_counter() - start
        for chunk in found:
            assert chunk is not None
            chunk.ref_count_down()
        return seconds

    return {"put": put, "get": get}


class PagedMemory(GPUConnectorInterface):
    """An engine's paged KV on the CPU: for each layer a tensor of K and V, blocks, tokens, heads and numbers."""

    def __init__(self, layers: int, heads: int, head_dim: int, block_tokens: int, num_blocks: int) -> None:
        self._block_tokens, self._head_dim = block_tokens, head_dim
        self._num_slots = num_blocks * block_tokens
        self._shape = (2, layers, heads * head_dim)
        self._layers = [torch.ones((2, self._num_slots, heads * head_dim), dtype=torch.bfloat16) for _ in range(layers)]

    def slots(self, block_ids: np.ndarray[Any, np.dtype[np.int64]]) -> torch.Tensor:
        """The slot of each token of the blocks."""
        return torch.from_numpy((block_ids[:, None] * self._block_tokens + np.arange(self._block_tokens)).reshape(-1))

    def move(self, chunk: torch.Tensor, slots: torch.Tensor, direction: TransferDirection) -> None:
        """LMCache's own transfer between a chunk and the slots."""
        device_ops.multi_layer_kv_transfer(
            chunk,
            self._layers,
            slots,
            torch.device("cpu"),
            self._num_slots,
            direction,
            EngineKVFormat.NL_X_TWO_NB_BS_NH_HS,
            block_size=self._block_tokens,
            head_size=self._head_dim,
        )

    def from_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        self.move(memory_obj.tensor, kwargs["slot_mapping"][start:end], TransferDirection.D2H)

    def to_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        self.move(memory_obj.tensor, kwargs["slot_mapping"][start:end], TransferDirection.H2D)

    def batched_from_gpu(self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any) -> None:
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(memory_obj, start, end, **kwargs)

    def batched_to_gpu(self, memory_objs: Any, starts: Any, ends: Any, **kwargs: Any) -> None:
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(memory_obj, start, end, **kwargs)

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size((*self._shape[:2], num_tokens, self._shape[2]))


def _engine(kv_shape: tuple[int, int, int, int, int], connector: GPUConnectorInterface, **settings: Any) -> LMCacheEngine:
    config = LMCacheEngineConfig.from_defaults(chunk_size=kv_shape[2], **settings)
    metadata = LMCacheMetadata("bench", 1, 1, 0, 0, torch.bfloat16, kv_shape, chunk_size=kv_shape[2])
    engine = LMCacheEngineBuilder.get_or_create("bench", config, metadata, connector, mock_up_broadcast_fn, mock_up_broadcast_object_fn)
    engine.post_init()
    return engine


def _tokens(count: int, seed: int) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, 49_152, count).tolist()
    return tokens


def _choose_threads(cases: Mapping[str, Case]) -> None:
    """Sets the number of threads with which all cases together are faster; memory is warm afterwards."""
    taken = {}
    for num_threads in sorted({1, torch.get_num_threads()}):
        torch.set_num_threads(num_threads)
        taken[num_threads] = min(sum(case() for case in cases.values()) for _ in range(3))
    torch.set_num_threads(min(taken, key=taken.__getitem__))


def _timed(function: Callable[[], None]) -> Case:
    def seconds() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return seconds


WORK: Mapping[str, Callable[..., dict[str, Case]]] = {
    "lookups": lookups,
    "hashing": hashing,
    "eviction": eviction,
    "copies": copies,
    "facade": facade,
    "remote": remote,
}


def _fail(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Says what went wrong and ends at once: the library's threads would keep the process for ever."""
    sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


def main() -> None:
    """Prepares the work, says so with an empty line, then answers each case with the seconds of one round."""
    sys.excepthook = _fail
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        cases = WORK[sys.argv[1]](**json.loads(sys.argv[2]))
        print(file=answers)
        for line in sys.stdin:
            print(cases[line.rstrip("\n")](), file=answers)
    os._exit(0)  # its threads are not waited for


if __name__ == "__main__":
    main()
