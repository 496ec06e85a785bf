"""The table of differences between versions of vLLM, without vLLM."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.connectors.vllm.differences import DIFFERENCES, VERSIONS, Difference

ENGINE_TESTS = Path(__file__).resolve().parents[1] / "engine"


@pytest.mark.parametrize("row", DIFFERENCES, ids=lambda row: row.what)
def test_each_row_has_a_test_that_runs_in_every_version(row: Difference) -> None:
    """The test that a row names exists, with a rule in its docstring, in a file whose tests all run in every version."""
    file, _, name = row.test.partition("::")
    tree = ast.parse((ENGINE_TESTS / file).read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    assert 1 == len(found)
    assert ast.get_docstring(found[0])
    marks = [
        ast.unparse(node.value) for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in map(ast.unparse, node.targets)
    ]
    assert ["[pytest.mark.engine, pytest.mark.every_version]"] == marks


def test_rows_are_told_apart() -> None:
    """No row twice, and every row says in which version something changed."""
    assert len(DIFFERENCES) == len({row.what for row in DIFFERENCES})
    assert [] == [
        row.what
        for row in DIFFERENCES
        if not any(f"0.{number}" in row.changed for number in range(27, 34)) and "any version" not in row.changed
    ]
    assert ["0.27", "0.32", "0.33"] == list(VERSIONS)


def test_the_table_is_read_without_vllm() -> None:
    """Neither vLLM nor torch is imported for it, and the connector's name is there all the same."""
    code = (
        "import sys\n"
        "sys.modules['vllm'] = sys.modules['torch'] = None\n"
        "from kvtier.connectors.vllm.differences import DIFFERENCES\n"
        "import kvtier.connectors.vllm as package\n"
        "assert package.__all__ == ['KVTierConnector']\n"
        "try:\n"
        "    package.KVTierConnector\n"
        "except ImportError:\n"
        "    print(len(DIFFERENCES))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert f"{len(DIFFERENCES)}\n" == done.stdout, done.stderr
