"""Speculative decoding in the real vLLM with kvtier: the tokens of vLLM alone, and as many drafts accepted as without.

Each test starts one engine or two, each in a process of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.harness import ENVIRONMENT, Result, assert_same, host, host_and_disk, loaded_tokens, made_once, run

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
DRAFT_MODEL = {"method": "draft_model", "model": ENVIRONMENT["KVTIER_TEST_MODEL"], "num_speculative_tokens": 3}
"""the model drafts for itself: every draft is right, unless the drafter's KV is not"""
NEARLY_ALL = 1000
"""tokens that are loaded when all prompts of a round come again"""


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> list[Result]:
    """What vLLM answers without drafts and without kvtier."""
    folder = made_once(
        tmp_path_factory, worker_id, "undrafted", lambda path: (path / "out.json").write_text(json.dumps(run("drafted", num_rounds=1)))
    )
    answers: list[Result] = json.loads((folder / "out.json").read_text())["rounds"][0]["answers"]
    return answers


def test_drafts_from_the_prompt(alone: list[Result], tmp_path: Path) -> None:
    """Drafts that are taken from the prompt, some accepted and some not; from host memory, then from disk beside prefix caching."""
    settings = host_and_disk(tmp_path / "tier")
    result = run("drafted", kvtier=settings, engine={"speculative_config": NGRAM}, num_rounds=2)
    for one in result["rounds"]:
        assert_same(alone, one["answers"])
        assert one["accepted"] > 50
    assert loaded_tokens(result["rounds"][1]["answers"])["host_tokens"] > NEARLY_ALL
    engine = {"speculative_config": NGRAM, "enable_prefix_caching": True}
    result = run("drafted", kvtier=settings, engine=engine, num_rounds=1)
    assert_same(alone, result["rounds"][0]["answers"])
    assert loaded_tokens(result["rounds"][0]["answers"])["disk_tokens"] > NEARLY_ALL // 2, "the others share what these load"


@pytest.mark.every_version
def test_drafts_of_a_model(alone: list[Result]) -> None:
    """The drafter's KV comes with the model's: what is loaded drafts as well as what was computed."""
    result = run("drafted", kvtier=host(), engine={"speculative_config": DRAFT_MODEL}, num_rounds=2)
    for one in result["rounds"]:
        assert_same(alone, one["answers"])
    assert loaded_tokens(result["rounds"][1]["answers"])["host_tokens"] > NEARLY_ALL
    computed, loaded = (one["accepted"] for one in result["rounds"])
    assert loaded >= 0.98 * computed > 0


@pytest.mark.every_version
def test_failed_loads_beside_drafts() -> None:
    """A request whose load fails has drafted from a token that vLLM drops: it goes back and ends with the same tokens."""
    result = run("failing", kvtier=host(connector={"layerwise": "on"}), engine={"speculative_config": DRAFT_MODEL}, num_prompts=3)
    for answers in result["rounds"][1:]:
        assert_same(result["rounds"][0], answers)
    assert loaded_tokens(result["rounds"][-1])["host_tokens"] > 0
