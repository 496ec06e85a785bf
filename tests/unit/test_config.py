"""Settings are read completely or refused completely, and every refusal says where and what is allowed."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import ValidationError

import kvtier.config
from kvtier.config import Config, ConnectorConfig, DiskTierConfig, HostTierConfig, WriteMode, commented_defaults
from kvtier.config.template import EXAMPLE
from kvtier.errors import ConfigError

ROOT = Path(__file__).parents[2]
HOST = "tiers:\n  - type: host\n    capacity: 8GiB\n"  # lines 1 to 3
DISK = HOST + "  - type: disk\n    path: /tier\n    capacity: 1GiB\n"  # lines 4 to 6


def write(directory: Path, text: str | bytes) -> Path:
    path = directory / "kvtier.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(directory: Path, text: str | bytes) -> str:
    """What is said about a file, without the directory it is in."""
    with pytest.raises(ConfigError) as caught:
        Config.load(write(directory, text))
    return str(caught.value).replace(f"{directory}/", "")


def test_one_capacity_is_enough(tmp_path: Path) -> None:
    """A file with the host's capacity is complete; the rest has the documented defaults."""
    config = Config.load(write(tmp_path, HOST))
    expected = HostTierConfig.model_validate(
        {
            "type": "host",
            "capacity": 8 << 30,
            "policy": "auto",
            "ttl": None,
            "ttl_mode": "sliding",
            "huge_pages": True,
            "numa_node": None,
        }
    )
    assert {} == config.host.quotas
    assert expected == config.host
    assert config.disk is None
    assert config.block_tokens is None
    assert "" == config.namespace_salt
    assert "info" == config.log_level
    assert ConnectorConfig() == config.connector
    connector = {
        "store_decode_blocks": True,
        "async_load": None,
        "layerwise": "auto",
        "promote_wait_s": 2.0,
        "store": True,
        "load": True,
        "load_or_recompute": "auto",
        "max_pinned_fraction": 0.5,
        "gpu_copy": "auto",
        "copy_threads": 2,
    }
    assert connector == config.connector.model_dump()


