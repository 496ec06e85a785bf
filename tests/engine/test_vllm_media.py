"""Multimodal items whose names say little, and those that come while their request runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.request import Request

from kvtier.connectors.vllm.identity import are_media_numbered
from tests.engine.rig import Rig, engine_config, host, host_and_disk, prompt

pytestmark = [pytest.mark.engine, pytest.mark.every_version]


@pytest.fixture(autouse=True)
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rig's model has none, and vLLM would wait for it."""
    monkeypatch.setattr(Request, "has_encoder_inputs", property(lambda _: False))


def image(name: str, offset: int, length: int = 32) -> list[MultiModalFeatureSpec]:
    return [MultiModalFeatureSpec(None, "image", name, PlaceholderRange(offset=offset, length=length))]


@pytest.mark.parametrize("are_numbered", [False, True])
def test_numbered_items_are_not_found_after_a_restart(tmp_path: Path, are_numbered: bool) -> None:
    """vLLM counts from one again: the first picture of each start has the same name. What lies before it is kept."""
    hits = []
    for _ in range(2):
        rig = Rig(host_and_disk(tmp_path / "tier"))
        rig.connector._are_media_numbered = are_numbered
        hits.append(rig.ask("a", prompt(1), mm_features=image("renderer0-mm-1-image-0", 70)))
        rig.close()
    assert [0, 64 if are_numbered else 192] == hits


@pytest.mark.parametrize(("cache_gb", "caching", "expected"), [(0, False, True), (0, True, False), (4, False, False), (None, False, False)])
def test_which_engines_number_items(cache_gb: float | None, caching: bool, expected: bool) -> None:
    """Those without both caches, as ``vllm.renderers`` does it; a model without such items has none to number."""
    config: Any = engine_config(host())
    config.cache_config.enable_prefix_caching = caching
    media = None if cache_gb is None else SimpleNamespace(mm_processor_cache_gb=cache_gb)
    config.model_config = SimpleNamespace(multimodal_config=media)
    assert expected == are_media_numbered(config)


def part(rig: Rig, tokens: list[int], **more: Any) -> Request:
    """A part of the input of one request."""
    return rig.add("session", tokens, **{"resumable": True, **more})


@pytest.mark.parametrize("runs_ahead", [False, True])
@pytest.mark.parametrize("is_preempted", [False, True])
def test_items_that_come_later_are_in_the_keys(runs_ahead: bool, is_preempted: bool) -> None:
    """A request whose input comes in parts: its blocks are found by those who have the same picture at the same place, by nobody else."""
    rig = Rig(host(), runs_ahead=runs_ahead, max_num_batched_tokens=64, max_num_scheduled_tokens=64)
    rig.wait_for_host_memory()
    part(rig, prompt(1, 64))
    rig.run(lambda _: None)
    session = part(rig, prompt(2, 96), mm_features=image("cat", 0))
    if is_preempted:
        rig.step(lambda _: None)
        rig.preempt(0)
    rig.run(lambda _: None)
    part(rig, [], resumable=False)
    rig.run(lambda _: None)
    tokens = [*prompt(1, 64), *prompt(2, 96)]
    found = {
        name: rig.connector.get_num_new_matched_tokens(
            rig.request(name or "none", tokens, mm_features=image(name, 64) if name else None), 0
        )[0]
        for name in ("", "dog", "cat")
    }
    assert {"": 64, "dog": 64, "cat": 128} == found
    assert session.request_id == "session"
    rig.close()
