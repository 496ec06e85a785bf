"""The arena: one file, many processes, memory that is there before anyone touches it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvtier
from kvtier.errors import ArenaError, ClosedError
from kvtier.memory import arena_file, numa, pages
from kvtier.memory.arena import Arena, remove_stale
from kvtier.testing.starts import refused_threads

MIB = 1 << 20
CAPACITY_BYTES = 4 * MIB
TIMEOUT_S = 30.0

PREAMBLE = """
import sys
from kvtier.errors import ArenaError
from kvtier.memory.arena import Arena
def answer(text):
    print(text, flush=True)
def wait():
    return sys.stdin.readline()
"""


class Child:
    """Another Python process that runs ``code`` with kvtier at hand; a conversation in lines."""

    def __init__(self, code: str, *args: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PREAMBLE + code, *map(str, args)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(kvtier.__file__).parents[1])},
        )

    def hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self, *, kill: bool = False) -> int:
        if kill:
            self.process.send_signal(signal.SIGKILL)
        with self.process:
            pass
        return self.process.returncode


@pytest.fixture
def path() -> Iterator[str]:
    """A name in /dev/shm that nobody else uses."""
    name = f"/dev/shm/kvtier-test-{uuid.uuid4().hex}"
    yield name
    Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def mounted(directory: Path, options: str) -> Iterator[Path]:
    """A tmpfs of its own; skips the test, saying so, where mounting is not permitted."""
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("NOT CHECKED: there is no mount command")
    if done.returncode:
        pytest.skip(f"NOT CHECKED: this user may not mount a tmpfs with {options}: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


def test_processes_see_each_others_bytes(path: str) -> None:
    """What one process writes into payload and generations, another one that attached reads, and the other way round."""
    with Arena.open(path, CAPACITY_BYTES) as arena:
        arena.view(8192, 5)[:] = b"hello"
        assert [1, 2] == [arena.bump(2), arena.bump(2)]
        child = Child(
            """
arena = Arena.open(sys.argv[1], int(sys.argv[2]))
answer((arena.created, bytes(arena.view(8192, 5)), int(arena.generations[2])))
arena.view(1 << 20, 3)[:] = b"you"
arena.generations[5] = 77
answer("written")
""",
            path,
            CAPACITY_BYTES,
        )
        assert "(False, b'hello', 2)" == child.hear()
        assert "written" == child.hear()
        assert 0 == child.end()
        assert b"you" == bytes(arena.view(MIB, 3))
        assert 78 == arena.bump(5)
        assert [] == arena.check()


def test_racing_processes_make_one_arena(path: str) -> None:
    """Of many processes that open the same path at once exactly one creates, and all map the same memory."""
    code = """
answer("here")
wait()
arena = Arena.open(sys.argv[1], int(sys.argv[2]))
arena.view(int(sys.argv[3]) * 4096, 1)[:] = b"x"
answer(arena.created)
wait()
"""
    children = [Child(code, path, CAPACITY_BYTES, number) for number in range(6)]
    for child in children:
        assert "here" == child.hear()
    for child in children:
        child.tell()
    assert ["False"] * 5 + ["True"] == sorted(child.hear() for child in children)
    with Arena.open(path, CAPACITY_BYTES) as arena:
        assert not arena.created
        assert [b"x"] * 6 == [bytes(arena.view(number * 4096, 1)) for number in range(6)]
    for child in children:
        child.tell()
        assert 0 == child.end()


def test_racing_threads_make_one_arena(path: str) -> None:
    """The locks tell threads of one process apart as well."""
    arenas: list[Arena] = []
    threads = [threading.Thread(target=lambda: arenas.append(Arena.open(path, CAPACITY_BYTES))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [False, False, False, True] == sorted(arena.created for arena in arenas)
    for arena in arenas:
        arena.close()


def test_another_capacity_is_refused(path: str) -> None:
    """A living arena is never resized: who asks for another capacity gets an error with both."""
    with Arena.open(path, CAPACITY_BYTES), pytest.raises(ArenaError, match=f"{CAPACITY_BYTES} bytes and is in use, but {MIB}"):
        Arena.open(path, MIB)


def test_a_dead_processes_arena_is_made_anew(path: str) -> None:
    """Nothing of a file on which nobody lives is taken over, not even its size."""
    with Arena.open(path, CAPACITY_BYTES) as arena:
        arena.view(0, 3)[:] = b"old"
        arena.bump(0)
    with Arena.open(path, 2 * CAPACITY_BYTES) as arena:
        assert arena.created
        assert bytes(3) == arena.view(0, 3)
        assert 0 == arena.generations[0]


@pytest.mark.parametrize("content", [b"precious", b"precious" * 4096])
def test_other_files_are_left_alone(path: str, content: bytes) -> None:
    """A file that is not an arena is neither overwritten nor removed."""
    Path(path).write_bytes(content)
    with pytest.raises(ArenaError, match="not a kvtier arena"):
        Arena.open(path, CAPACITY_BYTES)
    assert [] == remove_stale("/dev/shm", os.path.basename(path))
    assert content == Path(path).read_bytes()


def test_links_are_not_followed(path: str, tmp_path: Path) -> None:
    """/dev/shm is everybody's: a link laid there leads nowhere."""
    target = tmp_path / "target"
    os.symlink(target, path)
    with pytest.raises(ArenaError, match="cannot open"):
        Arena.open(path, CAPACITY_BYTES)
    assert not target.exists()


