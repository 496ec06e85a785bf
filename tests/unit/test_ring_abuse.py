"""The core's ring in hands that it was not made for: forks, and threads that close it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvtier import _core

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def ring() -> object:
    """A ring of the kernel's."""
    try:
        return _core.ring_open(4)
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")


IN_A_CHILD = """
import ctypes, gc, mmap, os, sys
from kvtier import _core

try:
    ring = _core.ring_open(4)
except OSError:
    sys.exit(0)
with open("/proc/self/maps") as file:
    places = [tuple(int(end, 16) for end in line.split()[0].split("-")) for line in file if "io_uring" in line]
child = os.fork()
if child:
    status = os.waitpid(child, 0)[1]
    _core.ring_wake(ring)
    assert [(0, 0)] == _core.ring_wait(ring, -1)
    sys.exit(os.waitstatus_to_exitcode(status) % 256)
for call in (
    lambda: _core.ring_submit(ring, 1, True, 0, 0, [bytearray(8)], -1),
    lambda: _core.ring_register(ring, 0, 4096, 4096),
    lambda: _core.ring_wait(ring, 0),
    lambda: _core.ring_wake(ring),
):
    try:
        call()
    except ValueError as error:
        assert str(error) == "the ring is closed"
    else:
        raise AssertionError("a ring of another process was used")
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
MAP_FIXED_NOREPLACE, MAP_FAILED = 0x100000, ctypes.c_void_p(-1).value
for start, end in places:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED_NOREPLACE
    assert start == libc.mmap(start, end - start, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0), "nothing may lie there in the child"
    ctypes.memset(start, 7, end - start)
END
for start, end in places:
    assert ctypes.string_at(start, end - start) == bytes([7]) * (end - start)
os._exit(0)
"""


@pytest.mark.parametrize("end", ["_core.ring_close(ring)", "del ring; gc.collect()"])
def test_a_fork_has_no_ring(end: str) -> None:
    """To a child the ring is closed; when it lets it go, what the child has put where the ring was stays. The parent goes on."""
    outcome = subprocess.run(
        [sys.executable, "-c", IN_A_CHILD.replace("END", end)], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert 0 == outcome.returncode, outcome.stderr


def test_closed_while_another_thread_waits(ring: object) -> None:
    """Who waits gets to know of it and returns; to everybody else the ring is closed at once."""
    found: list[object] = []
    thread = threading.Thread(target=lambda: found.extend(_core.ring_wait(ring, 60_000_000)))
    thread.start()
    time.sleep(0.05)
    _core.ring_close(ring)
    with pytest.raises(ValueError, match="the ring is closed"):
        _core.ring_wake(ring)
    thread.join(30)
    assert not thread.is_alive()
    assert [(0, 0)] == found
    _core.ring_close(ring)


def test_closing_spares_what_has_its_number_by_now(tmp_path: Path) -> None:
    """Somebody closed the ring's descriptor by mistake, and the number went to a file."""
    before = _rings()
    try:
        ring = _core.ring_open(4)
    except OSError as error:
        pytest.skip(f"no io_uring here: {error}")
    (number,) = _rings() - before
    with (tmp_path / "other").open("wb") as file:
        os.dup2(file.fileno(), number)
        _core.ring_close(ring)
        try:
            assert 5 == os.write(number, b"lives")
        finally:
            os.close(number)


def _rings() -> set[int]:
    """Descriptors of rings."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            if "io_uring" in str(Path(f"/proc/self/fd/{name}").readlink()):
                found.add(int(name))
    return found


def test_closed_by_its_own_arguments(ring: object) -> None:
    """A sequence may run any code when it is asked for a buffer."""

    class Vandal(Sequence[Any]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: Any) -> Any:
            _core.ring_close(ring)
            return bytearray(8)

    with pytest.raises(ValueError, match="the ring is closed"):
        _core.ring_submit(ring, 1, True, 0, 0, Vandal(), -1)
