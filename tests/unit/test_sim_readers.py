"""Readers of traces: what they read, and what they say of what is broken."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvtier.errors import TraceError
from kvtier.sim.readers import FORMATS, open_trace
from kvtier.sim.trace import Trace, TraceBuilder

MOONCAKE = [
    {"timestamp": 0, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 2500, "input_length": 1024, "output_length": 7, "hash_ids": [0, 3]},
]
BAILIAN = [
    {
        "chat_id": 5,
        "parent_chat_id": -1,
        "timestamp": 1.5,
        "input_length": 40,
        "output_length": 3,
        "type": "text",
        "turn": 1,
        "hash_ids": [9, 8, 7],
    },
    {
        "chat_id": 6,
        "parent_chat_id": 5,
        "timestamp": 9.5,
        "input_length": 64,
        "output_length": 3,
        "type": "text",
        "turn": 2,
        "hash_ids": [9, 8, 6, 4],
    },
]


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def blocks_of(trace: Trace) -> list[list[int]]:
    return [list(request.blocks) for request in trace]


def test_mooncake(tmp_path: Path) -> None:
    """Times become seconds; the block that is not full is left out."""
    trace = open_trace(write(tmp_path / "a.jsonl", MOONCAKE))
    assert ("a", 512, 3, 0) == (trace.name, trace.block_tokens, trace.num_unique, trace.num_skipped)
    assert [[0, 1], [0, 2]] == blocks_of(trace)
    assert [(0.0, 1500, 5, None), (2.5, 1024, 7, None)] == [(r.time_s, r.input_tokens, r.output_tokens, r.session) for r in trace]


def test_bailian(tmp_path: Path) -> None:
    """A session is a chat with what follows from it."""
    trace = open_trace(write(tmp_path / "b.jsonl", BAILIAN))
    assert 16 == trace.block_tokens
    assert [[0, 1], [0, 1, 2, 3]] == blocks_of(trace)
    assert [(1.5, 5), (9.5, 5)] == [(request.time_s, request.session) for request in trace]


def test_packed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(write(tmp_path / "a.jsonl", MOONCAKE).read_bytes()))
    assert [[0, 1], [0, 2]] == blocks_of(open_trace(path))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TraceError, match=r"a\.jsonl\.gz:\d: cannot be read"):
        open_trace(path)


def test_groups(tmp_path: Path) -> None:
    """Blocks are put together from the beginning of the prompt; what is left over is not full."""
    trace = open_trace(write(tmp_path / "b.jsonl", BAILIAN), group=2)
    assert (32, [[0], [0, 1]]) == (trace.block_tokens, blocks_of(trace))


def test_requests_come_in_the_order_of_time(tmp_path: Path) -> None:
    trace = open_trace(write(tmp_path / "a.jsonl", MOONCAKE[::-1]))
    assert ([0.0, 2.5], [[0, 2], [0, 1]]) == (trace.time_s.tolist(), blocks_of(trace))


KV_EVENTS = [
    [0.5, [{"type": "BlockStored", "block_hashes": [11, 12], "parent_block_hash": None, "block_size": 4, "token_ids": []}], None],
    {"ts": 0.6, "events": [{"type": "BlockStored", "block_hashes": [13], "parent_block_hash": 12, "block_size": 4, "medium": "GPU"}]},
    {"type": "BlockRemoved", "ts": 0.7, "block_hashes": [12]},
    {"type": "BlockStored", "ts": 0.8, "block_hashes": ["x"], "parent_block_hash": 12, "block_size": 4, "medium": "CPU"},
    {"type": "AllBlocksCleared"},
    {"type": "BlockStored", "ts": 9.0, "block_hashes": [14], "parent_block_hash": 12, "block_size": 4},
]


def test_kv_events(tmp_path: Path) -> None:
    """A store is a request for its blocks and all before them; one that goes on at once is the same request."""
    trace = open_trace(write(tmp_path / "e.jsonl", KV_EVENTS))
    assert [(0.5, [0, 1, 2], 12), (9.0, [0, 1, 3], 12)] == [(r.time_s, r.blocks, r.input_tokens) for r in trace]


def sessions_file(path: Path, **columns: Any) -> Path:
    """Two sessions that share the tools prefix of 2 blocks and differ in the system prefix."""
    whole = {
        "sess": [0, 0, 1],
        "t": [0.0, 5.0, 0.0],
        "in_len": [256, 330, 256],
        "out_len": [1, 2, 3],
        "run_off": [0, 1, 3, 4],
        "run_start": [1, 1, 9, 1],
        "run_len": [4, 4, 1, 4],
        "tool_tokens": [128, 140],
        "system_tokens": [64, 10],
        "think_time": [0.0, 3.0, 0.0],
    } | columns
    arrays: dict[str, Any] = {name: np.array(column) for name, column in whole.items() if column is not None}
    np.savez(path, **arrays)
    return path


def test_sessions(tmp_path: Path) -> None:
    """Ids of other sessions are others, but for shared prefixes."""
    path = sessions_file(tmp_path / "s.npz")
    assert [[0, 1, 2, 3], [5, 6, 7, 8], [0, 1, 2, 3, 4]] == blocks_of(open_trace(path, hours=None, group=1))
    shared = sessions_file(tmp_path / "s.npz", tool_tokens=[128, 128])
    trace = open_trace(shared, hours=None, group=1)
    assert [[0, 1, 2, 3], [0, 1, 5, 6], [0, 1, 2, 3, 4]] == blocks_of(trace)
    assert [(0, 0.0), (1, 0.0), (0, 3.0)] == [(request.session, request.pause_s) for request in trace]
    assert [[0, 1], [0, 2], [0, 1]] == blocks_of(open_trace(shared, hours=None, group=2))
    assert [[0], [0], [0]] == blocks_of(
        open_trace(sessions_file(tmp_path / "s.npz", system_tokens=[128, 128], tool_tokens=[128, 128]), hours=None)
    )
    same = sessions_file(tmp_path / "s.npz", tool_tokens=[128, 128], system_tokens=[64, 64])
    assert [[0, 1, 2, 3], [0, 1, 2, 5], [0, 1, 2, 3, 4]] == blocks_of(open_trace(same, hours=None, group=1))


def test_sessions_start_within_the_hours(tmp_path: Path) -> None:
    """The same seed gives the same starts; what falls behind is dropped."""
    path = sessions_file(tmp_path / "s.npz", t=[0.0, 7200.0, 0.0])
    first, again, other = (open_trace(path, hours=1, seed=seed, group=1) for seed in (1, 1, 2))
    assert 2 == len(first)
    assert first.time_s.tolist() == again.time_s.tolist() != other.time_s.tolist()
    assert max(first.time_s) < 3600


BROKEN = {
    "nothing": ("", r"expected one of the formats"),
    "no json": (
        '{"hash_ids": [], "input_length": 4, "output_length": 1, "timestamp": 0}\n{"timestamp": 0,\n',
        r":2: expected a JSON value",
    ),
    "no object": ('{"hash_ids": [], "input_length": 4, "output_length": 1, "timestamp": 0}\n7\n', r":2: expected a JSON object, found 7"),
    "no time": ('{"hash_ids": [], "input_length": 4, "output_length": 1}\n', r":1: expected `timestamp` to be a number .* no such field"),
    "bad time": ('{"hash_ids": [], "input_length": 4, "output_length": 1, "timestamp": NaN}\n', r":1: expected `timestamp`.* found nan"),
    "bad length": ('{"hash_ids": [], "input_length": -4, "output_length": 1, "timestamp": 0}\n', r":1: expected `input_length`.* found -4"),
    "bad ids": (
        '{"hash_ids": [true], "input_length": 4, "output_length": 1, "timestamp": 0}\n',
        r":1: expected `hash_ids` to be a list of wh",
    ),
    "bad event": ('{"type": "Stored"}\n', r":1: expected `type` to be one of AllBlocksCleared, BlockRemoved, BlockStored, found 'Stored'"),
    "bad parent": (
        '{"type": "BlockStored", "block_hashes": [1], "block_size": 4, "parent_block_hash": []}\n',
        r":1: expected `parent_block_h",
    ),
    "bad batch": ("[1]\n", r":1: expected a batch as"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_lines_are_named(name: str, tmp_path: Path) -> None:
    """File, line, and what was expected."""
    text, message = BROKEN[name]
    path = tmp_path / "t.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(TraceError, match=message):
        open_trace(path)


def test_broken_lines_can_be_skipped(tmp_path: Path) -> None:
    """They are counted; the rest is read. Where nothing is left that is an error all the same."""
    path = write(tmp_path / "a.jsonl", [MOONCAKE[0], {"timestamp": "x"}, [], MOONCAKE[1]])
    with pytest.raises(TraceError, match=r"a\.jsonl:2: expected `timestamp`"):
        open_trace(path)
    trace = open_trace(path, skip_bad=True)
    assert (2, 2) == (len(trace), trace.num_skipped)
    with pytest.raises(TraceError, match=r"at least one request, found none \(1 broken lines were skipped\)"):
        open_trace(write(tmp_path / "b.jsonl", [{"hash_ids": 1}]), skip_bad=True)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"t": None}, "expected a column `t`, found in_len"),
        ({"t": [0.0, 1.0]}, r"expected `t` to be a list of 3 numbers, found float64\[2\]"),
        ({"t": [0.0, np.nan, 0.0]}, "request 1: expected `t` to be a finite number"),
        ({"sess": [0, 0, 2]}, "expected `sess` to ascend within 0 ... 1"),
        ({"run_off": [0, 1, 3, 5]}, "expected `run_off` to ascend from 0 to 4"),
        ({"run_len": [4, 4, 0, 4]}, "run 2: expected a start of at least 0"),
        ({"in_len": [256, 8, 256]}, "request 1: expected `in_len` to be at least"),
        ({"out_len": [1, 2, -3]}, "request 2: expected `out_len`"),
        ({"run_start": [1, 1, 4, 1]}, "request 1: expected ids that stand for whole prefixes"),
        ({"system_tokens": [-1, 0]}, "expected `tool_tokens` and `system_tokens`"),
    ],
)
def test_broken_sessions(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=message):
        open_trace(sessions_file(tmp_path / "s.npz", **columns), hours=None, group=1)


def test_broken_sessions_can_be_skipped(tmp_path: Path) -> None:
    path = sessions_file(tmp_path / "s.npz", t=[0.0, np.nan, 0.0], run_start=[1, 1, 4, 1])
    trace = open_trace(path, hours=None, group=1, skip_bad=True)
    assert (2, 1) == (len(trace), trace.num_skipped)


def test_what_is_no_file(tmp_path: Path) -> None:
    for name in ("none.jsonl", "none.npz"):
        with pytest.raises(TraceError, match=name):
            open_trace(tmp_path / name)
    with pytest.raises(TraceError, match="cannot be read"):
        open_trace(tmp_path, kind="mooncake")
    with pytest.raises(ValueError, match="kind is 'x'; allowed: bailian"):
        open_trace(tmp_path / "a", kind="x")
    with pytest.raises(ValueError, match="group is 0"):
        open_trace(tmp_path / "a", group=0)


ids = st.integers(-3, 12) | st.integers()
values = st.none() | st.booleans() | ids | st.floats() | st.text(max_size=3) | st.lists(ids, max_size=6)
names = st.sampled_from(
    [
        "timestamp",
        "ts",
        "type",
        "hash_ids",
        "input_length",
        "output_length",
        "chat_id",
        "parent_chat_id",
        "events",
        "block_hashes",
        "block_size",
    ]
)
records = st.dictionaries(names, values, max_size=8) | st.sampled_from([*MOONCAKE, *BAILIAN, *KV_EVENTS])
lines = st.recursive(values | records, lambda inner: st.lists(inner, max_size=3), max_leaves=6).map(lambda v: json.dumps(v).encode())


def is_sound(trace: Trace) -> bool:
    """Each block has one parent, times ascend, ids are dense."""
    parents: dict[int, int] = {}
    for request in trace:
        for parent, block in zip([-1, *request.blocks], request.blocks, strict=False):
            assert parent == parents.setdefault(block, parent)
        assert len(set(request.blocks)) == len(request.blocks)
    assert sorted(trace.time_s.tolist()) == trace.time_s.tolist()
    return set(parents) <= set(range(trace.num_unique))


def read(path: Path, **options: Any) -> Trace | str:
    """The trace, or what is wrong with it."""
    try:
        return open_trace(path, **options)
    except TraceError as error:
        return str(error)


def is_right(result: Trace | str, expected: str) -> bool:
    """Either a sound trace or an error that says this."""
    return expected in result if isinstance(result, str) else is_sound(result)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["bailian", "kv-events", "mooncake"]), st.lists(lines | st.binary(max_size=20), max_size=8), st.integers(1, 3))
def test_whatever_is_in_a_file(tmp_path: Path, kind: str, content: list[bytes], group: int) -> None:
    """Either a sound trace or an error that names the file."""
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\n".join(content))
    assert is_right(read(path, kind=kind, group=group), str(path))
    assert is_right(read(path, group=group, skip_bad=True), str(path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2000), st.integers(0, 255), st.integers(0, 2500))
def test_damaged_npz(tmp_path: Path, place: int, byte: int, length: int) -> None:
    """A file that was cut or has a wrong byte."""
    whole = bytearray(sessions_file(tmp_path / "s.npz").read_bytes())
    whole[min(place, len(whole) - 1)] = byte
    path = tmp_path / "d.npz"
    path.write_bytes(whole[:length])
    assert is_right(read(path, hours=None, group=1), str(path))


small = st.integers(0, 6)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(small, min_size=4, max_size=4), st.lists(st.integers(1, 6), min_size=4, max_size=4), st.integers(1, 3), st.booleans())
def test_any_runs(tmp_path: Path, starts: list[int], lengths: list[int], group: int, skip_bad: bool) -> None:
    """Runs of ids that may overlap in any way give a sound trace or an error."""
    path = sessions_file(tmp_path / "r.npz", run_start=starts, run_len=lengths, in_len=[9999] * 3)
    expected = "expected at least one request" if skip_bad else "expected ids that stand for whole prefixes"
    assert is_right(read(path, hours=None, group=group, skip_bad=skip_bad), expected)


@given(st.lists(st.lists(st.integers(0, 4), max_size=5), max_size=6))
def test_ids_need_not_be_chained(prompts: list[list[int]]) -> None:
    """Blocks are the same where their whole prefixes are."""
    builder = TraceBuilder(1)
    for number, prompt in enumerate(prompts):
        builder.add(number, prompt, len(prompt), 0)
    trace = builder.build("t")
    assert is_sound(trace)
    names: dict[int, tuple[int, ...]] = {}
    for request, prompt in zip(trace, prompts, strict=True):
        for position, block in enumerate(request.blocks):
            assert tuple(prompt[: position + 1]) == names.setdefault(block, tuple(prompt[: position + 1]))
    assert len(names) == len(set(names.values())) == trace.num_unique


def test_every_format_is_tested() -> None:
    assert {"bailian", "kv-events", "mooncake", "recording", "sessions"} == set(FORMATS)
