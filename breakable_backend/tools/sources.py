"""Graphs, programs and replays as files: to read alone, and for a debugger while ``depyf.prepare_debug`` is active.

Each file is named after its content: ``breakable_cg_graph_0_segment_1_eager.py``. A text that has changed, such as a
program that was cut anew, gets one more number, and the older file stays.
"""

from __future__ import annotations

import ast
import copy
import functools
import operator
import re
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from torch import fx

from breakable_backend.ir.effects import calls_in
from breakable_backend.ir.program import EagerSegment, GraphSegment, Program, Segment
from breakable_backend.recordings.generated_code import printing, with_code
from breakable_backend.recordings.observer import Observer, Subject
from breakable_backend.recordings.repair import NodeByNode

PREFIX = "breakable_cg"

_HEAD = """\
from __future__ import annotations

from math import inf, nan

import torch
from torch import device
"""


def depyf_folder() -> Path | None:
    """The folder of ``depyf.prepare_debug``, inside it; None outside. Checked with depyf 0.18 to 0.20."""
    state = sys.modules.get("depyf.explain.global_variables")
    data = getattr(state, "data", {})
    return Path(data["dump_src_dir"]) if data.get("is_inside_prepare_debug") else None


def place(folder: Path, name: str, text: str) -> Path:
    """Write ``text`` to the file ``name``, or to ``stem.1.suffix`` and so on if that file has another text."""
    stem, _, suffix = name.rpartition(".")
    path, number = folder / name, 0
    while path.exists() and path.read_text(encoding="utf-8") != text:
        number += 1
        path = folder / f"{stem}.{number}.{suffix}"
    path.write_text(text, encoding="utf-8")
    return path


def title(*parts: object) -> str:
    """``breakable_cg_graph_0_replay_2`` for ``("graph 0", "replay", 2)``."""
    return f"{PREFIX}_{re.sub(r'[^0-9A-Za-z]+', '_', ' '.join(map(str, parts)))}"


def file_name(*parts: object, suffix: str = "py") -> str:
    return f"{title(*parts)}.{suffix}"


# --- what the files hold ----------------------------------------------------------------------------------------------


def module_text(module: fx.GraphModule, about: str) -> str:
    """``module`` as Python that runs: a class with the same ``forward``, and below it those of the modules in it."""
    with_code(module)
    comment = "".join(f"# {line}\n" for line in about.splitlines())
    return f"{comment}{_HEAD}\n\n{_readable(module)}"


def _readable(module: fx.GraphModule) -> str:
    with printing:
        text = module.print_readable(print_output=False)
    return f"{text.replace(type(module).__name__, _class_name(module), 1).strip()}\n"


def _class_name(module: fx.GraphModule) -> str:
    name = type(module).__name__
    return name if name.isidentifier() else "GraphModule"  # AOT calls its graphs <lambda>


def segment_name(position: int, segment: Segment) -> str:
    return f"segment_{position}_{'captured' if isinstance(segment, GraphSegment) else 'eager'}"


def segment_text(program: Program, position: int) -> str:
    """A segment as a module, below a line on how it runs and, for an eager one, why."""
    segment = program.segments[position]
    if isinstance(segment, EagerSegment):
        why = [f"  because {reason}{f', at {reason.source}' if reason.source else ''}" for reason in segment.reasons]
        return module_text(segment.module, "\n".join([f"segment {position}: runs eagerly, call by call", *why]))
    return module_text(segment.module, f"segment {position}: captured, {segment.num_kernels} ops that launch")


def whole(program: Program) -> fx.GraphModule:
    """The program as one module that calls its segments in order, each a module in it.

    It takes the inputs of the program, and after them its sizes, which are functions of the inputs.
    """
    graph, root = fx.Graph(), fx.GraphModule({}, fx.Graph())
    values: dict[str, fx.Node] = {}
    named = [(value.name, value.value) for value in program.inputs if value.index >= 0]
    for name, value in (*named, *program.sizes.items()):
        values[name] = graph.placeholder(name)
        values[name].meta["val"] = value
    for constant in program.inputs:
        if constant.index < 0:
            setattr(root, constant.name, constant.value)
            values[constant.name] = graph.get_attr(constant.name)
    for position, segment in enumerate(program.segments):
        name = segment_name(position, segment)
        root.add_module(name, _twin(segment.module))
        results = graph.call_module(name, tuple(values[taken] for taken in segment.inputs))
        for index, made in enumerate(segment.outputs):
            values[made] = graph.call_function(operator.getitem, (results, index))
            values[made].name = made
    root.add_module("outputs", _twin(program.epilogue.module))
    graph.output(graph.call_module("outputs", tuple(values[name] for name in program.epilogue.inputs)))
    return fx.GraphModule(root, graph, "Program")


def _twin(module: fx.GraphModule) -> fx.GraphModule:
    """A module of the same code. fx compiles a module anew that is put into another one, so this is a copy."""
    targets = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    parts = {target: operator.attrgetter(target)(module) for target in sorted(targets)}
    twins = {target: _twin(part) if isinstance(part, fx.GraphModule) else part for target, part in parts.items()}
    return fx.GraphModule(twins, copy.deepcopy(module.graph), type(module).__name__)