def test_every_setting_is_taken(tmp_path: Path) -> None:
    """Each key of the file ends in its attribute, in bytes and seconds."""
    config = Config.load(
        write(
            tmp_path,
            """\
block_tokens: 64
namespace_salt: a
tiers:
  - {type: host, capacity: 500MB, policy: fifo, ttl: 30min, ttl_mode: fixed, huge_pages: false, numa_node: 1, victim_buffer: 0.25,
     quotas: {acme: 2MB, "7": 100}}
  - {type: disk, path: /x, capacity: 100GiB, segment: 16MiB, policy: fifo, ttl: 7, ttl_mode: fixed, write: on_evict, direct_io: on,
     io_engine: threads, queue_depth: 32, io_threads: 3, max_in_flight: 1MiB, durable: false, admit: second_use, daily_writes: 1GiB,
     exclusive: true, encryption_key_env: KEY}
connector: {store_decode_blocks: false, async_load: true, layerwise: on, promote_wait: 250ms, store: false, load: false,
    max_pinned_fraction: 1, gpu_copy: staged, copy_threads: 3, load_or_recompute: always}
log_level: debug
""",
        )
    )
    host = {"type": "host", "capacity_bytes": 500_000_000, "policy": "fifo", "ttl_s": 1800.0, "ttl_mode": "fixed"}
    assert {
        **host,
        "huge_pages": False,
        "numa_node": 1,
        "victim_share": 0.25,
        "quotas": {"acme": 2_000_000, "7": 100},
    } == config.host.model_dump()
    disk = {"type": "disk", "path": Path("/x"), "capacity_bytes": 100 << 30, "segment_bytes": 16 << 20, "policy": "fifo", "ttl_s": 7.0}
    disk |= {"ttl_mode": "fixed", "write": WriteMode.ON_EVICT, "direct_io": "on", "io_threads": 3, "max_in_flight_bytes": 1 << 20}
    disk |= {"encryption_key_env": "KEY", "encryption_key_file": None}
    disk |= {
        "io_engine": "threads",
        "queue_depth": 32,
        "admit": "second_use",
        "daily_writes_bytes": 1 << 30,
        "exclusive": True,
        "quotas": {},
    }
    assert config.disk is not None
    assert {**disk, "durable": False} == config.disk.model_dump()
    connector = {"store_decode_blocks": False, "async_load": True, "layerwise": "on", "promote_wait_s": 0.25, "store": False, "load": False}
    connector |= {"max_pinned_fraction": 1.0, "gpu_copy": "staged", "copy_threads": 3, "load_or_recompute": "always"}
    assert connector == config.connector.model_dump()
    assert (64, "a", "debug") == (config.block_tokens, config.namespace_salt, config.log_level)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["kvtier.yaml:1: tiers: missing", "then one of type host"]),
        ("- 1\n", ["kvtier.yaml:1: a list is not a mapping"]),
        ("block_tokens: 16\n", ["kvtier.yaml:1: tiers: missing"]),
        ("tiers: 3\n", ["kvtier.yaml:1: tiers: 3 is wrong", "allowed: a list"]),
        ("tiers: []\n", ["kvtier.yaml:1: tiers: there is no tier of type host"]),
        ("tiers:\n  - type: host\n", ["kvtier.yaml:2: tiers[0].capacity: missing", "8GiB"]),
        ("tiers:\n  - capacity: 1\n", ["kvtier.yaml:2: tiers[0]: type is missing; allowed: gpu, host, disk"]),
        ("tiers:\n  - type: [host]\n", ["kvtier.yaml:2: tiers[0]: type a list is unknown; allowed: gpu, host, disk"]),
        ("tiers:\n  - host\n", ['kvtier.yaml:2: tiers[0]: "host" is not a mapping']),
        (HOST + "  - type: ssd\n", ['kvtier.yaml:4: tiers[1]: type "ssd" is unknown; allowed: gpu, host, disk']),
        (
            HOST + "  - type: dsk\n",
            ['kvtier.yaml:4: tiers[1]: type "dsk" is unknown; allowed: gpu, host, disk, redis, mooncake, object; did you mean disk?'],
        ),
        (HOST + "  - type: host\n    capacity: 1\n", ["kvtier.yaml:4: tiers[1]: a second tier of type host, after tiers[0]"]),
        (
            DISK + "    admit: index\n",
            ['tiers[1].admit: "index" is wrong (the policies are lru in host memory and lru here)', "hazard, default in both"],
        ),
        (
            DISK + "    ttl_mode: auto\n",
            ['tiers[1].ttl_mode: "auto" is wrong (the policy is lru); allowed: sliding, fixed, or the policies'],
        ),
        (DISK + "    policy: hazard\n    ttl: 5s\n    ttl_mode: auto\n", ['tiers[1].ttl_mode: "auto" is wrong (`ttl` is set)']),
        (HOST + "    victim_buffer: 0.6\n", ["tiers[0].victim_buffer: 0.6 is wrong; allowed: more than 0, to 0.5"]),
        (DISK + "    exclusive: true\n", ["tiers[1].exclusive: true is wrong (the write mode is through)", "with write: on_evict only"]),
        (HOST + "    quotas: [a]\n", ["tiers[0].quotas: a list is wrong (not a mapping of names to sizes)", "allowed: tenants and sizes"]),
        (HOST + "    quotas: {a: 1G}\n", ["yaml:4: tiers[0].quotas: ", "a: G is not a unit"]),
        (HOST + "    quotas: {'': 1GB}\n", ["'' is no name; a name is a text"]),
        (HOST + "    quotas: {a: 5GiB, b: 4GiB}\n", ["9GiB in all, more than the tier's capacity of 8GiB"]),
        (DISK + "    daily_writes: 0\n", ["tiers[1].daily_writes: 0 is wrong", "null, or more than 0"]),
        (
            DISK + "  - {type: disk, path: /b, capacity: 1GiB}\n",
            ["yaml:7: tiers[2]: a second tier of type disk"],
        ),
        ("tiers:\n  - {type: disk, path: /a, capacity: 1GiB}\n", ["kvtier.yaml:1: tiers: there is no tier of type host"]),
        (
            "tiers:\n  - {type: disk, path: /a, capacity: 1GiB}\n  - {type: host, capacity: 1}\n",
            ["kvtier.yaml:3: tiers[1]: the tier of type host must stand before tiers[0]"],
        ),
        (HOST.replace("8GiB", "8G"), ['yaml:3: tiers[0].capacity: "8G" is wrong', "did you mean 8GB or 8GiB?"]),
        (HOST.replace("8GiB", "8gib"), ['yaml:3: tiers[0].capacity: "8gib" is wrong', "did you mean 8GiB?"]),
        (HOST.replace("8GiB", "0"), ["yaml:3: tiers[0].capacity: 0 is wrong", "more than 0"]),
        (HOST.replace("8GiB", "-1"), ["yaml:3: tiers[0].capacity: -1 is wrong", "negative"]),
        (HOST.replace("8GiB", "1.5"), ["yaml:3: tiers[0].capacity: 1.5 is wrong", "not a size"]),
        (HOST.replace("8GiB", "true"), ["yaml:3: tiers[0].capacity: true is wrong", "not a size"]),
        (HOST.replace("8GiB", "0.3B"), ["yaml:3: tiers[0].capacity:", "not a whole number of bytes"]),
        (HOST.replace("8GiB", "9000PiB"), ["yaml:3: tiers[0].capacity:", "too large"]),
        (HOST.replace("8GiB", ""), ["yaml:3: tiers[0].capacity: null is wrong", "not a size"]),
        (HOST + "    ttl: 0\n", ["yaml:4: tiers[0].ttl: 0 is wrong; allowed: null, or more than 0: 30s"]),
        (HOST + "    ttl: 5m\n", ['yaml:4: tiers[0].ttl: "5m" is wrong', "did you mean 5ms or 5min?"]),
        (HOST + "    ttl: 900000d\n", ["yaml:4: tiers[0].ttl:", "hundred years"]),
        (HOST + "    ttl_mode: slide\n", ['yaml:4: tiers[0].ttl_mode: "slide" is wrong; allowed: sliding, fixed, auto;']),
        (HOST + "    policy: mru\n", ['yaml:4: tiers[0].policy: "mru" is wrong; allowed: auto, default, lru, fifo, arc']),
        (
            HOST + "    polcy: lru\n",
            ['yaml:4: tiers[0].polcy: unknown key (value "lru"); did you mean policy?; allowed: type, capacity, policy'],
        ),
        (HOST + "    capacity_bytes: 1\n", ["yaml:4: tiers[0].capacity_bytes: unknown key (value 1); did you mean capacity?"]),
        (HOST + "    io_threads: 1\n", ["yaml:4: tiers[0].io_threads: unknown key (value 1); it belongs to a tier of type disk"]),
        (HOST + "    huge_pages: yes\n", ['yaml:4: tiers[0].huge_pages: "yes" is wrong; allowed: true, false']),
        (HOST + "    numa_node: -1\n", ["yaml:4: tiers[0].numa_node: -1 is wrong; allowed: null, or a whole number from 0"]),
        (HOST + "    capacity: 2GiB\n", ["yaml:3: tiers[0].capacity: given twice, on lines 3 and 4"]),
        (HOST + "load: true\n", ["yaml:4: load: unknown key (value true); it belongs to connector"]),
        (HOST + "connector:\n  tiers: 1\n", ["yaml:5: connector.tiers: unknown key (value 1); it belongs to the top of the file"]),
        (HOST + "connector: []\n", ["yaml:4: connector: a list is not a mapping"]),
        (HOST + "connector:\n", ["yaml:4: connector: null is not a mapping"]),
        (HOST + "connector:\n  promote_wait: -1s\n", ['yaml:5: connector.promote_wait: "-1s" is wrong', "negative"]),
        (HOST + "connector:\n  max_pinned_fraction: 1.1\n", ["yaml:5: connector.max_pinned_fraction: 1.1 is wrong; allowed: 0 to 1"]),
        (HOST + "connector:\n  copy_threads: 0\n", ["yaml:5: connector.copy_threads: 0 is wrong; allowed: a whole number from 1 to 16"]),
        (HOST + "connector:\n  max_pinned_fraction: .nan\n", ["yaml:5: connector.max_pinned_fraction:", "allowed: 0 to 1"]),
        (HOST + "connector:\n  async_load: 1\n", ["yaml:5: connector.async_load: 1 is wrong; allowed: null, true, false"]),
        (HOST + "block_tokens: 0\n", ["yaml:4: block_tokens: 0 is wrong; allowed: auto, or a whole number of at least 1"]),
        (HOST + "block_tokens: '16'\n", ['yaml:4: block_tokens: "16" is wrong']),
        (HOST + "block_tokens: null\n", ["yaml:4: block_tokens: null is wrong"]),
        (HOST + "log_level: INFO\n", ['yaml:4: log_level: "INFO" is wrong; allowed: debug, info, warning, error; did you mean info?']),
        (HOST + "connector:\n  log_level: info\n", ["yaml:5: connector.log_level: unknown key", "it belongs to the top of the file"]),
        (HOST + "namespace_salt: 7\n", ["yaml:4: namespace_salt: 7 is wrong; allowed: any text"]),
        (HOST + "3: x\n", ['yaml:4: 3: unknown key (value "x")']),
        (HOST + "? [a]\n: b\n", ["yaml:1: line 4 has a key that is a list or a mapping"]),
        (HOST + "connector: &a\n  store: *a\n", ["yaml:5: connector.store: an alias that contains itself"]),
        (HOST + "namespace_salt: !!set {a}\n", ["yaml:4: namespace_salt: a mapping is wrong"]),
        (HOST + "namespace_salt: !!python/name:os.system x\n", ["yaml:4: namespace_salt: the tag tag:yaml.org,2002:python/name:os.system"]),
        (DISK.replace("path: /tier", "path: ''"), ['yaml:5: tiers[1].path: "" is wrong', "a directory"]),
        (DISK.replace("path: /tier", "path: 5"), ["yaml:5: tiers[1].path: 5 is wrong", "not a path"]),
        (DISK.replace("path: /tier", "path: $KVTIER_UNSET/x"), ["yaml:5: tiers[1].path:", "variable KVTIER_UNSET is not set"]),
        (DISK.replace("path: /tier", "path: ~nobody-of-that-name/x"), ["yaml:5: tiers[1].path:", "no home directory is known for ~nobody"]),
        (DISK + "    segment: 2GiB\n", ['yaml:7: tiers[1].segment: "2GiB" is wrong (2GiB is more than the tier\'s capacity of 1GiB)']),
        (DISK + "    segment: 5000\n", ["yaml:7: tiers[1].segment: 5000 is wrong", "a multiple of 4KiB"]),
        (DISK + "    segment: 4KiB\n", ["yaml:7: tiers[1].segment:", "from 8KiB to below 4GiB"]),
        (DISK.replace("1GiB", "1MiB"), ["yaml:4: tiers[1].segment: the default is wrong (64MiB is more than the tier's capacity of 1MiB)"]),
        (
            DISK + "    write: trough\n",
            ['yaml:7: tiers[1].write: "trough" is wrong; allowed: through, back, on_evict; did you mean through?'],
        ),
        (DISK + "    direct_io: maybe\n", ['yaml:7: tiers[1].direct_io: "maybe" is wrong; allowed: auto, on, off']),
        (DISK + "    direct_io: [on]\n", ["yaml:7: tiers[1].direct_io: a list is wrong; allowed: auto, on, off"]),
        (DISK + "    io_threads: 0\n", ["yaml:7: tiers[1].io_threads: 0 is wrong; allowed: a whole number from 1 to 64"]),
        (DISK + "    queue_depth: 257\n", ["yaml:7: tiers[1].queue_depth: 257 is wrong; allowed: a whole number from 1 to 256"]),
        (DISK + "    io_engine: aio\n", ['yaml:7: tiers[1].io_engine: "aio" is wrong; allowed: auto, io_uring, threads']),
        (DISK + "    io_threads: true\n", ["yaml:7: tiers[1].io_threads: true is wrong"]),
        (DISK + "    max_in_flight: 0\n", ["yaml:7: tiers[1].max_in_flight: 0 is wrong", "more than 0"]),
        (DISK + "    durable: 'true'\n", ['yaml:7: tiers[1].durable: "true" is wrong; allowed: true, false; write it without quotes']),
        (
            HOST + "blend: {first_layer: 0.5, last_layer: 0.5}\n",
            ["yaml:4: blend.last_layer: 0.5 is wrong", "first_layer is 0.5", "more than first_layer"],
        ),
        (HOST + "blend: {first_layer: 0.9}\n", ["yaml:4: blend.last_layer: the default is wrong", "first_layer is 0.9"]),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, expected: list[str]) -> None:
    """One wrong setting gives one line: file, line, path, value, and what is allowed."""
    message = refusal(tmp_path, text)
    assert [] == [part for part in expected if part not in message], message
    assert 1 == len(message.splitlines()), message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HOST + "\tttl: 1\n", ["kvtier.yaml:4: not YAML", "tabs", "ttl: 1", "^"]),
        (HOST + "   policy: lru\n", ["kvtier.yaml:4: not YAML", "same column"]),
        (HOST + "    policy: lru: x\n", ["kvtier.yaml:4: not YAML", "quotes"]),
        (HOST + "    policy: 'lru\n", ["kvtier.yaml:5: not YAML", "begun on line 4", "closing quote"]),
        (HOST + "connector: {store: true\n", ["kvtier.yaml:5: not YAML", "begun on line 4", "closing bracket"]),
        (HOST + "    policy: @lru\n", ["kvtier.yaml:4: not YAML", "must be in quotes"]),
        (HOST + "    policy: *lru\n", ["kvtier.yaml:4: not YAML", "must be in quotes"]),
        (HOST + "---\n" + HOST, ["kvtier.yaml:4: not YAML", "one document"]),
        (HOST + "policy\n", ["kvtier.yaml:5: not YAML", "a colon and a space"]),
        (HOST + "# \x00\n", ["kvtier.yaml:4: not YAML", "forbidden character"]),
        (HOST.encode() + b"namespace_salt: \xff\n", ["kvtier.yaml:4: not UTF-8 text (byte 0xff)"]),
        ("[" * 5000, ["kvtier.yaml: not a kvtier configuration: nested far too deeply"]),
        (b"#" * (2 << 20), ["kvtier.yaml: more than 1MiB"]),
    ],
)
def test_what_is_no_yaml_is_explained(tmp_path: Path, text: str | bytes, expected: list[str]) -> None:
    """A file that YAML refuses is refused with the line and a hint."""
    message = refusal(tmp_path, text)
    assert [] == [part for part in expected if part not in message], message


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """Missing files, directories and impossible paths are ConfigErrors that name the path."""
    for path, expected in (
        (tmp_path / "none.yaml", "none.yaml: there is no such file"),
        (tmp_path, "a directory; name the YAML file in it"),
        (write(tmp_path, HOST) / "x", "kvtier.yaml/x': cannot be read: Not a directory"),
        (Path("a\0b"), "cannot be read: embedded null"),
        (Path("~nobody-of-that-name/x"), "cannot be read: Could not determine home directory"),
    ):
        with pytest.raises(ConfigError, match=re.escape(expected)):
            Config.load(path)


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    """Mistakes of every kind appear together, one a line, in the order of the file."""
    text = """\
block_tokns: 16
tiers:
  - type: disk
    capacity: 1MiB
    segment: 2MiB
    ttl: 0
  - type: host
    capacity: x
    policy: lifo
    policy: lru
  - type: s3
connector:
  asnc_load: true
  promote_wait: soon
"""
    header, *lines = refusal(tmp_path, text).splitlines()
    places = [line.split(": ")[:2] for line in lines]
    expected = [
        ["1", "block_tokns"],
        ["3", "tiers[0].path"],
        ["5", "tiers[0].segment"],
        ["6", "tiers[0].ttl"],
        ["7", "tiers[1]"],
        ["8", "tiers[1].capacity"],
        ["9", "tiers[1].policy"],
        ["9", "tiers[1].policy"],
        ["11", "tiers[2]"],
        ["13", "connector.asnc_load"],
        ["14", "connector.promote_wait"],
    ]
    assert [[f"  kvtier.yaml:{line}", path] for line, path in expected] == places
    assert f"{len(expected)} errors in kvtier.yaml:" == header


