"""A peer's figures, with small programs in its place."""

from __future__ import annotations

import sys

import benchmark_pages
import pytest

from kvtier.bench import peers
from kvtier.bench.peers import WARM_UP, Peer

ANSWERS = """
import os, sys
print("loud at start", file=sys.stderr)
print()
sys.stdout.flush()
number = 0
for line in sys.stdin:
    number += 1
    print(100.0 if number <= 2 else float(number))
    sys.stdout.flush()
"""
FAILS_AT_START = "raise ImportError('no such extension')"
FAILS_LATER = "print(flush=True); input(); print(1.0, flush=True); input(); raise RuntimeError('out of luck')"
HANGS = "import time; time.sleep(60)"


def become(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(peers, "NAME", "sys")  # a package that is there
    monkeypatch.setattr(peers, "PROGRAM", (sys.executable, "-c", program))


def test_absent(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """No package, no figures, no process, not a word."""
    monkeypatch.setattr(peers, "NAME", "no_such_package_at_all")
    with Peer("lookups") as peer:
        assert not peer.is_running
        assert {} == peer.rounds("all hit", 3).time("all hit", "ms")
    assert ("", "") == tuple(capfd.readouterr())


def test_figures(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The median of the rounds after those that warm up, in the unit asked for; what the program says elsewhere stays there."""
    become(monkeypatch, ANSWERS)
    with Peer("lookups", tokens=1) as peer:
        assert 2 == WARM_UP
        assert {"sys": 4000.0} == peer.rounds("all hit", 3).time("all hit", "ms")
    assert {"sys": 2.0} == peer.rate("all hit", 8_000_000_000)
    assert {} == peer.time("another", "us")
    assert ("", "") == tuple(capfd.readouterr())


@pytest.mark.parametrize(("program", "reason"), [(FAILS_AT_START, "no such extension"), (FAILS_LATER, "out of luck")])
def test_failure(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], program: str, reason: str) -> None:
    """One line says why; there are no figures, not even of the rounds before."""
    become(monkeypatch, program)
    with Peer("lookups") as peer:
        assert {} == peer.rounds("all hit", 3).time("all hit", "ms")
    out, err = capfd.readouterr()
    assert "" == out
    assert 1 == len(err.splitlines())
    assert "lookups" in err
    assert reason in err


def test_hanging(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Whoever does not answer is stopped."""
    become(monkeypatch, HANGS)
    monkeypatch.setattr(peers, "ANSWER_LIMIT_S", 0.2)
    with Peer("lookups") as peer:
        assert not peer.is_running
    assert "ended with status -9" in capfd.readouterr().err


def test_page_has_a_column_where_there_are_peers() -> None:
    """A table has the column when one of its records has a peer, and every row has all cells."""
    plain = {"name": "a", "params": {}, "value": 1.0, "spread": 0.0, "unit": "ms", "limit": None, "fraction": None, "peers": {}}
    assert "Peers" not in benchmark_pages.table([plain])
    head, _, *rows = benchmark_pages.table([plain, {**plain, "peers": {"lmcache": 1.953}}]).splitlines()
    assert head.endswith("| Peers |")
    assert rows[1].endswith("| lmcache 1.95 |")
    assert {9} == {row.count("|") for row in (head, *rows)}