def test_a_missing_directory_is_an_error_with_the_path(path: str) -> None:
    """The message names the path that cannot be used."""
    with pytest.raises(ArenaError, match=f"{path}/arena: No such file"):
        Arena.open(f"{path}/arena", CAPACITY_BYTES)


@pytest.mark.parametrize("capacity_bytes", [0, -1])
def test_an_arena_has_bytes(path: str, capacity_bytes: int) -> None:
    """A capacity of nothing is an error, not an empty arena."""
    with pytest.raises(ArenaError, match="must be positive"):
        Arena.open(path, capacity_bytes)
    assert not os.path.exists(path)


def test_a_killed_owner_leaves_nothing(path: str) -> None:
    """After kill -9 the file is stale once the last process that attached is gone too, never before."""
    prefix = os.path.basename(path)
    code = """
arena = Arena.open(sys.argv[1], int(sys.argv[2]))
arena.prefault()
answer(arena.created)
wait()
"""
    owner = Child(code, path, CAPACITY_BYTES)
    assert "True" == owner.hear()
    attached = Child(code, path, CAPACITY_BYTES)
    assert "False" == attached.hear()
    assert [] == remove_stale("/dev/shm", prefix)
    assert -signal.SIGKILL == owner.end(kill=True)
    assert [] == remove_stale("/dev/shm", prefix)
    assert -signal.SIGKILL == attached.end(kill=True)
    assert [path] == remove_stale("/dev/shm", prefix)
    assert not os.path.exists(path)


def test_what_a_crash_during_creation_leaves_is_removed(path: str) -> None:
    """An empty file with the prefix is an arena that never came to be; other prefixes are not looked at."""
    Path(path).touch()
    assert [] == remove_stale("/dev/shm", "kvtier-other-")
    assert [path] == remove_stale("/dev/shm", os.path.basename(path))
    assert [] == remove_stale("/dev/shm/no-such-directory", "kvtier-")


def test_a_fork_that_closes_takes_nothing_away(path: str) -> None:
    """A forked child's ``close`` leaves the parent's arena mapped and alive."""
    with Arena.open(path, CAPACITY_BYTES) as arena:
        arena.view(0, 1)[:] = b"p"
        child = os.fork()
        if not child:
            arena.close()
            os._exit(0)
        assert (child, 0) == os.waitpid(child, 0)
        assert b"p" == bytes(arena.view(0, 1))
        assert [] == remove_stale("/dev/shm", os.path.basename(path))


def test_unlink_keeps_the_memory(path: str) -> None:
    """The name goes at once, the memory with the last process; a new arena of the same name is another one."""
    with Arena.open(path, CAPACITY_BYTES) as arena:
        arena.view(0, 1)[:] = b"a"
        arena.unlink()
        assert not os.path.exists(path)
        with Arena.open(path, CAPACITY_BYTES) as other:
            assert other.created
            arena.unlink()
            assert os.path.exists(path)
        assert b"a" == bytes(arena.view(0, 1))


