"""The documentation is true: its code runs, its settings are accepted, its links lead somewhere.

A fenced block is checked by its language:

* ``python``: runs; the blocks of one page share one namespace
* ``sh``, ``bash``, ``console``: every line is a ``kvtier`` command, which runs, or ``make`` with a target that exists
* ``yaml``: is accepted as kvtier's configuration
* ``json``: parses
* ``text``: is read by people only

``<!-- not run: reason -->`` on the line above a fence opts it out. ``<!-- file: NAME -->`` there puts the block into a file of that name,
for the commands further down the page.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvtier.config import Config

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md")) if path.is_file())
GENERATOR = ROOT / "scripts" / "generate_reference.py"
TIMEOUT_S = 60

SHELL = ("bash", "console", "sh")
CHECKED = ("python", "yaml", "json", *SHELL)
READ = ("text",)

_FENCE = re.compile(r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>.*)$")
_OPT_OUT = re.compile(r"^\s*<!-- not run: (?P<reason>.*\S) -->\s*$")
_FILE = re.compile(r"^\s*<!-- file: (?P<name>[\w.-]+) -->\s*$")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(<?(?P<target>[^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
_REFERENCE = re.compile(r"^\s*\[[^\]]+\]:\s+<?(?P<target>[^\s>]+)>?", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    """of the opening fence"""
    language: str
    text: str
    reason: str | None
    """why it is not checked"""
    file: str | None = None
    """the file that it is"""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, text: str) -> list[Block]:
    """All fenced blocks of a page, in order.

    Raises:
        ValueError: a fence is not closed.
    """
    found: list[Block] = []
    lines = text.splitlines()
    start: int | None = None
    fence = indent = language = ""
    for number, line in enumerate(lines):
        match = _FENCE.match(line)
        if start is None:
            if match:
                start, fence, indent, language = number, match["fence"], match["indent"], match["info"].strip()
        elif match and match["fence"].startswith(fence) and not match["info"].strip():
            above = lines[start - 1] if start else ""
            opted_out, file = _OPT_OUT.match(above), _FILE.match(above)
            inside = "\n".join(item.removeprefix(indent) for item in lines[start + 1 : number])
            reason, name = opted_out["reason"] if opted_out else None, file["name"] if file else None
            found.append(Block(page, start + 1, language, inside + "\n", reason, name))
            start = None
    if start is not None:
        raise ValueError(f"{page.name}:{start + 1}: the fence is never closed")
    return found


@functools.cache
def all_blocks() -> tuple[Block, ...]:
    """The blocks of all pages."""
    return tuple(block for page in PAGES for block in blocks_of(page, page.read_text(encoding="utf-8")))


def checked_blocks(*languages: str) -> list[Block]:
    """Those to be checked in the way of a language."""
    return [block for block in all_blocks() if block.language in languages and block.reason is None]


def environment() -> dict[str, str]:
    """For processes that import this checkout from elsewhere."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}


def python_of(blocks: list[Block]) -> str:
    """The Python blocks of one page as one program, each line where it stands on the page."""
    lines: list[str] = []
    for block in blocks:
        lines += [""] * (block.line - len(lines))
        lines += block.text.splitlines()
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("page", sorted({block.page for block in checked_blocks("python")}), ids=lambda page: str(page.relative_to(ROOT)))
def test_python(page: Path, tmp_path: Path) -> None:
    """The Python of a page runs from top to bottom, in an empty directory."""
    program = tmp_path / page.name.replace(".md", ".py")
    program.write_text(python_of([block for block in checked_blocks("python") if block.page == page]), encoding="utf-8")
    folder = tmp_path / "empty"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, str(program)], cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert 0 == done.returncode, done.stderr


@functools.cache
def make_targets() -> frozenset[str]:
    """The targets of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return frozenset(re.findall(r"^([a-z][a-z0-9-]*):", text, re.MULTILINE))


def command_of(line: str) -> list[str]:
    """How to run a line of a shell block: a command, or nothing where its existence was all to check.

    Raises:
        ValueError: the line is no command of kvtier and no target of the Makefile.
    """
    words = shlex.split(line, comments=True)
    if words[:1] == ["kvtier"]:
        return [sys.executable, "-m", *words]
    if words[1:3] == ["-m", "kvtier"] and words[0] in ("python", "python3"):
        return [sys.executable, *words[1:]]
    if words[:1] == ["make"]:
        targets = [word for word in words[1:] if "=" not in word and not word.startswith("-")]
        if unknown := [target for target in targets if target not in make_targets()]:
            raise ValueError(f"the Makefile has no target {', '.join(unknown)}")
        return []
    raise ValueError(f"{line!r} is neither a kvtier command nor make: opt the block out with a reason")


@pytest.mark.parametrize("block", checked_blocks(*SHELL), ids=str)
def test_shell(block: Block, tmp_path: Path) -> None:
    """The commands of a block work, one after the other, in a directory with nothing but the page's files above it."""
    for other in all_blocks():
        if other.page == block.page and other.line < block.line and other.file:
            (tmp_path / other.file).write_text(other.text, encoding="utf-8")
    for line in block.text.replace("\\\n", " ").splitlines():
        stripped = line.strip()
        if block.language == "console":
            if not stripped.startswith("$ "):
                continue  # what a command prints
            stripped = stripped.removeprefix("$ ")
        if not stripped or stripped.startswith("#"):
            continue
        if command := command_of(stripped):
            done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
            assert 0 == done.returncode, f"{stripped}: {done.stderr}"


