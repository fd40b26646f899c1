"""The architecture as a test: imports go down only, and the rules about size, docstrings, torch and print.

Everything is read from the source, nothing is imported, so an import inside a function or under TYPE_CHECKING counts.
The rules are functions of a folder; the last tests hold them against small wrong packages, to see them fail.
"""

import ast
import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(importlib.util.find_spec("multilora").submodule_search_locations[0])

# Top to bottom. A unit is a sub-package or a module of the package's root; units of one row do not import each other,
# except in the last row.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"adapter_tools"},
    {"llm", "cluster"},
    {"server"},
    {"drivers"},
    {"front"},
    {"planner"},
    {"engine"},
    {"adapters"},
    {"models"},
    {"layers"},
    {"attention", "lora"},
    {"memory", "distributed"},
    {"kernels"},
    {
        "__init__",
        "batch",
        "config",
        "config_checks",
        "demo",
        "errors",
        "logs",
        "lora_path",
        "module_command",
        "options",
        "params",
        "private_directory",
        "tracing",
        "transfer",
    },
]
LEVEL = {unit: len(LAYERS) - i for i, row in enumerate(LAYERS) for unit in row}
BASE = LAYERS[-1]

# The same inside adapters/, without an exception: in no row do units import each other.
ROOMS = [
    {"lifecycle"},
    {"loading", "device", "composition"},
    {"peft", "packing", "host"},
    {"__init__", "sources", "adapter", "pack_table"},
    {"thread_pool"},
]
FLOOR = {unit: len(ROOMS) - i for i, row in enumerate(ROOMS) for unit in row}

# Looked up on first use, so that `import multilora` stays light.
ALLOWED_UPWARD = {("__init__.py", "llm")}

NO_TORCH = (
    "server/",
    "drivers/async_driver.py",
    "drivers/request_driver.py",
    "front/",
    "engine/process/client.py",
    "engine/messages.py",
    "engine/adapter_stats.py",
)
NO_IO = ("front/",)  # whoever drives it decides how to wait
IO_MODULES = {"asyncio", "concurrent", "multiprocessing", "select", "socket", "subprocess", "zmq"}
MAX_LINES = 400
MAX_FUNCTION_LINES = 50


@dataclass(frozen=True)
class Module:
    path: str  # "engine/scheduling/scheduler.py"
    source: str

    @property
    def tree(self) -> ast.Module:
        return parsed(self.source)[0]

    @property
    def nodes(self) -> list[ast.AST]:
        """Every node of the tree."""
        return parsed(self.source)[1]

    @property
    def unit(self) -> str:
        return self.path.partition("/")[0].removesuffix(".py")

    @property
    def room(self) -> str | None:
        """Which unit of adapters/ it belongs to; None: it lies elsewhere."""
        folder, _, rest = self.path.partition("/")
        return rest.partition("/")[0].removesuffix(".py") if folder == "adapters" else None


@cache
def parsed(source: str) -> tuple[ast.Module, list[ast.AST]]:
    """Once for all rules: that is most of what they cost."""
    tree = ast.parse(source)
    return tree, list(ast.walk(tree))


def modules(root: Path) -> list[Module]:
    return [Module(file.relative_to(root).as_posix(), file.read_text()) for file in sorted(root.rglob("*.py"))]


