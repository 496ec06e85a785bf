"""What tells the weights in a directory from others under the same name: a digest of samples of their files.

A model's name says where weights are, not which: a link is turned to the next version, a checkpoint is written over, a branch moves on.
KV of the old ones under the name of the new ones would be wrong KV.  To read all of the files would double what a start reads; of each
tensor a piece is enough, since training, merging, editing and quantizing change tensors as wholes.  Nothing but the content counts,
so that machines with copies of their own share blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SAMPLE_BYTES = 1 << 10
"""read in the middle of each tensor"""
_NUM_SAMPLES = 1 << 10
"""spread evenly over a file of which it is not known where its tensors lie"""
_MAX_HEADER_BYTES = 100_000_000  # the format's own bound
_NUM_THREADS = 8
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_SETTINGS = ("config.json", "params.json", "adapter_config.json", "hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""small files that say how the weights are to be used"""


def fingerprint(path: str | Path) -> str:
    """32 hexadecimal digits for the weights at ``path``, a directory or a file; empty where there are none.

    The same on every machine with the same files. Reads ``SAMPLE_BYTES`` of each tensor, so it sees every change that reaches one byte
    in some hundreds of a tensor, but not one of a few numbers. Raises OSError.
    """
    files = _files(Path(path))
    if not any(file.name.endswith(_WEIGHTS) for file in files):
        return ""
    digest = hashlib.sha256()
    with ThreadPoolExecutor(min(_NUM_THREADS, len(files))) as threads:
        for file, found in zip(files, threads.map(_digest, files), strict=True):
            digest.update(f"{file.name}\0{len(found)}\0".encode() + found)
    return digest.hexdigest()[:32]


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(each for each in path.iterdir() if (each.name.endswith(_WEIGHTS) or each.name in _SETTINGS) and each.is_file())
    return [path] if path.is_file() else []


def _digest(path: Path) -> bytes:
    if path.name in _SETTINGS:
        return path.read_bytes()
    digest = hashlib.sha256()
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        num_bytes = os.fstat(fd).st_size
        digest.update(num_bytes.to_bytes(8, "little"))
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # else each sample would read a hundred kilobytes ahead
        header = _safetensors_header(fd, num_bytes) if path.name.endswith(".safetensors") else b""
        digest.update(header)
        for place in _places(header, num_bytes):
            digest.update(os.pread(fd, SAMPLE_BYTES, place))
    finally:
        os.close(fd)
    return digest.digest()


def _safetensors_header(fd: int, num_bytes: int) -> bytes:
    """The length and the text before the tensors; empty where there is none."""
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    return os.pread(fd, 8 + length, 0) if 8 + length <= num_bytes and length <= _MAX_HEADER_BYTES else b""


def _places(header: bytes, num_bytes: int) -> Iterable[int]:
    """Where samples begin, ascending."""
    tensors = _tensors(header)
    if tensors:
        return sorted(len(header) + max(begin, (begin + end - SAMPLE_BYTES) // 2) for begin, end in tensors)
    step = max(SAMPLE_BYTES, num_bytes // _NUM_SAMPLES)
    return range(0, num_bytes, step)


def _tensors(header: bytes) -> list[tuple[int, int]]:
    try:
        found: Any = json.loads(header[8:])
    except ValueError:
        return []
    return list(_extents(found)) if isinstance(found, dict) else []


def _extents(found: dict[str, Any]) -> Iterator[tuple[int, int]]:
    for value in found.values():
        match value:
            case {"data_offsets": [int(begin), int(end)]} if 0 <= begin <= end:
                yield begin, end