def test_close_waits_for_nobody(path: str) -> None:
    """``close`` is idempotent; views in use stay valid, and the arena counts as alive until they are gone."""
    arena = Arena.open(path, CAPACITY_BYTES)
    view = arena.view(4096, 3)
    generations = arena.generations
    arena.close()
    arena.close()
    view[:] = b"abc"
    assert b"abc" == bytes(view)
    generations[0] = 1
    for use in (lambda: arena.buffer, lambda: arena.generations, lambda: arena.ready_bytes, lambda: arena.bump(0), arena.check):
        with pytest.raises(ClosedError):
            use()
    with pytest.raises(ClosedError):
        arena.view(0, 1)
    prefix = os.path.basename(path)
    assert [] == remove_stale("/dev/shm", prefix)
    del view, generations
    assert [path] == remove_stale("/dev/shm", prefix)


def test_views_end_where_the_arena_is_ready(path: str) -> None:
    """No view reaches beyond what is reserved, whatever is asked for."""
    with Arena.open(path, CAPACITY_BYTES - 100) as arena:
        assert CAPACITY_BYTES == arena.capacity_bytes == arena.ready_bytes == len(arena.buffer)
        assert 4096 == len(arena.view(CAPACITY_BYTES - 4096, 4096))
        for offset, num_bytes in ((CAPACITY_BYTES - 4095, 4096), (-1, 1), (4096, -1), (CAPACITY_BYTES, 1)):
            with pytest.raises(IndexError, match="ready"):
                arena.view(offset, num_bytes)
        for slot in (-1, CAPACITY_BYTES // 4096):
            with pytest.raises(IndexError):
                arena.bump(slot)


def test_the_payload_is_where_address_says(path: str) -> None:
    """Address, buffer and views are the same memory, at a page's start."""
    with Arena.open(path, CAPACITY_BYTES) as arena:
        ctypes_view = (ctypes.c_char * 3).from_address(arena.address + 8192)
        arena.buffer[8192:8195] = b"abc"
        assert b"abc" == ctypes_view.raw == arena.view(8192, 3)
        assert 0 == arena.address % 4096


def test_a_generation_is_never_zero(path: str) -> None:
    """Zero means that a slot never had a tenant, also after four billion tenants."""
    with Arena.open(path, CAPACITY_BYTES) as arena:
        arena.generations[9] = 0xFFFFFFFF
        assert [1, 2] == [arena.bump(9), arena.bump(9)]


def test_no_thread_to_be_had(path: str) -> None:
    """A limit on processes is an ArenaError that says so; the arena can be closed, or prepared once the limit is raised."""
    with Arena.open(path, CAPACITY_BYTES) as arena:
        with refused_threads("kvtier-prefault"), pytest.raises(ArenaError, match=f"{path} cannot be prepared: can't start new thread"):
            arena.prefault()
        arena.prefault()
        assert arena.wait_prefaulted(TIMEOUT_S)
    with Arena.open(path, CAPACITY_BYTES) as arena, refused_threads("kvtier-prefault"), pytest.raises(ArenaError):
        arena.prefault()


def test_who_waits_for_memory_can_be_called_away(path: str) -> None:
    """Its creator may have died before it had reserved all of it."""
    calls: list[int] = []

    def look() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise ArenaError("it is gone")

    with Arena.open(path, 160 * MIB), Arena.open(path, 160 * MIB) as other:
        other.prefault()
        other.while_waiting = look
        assert not other.wait_prefaulted(0.15)
        with pytest.raises(ArenaError, match="it is gone"):
            other.wait_prefaulted(TIMEOUT_S)
        assert 3 == len(calls)


def test_prefault_reserves_everything_and_changes_nothing(path: str) -> None:
    """A large arena becomes ready in the background, in the creator and in who attached; bytes written before stay."""
    capacity_bytes = 160 * MIB
    with Arena.open(path, capacity_bytes) as arena, Arena.open(path, capacity_bytes) as other:
        assert arena_file.PAGE_BYTES <= arena.ready_bytes < capacity_bytes
        content = os.urandom(4 * MIB)
        arena.view(0, len(content))[:] = content
        other.prefault()
        assert not other.prefaulted
        arena.prefault()
        arena.prefault()
        assert arena.wait_prefaulted(TIMEOUT_S)
        assert other.wait_prefaulted(TIMEOUT_S)
        assert capacity_bytes == arena.ready_bytes == other.ready_bytes
        assert content == other.view(0, len(content))
        assert arena.reserve_error is None
        assert mapped_bytes(path) >= 2 * capacity_bytes


def mapped_bytes(path: str, kind: str = "Rss") -> int:
    """Bytes of the file that this process's page tables map, of one kind."""
    text = Path("/proc/self/smaps").read_text(encoding="utf-8")
    return sum(int(part.split(f"{kind}:")[1].split()[0]) * 1024 for part in text.split(path)[1:])


def test_old_kernels_reserve_by_touching(path: str) -> None:
    """Without the kernel's populate call the same is reached: pages are there, contents unchanged."""
    with open(path, "w+b") as file:
        file.truncate(CAPACITY_BYTES)
        file.write(b"start")
        file.flush()
        with pages_of(file.fileno()) as address:
            num_mapped = []
            for _ in range(5):  # under load the kernel unmaps a few again, 1 to 8 of 1024 in one of 3,000 runs
                assert 0 == pages.populate_by_touch(address, CAPACITY_BYTES, file.fileno(), 0)
                assert CAPACITY_BYTES == os.stat(path).st_blocks * 512
                num_mapped.append(mapped_bytes(path))
            assert CAPACITY_BYTES in num_mapped
        assert b"start" == Path(path).read_bytes()[:5]


@contextlib.contextmanager
def pages_of(fd: int) -> Iterator[int]:
    """A plain mapping of a whole file; its address."""
    mapping = mmap.mmap(fd, 0)
    yield ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    mapping.close()


def test_a_closing_creator_lets_the_others_finish(path: str) -> None:
    """Where the creator stops half-way, the arena stays at that size and nobody waits for more."""
    arena = Arena.open(path, 160 * MIB)
    with Arena.open(path, 160 * MIB) as other:
        other.prefault()
        arena.close()
        assert other.wait_prefaulted(TIMEOUT_S)
        assert 64 * MIB == other.ready_bytes


def test_too_little_room_is_an_error_that_helps(tmp_path: Path) -> None:
    """At creation the message says what was asked, what is there and how to mend it, and nothing is left behind."""
    with mounted(tmp_path, "size=16m") as directory:
        with pytest.raises(ArenaError, match=r"needs 66\.0 MiB in .*16\.0 MiB of 16\.0 MiB are free.*remount,size=.*--shm-size") as caught:
            Arena.open(str(directory / "arena"), 64 * MIB)
        assert isinstance(caught.value, OSError)
        assert [] == list(directory.iterdir())
        with Arena.open(str(directory / "arena"), 8 * MIB) as arena:
            assert 8 * MIB == arena.ready_bytes


def test_too_little_memory_is_an_error_that_helps(tmp_path: Path) -> None:
    """A tmpfs larger than the machine is no promise: memory is asked too."""
    with mounted(tmp_path, "size=64t") as directory, pytest.raises(ArenaError, match=r"of memory, but only .* are available"):
        Arena.open(str(directory / "arena"), 32 << 40)


def test_a_file_system_that_fills_up_kills_nobody(tmp_path: Path) -> None:
    """Room that vanishes after the start makes the arena smaller; its ready part works, and some room is left to others."""
    with mounted(tmp_path, "size=200m") as directory:
        child = Child(
            """
import os
arena = Arena.open(sys.argv[1] + "/arena", 160 << 20)
other = Arena.open(sys.argv[1] + "/arena", 160 << 20)
with open(sys.argv[1] + "/filler", "wb") as file:
    os.posix_fallocate(file.fileno(), 0, 80 << 20)
arena.prefault(), other.prefault()
assert arena.wait_prefaulted(30) and other.wait_prefaulted(30)
arena.buffer[:arena.ready_bytes] = b"x" * arena.ready_bytes
answer(arena.ready_bytes >> 20)
answer(other.reserve_error)
space = os.statvfs(sys.argv[1])
answer(space.f_bavail * space.f_frsize >> 20)
""",
            directory,
        )
        assert "96" == child.hear()
        assert f"only 96.0 MiB of 160.0 MiB could be reserved in {directory}: {os.strerror(errno.ENOSPC)}" == child.hear()
        assert 16 <= int(child.hear())
        assert 0 == child.end()


def test_a_full_file_system_at_creation_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the room was taken between the look and the reservation, creation fails and leaves nothing."""
    monkeypatch.setattr(arena_file, "check_room", lambda path, num_bytes: None)
    with mounted(tmp_path, "size=16m") as directory:
        with pytest.raises(ArenaError, match=r"only 0 bytes of 64\.0 MiB could be reserved"):
            Arena.open(str(directory / "arena"), 64 * MIB)
        assert [] == list(directory.iterdir())
        with pytest.raises(ArenaError, match="No space left"):
            Arena.open(str(directory / "arena"), 64 << 30)
        assert [] == list(directory.iterdir())


@pytest.mark.parametrize("option", ["advise", "never"])
def test_huge_pages_where_they_are_allowed(tmp_path: Path, option: str) -> None:
    """Where the file system allows huge pages the arena gets them and says so; where not, it says that and works."""
    with mounted(tmp_path, f"size=100m,huge={option}") as directory, Arena.open(str(directory / "arena"), 32 * MIB) as arena:
        shmem_enabled = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
        if not shmem_enabled.exists() or "[deny]" in shmem_enabled.read_text() or "[force]" in shmem_enabled.read_text():
            pytest.skip("NOT CHECKED: the kernel decides on huge pages for everybody")
        assert (option == "advise") == arena.huge_pages
        assert (32 * MIB if option == "advise" else 0) == mapped_bytes(arena.path, "ShmemPmdMapped")
        if arena.huge_pages:
            assert 0 == arena.address % (2 * MIB)
    with mounted(tmp_path, "size=100m,huge=advise") as directory, Arena.open(str(directory / "a"), MIB, huge_pages=False) as arena:
        assert not arena.huge_pages


def test_a_numa_node_that_does_not_exist_is_named(path: str) -> None:
    """The error says which nodes there are, and nothing is created."""
    nodes = ", ".join(map(str, numa.memory_nodes()))
    with pytest.raises(ArenaError, match=f"numa_node is 4711, but this machine's nodes with memory are {nodes}"):
        Arena.open(path, CAPACITY_BYTES, numa_node=4711)
    assert not os.path.exists(path)


def test_a_numa_node_is_preferred(path: str) -> None:
    """The kernel has noted the node for the payload."""
    node = numa.memory_nodes()[-1]
    with Arena.open(path, CAPACITY_BYTES, numa_node=node) as arena:
        lines = Path("/proc/self/numa_maps").read_text(encoding="utf-8").splitlines()
        assert any(f"prefer:{node}" in line or f"prefer=static:{node}" in line for line in lines if f"{arena.address:x}" in line)


@pytest.mark.parametrize(("text", "nodes"), [("0\n", [0]), ("0-2,5\n", [0, 1, 2, 5]), ("\n", [])])
def test_kernel_lists_of_nodes(text: str, nodes: list[int]) -> None:
    """Single numbers, ranges and nothing are read as the kernel means them."""
    assert nodes == numa.parse_nodes(text)


def test_check_finds_damage(path: str) -> None:
    """A scribbled header and a file that was cut off are named, without touching what is not there any more."""
    with Arena.open(path, CAPACITY_BYTES) as arena:
        with open(path, "r+b") as file:
            file.seek(8 * arena_file.FIELD_CAPACITY)
            file.write(b"\x01")
            file.truncate(2 * MIB)
        found = [damage.what for damage in arena.check()]
        assert [f"the header's capacity is {CAPACITY_BYTES + 1}, not {CAPACITY_BYTES}"] == found[:1]
        assert 2 == len(found)
        assert "the file has" in found[1]
        with pytest.raises(ArenaError, match="is in use, but"):
            Arena.open(path, CAPACITY_BYTES)


@pytest.mark.parametrize(("num_bytes", "words"), [(0, "0 bytes"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (5 << 40, "5.0 TiB")])
def test_sizes_in_words(num_bytes: int, words: str) -> None:
    """Messages give sizes in the unit a person would use."""
    assert words == arena_file.to_words(num_bytes)
