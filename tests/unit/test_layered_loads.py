"""Loads and stores by layer: the forward pass of a layer waits for that layer's KV alone, and what it computed is stored at once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvtier.connectors.worker import Transferred
from kvtier.copy.base import BlockCopy
from kvtier.copy.layered import ThreadedLayerLoader
from kvtier.hashing import Namespace
from kvtier.testing.copiers import EagerLayerStorer, LateLayerLoader
from kvtier.testing.fake_kv import FakeKVMemory
from kvtier.testing.fake_system import FakeSystem, FakeSystemOptions

PROMPT = list(range(40))


@pytest.fixture
def late(tmp_path: Path) -> Iterator[FakeSystem]:
    """A system that copies a layer only when somebody waits for it, with a prompt in host memory."""
    options = FakeSystemOptions(by_layer="late", token_budget=64)
    system = FakeSystem(tmp_path, Namespace(model="layers"), options, strict=False)
    system.engine.submit("first", PROMPT)
    system.settle()
    yield system
    system.close()


def loads_of(system: FakeSystem) -> LateLayerLoader:
    """The loader of the only rank."""
    (loader,) = system.loaders
    assert isinstance(loader, LateLayerLoader)
    return loader


def test_a_layer_is_loaded_when_it_is_computed(late: FakeSystem) -> None:
    """The engine checks every byte a layer reads, and nothing was copied before the layer asked: so the waits are in place."""
    again = late.engine.submit("again", PROMPT)
    late.settle()
    assert 1 == loads_of(late).num_loads
    assert len(PROMPT) > again.num_forward_tokens
    assert [] == late.problems()


@pytest.mark.parametrize("bad_layer", [0, 1])
def test_a_layer_that_does_not_arrive_is_computed(late: FakeSystem, bad_layer: int) -> None:
    """The forward pass goes on on garbage, the engine learns of it and computes the blocks: right tokens, nothing left over."""
    loads_of(late).faults.append(bad_layer)
    again = late.engine.submit("again", PROMPT)
    late.settle()
    assert len(PROMPT) <= again.num_forward_tokens
    assert [] == late.problems()


@pytest.mark.parametrize("says_late", [False, True])
def test_an_engine_that_does_not_wait_is_found_out(late: FakeSystem, says_late: bool) -> None:
    """A model whose attention bypasses the hooks computes once more, with the right tokens; from then on all is loaded beforehand.

    ``says_late``: the engine says that a step was computed when it has asked what became of it, as vLLM does where it drafts.
    """
    worker = late.workers[0]
    asked, ended, finish = worker.wait_for_layer, worker.forward_ended, worker.finish

    def finish_first() -> Transferred:
        worker.forward_ended = ended  # type: ignore[method-assign]
        done = finish()
        worker.forward_ended = lambda: None  # type: ignore[method-assign]
        return done

    worker.wait_for_layer = lambda layer: asked(layer) if layer == 0 else None  # type: ignore[method-assign]
    if says_late:
        worker.forward_ended, worker.finish = lambda: None, finish_first  # type: ignore[method-assign]
    for name in ("again", "once more"):
        late.engine.submit(name, PROMPT)
        late.settle()
    assert 1 == loads_of(late).num_loads
    assert late.engine.finished["once more"].num_forward_tokens < len(PROMPT)
    assert [] == late.problems()


def test_unknown_layers_wait_for_all(late: FakeSystem) -> None:
    """A layer without KV of its own may read any other layer's."""
    worker = late.workers[0]
    asked = worker.wait_for_layer
    worker.wait_for_layer = lambda layer: asked(None) if layer == 0 else None  # type: ignore[method-assign]
    again = late.engine.submit("again", PROMPT)
    late.settle()
    assert len(PROMPT) > again.num_forward_tokens


def stores_of(system: FakeSystem) -> EagerLayerStorer:
    """The storer of the only rank."""
    (storer,) = system.storers
    assert storer is not None
    return storer