def imports(module: Module, root: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of every import in the file, wherever it stands."""
    package = [root.name, *module.path.split("/")[:-1]]
    for node in module.nodes:
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{name}.{alias.name}") for alias in node.names)


def unit_of(name: str, root: Path) -> str | None:
    """Which unit of the package a dotted name belongs to; None: it is not ours."""
    parts = name.split(".")
    if parts[0] != root.name:
        return None
    if len(parts) > 1 and ((root / parts[1]).is_dir() or (root / f"{parts[1]}.py").exists()):
        return parts[1]
    return "__init__"  # a name defined by the package itself


def upward_imports(root: Path) -> list[str]:
    found = []
    for module in modules(root):
        for line, name in imports(module, root):
            unit = unit_of(name, root)
            if unit is None or unit == module.unit or (module.path, unit) in ALLOWED_UPWARD:
                continue
            both_base = {unit, module.unit} <= BASE
            if LEVEL.get(unit, 0) >= LEVEL.get(module.unit, 0) and not both_base:
                found.append(f"{module.path}:{line}: {module.unit} must not import {name}")
    return found


def room_of(name: str, root: Path) -> str | None:
    """Which unit of adapters/ a dotted name belongs to; None: it lies elsewhere."""
    package, folder, unit, *_ = [*name.split("."), "", ""]
    return unit if (package, folder) == (root.name, "adapters") and unit else None


def upward_room_imports(root: Path) -> list[str]:
    return [
        f"{module.path}:{line}: {module.room} must not import {name}"
        for module in modules(root)
        for line, name in imports(module, root)
        if module.room and (room := room_of(name, root)) and room != module.room
        if FLOOR.get(room, 0) >= FLOOR.get(module.room, 0)
    ]


def unknown_units(root: Path) -> list[str]:
    found = modules(root)
    return sorted(({m.unit for m in found} - LEVEL.keys()) | ({m.room for m in found} - FLOOR.keys() - {None}))


def cycles(root: Path) -> list[str]:
    """Units that reach themselves. What ALLOWED_UPWARD lists is no edge."""
    edges: dict[str, set[str]] = {}
    for module in modules(root):
        units = {unit_of(name, root) for _, name in imports(module, root)} - {None, module.unit}
        edges.setdefault(module.unit, set()).update(u for u in units if (module.path, u) not in ALLOWED_UPWARD)

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(edges.get(start, ()))
        while todo:
            unit = todo.pop()
            if unit not in seen:
                seen.add(unit)
                todo.extend(edges.get(unit, ()))
        return seen

    return sorted(unit for unit in edges if unit in reachable(unit))


def torch_imports(root: Path) -> list[str]:
    return [
        f"{module.path}:{line}: imports {name}"
        for module in modules(root)
        if module.path.startswith(NO_TORCH)
        for line, name in imports(module, root)
        if name.split(".")[0] == "torch"
    ]


def io_imports(root: Path) -> list[str]:
    return [
        f"{module.path}:{line}: imports {name}"
        for module in modules(root)
        if module.path.startswith(NO_IO)
        for line, name in imports(module, root)
        if name.split(".")[0] in IO_MODULES
    ]


def without_docstring(root: Path) -> list[str]:
    return [module.path for module in modules(root) if not ast.get_docstring(module.tree)]


CALLED_BY = re.compile(r"\bcalled(?:\s+\w+,?){0,4}?\s+by\s+(.*?)(?=[.;:]\s|\.?\Z)", re.IGNORECASE | re.DOTALL)


def importers(name: str, caller: Module, found: list[Module]) -> list[Module]:
    """The modules that a header of `caller` means by `runner.py` (of its own folder or one above it), by
    `engine/execution/runner.py` or by `server/` (any file of it)."""
    folders = caller.path.split("/")[:-1]
    for depth in range(len(folders), -1, -1):
        path = "/".join([*folders[:depth], name])
        if chosen := [m for m in found if m.path == path or (name.endswith("/") and m.path.startswith(path))]:
            return chosen
    return []


def imported_modules(module: Module, root: Path, known: set[str]) -> set[str]:
    """Dotted names of the package's modules from which the file takes something; `known`: all that there are."""
    names = {name for _, name in imports(module, root)}
    return {name if name in known else name.rpartition(".")[0] for name in names}


def dotted(module: Module, root: Path) -> str:
    return f"{root.name}.{module.path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}"


def false_callers(root: Path) -> list[str]:
    """Every "Called by" in a module's docstring names files or folders, and each of them imports the module."""
    found, wrong = modules(root), []
    known = {dotted(module, root) for module in found}
    for module in found:
        for sentence in CALLED_BY.findall(ast.get_docstring(module.tree) or ""):
            names = [name for name in re.findall(r"`([^`]+)`", sentence) if name.endswith((".py", "/"))]
            for name in names:
                callers = importers(name, module, found)
                if not any(dotted(module, root) in imported_modules(caller, root, known) for caller in callers):
                    wrong.append(f"{module.path}: called by {name}, which does not import it")
            if not names:
                wrong.append(f"{module.path}: called by {' '.join(sentence.split())!r}: no `file.py` or `folder/`")
    return wrong


def docstrings_without_subject(root: Path) -> list[str]:
    """Strings that stand alone, as docstrings and notes on constants do, and begin with "Of": of what?"""
    return [
        f"{module.path}:{node.lineno}"
        for module in modules(root)
        for node in module.nodes
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and str(node.value.value).startswith("Of ")
    ]


def prints(root: Path) -> list[str]:
    return [
        f"{module.path}:{node.lineno}"
        for module in modules(root)
        for node in module.nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]


def too_long(root: Path) -> list[str]:
    counts = {module.path: len(module.source.splitlines()) for module in modules(root)}
    return [f"{path}: {count} lines" for path, count in counts.items() if count > MAX_LINES]


def long_functions(root: Path) -> list[str]:
    return [
        f"{module.path}:{node.lineno}: {node.name} has {length} lines"
        for module in modules(root)
        for node in module.nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := node.end_lineno - node.lineno + 1) > MAX_FUNCTION_LINES
    ]