def whole_text(program: Program, about: str) -> str:
    """The program as one text to read: its printed form, and the code of its segments inside that of the whole."""
    return module_text(whole(program), f"{about}\n{program}")


# --- while depyf is active --------------------------------------------------------------------------------------------


class DepyfFiles(Observer):
    """Inside ``depyf.prepare_debug``: files of a graph, from which it runs, so that breakpoints in them are hit."""

    def __init__(self, subject: Subject) -> None:
        self.name, self.debug = subject.name, subject.options.debug
        self._stepped: weakref.WeakKeyDictionary[fx.GraphModule, _Stepped] = weakref.WeakKeyDictionary()
        """What runs from the files of captured segments while these are captured."""

    def traced(self, module: fx.GraphModule, stage: str) -> None:
        folder = depyf_folder()
        if folder is not None:
            text = module_text(module, f"{self.name} {stage}")
            _run_from(module, text, place(folder, file_name(self.name, stage), text))

    def cut(self, program: Program) -> None:
        """File the program as a whole, and segment by segment."""
        folder = depyf_folder()
        if folder is None:
            return
        place(folder, file_name(self.name, "program"), whole_text(program, self.name))
        for position, segment in enumerate(program.segments):
            text, name = segment_text(program, position), file_name(self.name, segment_name(position, segment))
            path = place(folder, name, text)
            _run_from(segment.module, text, path)
            if isinstance(segment, GraphSegment) and (stepped := _Stepped.of(segment.module, text, path)) is not None:
                self._stepped[segment.module] = stepped

    def captured(self, position: int, body: NodeByNode) -> Callable[..., Any] | None:
        """The code of the segment's file. Debug modes run it by themselves, or look at each node."""
        stepped = self._stepped.get(body.module) if self.debug is None else None
        return None if stepped is None else functools.partial(stepped.run, body)

    def file(self, source: str, name: str) -> str | None:
        folder = depyf_folder()
        return str(place(folder, file_name(name), source)) if folder is not None else None


def _run_from(module: fx.GraphModule, text: str, file: Path) -> None:
    """Give ``forward`` the code that ``file`` defines. The names that it needs are in its own globals."""
    if (tree := _parsed(text)) is not None:
        type(module).forward.__code__, _ = _forward(module, tree, file)


def _parsed(text: str) -> ast.Module | None:
    """None for what is not Python, as some texts that fx prints are not. Such files are only for reading."""
    try:
        return ast.parse(text)
    except SyntaxError:
        return None


def _forward(module: fx.GraphModule, tree: ast.Module, file: Path) -> tuple[CodeType, dict[str, Any]]:
    """The code of ``forward`` as ``tree`` has it, and its globals."""
    names = dict(type(module).forward.__globals__)
    exec(compile(tree, str(file), "exec"), names)
    return names[_class_name(module)].forward.__code__, names


@dataclass(frozen=True)
class _Stepped:
    """The code of a segment's file, with calls at the lines of its nodes that report when each begins and ends."""

    code: CodeType
    names: dict[str, Any]

    @classmethod
    def of(cls, module: fx.GraphModule, text: str, file: Path) -> _Stepped | None:
        """None if the text has no statement for some node."""
        nodes = {node.name for node in calls_in(module)}
        tree = _parsed(text)
        if tree is None:
            return None
        forward = next(f for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) and f.name == "forward")
        told: list[ast.stmt] = []
        for statement in forward.body:
            name = _made_by(statement)
            if name in nodes:
                nodes.remove(name)
                calls = [ast.parse(f"_begins({name!r})").body[0], ast.parse(f"_ends({name!r}, {name})").body[0]]
                for node in (part for call in calls for part in ast.walk(call)):
                    ast.copy_location(node, statement)
                told += [calls[0], statement, calls[1]]
            else:
                told.append(statement)
        if nodes:
            return None
        forward.body = told
        return cls(*_forward(module, tree, file))

    def run(self, body: NodeByNode, *inputs: Any) -> tuple[Any, ...]:
        """``body``, from the file."""
        nodes = {node.name: node for node in body.module.graph.nodes}
        told = {
            "_begins": lambda name: body.begins(nodes[name]),
            "_ends": lambda name, result: body.ends(nodes[name], result),
        }
        body.starts()
        results = FunctionType(self.code, {**self.names, **told})(body.module, *inputs)
        body.node = None
        return tuple(results)


def _made_by(statement: ast.stmt) -> str:
    """The variable that a statement of a printed graph computes. The statement also sets unused variables to None."""
    target: ast.expr | None = None
    if isinstance(statement, ast.AnnAssign):
        target = statement.target
    elif isinstance(statement, ast.Assign) and not isinstance(statement.value, ast.Constant):
        (target,) = statement.targets
    return target.id if isinstance(target, ast.Name) else ""