@pytest.mark.parametrize("block", checked_blocks("yaml"), ids=str)
def test_yaml(block: Block, tmp_path: Path) -> None:
    """A configuration on a page is a right one."""
    path = tmp_path / "kvtier.yaml"
    path.write_text(block.text, encoding="utf-8")
    Config.load(path)


@pytest.mark.parametrize("block", checked_blocks("json"), ids=str)
def test_json(block: Block) -> None:
    """JSON on a page parses."""
    json.loads(block.text)


def test_every_block_has_a_known_language() -> None:
    """A block whose language nobody checks would never be checked."""
    known = (*CHECKED, *READ)
    assert [] == [f"{block}: {block.language!r}" for block in all_blocks() if block.language not in known and block.reason is None]


def test_every_remark_is_above_a_fence() -> None:
    """A remark elsewhere, or misspelt, does nothing and misleads."""
    wrong = []
    for page in PAGES:
        lines = page.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            if re.search(r"<!-- *(not run|file)\b", re.sub(r"`[^`]*`", "", line)):
                follower = lines[number + 1] if number + 1 < len(lines) else ""
                if not (_OPT_OUT.match(line) or _FILE.match(line)) or not _FENCE.match(follower):
                    wrong.append(f"{page.relative_to(ROOT)}:{number + 1}")
    assert [] == wrong


def prose_of(page: Path) -> str:
    """A page without its fenced blocks and code spans."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for block in blocks_of(page, "\n".join(lines)):
        length = block.text.count("\n")
        lines[block.line - 1 : block.line + length] = [""] * (length + 1)
    return re.sub(r"`[^`\n]*`", "", "\n".join(lines))


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links_of(page: Path) -> list[str]:
    """All relative links of a page."""
    prose = prose_of(page)
    targets = [match["target"] for pattern in (_LINK, _REFERENCE) for match in pattern.finditer(prose)]
    return [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:", target)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    """A relative link leads to a file of the repository, and its anchor to a heading there."""
    dead = []
    for target in links_of(page):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or not path.is_relative_to(ROOT) or (anchor and path.suffix == ".md" and anchor not in anchors_of(path)):
            dead.append(target)
    assert [] == dead


def test_index_leads_everywhere() -> None:
    """From docs/index.md every page of the documentation is one click away."""
    linked = {(DOCS / target.partition("#")[0]).resolve() for target in links_of(DOCS / "index.md")}
    assert [] == sorted(str(page.relative_to(ROOT)) for page in PAGES if DOCS in page.parents and page not in linked | {DOCS / "index.md"})


def test_structure_lists_every_module() -> None:
    """docs/structure.md has one line for each module of kvtier and for nothing else."""
    listed = re.findall(r"^\| `(kvtier/[^`]+)` \| \S", (DOCS / "structure.md").read_text(encoding="utf-8"), re.MULTILINE)
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kvtier").rglob("*.py") if path.read_text(encoding="utf-8").strip()}
    assert [] == sorted(there - set(listed)), "missing"
    assert [] == sorted(set(listed) - there), "no such module"
    assert len(listed) == len(set(listed))


def test_command_line_is_documented() -> None:
    """docs/reference/cli.md has a section for each command that the help lists, and for no other."""
    page = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    commands = commands_below([])
    assert ["version"] in commands
    assert sorted(" ".join(command) for command in commands) == sorted(
        re.findall(r"^## `kvtier ([a-z][a-z -]*?)(?: [A-Z]+)?`$", page, re.MULTILINE)
    )


def commands_below(words: list[str]) -> list[list[str]]:
    """The commands that the help lists below ``kvtier WORDS...``, down to those that have none below them."""
    command = [sys.executable, "-m", "kvtier", *words, "--help"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=True)
    listing = re.search(r"^commands:\n((?: .*\n?|\n)+)", done.stdout, re.MULTILINE)
    if listing is None:
        return [words]
    return [found for name in re.findall(r"^    ([a-z][a-z-]*)\b", listing[1], re.MULTILINE) for found in commands_below([*words, name])]


def test_generated_pages_are_up_to_date() -> None:
    """The pages made from the code are what the code makes."""
    done = subprocess.run(
        [sys.executable, str(GENERATOR), "--check"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert 0 == done.returncode, done.stdout + done.stderr


PAGE = """\
# Title

```python
x = 1
```

<!-- not run: needs a GPU -->
```sh
rm -rf /
```

1. item

   <!-- file: a.yaml -->
   ~~~~yaml
   tiers: []
   ~~~
   ~~~~
"""


def test_block_finder() -> None:
    """The search finds blocks with their line, language, content without indentation, and reason."""
    page = ROOT / "page.md"
    expected = [
        Block(page, 3, "python", "x = 1\n", None),
        Block(page, 8, "sh", "rm -rf /\n", "needs a GPU"),
        Block(page, 15, "yaml", "tiers: []\n~~~\n", None, "a.yaml"),
    ]
    assert expected == blocks_of(page, PAGE)
    with pytest.raises(ValueError, match=r"page\.md:1: the fence is never closed"):
        blocks_of(page, "```python\nx\n")


@pytest.mark.parametrize("line", ["pip install kvtier", "make nonsense", "cat x | kvtier version", "python -m kvtiers"])
def test_other_commands_are_refused(line: str) -> None:
    """A line that cannot be checked is an error, not a silent pass."""
    with pytest.raises(ValueError, match=r"neither|no target"):
        command_of(line)


def test_known_commands_are_run() -> None:
    """kvtier commands run with this Python; make targets only have to exist."""
    assert [sys.executable, "-m", "kvtier", "version"] == command_of("kvtier version  # prints it")
    assert [sys.executable, "-m", "kvtier", "version"] == command_of("python -m kvtier version")
    assert [] == command_of('make demo ARGS="--rounds 2"')
