"""The tables of op names: each name is an op of a torch that this package supports, and none is looked up on import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import breakable_backend
import fresh
from breakable_backend import _torch

ROOT = Path(breakable_backend.__file__).parent
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# What not every supported torch has: the first torch with the op, and the first without it (None: it is still there).
ONLY_ON: dict[str, tuple[tuple[int, int], tuple[int, int] | None]] = {
    "aten::cholesky": ((1, 0), (2, 14)),
}

QUALIFIED = re.compile(r"(aten|prims?|inductor)::\w+")


def trees() -> Iterator[ast.Module]:
    for path in ROOT.rglob("*.py"):
        yield ast.parse(path.read_text(encoding="utf-8"), str(path))


def text_of(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def names_in_tables() -> set[str]:
    """What the package names by text: ``"aten::sort"``, and the words of ``aten("sort topk")``."""
    found: set[str] = set()
    for node in (node for tree in trees() for node in ast.walk(tree)):
        if QUALIFIED.fullmatch(text_of(node)):
            found.add(text_of(node))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("aten", "_torch.aten"):
            assert len(node.args) == 1 and text_of(node.args[0]), ast.unparse(node)
            found |= _torch.aten(text_of(node.args[0]))
    return found


def attributes() -> set[str]:
    """What the package reads off torch.ops: ``torch.ops.aten.clone``."""
    found: set[str] = set()
    for node in (node for tree in trees() for node in ast.walk(tree) if isinstance(node, ast.Attribute)):
        if match := re.fullmatch(r"(?:torch\.ops\.)?(aten|prims?|inductor)\.(\w+)", ast.unparse(node)):
            found.add("::".join(match.groups()))
    return found


def higher_order_names() -> set[str]:
    """The words of the tables of higher-order ops."""
    found: set[str] = set()
    for node in (node for tree in trees() for node in tree.body if isinstance(node, ast.Assign)):
        if "HIGHER_ORDER" in ast.unparse(node.targets[0]):
            found |= {text for inner in ast.walk(node.value) if (text := text_of(inner))}
    return found


def is_on_this_torch(name: str) -> bool:
    first, gone = ONLY_ON.get(name, ((1, 0), None))
    return first <= TORCH and (gone is None or gone > TORCH)


def test_the_tables_are_found() -> None:
    """The tests below see the tables: one name of each kind of spelling is among what they walk."""
    assert {"aten::cholesky", "aten::copy_", "aten::_unique2"} <= names_in_tables()
    assert {"aten::clone", "aten::lift_fresh"} <= attributes()
    assert {"invoke_subgraph", "flex_attention_backward"} <= higher_order_names()
    assert ONLY_ON.keys() <= names_in_tables()


def test_each_name_is_an_op_of_the_torches_that_have_it() -> None:
    """A name in a table is an op of this torch, unless ``ONLY_ON`` says that it is an op of others."""
    there = {name for name in names_in_tables() if _torch.find_overloads(name)}
    assert there == {name for name in names_in_tables() if is_on_this_torch(name)}


def test_what_is_read_off_torch_is_on_every_torch() -> None:
    """An op that the package reads off ``torch.ops`` is on every supported torch: no table is made so."""
    assert not attributes() & ONLY_ON.keys()
    assert all(map(_torch.find_overloads, attributes()))


def test_each_higher_order_op_is_there() -> None:
    """The names of higher-order ops are those of ops that torch has."""
    missing = {name for name in higher_order_names() if not hasattr(torch.ops.higher_order, name)}
    assert not missing


@pytest.mark.parametrize("spelling", ["f-string", "getattr"])
def test_tables_are_made_in_one_way(spelling: str) -> None:
    """Outside of ``_torch`` no table is put together from ``aten::`` and words, or read off ``torch.ops`` by its name."""
    pattern = {
        "f-string": r"f['\"](aten|prims?)::[^'\"]*['\"]\s+for\b",
        "getattr": r"getattr\(torch\.ops\.(aten|prims?)\b",
    }[spelling]
    found = [
        path.name
        for path in ROOT.rglob("*.py")
        if path.parent.name != "_torch" and re.search(pattern, path.read_text(encoding="utf-8"))
    ]
    assert not found


def test_a_torch_without_the_ops_of_the_tables() -> None:
    """Where the package finds none of the ops in its tables it imports, and compiles and captures without some of them."""
    run = fresh.python(WITHOUT_OPS.replace("MISSING", repr(names_in_tables() - attributes())), 200)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "imported\n1 captured\n"


WITHOUT_OPS = """
import importlib, pathlib, sys
import torch

missing = MISSING

def hide(look_up):
    def hidden(namespace, name):
        # torch itself cannot go without
        if f"aten::{name}" in missing and sys._getframe(1).f_globals.get("__name__", "").startswith("breakable_backend"):
            raise AttributeError(f"'_OpNamespace' object has no attribute {name!r}")
        return look_up(namespace, name)
    return hidden

namespace = type(torch.ops.aten)
namespace.__getattribute__, namespace.__getattr__ = hide(object.__getattribute__), hide(namespace.__getattr__)

import breakable_backend
root = pathlib.Path(breakable_backend.__file__).parent
for path in root.rglob("*.py"):
    module = ".".join(path.relative_to(root.parent).with_suffix("").parts).removesuffix(".__init__")
    importlib.import_module(module)
print("imported")

# In the package's name the dispatcher looks up what it calls: those stay.
missing &= {f"aten::{name}" for name in "cholesky _ctc_loss _unique2 _assert_async".split()}
compiled = torch.compile(lambda x: x.sin() * 2 + 1, backend=breakable_backend.breakable_cg, options={"driver": "tape"})
with torch.no_grad():
    assert all(torch.equal(compiled(x), x.sin() * 2 + 1) for x in torch.rand(4, 3))
print(sum(p["num_graph_segments"] for p in breakable_backend.explain(compiled).to_dict()["programs"]), "captured")
"""
