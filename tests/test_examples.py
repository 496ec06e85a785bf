"""Every example runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

NOT_RUN_HERE = {
    "multi_round_qa.py": "Makefile",
}
"""example that needs vLLM and a model -> the file that runs it instead"""


def examples() -> list[str]:
    """All examples that need no engine. Names with a leading underscore are parts of others."""
    names = sorted(path.name for path in EXAMPLES.glob("*.py"))
    return [name for name in names if not name.startswith("_") and name not in NOT_RUN_HERE]


@pytest.mark.parametrize("name", examples())
def test_example(name: str, tmp_path: Path) -> None:
    """An example ends well, without arguments, in an empty directory, and says something."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize(("name", "runner"), NOT_RUN_HERE.items())
def test_exceptions_are_run_elsewhere(name: str, runner: str) -> None:
    """Whoever is excepted is there, really needs the engine, and is run by the file that is said to do so."""
    sources = [path.read_text(encoding="utf-8") for path in (EXAMPLES / name, *EXAMPLES.glob("_*.py"))]
    assert any("vllm" in source for source in sources)
    assert f"examples/{name}" in (ROOT / runner).read_text(encoding="utf-8")