def test_a_mapping_is_checked_like_a_file() -> None:
    """Settings given as a mapping are refused in the same words, without lines."""
    with pytest.raises(ConfigError) as caught:
        Config.from_mapping({"tiers": [{"type": "host", "capacity": "8G", "plicy": "lru"}]})
    header, *lines = str(caught.value).splitlines()
    assert "2 errors in settings:" == header
    assert ["tiers[0].capacity", "tiers[0].plicy"] == [line.split(": ")[1] for line in lines]


def test_a_mapping_may_name_a_file(tmp_path: Path) -> None:
    """``config`` stands for the file, and for nothing beside it."""
    path = write(tmp_path, DISK)
    assert Config.load(path) == Config.from_mapping({"config": str(path)})
    with pytest.raises(ConfigError, match=r"tiers must be set in that file"):
        Config.from_mapping({"config": str(path), "tiers": []})
    with pytest.raises(ConfigError, match=r"config is 3; allowed: the path"):
        Config.from_mapping({"config": 3})


def test_paths_are_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``~``, ``$NAME`` and ``${NAME}`` are expanded, ``$$`` is a dollar sign, relative paths are made absolute; all read back."""
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("WHERE", "/mnt")
    monkeypatch.chdir(tmp_path)
    for text, expected in (
        ("~/x", "/home/somebody/x"),
        ("$WHERE/x", "/mnt/x"),
        ("${WHERE}2/x", "/mnt2/x"),
        ("/a$$WHERE", "/a$WHERE"),
        ("x/../y", f"{tmp_path}/y"),
    ):
        disk = {"type": "disk", "path": text, "capacity": "1GiB"}
        config = Config.from_mapping({"tiers": [{"type": "host", "capacity": 1}, disk]})
        assert config.disk is not None
        assert Path(expected) == config.disk.path
        assert config == Config.load(write(tmp_path, config.effective()))


def test_settings_are_frozen() -> None:
    """Nobody changes settings after they were checked, and nobody gets past the check of the tiers' order."""
    config = Config.from_mapping({"tiers": [{"type": "host", "capacity": 1}]})
    with pytest.raises(ValidationError, match="frozen"):
        config.host.capacity_bytes = 2
    with pytest.raises(ValidationError, match="no tier of type host"):
        Config.model_validate({"tiers": []})


