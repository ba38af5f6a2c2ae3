"""The order of the modules: each imports only from lower layers, and one module alone uses private torch names."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import breakable_backend

PACKAGE = "breakable_backend"
ROOT = Path(breakable_backend.__file__).parent
PRIVATE_TORCH = "_torch"

# The table of docs/design.md. A new module gets its line there and here.
LAYERS = {
    "_torch": 0,
    "calling": 0,
    "capturing": 0,
    "compiling": 0,
    "files": 0,
    "ir": 0,
    "locks": 0,
    "marks": 0,
    "recordings": 0,
    "tools": 0,
    "active": 1,
    "callers": 1,
    "calling.inputs": 1,
    "drivers.groups": 1,
    "drivers.room": 1,
    "drivers.seen": 1,
    "errors": 1,
    "ir.effects": 1,
    "ir.layout": 1,
    "ir.overlap": 1,
    "marks.learning": 1,
    "marks.straight": 1,
    "marks.structure": 1,
    "marks.tapes": 1,
    "tools.difference": 1,
    "calling.policy": 2,
    "drivers.bindings": 2,
    "failures": 2,
    "faults": 2,
    "ir.program": 2,
    "marks.gradients": 2,
    "marks.sites": 2,
    "options": 2,
    "drivers.ordering": 3,
    "ir.lifetimes": 3,
    "marks.ops": 3,
    "compiling.flat": 4,
    "drivers": 4,
    "drivers.collector": 4,
    "drivers.generator": 4,
    "drivers.nodes": 4,
    "drivers.streams": 4,
    "marks.functions": 4,
    "marks.marking": 4,
    "recordings.buffers": 4,
    "tools.debug": 4,
    "tools.sources": 4,
    "compiling.lowering": 5,
    "compiling.traced": 5,
    "drivers.cuda": 5,
    "drivers.eager": 5,
    "drivers.tape": 5,
    "marks.results": 5,
    "tools.journal": 5,
    "capturing.trace": 6,
    "compiling.partition": 6,
    "recordings.recording": 7,
    "calling.device_errors": 8,
    "recordings.replay": 8,
    "tools.profiling": 8,
    "tools.witness": 8,
    "recordings.plain": 9,
    "tools.compare": 9,
    "calling.executor": 10,
    "capturing.graph": 10,
    "backend": 11,
    "calling.resolved": 11,
    "capturing.capture": 11,
    "tools.measure": 11,
    "tools.page": 11,
    "calling.bound": 12,
    "tools.export": 12,
    "tools.report": 12,
    "__init__": 13,
}


PACKAGES = {"ir", "marks", "drivers", "compiling", "recordings", "calling", "capturing", "tools"}


def module_name(path: Path) -> str:
    """``drivers.cuda`` for ``drivers/cuda.py``, ``drivers`` for ``drivers/__init__.py``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path.read_text(encoding="utf-8") for path in sorted(ROOT.rglob("*.py"))}


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
    while inside and inside not in LAYERS:
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


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    """A module has a layer, and imports only from lower ones."""
    assert module in LAYERS, f"{module} has no layer: give it a line here and in docs/design.md"
    wrong = [name for name in imports(MODULES[module], module) - {module} if LAYERS[name] >= LAYERS[module]]
    assert not wrong, f"{module} (layer {LAYERS[module]}) imports upwards or sideways: {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("module", MODULES)
def test_private_torch_stays_in_one_module(module: str) -> None:
    """Only ``_torch.py`` uses private names of torch."""
    if module != PRIVATE_TORCH:
        names = private_torch_names(MODULES[module])
        assert not names, f"{module} uses {', '.join(names)}: wrap them in {PRIVATE_TORCH}.py"


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
