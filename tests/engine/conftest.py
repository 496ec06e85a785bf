"""Settings for tests that import vLLM into their own process; where it is not installed those are left out."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

from tests.engine.harness import ENVIRONMENT, run

collect_ignore_glob: list[str] = []

if find_spec("vllm") is None:
    collect_ignore_glob += ["test_vllm_adapter.py", "test_vllm_control.py", "test_vllm_versions.py"]
else:
    # vLLM reads them when it is imported.
    for _name, _value in {**ENVIRONMENT, "VLLM_LOGGING_LEVEL": "ERROR"}.items():
        os.environ.setdefault(_name, _value)

    def pytest_configure(config: pytest.Config) -> None:
        """The engine's libraries warn as they like, already while they are imported."""
        config.addinivalue_line("filterwarnings", "ignore")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those with engines in processes of their own first: at the end short ones are left, and no worker waits minutes for the other."""
    items.sort(key=lambda item: getattr(getattr(item, "module", None), "run", None) is not run)
