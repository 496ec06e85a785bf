"""What ``kvtier bench faults`` makes of its measurements. `tests/engine/test_sharing.py` lets the same faults happen in the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier.bench.faults import Asked, is_late, records_of
from kvtier.testing.faults import FAULTS, FaultyValkey
from kvtier.testing.servers import can_connect


def answer(waited_s: float, seconds: float) -> dict[str, float]:
    return {"waited_s": waited_s, "seconds": seconds}


@pytest.mark.parametrize(
    ("waited_s", "seconds", "noise_s", "late"),
    [
        (0.4, 1.4, 0.0, ""),
        (0.6, 1.4, 0.0, "frozen, added by the store, waiting, worst: 600 of 500"),
        (0.6, 1.4, 0.2, "frozen, added by the store, waiting, worst: 600 of 500"),
        (0.4, 1.6, 0.2, ""),
        (0.4, 1.6, 0.0, "frozen, added by the store, in all, worst: 600 of 500"),
        (0.4, 1.8, 0.2, "frozen, added by the store, in all, worst: 800 of 700"),
    ],
)
def test_each_request_counts(waited_s: float, seconds: float, noise_s: float, late: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One request over the deadline is one too many, and it is named; what the same request takes without kvtier is taken off.

    What computing differs by itself is allowed on top where it matters, and said."""
    alone = answer(0.0, 1.0)
    noisy = answer(0.0, 1.0 - noise_s / 2), answer(0.0, 1.0 + noise_s / 2)
    asked = [
        Asked(alone, answer(0.1, 1.1), alone),
        Asked(noisy[0], answer(waited_s, seconds), noisy[1]),
        Asked(alone, answer(0.1, 1.0), alone),
    ]
    records = list(records_of("frozen", 300, asked))
    assert bool(late) == is_late(records)
    assert late in capsys.readouterr().err
    values = {record.name.removeprefix("added by the store, "): round(record.value) for record in records}
    expected = {"waiting, median": 100, "waiting, worst": 1000 * waited_s, "in all, median": 100, "in all, worst": 1000 * seconds - 1000}
    assert {**expected, "the same twice without kvtier, largest difference": 1000 * noise_s} == {
        name: value for name, value in values.items() if name != "a request without kvtier"
    }


def test_every_fault_ends(tmp_path: Path) -> None:
    """Whatever has gone wrong with the server: afterwards it answers again."""
    with FaultyValkey(tmp_path) as store:
        for fault in FAULTS:
            store.begin(fault)
            store.end(fault)
            assert can_connect(store.server.socket_path)
            store.server.command("PING")