def names_with_two_meanings(root: Path) -> list[str]:
    """Public classes of one name in two places; a reader must not have to ask which is meant."""
    homes: dict[str, list[str]] = {}
    for module in modules(root):
        for node in module.nodes:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module.path)
    return [f"{name}: {', '.join(paths)}" for name, paths in sorted(homes.items()) if len(paths) > 1]


RULES = [
    upward_imports,
    upward_room_imports,
    unknown_units,
    cycles,
    torch_imports,
    io_imports,
    without_docstring,
    false_callers,
    docstrings_without_subject,
    prints,
    too_long,
    long_functions,
    names_with_two_meanings,
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_obeys(rule):
    assert rule(PACKAGE) == []


def test_no_benchmark_imports_in_a_loop():
    bench = Path(__file__).parents[1] / "bench"
    assert {"common.py", "gpu/__main__.py"} <= {m.path for m in modules(bench)}
    assert cycles(bench) == []


def test_there_is_something_to_check():
    assert {"engine/messages.py", "errors.py", "__init__.py"} <= {m.path for m in modules(PACKAGE)}


def wrong_package(tmp_path: Path, **files: str) -> Path:
    """A package named `multilora` of these files; `__` in a name stands for a folder."""
    root = tmp_path / "multilora"
    for name, source in {"errors": '"""E."""', **files}.items():
        path = root / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return root


@pytest.mark.parametrize(
    "source",
    [
        "import multilora.engine.engine",
        "from multilora.engine import engine",
        "from multilora import engine",
        "from ..engine.engine import Engine",
        "from .. import engine",
        "def f():\n    from multilora.engine.engine import Engine",
        "if TYPE_CHECKING:\n    from multilora.engine.engine import Engine",
    ],
)
def test_an_import_upwards_is_found(tmp_path, source):
    root = wrong_package(tmp_path, memory__pool=f'"""M."""\n{source}\n', engine__engine='"""E."""')
    (found,) = upward_imports(root)
    assert found.startswith("memory/pool.py:")
    assert "memory must not import multilora.engine" in found


def test_imports_downwards_and_of_others_are_fine(tmp_path):
    source = "import torch\nfrom multilora.memory import pool\nfrom .request import Request\nfrom ..errors import E\n"
    root = wrong_package(tmp_path, engine__engine=source, engine__request="", memory__pool="")
    assert upward_imports(root) == []


def test_neighbours_must_not_import_each_other(tmp_path):
    root = wrong_package(tmp_path, lora__a="from multilora.attention import b", attention__b="")
    assert upward_imports(root) == ["lora/a.py:1: lora must not import multilora.attention.b"]


@pytest.mark.parametrize(
    "source",
    [
        "from multilora.adapters.loading.loader import Loader",
        "from multilora.adapters import loading",
        "from ..loading import loader",
        "def f():\n    import multilora.adapters.loading.loader",
    ],
)
@pytest.mark.parametrize("room", ["peft", "device", "sources"])
def test_an_import_upwards_between_rooms_is_found(tmp_path, room, source):
    files = {f"adapters__{room}__a": source, "adapters__loading__loader": ""}
    root = wrong_package(tmp_path, **files)
    (found,) = upward_room_imports(root)
    assert found.startswith(f"adapters/{room}/a.py:")
    assert f"{room} must not import multilora.adapters.loading" in found
    assert upward_imports(root) == []


def test_imports_downwards_between_rooms_and_elsewhere_are_fine(tmp_path):
    source = "from multilora.adapters.peft import fields\nfrom . import process\nfrom multilora.lora import sites"
    root = wrong_package(tmp_path, adapters__loading__loader=source, adapters__peft__fields="", lora__sites="")
    assert upward_room_imports(root) == []


def test_base_files_must_not_import_packages(tmp_path):
    root = wrong_package(tmp_path, config="from multilora.memory.pool import Pool", memory__pool="")
    assert upward_imports(root) == ["config.py:1: config must not import multilora.memory.pool.Pool"]


def test_cycle_is_found(tmp_path):
    root = wrong_package(tmp_path, config="from multilora.batch import B", batch="from multilora.config import C")
    assert cycles(root) == ["batch", "config"]


def test_a_false_header_is_found(tmp_path):
    root = wrong_package(
        tmp_path,
        server__app="from multilora.front.registry import R\nfrom ..front import stream",
        front__registry='"""Called by `server/`, `app.py` and `stop.py` or by `llm/`. Called by the engine."""',
        front__stream='"""Called once, early, by `server/app.py` (R) and `stop.py`; called by `server/routes.py`."""',
        front__stop='"""T. Called by `stream.py`."""\nfrom multilora.front import stream',
    )
    (root / "front/__init__.py").write_text('"""F.\n\nCalled by `front/stop.py`\nand `registry.py`."""')
    assert false_callers(root) == [
        "front/__init__.py: called by front/stop.py, which does not import it",
        "front/__init__.py: called by registry.py, which does not import it",
        "front/registry.py: called by app.py, which does not import it",
        "front/registry.py: called by stop.py, which does not import it",
        "front/registry.py: called by llm/, which does not import it",
        "front/registry.py: called by 'the engine': no `file.py` or `folder/`",
        "front/stop.py: called by stream.py, which does not import it",
        "front/stream.py: called by server/routes.py, which does not import it",
    ]


def test_true_headers_are_fine(tmp_path):
    root = wrong_package(
        tmp_path,
        server__app="from multilora.front.registry import R\nfrom multilora import front\nfrom ..front import load",
        front__registry='"""R. Called by `server/`, by `server/app.py` and by `rooms/a.py` (make)."""',
        front__rooms__a="from ..registry import R",
        front__rooms__b='"""B. Called by `registry.py`."""',
    )
    (root / "front/__init__.py").write_text('"""F. Called by `server/app.py`."""')
    (root / "front/registry.py").write_text((root / "front/registry.py").read_text() + "\nfrom .rooms import b")
    assert false_callers(root) == []


def test_the_other_rules_can_fail(tmp_path):
    longest = "def f():\n" + "    pass\n" * MAX_FUNCTION_LINES
    root = wrong_package(
        tmp_path,
        server__app='"""S."""\nimport torch.nn',
        layers__of='"""Layers."""\nX = 1\n"""Of x."""\n',
        engine__process__client="def f():\n    from torch import nn\n    print(1)\n",
        front__front='"""F."""\ndef f():\n    import asyncio',
        surprise='"""S."""\n' + "\n" * MAX_LINES,
        adapters__attic__old='"""O."""\nclass Twice: ...\nclass _Once: ...\n',
        adapters__attic__older='"""O."""\nclass Twice: ...\nclass _Once: ...\n' + longest,
    )
    assert long_functions(root) == [f"adapters/attic/older.py:4: f has {MAX_FUNCTION_LINES + 1} lines"]
    assert names_with_two_meanings(root) == ["Twice: adapters/attic/old.py, adapters/attic/older.py"]
    assert torch_imports(root) == [
        "engine/process/client.py:2: imports torch.nn",
        "server/app.py:2: imports torch.nn",
    ]
    assert io_imports(root) == ["front/front.py:3: imports asyncio"]
    assert docstrings_without_subject(root) == ["layers/of.py:3"]
    assert prints(root) == ["engine/process/client.py:3"]
    assert without_docstring(root) == ["engine/process/client.py"]
    assert too_long(root) == [f"surprise.py: {MAX_LINES + 1} lines"]
    assert unknown_units(root) == ["attic", "surprise"]
