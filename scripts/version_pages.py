"""The page on vLLM's versions, from the connector's table of differences."""

from __future__ import annotations

from kvtier.connectors.vllm.differences import DIFFERENCES, VERSIONS

HEAD = """<!-- printed by scripts/generate_reference.py; change kvtier/connectors/vllm/differences.py, then run it -->

# Versions of vLLM

| vLLM | What is known |
| --- | --- |
{versions}

Versions between these lie between them: the table below says since when a thing is as it is. 0.28 to 0.31 are not run.

The interface of 0.33 is written down in `tests/engine/interface_0_33.py`; a test compares the connector's methods with it and with the
installed version's, parameter by parameter.

## Differences

Each row has a test in `tests/engine/`, which runs in 0.27 and in 0.32 and fails in the version that needs the handling where it is missing.

{rows}
"""


def versions_page() -> str:
    """The page docs/reference/vllm-versions.md."""
    versions = "\n".join(f"| {version} | {known} |" for version, known in VERSIONS.items())
    rows = "\n".join(
        [
            "| What | In which versions | What kvtier does | Test |",
            "| --- | --- | --- | --- |",
            *(f"| {row.what} | {row.changed} | {row.handling} | `{row.test.partition('::')[2]}` |" for row in DIFFERENCES),
        ]
    )
    return HEAD.format(versions=versions, rows=rows)
