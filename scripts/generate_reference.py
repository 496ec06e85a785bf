"""Prints the pages of docs/ that follow from the code, so that they cannot differ from it.

python generate_reference.py            writes the pages
python generate_reference.py --check    exits with 1 where a page differs
"""

from __future__ import annotations

import argparse
import ast
import enum
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # this checkout, whatever is installed

from benchmark_pages import benchmarks_page, readme  # noqa: E402 - after the line above, like the next ones
from chunk_reuse_page import chunk_reuse  # noqa: E402
from pydantic import BaseModel  # noqa: E402
from version_pages import versions_page  # noqa: E402

from kvtier.config import (  # noqa: E402
    BlendConfig,
    Config,
    ConnectorConfig,
    ControlConfig,
    DaemonConfig,
    DiskTierConfig,
    GpuTierConfig,
    HostTierConfig,
    MooncakeTierConfig,
    ObjectTierConfig,
    RecordConfig,
    RedisTierConfig,
)
from kvtier.config.fields import text_of  # noqa: E402
from kvtier.config.template import EXAMPLE  # noqa: E402
from kvtier.units import DURATION_UNITS, SIZE_UNITS, format_duration, format_size  # noqa: E402

HEAD = """<!-- printed by scripts/generate_reference.py; change the models in kvtier/config, then run it -->

# Configuration

One YAML file. `kvtier config check FILE` reports everything that is wrong with it; unknown keys are errors. Python code reads it with
`kvtier.config.Config.load(path)` and finds each setting under the attribute in the second column.

- **Sizes** are whole bytes, or a number and a unit: {sizes}. KiB, MiB, ... count in steps of 1024; kB, MB, ... in steps of 1000.
- **Durations** are seconds, or a number and a unit: {durations}.
- **Booleans** are `true` and `false`; `yes` and `on` are words.
- `null` means: none.
"""

SECTIONS: tuple[tuple[str, type[BaseModel]], ...] = (
    ("Top of the file", Config),
    ("`tiers`: `type: gpu`", GpuTierConfig),
    ("`tiers`: `type: host`", HostTierConfig),
    ("`tiers`: `type: disk`", DiskTierConfig),
    ("`tiers`: `type: redis`", RedisTierConfig),
    ("`tiers`: `type: mooncake`", MooncakeTierConfig),
    ("`tiers`: `type: object`", ObjectTierConfig),
    ("`connector`", ConnectorConfig),
    ("`blend`", BlendConfig),
    ("`control`", ControlConfig),
    ("`daemon`", DaemonConfig),
    ("`record`", RecordConfig),
)


def configuration_page() -> str:
    """The page docs/reference/configuration.md."""
    parts = [HEAD.format(sizes=listed(SIZE_UNITS), durations=listed(DURATION_UNITS))]
    parts += [section(title, model) for title, model in SECTIONS]
    example = Config.from_mapping(EXAMPLE).effective()
    about = "`kvtier config show-defaults` prints this with an explanation of each setting."
    parts.append(f"## All settings with their defaults\n\n{about}\n\n```yaml\n{example}```\n")
    return "\n".join(parts)


def listed(units: Iterable[str]) -> str:
    return ", ".join(f"`{unit}`" for unit in units)


