"""The order of the folders: each imports only from lower ones, and one place alone uses private torch names."""

from __future__ import annotations

import ast
import graphlib
import itertools
import re
from pathlib import Path

import pytest

import breakable_backend

PACKAGE = "breakable_backend"
ROOT = Path(breakable_backend.__file__).parent
PRIVATE_TORCH = "_torch"

# The table of docs/design.md, lowest first. A folder may import what stands before it, in its own line too.
LEVELS = (
    ("_torch",),
    ("locks", "files", "errors", "failure_kinds", "internal_errors", "options", "active", "callers", "interception"),
    ("ir",),
    ("marks",),
    ("drivers",),
    ("compiling", "recordings"),
    ("calling", "capturing"),
    ("backend",),
    ("tools",),
)
CONTENTS = "__init__"
"""The contents page of the package, above all levels."""
ORDER = {folder: place for place, folder in enumerate([*itertools.chain(*LEVELS), CONTENTS, "__main__"])}


def module_name(path: Path) -> str:
    """``drivers.cuda`` for ``drivers/cuda.py``, ``drivers`` for ``drivers/__init__.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = {module_name(path) for path in ROOT.glob("*/__init__.py")}


def folder(module: str) -> str:
    """What stands in the table for ``module``: its folder, or itself."""
    return module.partition(".")[0]


def imports(source: str, module: str) -> set[str]:
    """The package's own modules that ``source`` imports, wherever in it, type checking included."""
    found = set()
    parts = [] if module == "__init__" else module.split(".")
    package = [PACKAGE, *(parts if module in PACKAGES else parts[:-1])]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *(node.module.split(".") if node.module else [])])
            targets = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        found |= {known_module(target) for target in targets if target.split(".")[0] == PACKAGE}
    return found


def known_module(target: str) -> str:
    """The module that ``target`` is, or is a name of."""
    inside = target.removeprefix(PACKAGE).removeprefix(".")
    while inside and inside not in MODULES:
        inside = inside.rpartition(".")[0]
    return inside or "__init__"


