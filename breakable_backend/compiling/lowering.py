"""From Dynamo's graph to an ATen graph: what AOTAutograd must keep, and what is noted before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from breakable_backend import _torch
from breakable_backend._torch import pytree
from breakable_backend.compiling.regions import CutsRegion, inline_regions, may_be_cut
from breakable_backend.errors import first_line, message
from breakable_backend.ir.ambient_modes import AMBIENT_KEY, Cast, Modes
from breakable_backend.ir.effects import WRITES_UNDECLARED, bodies, graphs_in, tensors_of, written_arguments
from breakable_backend.ir.source_lines import source_line
from breakable_backend.marks.marking import EagerOps, Marks, is_marked, marked_names

OUT_KEY = "breakable_cg_out"


@dataclass(frozen=True)
class Lowered:
    """An ATen graph with mutations in program order, and which of its arguments are static inputs."""

    module: fx.GraphModule
    static: frozenset[int]
    unmet: frozenset[str] = frozenset()
    """Marks, each with its kind, that this graph calls nothing of."""
    marked: frozenset[str] = field(default_factory=marked_names)
    """What ``mark_eager`` had marked when the graph was traced. A later mark does not change the graph."""


class CannotLower(Exception):
    """A graph that has to run as Dynamo traced it; the text says why, and ``source`` at which line, if a node is to blame."""

    def __init__(self, why: str, node: fx.Node | None = None) -> None:
        super().__init__(why)
        self.source = source_line(node) if node is not None else ""


NEEDS_GRADIENTS = "it needs gradients"


def lower(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    compile_lowered: Callable[[Lowered], Callable[[list[Any]], Any]],
    eager_ops: EagerOps,
    *,
    keep_floats: bool = True,
) -> Callable[..., Any]:
    """Trace ``gm`` to ATen, let ``compile_lowered`` compile that, and return what Dynamo may call.

    Unused marked calls and unused random draws stay. Each node of the ATen graph carries in ``meta["custom"]`` the
    modes that it was traced under, and the marks of PyTorch functions. With ``keep_floats`` a Python float that varies
    stays a number.

    Raises:
        CannotLower: an output needs a gradient, or AOTAutograd cannot trace the graph, or would not keep it right.
    """
    _torch.guard_on_forward_ad()
    if _torch.forward_ad_active():
        raise CannotLower("forward-mode AD is on, and tensors may carry tangents")
    if any(_torch.makes_quantised(target) for target in _targets(gm)):
        raise CannotLower("it makes quantised tensors, which tracing takes for floats")
    if needs_gradients(gm):
        raise CannotLower(NEEDS_GRADIENTS)
    for node in gm.graph.nodes:
        if node.target is _torch.ENTER_INFERENCE_MODE:
            raise CannotLower("it enters or leaves inference mode", node)
    if any(_torch.zero_floats(gm).values()):
        raise CannotLower("a float that tracing takes for a constant is zero, and Python computes with it")
    for value in example_inputs:
        if isinstance(value, torch.Tensor) and value.layout not in (torch.strided, torch.jagged):
            raise CannotLower(f"it takes a tensor of layout {value.layout}, which is not addressed by strides")

    marks = Marks(eager_ops)
    marks.annotate(gm)
    inline_regions(gm, may_be_cut)
    try:
        return _traced(gm, example_inputs, compile_lowered, marks, keep_floats)
    except CutsRegion:
        inline_regions(gm)
        return _traced(gm, example_inputs, compile_lowered, marks, keep_floats)


def _traced(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    compile_lowered: Callable[[Lowered], Callable[[list[Any]], Any]],
    marks: Marks,
    keep_floats: bool,
) -> Callable[..., Any]:
    """``gm``, traced to ATen and compiled."""
    autocast = _torch.any_autocast_enabled()
    """Whether AOTAutograd's wrapper has to switch off an autocast of the caller's around each call."""
    made: list[tuple[Callable[[list[Any]], Any], tuple[int, ...] | None]] = []
    """What was compiled; and, if none of AOTAutograd's wrappers has to run around a call, the inputs whose versions are
    counted up."""
    ours: list[Exception] = []
    """Exceptions of this package's code that AOTAutograd calls."""

    def inference(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        try:
            return compiled_by_us(module, inputs)
        except Exception as error:
            ours.append(error)
            raise

    def compiled_by_us(module: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:
        _torch.forget_effect_tokens()
        _torch.name_inputs(module.graph.find_nodes(op="placeholder"), gm)
        written = None if autocast else _torch.written_without_wrappers(gm, module)
        returned_outs(module)
        out_of_place_views(module)
        if lost := lost_outs(module, outs):
            raise CannotLower(f"{lost} leaves its out= unwritten when it is traced")
        compiled = compile_lowered(Lowered(module, _torch.static_input_indices(), marks.unmet(module)))
        made.append((compiled, written))
        return _boxed(compiled)

    def training(_module: fx.GraphModule, _inputs: Sequence[Any]) -> Callable[..., Any]:
        raise CannotLower(NEEDS_GRADIENTS)

    note_ambient(gm)
    outs = note_outs(gm)
    around = marks.taken_apart(called_ops(gm))
    try:
        apart = _torch.apart(example_inputs)
        kept = kept_ops(gm, marks.eager_ops)
        function = _torch.trace_inference(gm, apart, inference, training, kept, around, keep_floats)
    except (CannotLower, CutsRegion, _torch.dynamo_error()):
        raise
    except Exception as error:  # AOTAutograd passes on any exception of its parts
        if error in ours:
            raise
        raise CannotLower(f"AOTAutograd does not take it: {_what(error)}") from error
    compiled, written = made[-1]
    if written is not None:
        function = without_wrappers(compiled, written)
    function.executor = compiled  # type: ignore[attr-defined]
    return function


def _boxed(compiled: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    """``compiled`` as AOTAutograd calls it, whose check for aliases in the first call is left out."""
    first = True

    def boxed(args: list[Any]) -> Any:
        nonlocal first
        if first:
            first = False
            with _torch.without_alias_check():
                return compiled(args)
        return compiled(args)

    boxed._boxed_call = True  # type: ignore[attr-defined]
    return boxed


def without_wrappers(compiled: Callable[[list[Any]], Any], written: tuple[int, ...]) -> Callable[..., Any]:
    """``compiled`` as Dynamo calls it, with the rest of AOTAutograd's wrappers if no output or argument needs them.

    They take 10 to 25 us a call (CPU, torch 2.13).
    """
    count_up = torch.autograd.graph.increment_version
    is_grad_enabled, set_grad_enabled = torch.is_grad_enabled, _torch.set_grad_enabled

    def call(*args: Any) -> Any:
        values = list(args)
        if written:
            count_up([values[index] for index in written])
        if not is_grad_enabled():
            return compiled(values)
        set_grad_enabled(False)
        try:
            return compiled(values)
        finally:
            set_grad_enabled(True)

    call.written = written  # type: ignore[attr-defined]
    return call


def _what(error: Exception) -> str:
    """The first line of an exception, with its class if that is more informative than the text."""
    text = message(error)
    return text if isinstance(error, RuntimeError | ValueError) and text else first_line(error)


def needs_gradients(gm: fx.GraphModule) -> bool:
    """Whether a caller could ask for gradients through ``gm``, according to Dynamo's fake outputs."""
    output = gm.graph.output_node()
    return torch.is_grad_enabled() and any(
        tensor.requires_grad for node in output.all_input_nodes for tensor in tensors_of(node.meta.get("example_value"))
    )


def note_outs(gm: fx.GraphModule) -> dict[int, str]:
    """Number each call with ``out=`` in ``node.meta["custom"]``, which survives AOT. Returns what each of them calls."""
    outs: dict[int, str] = {}
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.kwargs.get("out") is not None:
            node.meta["custom"] = {**node.meta.get("custom", {}), OUT_KEY: len(outs)}
            outs[len(outs)] = getattr(node.target, "__name__", str(node.target))
    return outs


def returned_outs(module: fx.GraphModule) -> None:
    """Put the first argument of an op with ``out=`` back where the trace has the op's result in its place.

    The fakes of ``copy.out`` and ``slice_scatter.out`` return their first argument, and the kernels return ``out``. So a
    trace takes the result for another name of that argument. (torch 2.11 to 2.15) :func:`out_of_place_views`, which comes
    next, generates the code of ``module`` anew.
    """
    for node in module.graph.nodes:
        out, first = node.kwargs.get("out"), node.args[0] if node.args else None
        if not isinstance(out, fx.Node) or not isinstance(first, fx.Node):
            continue
        values: list[Any] = [each.meta.get("val") for each in (node, first, out)]
        if all(isinstance(value, torch.Tensor) for value in values):
            result, read, written = map(_torch.storage_key, values)
            if result == read != written:
                node.replace_all_uses_with(first)
                node.meta["val"] = out.meta["val"]


def lost_outs(module: fx.GraphModule, outs: dict[int, str]) -> str:
    """A call with ``out=`` whose argument no op in the ATen graph writes; empty if there is none.

    Some of PyTorch's composite kernels take another branch while they are traced, and there ignore ``out=``:
    ``torch.linalg.matrix_rank`` does on torch 2.11 to 2.15.
    """
    written = {node.meta.get("custom", {}).get(OUT_KEY) for node in module.graph.nodes if written_arguments(node)}
    return next((name for number, name in outs.items() if number not in written), "")


def note_ambient(gm: fx.GraphModule) -> None:
    """Note the modes around each node of a Dynamo graph in ``node.meta["custom"]``, which survives AOT.

    AOT compiles autocast and grad mode into the ATen ops and removes them. A custom op under ``with
    torch.autocast(...)`` would then run without it.
    """
    now = Modes.current()
    _note(gm, {cast[0]: cast for cast in now.autocast}, now.grad)


def _note(gm: fx.GraphModule, autocast: dict[str, Cast], grad: bool) -> None:
    saved: dict[Any, tuple[str, Cast | None]] = {}
    for node in gm.graph.nodes:
        if node.target is _torch.ENTER_AUTOCAST:
            device, dtype, enabled, cache = (*node.args, None, None, None)[:4]
            saved[node] = (str(device), autocast.pop(str(device), None))
            if enabled or enabled is None:
                autocast[str(device)] = (
                    str(device),
                    dtype or torch.get_autocast_dtype(str(device)),
                    torch.is_autocast_cache_enabled() if cache is None else cache,
                )
        elif node.target is _torch.EXIT_AUTOCAST:
            device, before = saved[node.args[0]]
            autocast.pop(device, None)
            if before is not None:
                autocast[device] = before
        elif node.target is _torch.SET_GRAD_ENABLED:
            grad = bool(node.args[0])
        elif autocast or grad:
            modes = Modes(tuple(autocast.values()), grad)
            node.meta["custom"] = {**node.meta.get("custom", {}), AMBIENT_KEY: modes}
            for body in bodies(node):
                _note(body, dict(autocast), grad)


def out_of_place_views(module: fx.GraphModule) -> None:
    """Replace ``t_``, ``unsqueeze_`` and similar ops by views.

    They change a tensor object and launch nothing. A segment makes views again from the object that made the storage,
    so that object must not change. Later readers read the view already.
    """
    for node in module.graph.nodes:
        if isinstance(node.target, _torch.OpOverload) and torch.Tag.inplace_view in node.target.tags:
            node.target = _torch.out_of_place(node.target) or node.target
    module.recompile()


def kept_ops(gm: fx.GraphModule, eager_ops: EagerOps) -> set[Any]:
    """The ops that any graph in ``gm`` calls for more than their result.

    These are marked ops, ops that return nothing, and higher-order ops, whose bodies may write. AOT does not look into
    bodies, and would drop a user's Triton kernel. An op may also write what its schema does not tell of, such as the
    statistics of a batch norm.
    """
    found = {op for op in called_ops(gm) if is_marked(op, eager_ops) or not op._schema.returns}
    found.update(op for name in WRITES_UNDECLARED for op in _torch.find_overloads(name))
    return found.union(target for target in _targets(gm) if isinstance(target, _torch.HigherOrderOperator))


def called_ops(gm: fx.GraphModule) -> set[Any]:
    """The overloads that any graph in ``gm`` calls by name."""
    return {op for target in _targets(gm) for op in _torch.overloads(target)}


def _targets(gm: fx.GraphModule) -> list[Any]:
    """What nodes call in any graph in ``gm``, and what they pass to higher-order ops to call."""
    nodes = [node for module in graphs_in(gm) for node in module.graph.nodes]
    return [target for node in nodes for target in (node.target, *pytree.tree_leaves((node.args, node.kwargs)))]