def section(title: str, model: type[BaseModel]) -> str:
    """One table: a row for each setting."""
    about = " ".join((model.__doc__ or "").split())
    rows = ["| Key | Attribute | Type | Default | Allowed | Meaning |", "| --- | --- | --- | --- | --- | --- |"]
    for name, field in model.model_fields.items():
        kind = text_of(field, "kind")
        # the type picks the section, so there is nothing to fall back on
        default = "required" if field.is_required() or name == "type" else default_text(name, kind, field.default)
        cells = (f"`{field.alias or name}`", f"`{name}`", kind, default, text_of(field, "allowed"), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return "\n".join([f"## {title}", "", about, "", *rows, ""])


def default_text(name: str, kind: str, default: object) -> str:
    """A default as it stands in the file."""
    if name == "block_tokens":
        return "`auto`"
    if isinstance(default, BaseModel):
        return "all defaults"
    if default is None or isinstance(default, bool):
        return f"`{str(default).lower() if default is not None else 'null'}`"
    if isinstance(default, int) and kind == "size":
        return f"`{format_size(default)}`"
    if isinstance(default, float) and kind == "duration":
        return f"`{format_duration(default)}`"
    if isinstance(default, enum.Enum):
        return f"`{default.value}`"
    return '`""`' if default == "" else f"`{default}`"


STRUCTURE_HEAD = """<!-- printed by scripts/generate_reference.py; change the modules' docstrings, then run it -->

# Structure

One line for each module; [Architecture](explanation/architecture.md) has the picture. An import may only point to the same layer (L) or a
lower one.
"""

STRUCTURE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("The public API and the command line", ("__init__.py", "__main__.py", "cli.py")),
    (
        "L0: values, keys, settings",
        ("types.py", "errors.py", "stats.py", "units.py", "layout.py", "hashing.py", "_native.py", "_fallback.py", "config"),
    ),
    ("L1: memory and files", ("memory", "io", "codecs", "recording.py")),
    ("L2: where bytes are kept and how they get there", ("tiers", "copy")),
    ("L3: decisions", ("control", "policies")),
    (
        "L4: the two joined, the control API, and the machine they run on",
        (
            "engine.py",
            "cache.py",
            "lower_tiers.py",
            "remote_tiers.py",
            "transfer.py",
            "sharing.py",
            "slot_recorder.py",
            "verbs.py",
            "controller.py",
            "controlled.py",
            "job.py",
            "machine.py",
        ),
    ),
    ("L4: the simulator", ("sim",)),
    ("L4: chunks reused at any position", ("blend",)),
    ("L5: the node daemon", ("serve",)),
    ("L5: engines, benchmarks, tests for third parties", ("connectors", "bench", "testing")),
)
"""title -> modules and packages of kvtier, in the order of the page"""

STRUCTURE_TAIL = """## Beside the package

| Folder | What it is for |
| --- | --- |
| `csrc/` | The sources of the compiled core. |
| `tests/unit/` | Tests without an engine, one file a module or part. |
| `tests/engine/` | Tests in the real vLLM. |
| `tests/` | Tests of the repository itself: imports, public API, documentation, examples. |
| `examples/` | Programs to start from. |
| `scripts/` | What `make` runs: setting up, testing, the generated pages. |
"""


def structure_page() -> str:
    """The page docs/structure.md.

    Raises:
        ValueError: a module belongs to no part of the page.
    """
    parts, remaining = [STRUCTURE_HEAD], set(modules_in(ROOT / "kvtier"))
    for title, names in STRUCTURE:
        paths = [path for name in names for path in modules_in(ROOT / "kvtier" / name)]
        remaining -= set(paths)
        rows = [f"| `{path.relative_to(ROOT).as_posix()}` | {first_line(path)} |" for path in paths]
        parts.append("\n".join([f"## {title}", "", "| Module | What it is for |", "| --- | --- |", *rows, ""]))
    if remaining:
        raise ValueError(f"put into STRUCTURE of {Path(__file__).name}: {', '.join(sorted(map(str, remaining)))}")
    return "\n".join([*parts, STRUCTURE_TAIL])


def modules_in(place: Path) -> list[Path]:
    """The modules of a package, or the one module; empty ones have nothing to say."""
    paths = sorted(place.rglob("*.py")) if place.is_dir() else [place]
    return [path for path in paths if path.stat().st_size]


def first_line(path: Path) -> str:
    """The first line of a module's docstring, as Markdown."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    text = " ".join(text.partition("\n\n")[0].split()).replace("|", r"\|")
    return re.sub(r":(?:class|func|meth|mod|data):`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text).replace("``", "`")


PAGES: Mapping[str, Callable[[], str]] = {
    "docs/reference/configuration.md": configuration_page,
    "docs/reference/vllm-versions.md": versions_page,
    "docs/structure.md": structure_page,
    "docs/benchmarks/README.md": benchmarks_page,
    "docs/explanation/chunk-reuse.md": chunk_reuse,
    "README.md": readme,
}
"""Page -> what prints it."""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description="Print the reference pages that follow from the code.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page differs")
    options = parser.parse_args(arguments)
    stale = []
    for name, make in PAGES.items():
        path, text = ROOT / name, make()
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            continue
        if options.check:
            stale.append(name)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"wrote {name}")
    for name in stale:
        print(f"{name} differs from the code: run scripts/generate_reference.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
