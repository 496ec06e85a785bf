"""Whatever is given as settings is read exactly or refused as a ConfigError, and what is printed reads back."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvtier.config import Config, HostTierConfig
from kvtier.errors import ConfigError
from kvtier.policies import POLICIES
from kvtier.units import MAX_DURATION_S, MAX_SIZE_BYTES, format_duration, format_size, parse_duration, parse_size

HOST = "tiers:\n  - type: host\n    capacity: 8GiB\n"


def write(directory: Path, text: bytes) -> Path:
    path = directory / "kvtier.yaml"
    path.write_bytes(text)
    return path


sizes = st.one_of(st.integers(1, 1 << 20), st.integers(1, MAX_SIZE_BYTES))
durations = st.one_of(st.integers(1, 10**6).map(float), st.floats(0, MAX_DURATION_S, exclude_min=True))
residency: dict[str, Any] = {
    "policy": st.sampled_from(sorted(POLICIES)),
    "ttl": st.none() | durations,
    "ttl_mode": st.sampled_from(["sliding", "fixed"]),
}
texts = st.text() | st.sampled_from(
    ["on", "no", "010", "1_0", "0x1F", "1:30", "2024-01-01", "~", "null", "<<", "=", "1e5", ".5", "- a", "#", "1.", ".inf"]
)
characters = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
special = st.text(st.sampled_from("$A{}~/ "), min_size=1)
paths = st.one_of(special, st.text(characters, min_size=1)).map(lambda text: "/" + text.replace("$", "$$"))


quotas = st.dictionaries(texts.filter(bool), st.integers(0, 2048), max_size=3)


@st.composite
def disks(draw: st.DrawFn) -> dict[str, Any]:
    pages = draw(st.integers(2, (1 << 20) - 1))
    fields: dict[str, Any] = {
        **residency,
        "write": st.sampled_from(["through", "back", "on_evict"]),
        "direct_io": st.sampled_from(["auto", "on", "off"]),
        "io_engine": st.sampled_from(["auto", "io_uring", "threads"]),
        "queue_depth": st.integers(1, 256),
        "io_threads": st.integers(1, 64),
        "max_in_flight": sizes,
        "durable": st.booleans(),
        "admit": st.sampled_from(["all", "second_use"]),
        "daily_writes": st.none() | sizes,
        "exclusive": st.booleans(),
        "quotas": quotas,
    }
    optional = draw(st.fixed_dictionaries({}, optional=fields))
    if optional.get("exclusive"):
        optional["write"] = "on_evict"
    return {
        "type": "disk",
        "path": draw(paths),
        "segment": pages * 4096,
        "capacity": draw(st.integers(pages * 4096, MAX_SIZE_BYTES)),
        **optional,
    }


hosts = st.fixed_dictionaries(
    {"type": st.just("host"), "capacity": sizes},
    optional={
        **residency,
        "quotas": st.just({}) | st.just({"1e5": 1}),
        "huge_pages": st.booleans(),
        "numa_node": st.none() | st.integers(0, 1 << 40),
    },
)
connectors = st.fixed_dictionaries(
    {},
    optional={
        "store": st.booleans(),
        "load": st.booleans(),
        "store_decode_blocks": st.booleans(),
        "async_load": st.none() | st.booleans(),
        "promote_wait": st.just(0) | durations,
        "max_pinned_fraction": st.floats(0, 1),
        "gpu_copy": st.sampled_from(["auto", "dma", "bulk", "staged", "direct"]),
        "copy_threads": st.integers(1, 16),
        "load_or_recompute": st.sampled_from(["auto", "always"]),
    },
)
levels = st.sampled_from(["debug", "info", "warning", "error"])
settings_mappings = st.fixed_dictionaries(
    {"tiers": st.tuples(hosts, disks()).map(list) | st.tuples(hosts).map(list)},
    optional={
        "block_tokens": st.just("auto") | st.integers(1, 1 << 40),
        "namespace_salt": texts,
        "connector": connectors,
        "control": st.fixed_dictionaries({}, optional={"max_pinned_fraction": st.floats(0, 1)}),
        "log_level": levels,
    },
)


@given(settings_mappings)
def test_effective_settings_read_back_equal(mapping: dict[str, Any]) -> None:
    """What ``effective`` prints is a file with the same meaning, and printing that gives the same text."""
    config = Config.from_mapping(mapping)
    with tempfile.TemporaryDirectory() as directory:
        again = Config.load(write(Path(directory), config.effective().encode()))
    assert config == again
    assert config.effective() == again.effective()


@given(st.integers(0, MAX_SIZE_BYTES), st.floats(0, MAX_DURATION_S))
def test_units_read_back_exactly(num_bytes: int, duration_s: float) -> None:
    """A printed size or duration means exactly what it was."""
    assert num_bytes == parse_size(format_size(num_bytes))
    assert duration_s == parse_duration(format_duration(duration_s))


def test_units() -> None:
    """Units mean what the reference says, and what is printed is short."""
    assert [8 << 30, 500_000_000, 1536, 12, 3 << 40, 2048] == [
        parse_size(each) for each in ("8GiB", "500MB", "1.5KiB", "12", "3 TiB", 2048)
    ]
    assert [30.0, 300.0, 7200.0, 0.25, 86400.0, 1.5, 2] == [parse_duration(each) for each in ("30s", "5min", "2h", "250ms", "1d", 1.5, 2)]
    assert ["0B", "8GiB", "1537B", "1MB"] == [format_size(each) for each in (0, 8 << 30, 1537, 10**6)]
    assert ["0s", "5min", "1d", "90s", "0.25s"] == [format_duration(each) for each in (0.0, 300.0, 86400.0, 90.0, 0.25)]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_any_mapping_gives_settings_or_a_config_error(value: Any) -> None:
    """Nothing that can be given, at any place, ends in another exception."""
    host = {"type": "host", "capacity": 1}
    disk = {"type": "disk", "path": "/x", "capacity": "1GiB"}
    mappings: list[dict[str, Any]] = [{"tiers": value}, {"tiers": [host, value]}, {"tiers": [host], "connector": value}, {"config": value}]
    mappings += [{"tiers": [{**host, key: value}]} for key in ("type", "capacity", "ttl", "policy", "numa_node", "x")]
    mappings += [{"tiers": [host, {**disk, key: value}]} for key in ("type", "path", "segment", "write", "direct_io", "io_threads")]
    mappings += [{"tiers": [host], key: value} for key in ("block_tokens", "namespace_salt", "x")]
    for mapping in mappings:
        with contextlib.suppress(ConfigError):
            assert isinstance(Config.from_mapping(mapping).host, HostTierConfig)


@given(st.text())
def test_any_file_gives_settings_or_a_config_error(text: str) -> None:
    """Nothing that can stand in a file ends in another exception."""
    with tempfile.TemporaryDirectory() as directory:
        path = write(Path(directory), (HOST + text).encode(errors="surrogatepass"))
        with contextlib.suppress(ConfigError):
            assert 8 << 30 == Config.load(path).host.capacity_bytes
