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
    "multi_round_qa.py": "needs vLLM and a model: the tests in the real engine and `make demo` run it",
}
"""example -> why"""


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


def test_exceptions_exist() -> None:
    """Whoever is excepted is there, and really needs what the others do not have."""
    for name in NOT_RUN_HERE:
        sources = [path.read_text(encoding="utf-8") for path in (EXAMPLES / name, *EXAMPLES.glob("_*.py"))]
        assert any("vllm" in source for source in sources), name
