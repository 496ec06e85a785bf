"""Weights are told from others under the same name by samples of their files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.connectors.weights import SAMPLE_BYTES, fingerprint

TENSORS = {"a": b"\x01" * 5000, "b": b"\x02" * 10, "empty": b"", "c": b"\x03" * SAMPLE_BYTES, "d": bytes(range(256)) * 40}


def write_safetensors(path: Path, tensors: Mapping[str, bytes], dtype: str = "U8") -> None:
    """A file of that format, its tensors in the given order."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, content in tensors.items():
        header[name] = {"dtype": dtype, "shape": [len(content)], "data_offsets": [end, end + len(content)]}  # type: ignore[dict-item]
        end += len(content)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(tensors.values()))


def checkpoint(directory: Path, tensors: Mapping[str, bytes] = TENSORS, **config: object) -> Path:
    """A directory with weights and a configuration."""
    directory.mkdir(exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps({"rope_theta": 10000} | config))
    return directory


def changed(content: bytes) -> bytes:
    return bytes(byte ^ 1 for byte in content)


def test_a_copy_is_the_same(tmp_path: Path) -> None:
    """Neither place nor time counts, nor what the weights do not depend on; a link is what it leads to."""
    one = fingerprint(checkpoint(tmp_path / "one"))
    assert 32 == len(one)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    os.utime(tmp_path / "two/model.safetensors", (1, 1))
    (tmp_path / "two/tokenizer.json").write_text("{}")
    (tmp_path / "two/original").mkdir()
    assert one == fingerprint(tmp_path / "two")
    (tmp_path / "current").symlink_to(tmp_path / "two")
    assert one == fingerprint(tmp_path / "current")


@pytest.mark.parametrize("name", [name for name, content in TENSORS.items() if content])
def test_each_tensor_counts(tmp_path: Path, name: str) -> None:
    """Whatever its size and place."""
    one = fingerprint(checkpoint(tmp_path / "m"))
    assert one != fingerprint(checkpoint(tmp_path / "m", TENSORS | {name: changed(TENSORS[name])}))


def test_what_else_counts(tmp_path: Path) -> None:
    """The types and names of tensors, the configuration, further files and their names, how many there are."""
    found = [fingerprint(checkpoint(tmp_path / "m"))]
    found.append(fingerprint(checkpoint(tmp_path / "m", rope_theta=500000)))
    write_safetensors(tmp_path / "m/model.safetensors", TENSORS, "I8")
    found.append(fingerprint(tmp_path / "m"))
    checkpoint(tmp_path / "m", {"e": b""} | TENSORS)
    found.append(fingerprint(tmp_path / "m"))
    (tmp_path / "m/more.bin").write_bytes(b"1")
    found.append(fingerprint(tmp_path / "m"))
    (tmp_path / "m/more.bin").rename(tmp_path / "m/others.bin")
    found.append(fingerprint(tmp_path / "m"))
    (tmp_path / "m/others.bin").write_bytes(b"2")
    found.append(fingerprint(tmp_path / "m"))
    (tmp_path / "m/config.json").unlink()
    found.append(fingerprint(tmp_path / "m"))
    assert len(found) == len(set(found))


def test_where_there_are_no_weights(tmp_path: Path) -> None:
    """Empty: the name is all there is."""
    (tmp_path / "config.json").write_text("{}")
    assert "" == fingerprint(tmp_path)
    assert "" == fingerprint(tmp_path / "config.json")
    assert "" == fingerprint(tmp_path / "absent")


@pytest.mark.parametrize("name", ["model.gguf", "model.bin", "model.safetensors"])
def test_a_file_of_which_nothing_is_known(tmp_path: Path, name: str) -> None:
    """Samples are spread over it, to its end."""
    path = tmp_path / name
    content = b"\xff" * (3 << 20)
    path.write_bytes(content)
    found = [fingerprint(path)]
    for part in range(16):
        of_part = slice(part * len(content) // 16, (part + 1) * len(content) // 16)
        path.write_bytes(content[: of_part.start] + changed(content[of_part]) + content[of_part.stop :])
        found.append(fingerprint(path))
    path.write_bytes(content[:-1])
    found.append(fingerprint(path))
    assert 18 == len(set(found))


@settings(max_examples=100, deadline=None)
@given(
    content=st.binary(max_size=200)
    | st.builds(lambda text, more: len(text).to_bytes(8, "little") + text + more, st.binary(max_size=60), st.binary(max_size=60))
    | st.builds(
        lambda header: len(text := json.dumps(header).encode()).to_bytes(8, "little") + text,
        st.recursive(
            st.integers() | st.none() | st.text(max_size=3),
            lambda each: st.lists(each, max_size=3) | st.dictionaries(st.sampled_from(["x", "data_offsets"]), each, max_size=3),
        ),
    )
)
def test_any_content_has_a_fingerprint(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    """A header that makes no sense, points outside of the file or is longer than it."""
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    path.write_bytes(content)
    assert fingerprint(path) == fingerprint(path) != ""


def test_little_is_read_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 GiB, in tensors or not, no more than some megabytes."""
    num_read = 0
    pread = os.pread

    def counted(fd: int, size: int, place: int) -> bytes:
        nonlocal num_read
        num_read += size
        return pread(fd, size, place)

    monkeypatch.setattr(os, "pread", counted)
    extents = {str(number): {"data_offsets": [number << 26, (number + 1) << 26]} for number in range(1000)}
    text = json.dumps(extents).encode()
    for name in ("model.safetensors", "model.gguf"):
        path = tmp_path / name
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(path, 64 << 30)
        fingerprint(path)
        path.unlink()
    assert 0 < num_read < 4 << 20


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That is an OSError, also out of the threads."""
    checkpoint(tmp_path)

    def failing(*_: object) -> bytes:
        raise OSError(5, "broken")

    monkeypatch.setattr(os, "pread", failing)
    with pytest.raises(OSError, match="broken"):
        fingerprint(tmp_path)
