"""Whatever is done to the files of a closed disk tier: misses, never an exception, never other bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import lmdb
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.testing.tiers import assert_right_bytes, load, load_job, meta_of, store, wait_for
from kvtier.tiers.disk import DiskTier, check_path, index_file, scan
from kvtier.types import BlockMeta, Outcome

SEGMENT_BYTES = 64 << 10
CAPACITY_BYTES = (1 << 20) + (32 << 10) + 6 * SEGMENT_BYTES
METAS = [meta_of(number, 5000 if number < 10 else 20000) for number in range(14)]
FILES = ("format", "clean", "lock", "index.mdb", "segment-000000.kv", "segment-000001.kv", "segment-000002.kv", "segment-000003.kv")


def open_tier(directory: Path) -> DiskTier:
    """The tier of these tests. In the page cache: some hundred directories are damaged, and a busy disk would make that minutes."""
    return DiskTier(directory, CAPACITY_BYTES, segment_bytes=SEGMENT_BYTES, direct_io="off", durable=False)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A closed tier with blocks of two sizes, some of them removed."""
    directory = tmp_path_factory.mktemp("healthy")
    tier = open_tier(directory)
    assert {Outcome.OK} == set(store(tier, METAS))
    tier.remove([METAS[3].key])
    tier.close()
    assert sorted(FILES) == sorted(os.listdir(directory))
    return directory


def survivors(healthy: Path, damage: Callable[[Path], object]) -> tuple[DiskTier, set[BlockMeta]]:
    """Damages a copy, opens it, loads everything; returns the tier (closed) and the blocks that came out OK."""
    with tempfile.TemporaryDirectory(prefix="damaged-", dir=healthy.parent) as name:
        directory = Path(name) / "tier"
        shutil.copytree(healthy, directory)
        damage(directory)
        if (directory / "format").exists() or (directory / "index.mdb").exists():
            check_path(directory)
        tier = open_tier(directory)
        assert tier.lookup([meta.key for meta in METAS]) <= len(METAS)
        job = load_job(1, METAS)
        tier.submit(job)
        (result,) = wait_for(tier)
        assert_right_bytes(job, result)
        assert set(result.outcomes) <= {Outcome.OK, Outcome.MISS, Outcome.CORRUPT}
        assert {Outcome.OK} == set(store(tier, METAS)), "a damaged tier is as good as new once its losses are stored again"
        assert {Outcome.OK} == set(load(tier, METAS))
        assert [] == tier.check()
        tier.close()
        assert [] == check_path(directory)
        return tier, {block.meta for block, outcome in zip(job.blocks, result.outcomes, strict=True) if outcome is Outcome.OK}


def delete(directory: Path, *names: str) -> None:
    """Deletes files."""
    for name in names:
        os.unlink(directory / name)


def flip(path: Path, position: int, mask: int) -> None:
    """Changes one byte."""
    with open(path, "r+b", buffering=0) as file:
        byte = os.pread(file.fileno(), 1, position)
        os.pwrite(file.fileno(), bytes([byte[0] ^ mask]), position)


PAGES_IN_USE = st.one_of(
    st.integers(0, 4095),  # headers: format, clean, LMDB's first page, the first record's header
    st.integers(0, 16383),
    st.integers(0, SEGMENT_BYTES - 1),
)


@pytest.mark.slow  # each example opens a tier and starts processes that read its index
@pytest.mark.timeout(300)
@settings(max_examples=100, deadline=None)
@given(name=st.sampled_from(FILES), position=PAGES_IN_USE, mask=st.integers(1, 255))
def test_flipped_byte(healthy: Path, name: str, position: int, mask: int) -> None:
    """One changed byte costs at most the block it lies in."""
    position %= os.path.getsize(healthy / name)
    _, whole = survivors(healthy, lambda directory: flip(directory / name, position, mask))
    assert len(METAS) - 2 <= len(whole)
    if name in ("format", "clean", "lock", "index.mdb"):
        assert set(METAS) - {METAS[3]} <= whole, "nothing is lost where the records are all there"


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from(FILES), share=st.floats(0, 1))
def test_truncated_file(healthy: Path, name: str, share: float) -> None:
    """A file cut anywhere costs at most its own blocks."""
    size = int(share * (os.path.getsize(healthy / name) - 1))
    _, whole = survivors(healthy, lambda directory: os.truncate(directory / name, size))
    if not name.startswith("segment"):
        assert set(METAS) - {METAS[3]} <= whole