def private_torch_names(source: str) -> list[str]:
    """The private names of torch that ``source`` imports or reaches through attributes.

    The names of ops (``torch.ops.aten._to_copy``) are none: an op's schema is public whatever its name.
    """
    tree = ast.parse(source)
    found, torch_names = [], {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    found.append(alias.name)
                    torch_names[alias.asname or "torch"] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                found.append(f"{node.module}.{alias.name}")
                torch_names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        name = None
        if isinstance(node, ast.Attribute):
            name = dotted(node)
        elif (
            isinstance(node, ast.Call) and dotted(node.func) in ("getattr", "hasattr", "setattr") and len(node.args) > 1
        ):
            attribute = node.args[1]
            if isinstance(attribute, ast.Constant) and isinstance(attribute.value, str) and dotted(node.args[0]):
                name = f"{dotted(node.args[0])}.{attribute.value}"
        root, _, rest = (name or "").partition(".")
        if rest and root in torch_names:
            found.append(f"{torch_names[root]}.{rest}")
    return sorted({name for name in found if is_private(name)})


def dotted(node: ast.expr) -> str | None:
    """``a.b.c`` for such a chain of attributes; None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (value := dotted(node.value)):
        return f"{value}.{node.attr}"
    return None


def is_private(name: str) -> bool:
    parts = name.split(".")
    if parts[1:2] == ["ops"]:
        return False
    return any(part.startswith("_") and not (part.startswith("__") and part.endswith("__")) for part in parts)


def test_every_folder_has_a_level() -> None:
    """The table has each folder, and each module that lies in none, once, on nine levels at most."""
    assert set(ORDER) == set(map(folder, MODULES))
    assert len(LEVELS) <= 9


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    """A module imports from its own folder, and from folders that stand before it."""
    here = folder(module)
    wrong = [name for name in imports(MODULES[module], module) if ORDER[folder(name)] > ORDER[here]]
    assert not wrong, f"{module} imports upwards: {', '.join(sorted(wrong))}"


def test_the_table_of_the_design_has_every_module() -> None:
    """``docs/design.md`` says of each folder and module what it is about, in the order of the folders."""
    text = (ROOT.parent / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.partition("## 5. Folders")[2].partition("\n## ")[0]
    told = re.findall(
        r"`(\w+)/?`", "".join(line.rpartition(" | ")[0] for line in table.splitlines() if line[:1] == "|")
    )
    assert set(told) == {module.rpartition(".")[2] for module in MODULES} - {CONTENTS}
    assert [name for name in told if name in ORDER] == [name for name in ORDER if name != CONTENTS]


def test_module_names_are_unique() -> None:
    """No two folders have a module of the same name; one of ``_torch`` has the name of what it wraps."""
    names = sorted(module.rpartition(".")[2] for module in MODULES if folder(module) != PRIVATE_TORCH)
    assert len(names) == len(set(names)), [name for name in set(names) if names.count(name) > 1]


def test_no_import_goes_in_a_circle() -> None:
    """Within a folder too, the modules have an order."""
    graph = {module: imports(text, module) - {module, CONTENTS} for module, text in MODULES.items()}
    for package in PACKAGES:  # `from package import module` is an import of the module alone
        graph[package] = {name for name in graph[package] if not name.startswith(f"{package}.")}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_private_torch_name_hides_another() -> None:
    """``_torch`` has the names of all its modules, so no two of them define the same one."""
    inside = [text for module, text in MODULES.items() if folder(module) == PRIVATE_TORCH]
    names = [name for text in inside for name in defined_names(text) if not name.startswith("_")]
    assert sorted(names) == sorted(set(names))
    assert {"storage_key", "CompileTimeError", "are_at"} <= set(names)


def defined_names(source: str) -> list[str]:
    """The names that a module defines by itself, without those that it imports."""
    statements = ast.parse(source).body
    targets = [target for statement in statements if isinstance(statement, ast.Assign) for target in statement.targets]
    targets += [statement.target for statement in statements if isinstance(statement, ast.AnnAssign)]
    named = [statement.name for statement in statements if isinstance(statement, ast.FunctionDef | ast.ClassDef)]
    return named + [target.id for target in targets if isinstance(target, ast.Name)]


@pytest.mark.parametrize("module", MODULES)
def test_private_torch_stays_in_one_folder(module: str) -> None:
    """Only ``_torch`` uses private names of torch."""
    if folder(module) != PRIVATE_TORCH:
        names = private_torch_names(MODULES[module])
        assert not names, f"{module} uses {', '.join(names)}: wrap them in {PRIVATE_TORCH}"


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("from breakable_backend.errors import CaptureError", "options", {"errors"}),
        ("from breakable_backend import _torch, explain", "report", {"_torch", "__init__"}),
        ("import breakable_backend", "report", {"__init__"}),
        ("import breakable_backend.drivers.cuda as c", "backend", {"drivers.cuda"}),
        ("from breakable_backend.drivers import CaptureDriver, tape", "backend", {"drivers", "drivers.tape"}),
        ("from . import errors", "options", {"errors"}),
        ("from .errors import CaptureError", "drivers", {"drivers"}),
        ("from ..errors import CaptureError", "drivers.cuda", {"errors"}),
        ("from . import tape", "drivers.cuda", {"drivers.tape"}),
        ("def f():\n    from .replay import emit", "recordings.recording", {"recordings.replay"}),
        ("import torch, breakable_backend_other", "recording", set()),
    ],
)
def test_finds_imports(source: str, module: str, expected: set[str]) -> None:
    """The finder of imports itself sees each form of one."""
    assert imports(source, module) == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch._dynamo", ["torch._dynamo"]),
        ("import torch\ntorch.cuda._sleep(1)", ["torch.cuda._sleep"]),
        ("import torch as t\nt._C._f()", ["torch._C", "torch._C._f"]),
        ("import torch.fx as fx\nfx._symbolic_trace", ["torch.fx._symbolic_trace"]),
        ("from torch import fx, _dynamo\nfx.node._name", ["torch._dynamo", "torch.fx.node._name"]),
        ("from torch._ops import OpOverload", ["torch._ops.OpOverload"]),
        ("import torch\ngetattr(torch._C, 'x')\nhasattr(torch, '_x')", ["torch._C", "torch._C.x", "torch._x"]),
        ("import torch\ntorch.__version__, torch.ops.aten._to_copy.default", []),
        ("from breakable_backend import _torch\n_torch.storage_key", []),
        ("self._torch._x", []),
    ],
)
def test_finds_private_names(source: str, expected: list[str]) -> None:
    """The finder of private names itself sees each way to one."""
    assert private_torch_names(source) == expected
