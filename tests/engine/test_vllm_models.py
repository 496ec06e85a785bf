"""Models whose layers do not all keep the KV of all tokens: served with the right tokens, or refused at start."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.harness import assert_same, host, loaded_tokens, make_tiny_model, run
from tests.engine.tiny import WINDOW

pytestmark = [pytest.mark.engine, pytest.mark.every_version, pytest.mark.timeout(400)]


def test_layers_with_and_without_a_sliding_window(tmp_path: Path) -> None:
    """vLLM keeps all KV of such a model for a connector like kvtier: prompts longer than the window give the same tokens."""
    environment = {"KVTIER_TEST_MODEL": str(make_tiny_model("hybrid", tmp_path / "model"))}
    alone = run("repeat", rounds=[False], environment=environment)["rounds"][0]
    assert 1 < len({tuple(answer["tokens"]) for answer in alone}), "the model does not look at its prompt"
    engine = {"max_num_batched_tokens": 128}
    result = run("repeat", kvtier=host(), rounds=[False, False, True], environment=environment, engine=engine)
    for answers in result["rounds"]:
        assert_same(alone, answers)
    assert all(answer["loaded"]["host_tokens"] >= 2 * WINDOW for answer in result["rounds"][1])
    assert loaded_tokens(result["rounds"][2])["host_tokens"] > 8 * 2 * WINDOW


def test_models_that_are_refused(tmp_path: Path) -> None:
    """Layers that forget tokens (a sliding window alone, a state): the engine does not start, and says why and what to do."""
    kinds = {"sliding": "SlidingWindowSpec", "state": "MambaSpec"}
    cases = [{"kvtier": host(), "engine": {"model": str(make_tiny_model(kind, tmp_path / kind))}} for kind in kinds]
    messages = run("refusals", cases=cases)["messages"]
    for message, named in zip(messages, kinds.values(), strict=True):
        assert "UnsupportedModelError" in message
        assert f"KV cache of kind {named}" in message
        assert "Start vLLM without the kvtier connector" in message
