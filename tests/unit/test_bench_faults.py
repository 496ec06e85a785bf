"""What ``kvtier bench faults`` makes of its measurements. `tests/engine/test_sharing.py` lets the same faults happen in the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier.bench.faults import is_late, records_of
from kvtier.testing.faults import FAULTS, FaultyValkey
from kvtier.testing.servers import can_connect


def answer(waited_s: float, seconds: float) -> dict[str, float]:
    return {"waited_s": waited_s, "seconds": seconds}


@pytest.mark.parametrize(
    ("waited_s", "seconds", "late"), [(0.4, 1.4, ""), (0.6, 1.4, "frozen, added by the store, waiting, worst: 600 of 500")]
)
def test_each_request_counts(waited_s: float, seconds: float, late: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One request over the deadline is one too many, and it is named; what the same request takes without kvtier is taken off."""
    pairs = [(answer(0.0, 1.0), answer(0.1, 1.1)), (answer(0.0, 1.0), answer(waited_s, seconds)), (answer(0.0, 2.0), answer(0.1, 2.0))]
    records = list(records_of("frozen", 300, pairs))
    assert bool(late) == is_late(records)
    assert late in capsys.readouterr().err
    values = {record.name.removeprefix("added by the store, "): round(record.value) for record in records}
    expected = {"waiting, median": 100, "waiting, worst": 1000 * waited_s, "in all, median": 100, "in all, worst": 400}
    assert expected == {name: value for name, value in values.items() if name in expected}


def test_every_fault_ends(tmp_path: Path) -> None:
    """Whatever has gone wrong with the server: afterwards it answers again."""
    with FaultyValkey(tmp_path) as store:
        for fault in FAULTS:
            store.begin(fault)
            store.end(fault)
            assert can_connect(store.server.socket_path)
            store.server.command("PING")