def test_exports_are_sorted() -> None:
    """The package names exactly what others use."""
    assert sorted(kvtier.config.__all__) == kvtier.config.__all__
    exports = {
        "BlendConfig",
        "Config",
        "ConnectorConfig",
        "ControlConfig",
        "DaemonConfig",
        "DiskTierConfig",
        "GpuTierConfig",
        "HostTierConfig",
        "LowerTierConfig",
        "MooncakeTierConfig",
        "ObjectTierConfig",
        "RecordConfig",
        "RedisTierConfig",
        "RemoteTierConfig",
        "WriteMode",
        "commented_defaults",
    }
    assert exports == set(kvtier.config.__all__)
    assert DiskTierConfig.__doc__


def test_the_file_to_start_from(tmp_path: Path) -> None:
    """It loads as the defaults; it holds every setting, each below a comment; what has no default is marked as required."""
    config = Config.load(write(tmp_path, commented_defaults()))
    assert Config.from_mapping(EXAMPLE) == config
    lines = [line.strip() for line in commented_defaults().splitlines()]
    settings = [line.removeprefix("- ") for line in lines if line and not line.startswith("#")]
    assert [line.strip("- ") for line in config.effective().splitlines()] == settings
    assert [] == [line for above, line in pairwise(lines) if line.removeprefix("- ") in settings and not above.startswith("# ")]
    assert 4 == len([line for line in lines if line.startswith("# Required: ")])  # tiers, both capacities, the path


