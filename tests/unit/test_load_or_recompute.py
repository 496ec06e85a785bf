"""The scheduler half refuses loads that are slower than computing, learns both speeds from the engine, and says so in the statistics."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier.connectors.messages import WorkerReport
from kvtier.connectors.requests import DefaultSettings
from kvtier.control.estimates import MIN_SAMPLES, PROBE_EVERY, WINDOW
from kvtier.hashing import KeyChain, request_root
from tests.unit.test_connector_scheduler import BLOCK, NAMESPACE, PAGE, DiskRig, Rig, prompt

AUTO = DefaultSettings(load_or_recompute="auto")


def teach(rig: Rig, tier: str, bytes_per_s: float, samples: int = WINDOW) -> None:
    for _ in range(samples):
        rig.cache.estimates.transferred(tier, 4 * PAGE, 4 * PAGE / bytes_per_s)


def learn_to_compute(rig: Rig, tokens_per_s: float, samples: int = MIN_SAMPLES) -> None:
    """Steps of one request each, that take their time."""
    for number in range(samples):
        name = f"teacher {number}"
        rig.add(name, prompt(900 + number, 40))
        rig.match(name, 40)
        rig.allocate(name, 10)
        message = rig.build(**{name: 40})
        rig.now += 40 / tokens_per_s
        rig.half.finish_step(rig.report(message.stores))
        rig.half.request_finished(name)


@pytest.mark.parametrize(("tokens_per_s", "expected"), [(1e3, 16), (1e9, 0)])
def test_a_load_that_is_slower_than_computing_is_refused(tmp_path: Path, tokens_per_s: float, expected: int) -> None:
    """16 tokens lie in four pages that come at a million bytes a second: 16 ms."""
    rig = Rig(tmp_path, AUTO, host_blocks=16 + 10 * MIN_SAMPLES)
    rig.put(prompt(1, 16))
    learn_to_compute(rig, tokens_per_s)
    teach(rig, "host", 1e6)
    rig.add("a", prompt(1, 20))
    assert [expected] * 3 == [rig.match("a", 20) for _ in range(3)]
    stats = rig.cache.stats
    assert (4 if not expected else 0) == stats["recompute.refused_blocks"]
    assert (16 if not expected else 0) == stats["recompute.estimated_load_ms"]
    assert 0 == stats["recompute.estimated_compute_ms"]
    rig.half.close()


def test_always_asks_no_estimate(tmp_path: Path) -> None:
    """With the switch off, everything is loaded, however slow."""
    rig = Rig(tmp_path, DefaultSettings(load_or_recompute="always"), host_blocks=16 + 10 * MIN_SAMPLES)
    rig.put(prompt(1, 16))
    learn_to_compute(rig, 1e9)
    teach(rig, "host", 1e3)
    rig.add("a", prompt(1, 20))
    assert 16 == rig.match("a", 20)
    rig.half.close()


def test_what_lies_in_host_memory_is_loaded_and_the_slow_rest_computed(tmp_path: Path) -> None:
    """Half of a prompt is on a slow disk: the request does not wait for it, and what it computes is stored again."""
    rig = DiskRig(tmp_path, AUTO, host_blocks=12 + 10 * MIN_SAMPLES)
    learn_to_compute(rig, 1e6)
    rig.put(prompt(1, 16))
    assert rig.cache.drain(10.0)
    rig.cache.verbs.clear({0}, None)
    rig.cache.promote(KeyChain(request_root(NAMESPACE.digest), BLOCK).update(prompt(1, 16), 8))
    assert rig.cache.drain(10.0)
    teach(rig, "host", 1e12)
    teach(rig, "disk", 1e3)
    rig.add("a", prompt(1, 20))
    assert [8, 8] == [rig.match("a", 20) for _ in range(2)]
    assert 2 == rig.cache.stats["recompute.refused_blocks"]
    rig.half.close()


def test_a_refused_tier_is_tried_again(tmp_path: Path) -> None:
    """Every sixteenth refusal is a load; when it turns out fast, loads go on."""
    rig = Rig(tmp_path, AUTO, host_blocks=16 + 10 * MIN_SAMPLES)
    rig.put(prompt(1, 16))
    learn_to_compute(rig, 1e9)
    teach(rig, "host", 1e6)
    loaded = []
    for number in range(PROBE_EVERY):
        rig.add(f"request {number}", prompt(1, 20))
        loaded.append(rig.match(f"request {number}", 20))
        rig.half.request_finished(f"request {number}")
    assert [0] * (PROBE_EVERY - 1) + [16] == loaded
    assert 1 == rig.cache.stats["recompute.probes"]
    rig.half.finish_step(WorkerReport(load_times=[(4 * PAGE, 1e-9)] * WINDOW))
    rig.add("last", prompt(1, 20))
    assert 16 == rig.match("last", 20)
    rig.half.close()