def test_a_layer_is_stored_when_it_was_computed(late: FakeSystem) -> None:
    """Each layer is copied at the moment the engine tells of it; the engine checks every byte that comes back."""
    copied: list[int] = []
    inner = stores_of(late).inner
    copy_layer, forward = inner.copy_layer, late.engine.memory.forward

    def note_copy(layer: int, *arguments: Any, to_arena: bool = False) -> None:
        copied.extend([layer] if to_arena else [])
        copy_layer(layer, *arguments, to_arena=to_arena)

    def note_forward(block_ids: list[int], states: list[int], first_token: int, layers: slice) -> bool:
        assert layers.start == len(copied)  # every layer before this one has been stored, and no other
        return forward(block_ids, states, first_token, layers)

    inner.copy_layer = note_copy  # type: ignore[method-assign, assignment]
    late.engine.memory.forward = note_forward  # type: ignore[method-assign, assignment]
    late.engine.submit("second", PROMPT[::-1])
    late.settle()
    assert [0, 1] == copied
    late.engine.memory.forward = forward  # type: ignore[method-assign]
    again = late.engine.submit("again", PROMPT[::-1])
    late.settle()
    assert again.num_loaded_tokens > 30
    assert [] == late.problems()


@pytest.mark.parametrize("bad_layer", [0, 1])
def test_a_layer_that_cannot_be_stored_fails_the_store(late: FakeSystem, bad_layer: int) -> None:
    """None of the step's blocks become readable; later steps store again."""
    stores_of(late).faults.append(bad_layer)
    late.engine.submit("second", PROMPT[::-1])
    late.settle()
    again = late.engine.submit("again", PROMPT[::-1])
    late.settle()
    assert 0 == again.num_loaded_tokens
    third = late.engine.submit("third", PROMPT[::-1])
    late.settle()
    assert third.num_loaded_tokens > 30
    assert [] == late.problems()


def test_layers_that_nobody_tells_of_are_stored_at_the_end(late: FakeSystem) -> None:
    """A layer whose hook is not called is stored with the end of the step."""
    worker = late.workers[0]
    told = worker.layer_computed
    worker.layer_computed = lambda layer: told(layer) if layer == 0 else None  # type: ignore[method-assign]
    late.engine.submit("second", PROMPT[::-1])
    late.settle()
    assert 2 == stores_of(late).num_stores
    again = late.engine.submit("again", PROMPT[::-1])
    late.settle()
    assert again.num_loaded_tokens > 30
    assert [] == late.problems()


def test_an_engine_that_computes_a_layer_in_parts_is_found_out(late: FakeSystem) -> None:
    """Where a layer is told of twice in a step nothing is stored of that step; from then on blocks are stored whole."""
    worker = late.workers[0]
    told = worker.layer_computed

    def twice(layer: int) -> None:
        told(layer)
        told(layer)

    worker.layer_computed = twice  # type: ignore[method-assign]
    for name in ("second", "again", "third"):
        late.engine.submit(name, PROMPT[::-1])
        late.settle()
    assert 2 == stores_of(late).num_stores
    assert 0 == late.engine.finished["again"].num_loaded_tokens
    assert late.engine.finished["third"].num_loaded_tokens > 30
    assert [] == late.problems()


def test_a_load_that_breaks_ends_every_layer_behind_it() -> None:
    """Offsets outside the arena: each layer's event raises, and nobody waits for ever."""
    memory = FakeKVMemory(num_ranks=1, num_layers=3, num_blocks=4, block_tokens=4)
    arena = np.zeros(4096, np.uint8)
    layers = [range(index, index + 1) for index in range(3)]
    loader = ThreadedLayerLoader(memory.layout(0), layers, arena_address=arena.ctypes.data, arena_bytes=4096)
    events = loader.scatter_layers([BlockCopy(0, 0), BlockCopy(1, 4090)])
    for event in events:
        with pytest.raises(IndexError):
            event.wait()
        with pytest.raises(IndexError):
            event.done()
    loader.close()


@pytest.mark.parametrize("layers", [[range(2)], [range(1), range(2, 3)], [range(1, 3), range(1)]])
def test_layers_divide_the_segments(layers: list[range]) -> None:
    """Each segment belongs to one layer, in order; anything else is refused."""
    memory = FakeKVMemory(num_ranks=1, num_layers=3, num_blocks=4, block_tokens=4)
    with pytest.raises(ValueError, match="divide 3 segments"):
        ThreadedLayerLoader(memory.layout(0), layers, arena_address=0, arena_bytes=0)
