"""What is public is what `__all__` says, and it is all there."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvtier
from kvtier import errors

ROOT = Path(__file__).resolve().parent.parent

PUBLIC = {
    "Config",
    "CacheEngine",
    "Namespace",
    "KeyChain",
    "KVTierError",
    "ConfigError",
    "UnsupportedModelError",
    "TierError",
    "TierBusyError",
    "TierFormatError",
    "TraceError",
    "ArenaError",
    "BlendRefusedError",
    "ClosedError",
    "ControlError",
    "Controller",
    "DaemonError",
    "Job",
    "JobCancelledError",
    "JobTimeoutError",
    "NextUse",
    "SessionOver",
    "StepGraph",
    "ToolCall",
    "Workflow",
    "QuotaError",
    "RemoteError",
    "UnknownSessionError",
    "connect",
    "controllers",
    "InvariantError",
    "__version__",
}
"""a change here is a change of the public API"""

NEEDS_AN_ENGINE = "kvtier/connectors/vllm/"


def modules_with_all() -> list[str]:
    """Names of all modules that have `__all__` and can be imported without an engine."""
    found = []
    for path in sorted((ROOT / "kvtier").rglob("*.py")):
        relative = path.relative_to(ROOT)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        named = any(isinstance(node, ast.Assign) and "__all__" in map(ast.unparse, node.targets) for node in tree.body)
        if named and not relative.as_posix().startswith(NEEDS_AN_ENGINE):
            parts = relative.with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


@pytest.mark.parametrize("name", modules_with_all())
def test_all_is_exact(name: str) -> None:
    """Every name of ``__all__`` is there, once, and a star import gives just these."""
    if name == "kvtier.tiers.mooncake":
        pytest.importorskip(name, reason="Mooncake does not load", exc_type=ImportError)
    module = importlib.import_module(name)
    assert len(module.__all__) == len(set(module.__all__))
    assert [] == [item for item in module.__all__ if not hasattr(module, item)]
    space: dict[str, object] = {}
    exec(f"from {name} import *", space)
    assert set(module.__all__) == set(space) - {"__builtins__"}


def sorting_key(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest, each by the alphabet."""
    if name.isupper():
        return (0, name)
    return (1 if name[0].isupper() else 2, name)


def declared_names(path: Path) -> list[str] | None:
    """The names in a module's ``__all__``, read without importing it; nothing where it has none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and "__all__" in map(ast.unparse, node.targets):
            return list(ast.literal_eval(node.value))
    return None


@pytest.mark.parametrize("path", sorted((ROOT / "kvtier").rglob("*.py")), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_all_is_sorted(path: Path) -> None:
    """``__all__`` is sorted, and a package that brings names in from elsewhere has one."""
    names = declared_names(path)
    assert names is None or sorted(names, key=sorting_key) == names
    imports = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
    if path.name == "__init__.py" and any(node.module != "__future__" for node in imports):
        assert names


def test_facade() -> None:
    """The package offers the public API: what is listed here, no more and no less; all errors are part of it."""
    assert set(kvtier.__all__) == PUBLIC
    assert sorted(PUBLIC) == dir(kvtier)
    assert set() == {name for name in vars(errors) if name.endswith("Error")} - PUBLIC


def test_facade_gives_the_objects_themselves() -> None:
    """A name of the facade is the object of the module that defines it."""
    wrong = [
        name
        for name in PUBLIC - {"__version__"}
        if (home := getattr(kvtier, name).__module__) == "kvtier"
        or getattr(importlib.import_module(home), name) is not getattr(kvtier, name)
    ]
    assert [] == wrong


def test_facade_is_lazy() -> None:
    """A name is loaded when it is first used and then stays; an unknown one is an AttributeError that says so."""
    code = (
        "import sys, kvtier\n"
        "assert 'kvtier.config' not in sys.modules\n"
        "assert kvtier.Config is vars(kvtier)['Config']\n"
        "assert 'kvtier.config' in sys.modules\n"
        "assert 'kvtier.engine' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=True)
    with pytest.raises(AttributeError, match="module 'kvtier' has no attribute 'config_file'"):
        kvtier.config_file  # noqa: B018


def test_version_is_the_distributions() -> None:
    """``setup.py`` and the package agree on the version."""
    match = re.search(r'^    version="([^"]+)",$', (ROOT / "setup.py").read_text(encoding="utf-8"), re.MULTILINE)
    assert match is not None
    assert kvtier.__version__ == match[1]


def test_types_are_shipped() -> None:
    """The marker that makes type checkers read kvtier's annotations is there, and in the distribution."""
    assert (ROOT / "kvtier" / "py.typed").is_file()
    assert '"kvtier": ["py.typed", "*.pyi"]' in (ROOT / "setup.py").read_text(encoding="utf-8")