@pytest.mark.parametrize("name", FILES)
def test_deleted_file(healthy: Path, name: str) -> None:
    """A file that is gone costs at most its own blocks, and they are counted at the opening."""
    tier, whole = survivors(healthy, lambda directory: delete(directory, name))
    if name.startswith("segment"):
        assert len(METAS) - 1 - len(whole) == tier.recovery.num_lost > 0
    else:
        assert set(METAS) - {METAS[3]} <= whole


@pytest.mark.parametrize("name", ["format", "clean"])
def test_text_without_a_title(healthy: Path, name: str) -> None:
    """A text file of which only the checksum is left, and right, is damaged like any other; no block is lost."""
    content = f"checksum: {xxhash.xxh3_64_hexdigest(b'')}\n"
    _, whole = survivors(healthy, lambda directory: (directory / name).write_text(content))
    assert set(METAS) - {METAS[3]} <= whole


@settings(max_examples=40, deadline=None)
@given(names=st.sets(st.sampled_from(FILES), min_size=2))
def test_several_deleted_files(healthy: Path, names: set[str]) -> None:
    """Any files may go, all of them too."""
    survivors(healthy, lambda directory: delete(directory, *names))


@settings(max_examples=30, deadline=None)
@given(seed=st.binary(min_size=1, max_size=64), start=st.integers(0, 200_000))
def test_garbage_in_the_index(healthy: Path, seed: bytes, start: int) -> None:
    """Garbage in the LMDB file, even without a clean close to compare with, never reaches the process."""

    def damage(directory: Path) -> None:
        (directory / "clean").unlink()
        with open(directory / "index.mdb", "r+b") as file:
            file.seek(start)
            file.write((seed * 9000)[:9000])

    survivors(healthy, damage)


def test_a_row_that_is_not_whole_condemns_the_index(healthy: Path) -> None:
    """After a kill nobody vouches for the index: one row that does not verify, and the records are asked instead."""

    def damage(directory: Path) -> None:
        (directory / "clean").unlink()
        content = (directory / "index.mdb").read_bytes()
        position = content.find(METAS[1].key)
        assert position >= 0
        while position >= 0:
            flip(directory / "index.mdb", position, 1)
            position = content.find(METAS[1].key, position + 1)

    tier, whole = survivors(healthy, damage)
    assert "scanned" == tier.recovery.source
    assert set(METAS) - {METAS[3]} <= whole


def test_swapped_segments(healthy: Path) -> None:
    """Records in the wrong place are no records: the right bytes of another block are wrong bytes."""

    def damage(directory: Path) -> None:
        (directory / "segment-000000.kv").rename(directory / "spare")
        (directory / "segment-000001.kv").rename(directory / "segment-000000.kv")
        (directory / "spare").rename(directory / "segment-000001.kv")

    with tempfile.TemporaryDirectory(dir=healthy.parent) as name:
        directory = Path(name) / "tier"
        shutil.copytree(healthy, directory)
        damage(directory)
        tier = open_tier(directory)
        assert Outcome.CORRUPT in load(tier, METAS)
        tier.close()


def test_a_record_moved_to_another_place_is_refused(healthy: Path) -> None:
    """A whole and valid record of another block, copied over a block's own record, is CORRUPT: the header echoes the key."""

    def damage(directory: Path) -> None:
        with open(directory / "segment-000000.kv", "r+b") as file:
            record = file.read(3 * 4096)
            file.seek(3 * 4096)
            file.write(record)

    _, whole = survivors(healthy, damage)
    assert set(METAS) - {METAS[1], METAS[3]} == whole


def test_check_finds_what_is_wrong(healthy: Path) -> None:
    """``check_path`` names file and key, and changes nothing."""
    with tempfile.TemporaryDirectory(dir=healthy.parent) as name:
        directory = Path(name) / "tier"
        shutil.copytree(healthy, directory)
        flip(directory / "segment-000000.kv", 4096 + 17, 1)
        (directory / "notes.txt").write_text("not kvtier's")
        before = {path.name: path.read_bytes() for path in directory.iterdir()}
        found = check_path(directory)
        assert {("segment-000000.kv", METAS[0].key), ("notes.txt", None)} == {(damage.where, damage.key) for damage in found}
        assert before == {path.name: path.read_bytes() for path in directory.iterdir()}


