"""The real vLLM under random requests, verbs of the control API and faults, in random settings: every answer is vLLM's own.

``KVTIER_RANDOM_SEEDS=FROM:TO`` plays others than the usual games.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.engine.harness import LOGPROB_TOLERANCE, Result, made_once, make_tiny_model, run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
FIRST, _, LAST = os.environ.get("KVTIER_RANDOM_SEEDS", "0:5").partition(":")
NUM_ACTIONS = 600


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, str]:
    """Weights under which each token depends sharply on those before it: wrong KV shows."""
    folder = made_once(tmp_path_factory, worker_id, "tiny-llama", lambda path: make_tiny_model("llama", path / "model"))
    return {"KVTIER_TEST_MODEL": str(folder / "model")}


@pytest.mark.every_version
@pytest.mark.parametrize("seed", range(int(FIRST), int(LAST)))
def test_every_answer_is_vllms_own(seed: int, model: dict[str, str], tmp_path: Path) -> None:
    """Whatever is asked for, aborted, moved, dropped or damaged: nobody waits for ever, and the books are right at the end."""
    settings = random_settings(seed, tmp_path / "tier")
    result = run("random_requests", environment=model, timeout_s=300.0, num_actions=NUM_ACTIONS, seed=seed, **settings)
    assert [] == result["stuck"] == result["problems"]
    assert {""} >= {ending for _, ending in result["verbs"]} - {"QuotaError"}
    answers = result["answers"]
    assert len(answers) > NUM_ACTIONS // 10
    prompts = {tuple(answer["prompt"]) for answer in answers}
    expected = dict(zip(prompts, run("answered_alone", environment=model, prompts=[*map(list, prompts)])["answers"], strict=True))
    for answer in answers:
        assert_as_alone(answer, expected[tuple(answer["prompt"])])
    assert sum(result["counters"].get(f"{tier}.loaded_blocks", 0) for tier in ("host", "gpu")) > 0, "this game shows nothing"


def random_settings(seed: int, disk: Path) -> Result:
    """Of the engine and of kvtier."""
    source = random.Random(f"settings {seed}")
    tiers: list[Result] = [{"type": "host", "capacity": source.choice(["3MiB", "6MiB", "64MiB"])}]
    more = {}
    if source.random() < 0.6:
        tiers.append({"type": "disk", "path": str(disk), "capacity": "256MiB", "write": source.choice(["through", "on_evict"])})
        more["disk"] = str(disk)
    if source.random() < 0.4:
        tiers.insert(0, {"type": "gpu", "capacity": "2MiB"})
    connector = {
        "load_or_recompute": source.choice(["always", "always", "always", "auto"]),
        "async_load": source.random() < 0.5,
        "layerwise": source.choice(["auto", "on", "off"]),
    }
    engine: Result = {
        "enable_prefix_caching": source.random() < 0.5,
        "max_model_len": 512,
        "max_num_batched_tokens": source.choice([64, 256, 1024]),
        "num_gpu_blocks_override": source.choice([40, 100]),
        "async_scheduling": source.random() < 0.5,
    }
    return {"kvtier": {"tiers": tiers, "connector": connector, "block_tokens": source.choice(["auto", 64])}, "engine": engine, **more}


def assert_as_alone(answer: Result, alone: Result) -> None:
    """The same tokens, up to where two of them are as good as equal."""
    for token, other, logprob, expected in zip(answer["tokens"], alone["tokens"], answer["logprobs"], alone["logprobs"], strict=False):
        assert abs(logprob - expected) < LOGPROB_TOLERANCE, (answer, alone)
        if token != other:
            return