def test_the_guide_s_examples_are_valid(tmp_path: Path) -> None:
    """Each YAML block of the guide loads, and the mistakes it shows are reported in those words."""
    guide = (ROOT / "docs/how-to/configure.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    assert blocks
    for block in blocks:
        Config.load(write(tmp_path, block))
    shown = re.findall(r"```text\n(.*?)\n```", guide, re.DOTALL)
    assert [refusal(tmp_path, HOST.replace("8GiB", "8G") + "    polcy: fifo\n")] == shown


def test_what_auto_stands_for() -> None:
    """The policy is the one that recorded workloads chose where host memory stands alone, and lru where tiers are stacked."""
    host, disk, gpu = (
        {"type": "host", "capacity": "8GiB"},
        {"type": "disk", "path": "/x", "capacity": "9GiB"},
        {"type": "gpu", "capacity": "1GiB"},
    )
    alone = Config.from_mapping({"tiers": [gpu, host]})
    assert alone.gpu is not None
    assert ("lru", "default") == (alone.policy_of(alone.gpu), alone.policy_of(alone.host))
    stacked = Config.from_mapping({"tiers": [host, disk]})
    assert stacked.disk is not None
    assert ("lru", "lru") == (stacked.policy_of(stacked.host), stacked.policy_of(stacked.disk))
    named = Config.from_mapping({"tiers": [{**host, "policy": "arc"}, disk]})
    assert "arc" == named.policy_of(named.host)


def test_key_that_is_no_text_in_a_section() -> None:
    """Settings built by a program: a wrong key of a section is named like any other mistake."""
    with pytest.raises(ConfigError, match=r"connector.*a key that is not a text"):
        Config.from_mapping({"tiers": [{"type": "host", "capacity": "1GiB"}], "connector": {1: 2}})
