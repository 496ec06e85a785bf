"""An engine that reuses no chunks loads vLLM's own class of its model, and kvtier's plugin costs it nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.model_executor.models.registry import ModelRegistry

from kvtier.connectors.vllm import model_choice
from kvtier.connectors.vllm.plugin import ARCHITECTURES, NAME, register
from tests.engine.harness import host

pytestmark = [pytest.mark.engine, pytest.mark.every_version]
LIGHT = """
import sys
from types import SimpleNamespace
known = SimpleNamespace(_registry={}, register_connector=lambda *_: None, register_model=lambda *_: None)
sys.modules["vllm.distributed.kv_transfer.kv_connector.factory"] = SimpleNamespace(KVConnectorFactory=known)
sys.modules["vllm.model_executor.models.registry"] = SimpleNamespace(ModelRegistry=known)
before = set(sys.modules)
from kvtier.connectors.vllm.plugin import register
register()
print(*sorted(set(sys.modules) - before))
"""
HEAVY = {"torch", "numpy", "pydantic", "yaml", "vllm", "kvtier.config", "kvtier.cache", "kvtier.connectors.vllm.connector"}


def transfer(connector: str, settings: Mapping[str, Any]) -> Any:
    """The part of an engine's configuration that counts."""
    return SimpleNamespace(kv_transfer_config=SimpleNamespace(kv_connector=connector, kv_connector_extra_config=settings))


@pytest.mark.parametrize(
    ("config", "is_ours"),
    [
        (None, False),
        (SimpleNamespace(kv_transfer_config=None), False),
        (transfer("ExampleConnector", {"blend": {"enabled": True}}), False),
        (transfer(NAME, host()), False),
        (transfer(NAME, {"no such key": 1, "blend": {"enabled": True}}), False),
        (transfer(NAME, host(blend={"enabled": True})), True),
    ],
)
def test_the_class_follows_the_engines_configuration(monkeypatch: pytest.MonkeyPatch, config: Any, is_ours: bool) -> None:
    """vLLM's own, unless this engine is configured with kvtier and blend.enabled: then a subclass of it under the same name."""
    register()
    monkeypatch.setattr("vllm.config.get_current_vllm_config_or_none", lambda: config)
    for name, module in ARCHITECTURES.items():
        assert f"{model_choice.__name__}:{name}" == f"{ModelRegistry.models[name].module_name}:{ModelRegistry.models[name].class_name}"
        chosen: Any = getattr(model_choice, name)
        own = f"vllm.model_executor.models.{module}"
        assert name == chosen.__name__
        assert ("kvtier.connectors.vllm.models" if is_ours else own) == chosen.__module__
        assert own in {base.__module__ for base in chosen.__mro__}
    with pytest.raises(AttributeError, match="GPT2LMHeadModel"):
        _ = model_choice.GPT2LMHeadModel


def test_the_plugin_imports_no_model_and_no_connector() -> None:
    """Every process of every vLLM beside which kvtier is installed runs it. What it asks vLLM for is there already and stands in here."""
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, timeout=120, check=True)
    new = set(done.stdout.split())
    assert {"kvtier.connectors.vllm.plugin"} == new & {*HEAVY, "kvtier.connectors.vllm.plugin"}
