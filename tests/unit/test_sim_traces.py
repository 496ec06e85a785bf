"""The public traces, where ``KVTIER_TRACES`` names a folder with them: the figures that are published of them come out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvtier.sim.model import Machine
from kvtier.sim.optimum import ideal_hits, look_ahead, token_hit_rate
from kvtier.sim.readers import open_trace
from kvtier.sim.replay import Replay
from kvtier.sim.setup import Setup, TierSetup

FOLDER = Path(os.environ.get("KVTIER_TRACES", "/nonexistent"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="KVTIER_TRACES names no folder")


@pytest.mark.parametrize(
    ("name", "num_requests", "num_blocks", "ideal"),
    [("mooncake_conversation.jsonl", 12_031, 170_899, 0.373), ("mooncake_synthetic.jsonl", 3_993, 40_148, 0.650)],
)
def test_mooncake(name: str, num_requests: int, num_blocks: int, ideal: float) -> None:
    """The ideal hit rate, from the optimum and from a replay in host memory without end."""
    trace = open_trace(FOLDER / name)
    assert (num_requests, num_blocks) == (len(trace), trace.num_unique)
    assert ideal == round(token_hit_rate(trace, ideal_hits(look_ahead(trace), trace)), 3)
    replayed = Replay(trace, Setup(TierSetup(num_blocks, "lru")), Machine()).run()
    assert ideal == round(token_hit_rate(trace, replayed.hit_blocks), 3)


def test_sessions() -> None:
    """Requests, blocks and ideal hit rate of the coding agents, started within eight hours."""
    trace = open_trace(FOLDER / "agent_sessions_rle64.npz")
    assert (37_823, 641_584, 256) == (len(trace), trace.num_unique, trace.block_tokens)
    assert 116_047 == round(trace.input_tokens.mean())
    assert 0.961 == round(token_hit_rate(trace, ideal_hits(look_ahead(trace), trace)), 3)