def test_live_check_finds_what_is_wrong(tmp_path: Path) -> None:
    """``check()`` of an open tier reads everything and names the damaged block; the next load is CORRUPT, then a MISS."""
    tier = open_tier(tmp_path)
    store(tier, METAS)
    flip(tmp_path / "segment-000000.kv", 4096 + 17, 1)
    assert [METAS[0].key] == [damage.key for damage in tier.check()]
    assert (Outcome.CORRUPT, Outcome.OK) == load(tier, METAS[:2])
    assert (Outcome.MISS, Outcome.OK) == load(tier, METAS[:2])
    assert 0 == tier.lookup([METAS[0].key])
    tier.close()


def test_segments_that_vanish_or_shrink_while_open(tmp_path: Path) -> None:
    """A segment cut or deleted under an open tier costs its blocks and nothing else; stores go on."""
    tier = open_tier(tmp_path)
    store(tier, METAS)
    os.truncate(tmp_path / "segment-000000.kv", 4096)
    outcomes = load(tier, METAS)
    assert {Outcome.CORRUPT, Outcome.OK} == set(outcomes)
    tier._files.close()  # as if the descriptors had been needed elsewhere
    os.unlink(tmp_path / "segment-000001.kv")
    outcomes = load(tier, METAS)
    assert {Outcome.MISS, Outcome.OK} == set(outcomes)
    assert {Outcome.OK} == set(store(tier, METAS))
    assert {Outcome.OK} == set(load(tier, METAS))
    tier.close()


def test_a_damaged_index_can_kill_who_maps_it(healthy: Path, tmp_path: Path) -> None:
    """Why ``salvage`` is a process of its own: a cut LMDB file kills its reader by a signal, and the tier sees only 'damaged'."""
    shutil.copytree(healthy, tmp_path / "tier")
    path = tmp_path / "tier" / "index.mdb"
    os.truncate(path, 2 * 4096)
    script = str(Path(index_file.__file__).with_name("salvage.py"))
    package = str(Path(str(lmdb.__file__)).parent.parent)
    child = subprocess.run([sys.executable, "-I", "-S", script, package, str(path), "8", "80"], capture_output=True, check=False)
    assert child.returncode in (-signal.SIGBUS, -signal.SIGSEGV, -signal.SIGABRT, 1)
    assert index_file.salvage(tmp_path / "tier") is None


def test_scan_trusts_only_the_newest_division_of_a_segment(tmp_path: Path) -> None:
    """Whole records of an earlier slot size, left over between newer ones, do not come back."""
    tier = open_tier(tmp_path)
    bound = tier.max_blocks(5000)
    old = [meta_of(number, 5000) for number in range(bound)]
    assert {Outcome.OK} == set(store(tier, old))
    tier.remove([meta.key for meta in old])
    new = [meta_of(1000, 20000)]
    assert {Outcome.OK} == set(store(tier, new))
    tier.close()
    found = scan.scan_segments(tmp_path, 6, SEGMENT_BYTES)
    (place,) = [fields.place for fields in found if fields.key == new[0].key]
    segment = place // (SEGMENT_BYTES // 4096)
    assert [new[0].key] == [fields.key for fields in found if fields.place // (SEGMENT_BYTES // 4096) == segment]


@pytest.mark.parametrize("is_clean", [True, False])
def test_sequence_numbers_never_go_back(tmp_path: Path, is_clean: bool) -> None:
    """Blocks stored after a reopening are newer than all that were ever removed, so that a scan takes the right ones."""
    tier = open_tier(tmp_path)
    old = [meta_of(number, 5000) for number in range(5)]
    store(tier, old)
    tier.remove([meta.key for meta in old])
    if is_clean:
        tier.close()
    else:
        store(tier, [meta_of(99, 40000)])  # with its commit the removal is on disk
        tier.remove([meta_of(99, 40000).key])
        store(tier, [meta_of(98, 100)])
        tier.abandon()
    tier = open_tier(tmp_path)
    new = [meta_of(1000, 20000)]
    assert {Outcome.OK} == set(store(tier, new))
    tier.close()
    (tmp_path / "index.mdb").unlink()
    tier = open_tier(tmp_path)
    assert "scanned" == tier.recovery.source
    assert {Outcome.OK} == set(load(tier, new))
    tier.close()
