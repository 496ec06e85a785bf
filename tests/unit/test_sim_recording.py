"""Recordings: what serving did, the simulator does too, block for block; and a recorder that is never in the way."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier import recording
from kvtier.connectors.requests import DefaultSettings
from kvtier.errors import TraceError
from kvtier.hashing import Namespace
from kvtier.recording import Blocks, Recorder
from kvtier.sim.readers import open_trace
from kvtier.sim.verify import Verdict, verify
from kvtier.testing.fake_system import FakeSystem, FakeSystemOptions
from kvtier.types import BlockKey

NAMESPACE = Namespace(model="fake")


def served(folder: Path, requests: list[tuple[list[int], int]], *, at_once: int = 1, **options: Any) -> Path:
    """Serves requests (prompt, tokens to generate) and returns the recording. ``at_once``: so many are submitted together.

    One comes each second and takes no time: a policy that learns from times must see those that the recording has.
    """
    path = folder / "record.jsonl"
    path.unlink(missing_ok=True)
    now = 0.0
    system = FakeSystem(folder, NAMESPACE, FakeSystemOptions(record=path, **options), clock=lambda: now)
    try:
        for number, (prompt, max_new_tokens) in enumerate(requests):
            now += 1
            system.engine.submit(f"r{number}", prompt, max_new_tokens)
            if number % at_once == at_once - 1:
                system.engine.run()
        system.settle()
        assert [] == system.problems()
        assert 0 == system.cache.stats["record.lost_lines"]
    finally:
        system.close()
    return path


def chats(count: int) -> list[tuple[list[int], int]]:
    """Prompts over a few documents, so that there are hits and evictions."""
    documents = [[(7 * number + position) % 97 for position in range(20 + 8 * number)] for number in range(4)]
    return [(documents[(number * number) % 4] + [number % 5] * (number % 9), 1 + number % 6) for number in range(count)]


def assert_same(verdict: Verdict) -> None:
    assert [] == verdict.differences
    assert verdict.num_hit_blocks > 0
    assert verdict.num_evicted_blocks > 0


@pytest.mark.parametrize("at_once", [1, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"prefix_caching": True, "num_engine_blocks": 20, "host_blocks": 30},
        {"blocks_per_slot": 2, "num_ranks": 2},
        {"num_polls": 2},
        {"settings": DefaultSettings(async_load=True), "num_polls": 1},
        {"settings": DefaultSettings(store_decode_blocks=False, max_pinned_fraction=0.1)},
        {"num_engine_blocks": 24},
    ],
    ids=["plain", "prefix-caching", "large-blocks", "async-copies", "async-loads", "few-pins", "preemption"],
)
def test_the_simulator_decides_as_serving_did(tmp_path: Path, options: dict[str, Any], at_once: int) -> None:
    """The same hits and evictions, also with copies that take several steps, preemption, and requests side by side."""
    assert_same(verify(served(tmp_path, chats(60), at_once=at_once, **options)))


tokens = st.integers(0, 2)
prompts = st.lists(st.tuples(st.lists(tokens, min_size=1, max_size=40), st.integers(1, 9)), min_size=1, max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(requests=prompts, at_once=st.integers(1, 4), host_blocks=st.integers(3, 16), polls=st.sampled_from([0, 1]), caching=st.booleans())
def test_any_requests(
    tmp_path: Path, requests: list[tuple[list[int], int]], at_once: int, host_blocks: int, polls: int, caching: bool
) -> None:
    """No difference, whatever is asked."""
    path = served(tmp_path, requests, at_once=at_once, host_blocks=host_blocks, num_polls=polls, prefix_caching=caching)
    assert [] == verify(path).differences


def test_a_recording_is_a_trace(tmp_path: Path) -> None:
    """Requests with their prompts and what they generated, in blocks that are shared where their tokens are."""
    first = list(range(10))
    trace = open_trace(served(tmp_path, [(first, 3), ([*first, 50], 1), ([60] * 9, 2)]))
    assert 4 == trace.block_tokens
    assert [(10, 3), (11, 1), (9, 2)] == [(request.input_tokens, request.output_tokens) for request in trace]
    assert [[0, 1, 2], [0, 1], [3, 4]] == [request.blocks for request in trace]


def test_differences_are_told(tmp_path: Path) -> None:
    """A recording of another size does not pass."""
    path = served(tmp_path, chats(60))
    lines = path.read_text().splitlines()
    header = json.loads(lines[0])
    path.write_text("\n".join([json.dumps({**header, "host_blocks": 15}), *lines[1:]]))
    assert verify(path).differences
    path.write_text("\n".join([lines[0], '["lost",0.5,3]', *lines[1:]]))
    with pytest.raises(TraceError, match="3 lines were lost while recording"):
        verify(path)
    path.write_text("\n".join([json.dumps({**header, "disk_bytes": 5}), *lines[1:]]))
    with pytest.raises(TraceError, match="this one has a disk"):
        verify(path)


HEADER = {"kvtier_recording": 1, "block_tokens": 4, "engine_block_tokens": 4, "block_bytes": 9, "host_blocks": 3, "max_pinned_blocks": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", r":2: expected a list that begins with one of ask, start"),
        ('["ask",0]', r":2: expected 10 values in a line `ask`, found 2"),
        ('["finish",-1,0,0]', r":2: expected `time` to be a number of at least 0"),
        ('["finish",0,0,0]', r":2: expected a request that was asked for before, found 0"),
        ('["evict",0,"host",[0]]', r":2: expected value 3 of `evict` to be runs of blocks, found \[0\]"),
        ('["end",0,[[1]]]', r":2: expected value 2 of `end` to be a list of jobs"),
    ],
)
def test_broken_lines(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(f"{json.dumps(HEADER)}\n{line}\n")
    with pytest.raises(TraceError, match=message):
        open_trace(path)
    path.write_text(json.dumps({**HEADER, "kvtier_recording": 2}))
    with pytest.raises(TraceError, match=":1: expected `kvtier_recording` to be 1"):
        open_trace(path)


numbers = st.integers(0, 5)
runs = st.lists(numbers, max_size=4) | st.just([0, 3])
recorded = st.one_of(
    st.tuples(st.just("ask"), numbers, *[numbers] * 7, runs),
    st.tuples(st.just("start"), *[numbers] * 4, st.integers(-1, 3)),
    st.tuples(st.just("store"), *[numbers] * 4, st.integers(-1, 3), numbers, runs),
    st.tuples(st.just("end"), numbers, st.lists(st.tuples(numbers, st.lists(numbers, max_size=2)), max_size=2)),
    st.tuples(st.just("evict"), numbers, st.just("host"), runs),
    st.tuples(st.just("finish"), *[numbers] * 3),
    st.tuples(st.just("reset"), numbers),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(recorded | st.lists(numbers), max_size=25))
def test_whatever_is_in_a_recording(tmp_path: Path, lines: list[Any]) -> None:
    """A trace and a verdict, or an error that names the line."""
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(map(json.dumps, [HEADER, *lines])))
    for read in (open_trace, verify):
        try:
            assert read(path) is not None
        except TraceError as error:
            message = str(error)
            assert message.startswith(f"{path}:")


def key(number: int) -> BlockKey:
    return BlockKey(bytes([number]) * 16)


def lines_of(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_keys_become_runs(tmp_path: Path) -> None:
    """Blocks are numbered as they come; no key is written."""
    recorder = Recorder(tmp_path / "r", {"a": 1}, max_bytes=1000)
    recorder.add("x", 0.5, Blocks([key(7), key(3), key(9)]), Blocks([key(9), key(7), key(3), key(1)]))
    recorder.close()
    recorder.close()
    assert [{"kvtier_recording": 1, "a": 1}, ["x", 0.5, [0, 3], [2, 1, 0, 2, 3, 1]]] == lines_of(tmp_path / "r")


def test_no_file_is_overwritten(tmp_path: Path) -> None:
    for _ in range(3):
        Recorder(tmp_path / "r", {}, max_bytes=1000).close()
    assert ["r", "r.1", "r.2"] == sorted(path.name for path in tmp_path.iterdir())


def test_the_size_is_bounded(tmp_path: Path) -> None:
    """Recording ends at the line that reaches the bound; that is no loss."""
    recorder = Recorder(tmp_path / "r", {}, max_bytes=100)
    for _ in range(50):
        recorder.add("x", 1.0, "some text")
    recorder.close()
    assert not recorder.is_open
    assert 0 == recorder.num_lost
    assert 100 <= (tmp_path / "r").stat().st_size < 130


def test_what_cannot_be_written_is_counted(tmp_path: Path) -> None:
    """No directory, a full disk: counted, never raised."""
    recorder = Recorder(tmp_path / "none" / "r", {}, max_bytes=100)
    recorder.add("x", 1.0)
    recorder.close()
    assert (1, None) == (recorder.num_lost, recorder.path)
    if not os.path.exists("/dev/full"):
        return
    full = Recorder(tmp_path / "r", {}, max_bytes=1 << 20)
    assert full._file is not None
    full._file.close()
    full._file = open("/dev/full", "w", encoding="ascii")  # noqa: SIM115 - closed by the recorder
    for _ in range(9):
        full.add("x", 1.0)
    full.close()
    assert full.num_lost >= 1
    assert not full.is_open


def test_a_slow_writer_loses_lines_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread never waits for the file."""
    monkeypatch.setattr(recording, "MAX_WAITING", 5)
    gate = threading.Event()
    monkeypatch.setattr(Recorder, "_run", lambda self: gate.wait())
    recorder = Recorder(tmp_path / "r", {}, max_bytes=10_000)
    for number in range(9):
        recorder.add("x", float(number))
    gate.set()
    recorder.close()
    assert 4 == recorder.num_lost
    assert [["lost", 0.0, 4], *(["x", float(number)] for number in range(5))] == lines_of(tmp_path / "r")[1:]
