"""What the real vLLM with kvtier did, the simulator does too, block for block."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtier.sim.readers import open_trace
from kvtier.sim.verify import verify
from tests.engine.harness import host, loaded_tokens, run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
BLOCK_TOKENS = 32


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_the_simulator_decides_as_the_engine_did(tmp_path: Path, prefix_caching: bool) -> None:
    """Prompts one by one, again, and all at once, in host memory that is too small for them: the same hits, the same evictions."""
    path = tmp_path / "record.jsonl"
    settings = host("30MiB", record={"path": str(path)})
    result = run("repeat", kvtier=settings, engine={"enable_prefix_caching": prefix_caching})
    verdict = verify(path)
    assert [] == verdict.differences
    assert verdict.num_evicted_blocks > 20
    assert verdict.num_hit_blocks > 10
    answers = [answer for answers in result["rounds"] for answer in answers]
    assert BLOCK_TOKENS * verdict.num_hit_blocks == loaded_tokens(answers)["host_tokens"]
    trace = open_trace(path)
    assert (BLOCK_TOKENS, len(answers)) == (trace.block_tokens, len(trace))
