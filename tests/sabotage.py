"""Small faults in the package, each with the test that has to notice it: ``test_sabotage.py`` proves that it does.

A fault replaces one piece of code in one function of a copy of the package. The named test then has to fail, in a
process of its own that imports the copy. Code is compared as syntax trees, so that a fault still fits after its
function was formatted anew or moved inside its module.
"""

from __future__ import annotations

import ast
import itertools
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

import fresh
from warm import ROOT, TESTS, Changes, changes_between

PACKAGE = "breakable_backend"
TIMEOUT = 300.0
"""Seconds after which a run counts as hung."""
OPTIONS = "-x -q --tb=short --show-capture=no --assert=plain -p no:cacheprovider".split()


@dataclass(frozen=True)
class Fault:
    """``old``, which occurs once in ``where``, replaced by ``new``, has to turn ``test`` red."""

    name: str
    where: str
    """``module:name``: a function, method, class or variable by its qualified name in a module of the package, such as
    ``recordings.recording:Recorder.load``; ``module`` alone means the whole module."""
    old: str
    """An expression, or statements that follow each other."""
    new: str
    """An expression in its place, or statements; ``pass`` takes statements out."""
    test: str
    """Node id of one test, without the folder that its file lies in."""
    gpu: bool = False
    """Whether only a GPU shows it."""
    anew: bool = False
    """Whether the package has to be imported with the fault in it: by a process that the test starts, or since what the
    fault is in runs on import. Outside of functions this goes without saying."""
    since: str = "2.11"
    """The torch from which on it makes a difference: what it takes away cures what older ones do not have."""

    @property
    def file(self) -> Path:
        """The module's file, relative to the folder that holds the package."""
        path = Path(PACKAGE, *self.where.partition(":")[0].split("."))
        return path / "__init__.py" if (ROOT / path).is_dir() else path.with_suffix(".py")

    def source(self) -> str:
        """The text of the module with the fault in it, without its comments."""
        return ast.unparse(self.put_into(ast.parse((ROOT / self.file).read_bytes())))

    @cached_property
    def changes(self) -> Changes | None:
        """What the fault changes in functions that are there; None if the package has to be imported with it."""
        path = ROOT / self.file
        return None if self.gpu or self.anew else changes_between(path, self.put_into(ast.parse(path.read_bytes())))

    def put_into(self, tree: ast.Module) -> ast.Module:
        """Change the module's ``tree``; returns it. What is new lies where the old was, so that no other line moves."""
        old, new = self.pieces()
        node, field, start = self.place(tree)
        value = getattr(node, field)
        replaced = value[start] if isinstance(value, list) else value
        for added in new:
            for part in ast.walk(added):
                ast.copy_location(part, replaced)
        if isinstance(value, list):
            value[start : start + len(old)] = new
        else:
            setattr(node, field, *new)
        return tree

    def place(self, tree: ast.Module) -> tuple[ast.AST, str, int]:
        """The node, its field, and the index in that, where the fault goes."""
        found = places(find(tree, self.where.partition(":")[2]), self.pieces()[0])
        assert len(found) == 1, f"{self.name}: {self.old!r} is {len(found)} times in {self.where}"
        return found[0]

    def pieces(self) -> tuple[list[ast.AST], list[ast.AST]]:
        """The old and the new code: both an expression, or both statements."""
        old, new = _parsed(self.old), _parsed(self.new)
        if isinstance(old, ast.expr) and isinstance(new, ast.expr):
            return [old], [new]
        return _as_statements(old), _as_statements(new)


@contextmanager
def planted(root: Path, file: Path, source: str) -> Iterator[None]:
    """Have ``file`` of the copy in ``root`` with other ``source`` for the time of a ``with`` statement."""
    path = root / file
    path.write_text(source, encoding="utf-8")
    # By time and size Python tells whether a module is the one that it compiled, and faults may follow each other fast.
    tick = next(_ticks)
    os.utime(path, (tick, tick))
    try:
        yield
    finally:
        shutil.copy2(ROOT / file, path)


_ticks = itertools.count(1)


def find(tree: ast.Module, name: str) -> ast.AST:
    """What defines the qualified ``name`` in a module: the last of that name, as Python has it; '' is the module."""
    node: ast.AST = tree
    for part in name.split(".") if name else ():
        defined = [child for child in _statements_in(node) if part in _defined(child)]
        assert defined, f"{name} is not there"
        node = defined[-1]
    return node


def _statements_in(node: ast.AST) -> Iterator[ast.AST]:
    """The statements of ``node``, also those below ``if``, ``with`` and ``try``, but not those of inner definitions."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler):
            yield child
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _statements_in(child)


def _defined(node: ast.AST) -> list[str]:
    """The names that a statement defines."""
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Assign():
            return [target.id for target in node.targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return []


def places(scope: ast.AST, wanted: Sequence[ast.AST]) -> list[tuple[ast.AST, str, int]]:
    """Where nodes as ``wanted`` follow each other in ``scope``: a node, its field, and the first's index in that."""
    kind, dumps = type(wanted[0]), list(map(ast.dump, wanted))
    found = []
    for node in ast.walk(scope):
        for field, value in ast.iter_fields(node):
            items = value if isinstance(value, list) else [value]
            for i, item in enumerate(items):
                if type(item) is kind and list(map(ast.dump, items[i : i + len(wanted)])) == dumps:
                    found.append((node, field, i))
    return found


def _parsed(code: str) -> ast.expr | list[ast.AST]:
    code = textwrap.dedent(code).strip()
    try:
        return ast.parse(f"({code}\n)", mode="eval").body
    except SyntaxError:
        return list(ast.parse(code).body)


def _as_statements(code: ast.expr | list[ast.AST]) -> list[ast.AST]:
    return [ast.Expr(code)] if isinstance(code, ast.expr) else code


FAULTS = (
    # --- views in the body of an op ---
    Fault(
        "a-view-in-the-body-of-an-op-is-made-twice",
        "_torch.ops:_run_kernel",
        "not is_view or key != 'ADInplaceOrView'",
        "True",
        "test_host_syncs.py::test_views_in_the_body_of_an_op[cpu-False]",
    ),
    # --- training ---
    Fault(
        "a-missing-gradient-is-zeros",
        "compiling.forward_and_backward:Backward.gradients_in",
        "None if terms and (not any((came[number] for number in terms))) else value",
        "value",
        "test_training.py::test_a_mixture_of_experts_trains[cpu-at last]",
    ),
    Fault(
        "a-part-of-a-sum-is-missing-and-so-is-the-sum",
        "compiling.forward_and_backward:Backward.gradients_in",
        "not any((came[number] for number in terms))",
        "not all((came[number] for number in terms))",
        "test_training.py::test_a_mixture_of_experts_trains[cpu-at last]",
    ),
    Fault(
        "gradients-behind-a-missing-one-are-computed",
        "compiling.forward_and_backward:Backward.absent_from",
        "unreached(call.site, saved[call.handle], call.given)",
        "frozenset()",
        "test_training.py::test_layers_without_a_gradient[cpu-once-at last]",
    ),
    Fault(
        "a-trace-has-an-edge-for-each-gradient",
        "_torch.autograd:leaf_in_place_of",
        "tensor.detach().requires_grad_()",
        "tensor",
        "test_training.py::test_layers_without_a_gradient[cpu-once-at last]",
    ),
    Fault(
        "what-is-missing-by-all-results-alone",
        "marks.saved_for_backward:SavedForBackward.unreached",
        "(members for members, is_given in zip(self.members, given, strict=True) if is_given)",
        "self.members",
        "test_training.py::test_layers_without_a_gradient[cpu-once-none or all]",
    ),
    Fault(
        "missing-gradients-keep-a-graph-eager",
        "marks.call_ops:_Node.backward",
        "missing - saved.unreached([grad is not None for grad in given])",
        "missing",
        "test_training.py::test_layers_without_a_gradient[cpu-once-at first]",
    ),
    Fault(
        "hooks-behind-an-edge-without-a-gradient",
        "_torch.autograd:spare_hooks",
        "nodes_behind(without)",
        "without",
        "test_training.py::test_layers_without_a_gradient[cpu-once-at last]",
    ),
    Fault(
        "layouts-by-the-order-of-outputs-that-needed-gradients",
        "compiling.halves:Halves.trace",
        "tuple(map(layouts.get, joint.differentiable))",
        "tuple(layouts.values())",
        "test_training.py::test_layers_without_a_gradient[cpu-once-none or all]",
    ),
    Fault(
        "an-eager-call-has-an-edge-for-each-argument",
        "marks.call_ops:_define",
        "saved.unreached([True] * len(saved.members))",
        "()",
        "test_training.py::test_a_gradient_of_two_functions_that_one_leaves_out[cpu]",
    ),
    Fault(
        "hooks-are-called-without-a-gradient",
        "_torch.autograd:_Spared.__call__",
        "given is not None if self.came is None else self.came[0]",
        "True",
        "test_training.py::test_a_mixture_of_experts_trains[cpu-at first]",
    ),
    Fault(
        "of-two-arguments-in-one-memory-the-first",
        "marks.results:_Taker._alias",
        "bases.sort(key=lambda place: place[1] is not tensor)",
        "pass",
        "test_functions.py::test_two_arguments_in_one_memory[cpu-learned]",
    ),
    Fault(
        "expanded-views-lie-where-they-lay",
        "marks.structure:view_leaf",
        "size > 1 and where[1][dim] == 0",
        "False",
        "test_functions.py::test_expanded_view_of_an_argument_that_begins_elsewhere[cpu-learned-dense]",
    ),
    Fault(
        "results-over-an-arguments-memory-are-fresh",
        "marks.results:_Taker.take",
        "[in_memory_of(self.arguments, tensor) for tensor in self.tensors]",
        "list(self.tensors)",
        "test_functions.py::test_results_over_the_memory_of_an_argument[cpu-learned]",
    ),
    Fault(
        "memory-of-other-libraries-is-the-callers",
        "marks.results:_is_kept",
        "not group[0].untyped_storage().resizable()",
        "False",
        "test_functions.py::test_kept_memory_of_another_library[cpu]",
    ),
    Fault(
        "memory-of-other-libraries-is-the-callers-by-the-short-way",
        "_torch.tensors:is_sole_owner",
        "storage.resizable()",
        "True",
        "test_functions.py::test_kept_memory_of_another_library[cpu]",
    ),
    Fault(
        "what-is-detached-needs-gradients-without-grad-mode",
        "marks.results:_Taker._alias",
        "base.requires_grad and not tensor.requires_grad",
        "self.recording and base.requires_grad and not tensor.requires_grad",
        "test_functions.py::test_what_is_detached_without_grad_mode[cpu-False-detach]",
    ),
    Fault(
        "fake-functions-see-no-gradients-without-grad-mode",
        "marks.call_sites:Site._ask",
        "call.needs or _needing(call.tensors)",
        "call.needs or [False] * len(given)",
        "test_functions.py::test_what_is_detached_without_grad_mode[cpu-True-detach]",
    ),
    Fault(
        "lazy-results-lie-otherwise",
        "marks.results:_Taker._take_group",
        "TensorSpec.of(root).empty() if _torch.is_traced(root) else copy_of(root)",
        "root.resolve_conj().resolve_neg()",
        "test_functions.py::test_layout_of_lazy_results[cpu-False]",
    ),
    Fault(
        "results-over-an-arguments-memory-are-fresh-in-a-capture",
        "capturing.capture:_OngoingCapture._break",
        "on_known_memory(result, taken)",
        "result",
        "test_capture_hostile.py::test_results_over_the_memory_of_an_argument[cpu]",
    ),
    Fault(
        "a-result-that-is-an-argument-later-is-copied",
        "capturing.eager_results:Parts._is_given",
        "self.places.touches(start, start + 1)",
        "False",
        "test_capture_hostile.py::test_results_that_share_memory_later[cpu-an argument]",
    ),
    Fault(
        "an-argument-stays-where-it-was-captured",
        "capturing.eager_results:Parts._is_given",
        "_places(self.given).touches(start, start + 1)",
        "True",
        "test_capture_hostile.py::test_a_result_in_the_old_memory_of_an_argument[cpu]",
    ),
    Fault(
        "results-that-are-one-later-are-copied-apart",
        "capturing.eager_results:Parts.check",
        "not self.apart",
        "False",
        "test_capture_hostile.py::test_results_that_share_memory_later[cpu-one tensor twice]",
    ),
    Fault(
        "results-that-need-no-gradients-at-first-never-do",
        "marks.call_sites:Site.traced_as",
        "some or place in self.seen",
        "some",
        "test_training.py::test_results_that_need_gradients_in_some_calls_only[cpu]",
    ),
    Fault(
        "gradients-that-were-not-expected-are-lost",
        "marks.call_sites:Site.run",
        "some and (not known)",
        "False",
        "test_training.py::test_results_that_need_gradients_in_some_calls_only[cpu]",
    ),
    Fault(
        "hooks-on-arguments-are-not-looked-for-in-calls-that-learn",
        "marks.functions:_learn",
        "watching != [*map(_torch.num_watching, passed)]",
        "False",
        "test_functions_gradients.py::test_arguments_whose_gradients_are_watched[cpu-hooked_in_part]",
    ),
    Fault(
        "hooks-on-arguments-are-lost",
        "marks.call_sites:history_used",
        "_torch.num_watching(leaf)",
        "False",
        "test_functions_gradients.py::test_arguments_that_a_later_call_watches[cpu-hooked_in_part]",
    ),
    Fault(
        "captures-lose-hooks-on-arguments",
        "marks.call_sites:history_used",
        "_torch.num_watching(leaf)",
        "False",
        "test_capture_gradients.py::test_gradients_of_arguments_that_go_elsewhere[cpu]",
    ),
    Fault(
        "captures-lose-gradients-of-kept-arguments",
        "marks.call_sites:history_used",
        "_torch.watch_accumulation(leaf, later)",
        "None",
        "test_capture_gradients.py::test_gradients_of_arguments_that_go_elsewhere[cpu]",
    ),
    Fault(
        "hooks-on-views-of-arguments-are-lost",
        "marks.results:_Taker._alias",
        "_torch.num_watching(tensor)",
        "False",
        "test_functions_gradients.py::test_arguments_that_a_later_call_watches[cpu-hooked_view]",
    ),
    Fault(
        "gradients-of-kept-arguments-are-lost",
        "marks.call_sites:history_used",
        "_torch.watch_accumulation(leaf, later)",
        "None",
        "test_functions_gradients.py::test_arguments_that_are_differentiated_elsewhere[cpu-0-kept]",
    ),
    Fault(
        "what-cannot-be-held-is-an-error-for-ever",
        "marks.call_sites:Site._take",
        "self.mark.fake is None",
        "False",
        "test_functions_gradients.py::test_arguments_that_a_later_call_watches[cpu-hooked_view]",
    ),
    Fault(
        "hooks-stay-wrapped",
        "_torch.autograd:_spare",
        "hooks[key] = hook",
        "None",
        "test_training.py::test_hooks_are_left_as_they_were[cpu]",
    ),
    Fault(
        "hooks-stay-wrapped-behind-an-error",
        "_torch.autograd:_spare",
        "hook.backward == backward",
        "True",
        "test_training.py::test_hooks_behind_a_backward_that_raises[cpu]",
    ),
    Fault(
        "hooks-see-a-part-of-a-results-gradient",
        "_torch.autograd:_Hooks.__setitem__",
        "self.hear()",
        "None",
        "test_training.py::test_gradients_of_results_that_others_are_computed_from[cpu-hooked]",
    ),
    Fault(
        "a-part-of-a-results-gradient-is-retained",
        "calling.training:_Captured.backward",
        "result.retains_grad",
        "False",
        "test_training.py::test_gradients_of_results_that_others_are_computed_from[cpu-retained]",
    ),
    Fault(
        "hooks-of-results-are-called-with-none",
        "_torch.autograd:_call_with_gradient",
        "None if grad is None else hook(grad)",
        "hook(grad)",
        "test_training.py::test_hooks_of_results_without_a_gradient[cpu]",
    ),
    Fault(
        "hooks-for-several-gradients-wait-for-ever",
        "_torch.autograd:_counts_its_calls",
        "code.co_filename == torch.autograd.graph.__file__",
        "False",
        "test_training.py::test_hooks_for_several_gradients[cpu]",
    ),
    Fault(
        "a-sum-of-the-users-counts-as-autograds",
        "_torch.autograd:adds_gradients",
        "bool(node.meta.get('is_gradient_acc'))",
        "True",
        "test_training.py::test_a_gradient_of_two_functions_that_one_leaves_out[cpu]",
    ),
    Fault(
        "what-stands-for-a-missing-gradient-changes-a-sign",
        "marks.saved_for_backward:nothing_like",
        "torch.full_like(leaf, -0.0)",
        "torch.zeros_like(leaf)",
        "test_training.py::test_nothing_changes_no_bit[cpu]",
    ),
    Fault(
        "what-is-saved-lies-in-the-shared-pool",
        "recordings.specialised:Plan.apart",
        "self.saved_from is not None or not self.fresh_outputs",
        "not self.fresh_outputs",
        "test_training.py::test_inference_between_forward_and_backward[cpu]",
    ),
    Fault(
        "each-slot-warms-up-its-backward",
        "calling.slots:BackwardExecutor.new_entry",
        "entry.warmed_up or warm",
        "entry.warmed_up",
        "test_training.py::test_the_first_slot_warms_up_for_all[cpu]",
    ),
    Fault(
        "a-slot-is-free-while-its-forward-is-pending",
        "calling.slots:ForwardExecutor._free",
        "ref is None or ref.expired()",
        "True",
        "test_training.py::test_two_forwards_pending[cpu-order0]",
    ),
    Fault(
        "a-backward-leaves-the-thread-of-the-capture",
        "capturing.capture:_OngoingCapture.open",
        "torch.autograd.set_multithreading_enabled(False)",
        "torch.autograd.set_multithreading_enabled(True)",
        "test_capture_gradients.py::test_a_step_of_training[cuda-0.0-sgd]",
        gpu=True,
    ),
    Fault(
        "parameters-are-first-used-in-an-eager-step",
        "capturing.gradients:Reach.of",
        "tuple(map(get_gradient_edge, (*own.values(), *others.values())))",
        "()",
        "test_capture_gradients.py::test_parameters_of_a_module[cuda]",
        gpu=True,
    ),
    Fault(
        "detached-arguments-are-first-used-in-an-eager-step",
        "capturing.gradients:Call.of",
        "tuple(map(get_gradient_edge, inputs))",
        "()",
        "test_capture_gradients.py::test_gradients_of_arguments_that_go_elsewhere[cuda]",
        gpu=True,
    ),
    Fault(
        "eager-graphs-name-their-last-line",
        "compiling.lowering:CannotLower.__init__",
        "source_line(node) if node is not None else ''",
        "''",
        "test_training.py::test_the_line_that_keeps_a_graph_eager[cpu]",
    ),
    Fault(
        "gradients-that-are-gone-stay-gone",
        "capturing.graph:Gradient.put_back",
        "leaf.grad = self.grad",
        "pass",
        "test_capture_gradients.py::test_gradients_between_replays[cpu]",
    ),
    Fault(
        "captured-gradients-stay-where-they-are",
        "capturing.capture:_OngoingCapture._break",
        "isinstance(replayed, gradients.Backward)",
        "False",
        "test_capture_gradients.py::test_gradients_to_inputs[cpu]",
    ),
    Fault(
        "what-a-replay-saved-is-kept",
        "capturing.gradients:Forward.__call__",
        "self.seen(result, inputs) if self.wanted else None",
        "self.seen(result, inputs)",
        "test_capture_gradients.py::test_nothing_is_kept_behind_the_backward[cpu]",
    ),
    Fault(
        "hooks-see-gradients-twice",
        "capturing.gradients:Backward.gradients",
        "_torch.without_hooks(leaves)",
        "torch.no_grad()",
        "test_capture_gradients.py::test_hooks_on_parameters_run_once[cpu]",
    ),
    Fault(
        "missing-gradients-change-a-sign",
        "capturing.gradients:Backward.gradients",
        "nothing_like(leaf)",
        "torch.zeros_like(leaf)",
        "test_capture_gradients.py::test_gradients_that_come_and_go[cpu]",
    ),
    Fault(
        "replayed-gradients-are-not-counted",
        "capturing.gradients:Backward.__call__",
        "came != self.wanted",
        "False",
        "test_capture_gradients.py::test_refused_at_replay[cpu]",
    ),
    Fault(
        "a-masked-value-gets-the-gradient-of-fakes",
        "_torch.autograd:traced_otherwise",
        'name == "MaskedFillBackward1" and node.next_functions[1][0] is not None',
        "False",
        "test_sweep.py::test_gradients_as_eager[cpu-masked_fill]",
    ),
    Fault(
        "an-lstm-on-the-host-is-captured",
        "_torch.autograd:_OTHER_FOR_FAKES_OF_THE_HOST",
        '"MkldnnRnnLayerBackward0"',
        '""',
        "test_training.py::test_recurrent_layers[cpu-LSTM]",
    ),
    Fault(
        "an-average-of-weights-is-taken-for-an-optimizer",
        "errors:optimizer_runs",
        "name == 'step' and file.startswith(folder)",
        "file.startswith(folder)",
        "test_capture.py::test_an_average_of_weights_that_counts_on_the_device",
    ),
    Fault(
        "gradients-of-kernels-are-lost",
        "_torch.autograd:traced_otherwise",
        "name == 'torch::autograd::WarnNotImplemented'",
        "False",
        "test_contract_training.py::test_ops_without_an_autograd_kernel[cpu-False]",
    ),
    Fault(
        "gradients-of-kernels-that-write-are-lost",
        "compiling.halves:_Run.call_function",
        "value.grad_fn is node",
        "False",
        "test_contract_training.py::test_ops_without_an_autograd_kernel[cpu-True]",
    ),
    Fault(
        "gradients-of-elements-elsewhere",
        "compiling.joint_graph:_reaches_absolutely",
        '_root(node.all_input_nodes[0]).op == "placeholder"',
        "False",
        "test_sweep.py::test_gradients_as_eager[cpu-as_strided_copy]",
    ),
    Fault(
        "two-gradients-share-memory",
        "calling.training:Training.gradients",
        "place in backward.entangled",
        "False",
        "test_training.py::test_one_gradient_of_two_inputs[cpu]",
    ),
    Fault(
        "outputs-are-not-looked-at",
        "calling.training:_Captured.forward",
        "forward.checked",
        "()",
        "test_training.py::test_what_was_written_since[cpu]",
    ),
    Fault(
        "what-other-results-need-must-not-be-written",
        "calling.training:_Held.of.written",
        "zip((inputs, results), versions, places, strict=True)",
        "zip((inputs, results), versions, map(range, map(len, versions)), strict=True)",
        "test_training.py::test_what_was_written_for_another_result[cpu]",
    ),
    Fault(
        "what-this-result-needs-may-be-written",
        "calling.training:_Held.of.written",
        "values[place]._version != version[place]",
        "False",
        "test_training.py::test_what_was_written_for_another_result[cpu]",
    ),
    Fault(
        "a-graph-that-is-instantiated-anew-forgets-its-other-copies",
        "drivers.cuda:CudaGraph._renew",
        "(status,) = set_addresses(copy.node, copy.target, copy.source, copy.size, kind)",
        "status = 0",
        "test_refused_copies.py::test_memory_of_another_kind",
    ),
    Fault(
        "a-graph-that-is-instantiated-anew-makes-each-copy",
        "drivers.cuda:CudaGraph._renew",
        "self._enable(copy, False)",
        "pass",
        "test_refused_copies.py::test_memory_of_another_kind",
    ),
    Fault(
        "a-trace-casts-a-weight-at-each-use",
        "_torch.autograd:autocast_cache",
        "torch.set_autocast_cache_enabled(enabled)",
        "pass",
        "test_training.py::test_autocast_of_a_weight_that_is_used_twice[cpu-around]",
    ),
    Fault(
        "nobody-looks-whether-weights-moved",
        "calling.training:_Captured.backward",
        "not _torch.are_at(list(inputs), ctx.pointers, everything)",
        "False",
        "test_training.py::test_other_memory_between_the_two[cpu]",
    ),
    Fault(
        "what-is-written-through-another-argument-is-not-noticed",
        "calling.training:Training.__call__",
        "forward.written and not _count_up(args, forward.written, forward.watched)",
        "forward.written and not _count_up(args, forward.written, ())",
        "test_training.py::test_an_argument_written_through_another[cpu-input]",
    ),
    Fault(
        "formulas-are-captured-as-traced",
        "compiling.halves:Halves._traced",
        "_torch.traced_otherwise(differentiable)",
        "''",
        "test_training.py::test_formulas_that_are_traced_otherwise[cpu-prod]",
    ),
    Fault(
        "a-second-derivative-goes-on",
        "calling.first_backwards:refusal",
        "torch.is_grad_enabled()",
        "False",
        "test_training.py::test_second_derivatives[cpu]",
    ),
    Fault(
        "a-weight-with-another-storage-is-read",
        "calling.training:Training.have_other_storages",
        "place not in before or before[place].cdata != _torch.storage_key(inputs[place])",
        "False",
        "test_training.py::test_other_memory_between_the_two[cpu]",
    ),
    Fault(
        "a-storage-that-was-filled-again-counts-as-another",
        "calling.training:Training.have_other_storages",
        "place not in before or before[place].cdata != _torch.storage_key(inputs[place])",
        "True",
        "test_training.py::test_memory_that_is_freed_between_the_two[cpu]",
    ),
    Fault(
        "one-trace-for-all-sizes",
        "calling.training_by_size:BySize.__call__",
        "[value if type(value) is int else (value.shape, value.stride()) for value in values]",
        "[]",
        "test_training.py::test_sizes_that_vary[cpu-dynamic]",
    ),
    Fault(
        "parts-of-a-subclass-live-as-long-as-a-call",
        "calling.training:_Call._take_inner",
        "whole.inner",
        "self.args[index]",
        "test_training.py::test_frozen_weights_of_a_subclass[cpu-True]",
    ),
    Fault(
        "weights-that-move-are-never-copied",
        "calling.compiled_graph:CompiledGraph._moving",
        "max(map(len, places.values()), default=0) <= eviction.MAX_ADDRESSES",
        "True",
        "test_contract_keys.py::test_static_inputs_at_many_addresses[cpu-read]",
    ),
    Fault(
        "weights-of-other-instances-count-as-moved",
        "calling.compiled_graph:CompiledGraph._moving",
        "tensor is None or tensor is not args[value.index]",
        "tensor is None",
        "test_contract_keys.py::test_many_instances[cpu]",
    ),
    Fault(
        "weights-that-are-freed-and-filled-again-are-counted",
        "calling.compiled_graph:CompiledGraph._moving",
        "storage.cdata == _torch.storage_key(tensor)",
        "False",
        "test_contract_keys.py::test_static_inputs_that_are_freed_and_filled_again[cpu-1]",
    ),
    Fault(
        "weights-that-are-freed-once-in-a-while-are-copied",
        "calling.compiled_graph:CompiledGraph._moving",
        "not of_use",
        "True",
        "test_contract_keys.py::test_static_inputs_that_are_freed_and_filled_again[cpu-4]",
    ),
    Fault(
        "storages-are-known-by-their-address",
        "calling.training:Training.storages",
        "any((ref() is not one for ref, one in zip(known[1], static, strict=True)))",
        "False",
        "test_training.py::test_memory_that_goes_from_one_weight_to_another[cpu]",
    ),
    Fault(
        "nobody-looks-behind-a-backward",
        "calling.first_backwards:_look_behind",
        "not storage.nbytes()",
        "False",
        "test_training.py::test_memory_that_is_freed_between_steps[cpu-True]",
    ),
    Fault(
        "what-a-marked-function-writes-through-another-argument-is-not-noticed",
        "compiling.halves:Halves._joint_of",
        "tuple(sorted({*facts['written'], *written}))",
        "tuple(facts['written'])",
        "test_training.py::test_an_argument_written_through_another[cpu-marked]",
    ),
    Fault(
        "a-parameter-that-was-unfrozen-unnoticed-gets-no-gradient",
        "calling.training:Training._changed",
        "args[index].requires_grad is not inputs[index][1] or not inputs[index][0].accepts(args[index])",
        "not inputs[index][0].accepts(args[index])",
        "test_training.py::test_parameters_that_dynamo_does_not_look_at[cpu-unfrozen]",
    ),
    Fault(
        "a-graph-that-counts-in-a-buffer-is-eager",
        "compiling.joint_graph:aliases_in",
        "node in arguments or (node in outputs and outputs[node] != index)",
        "node in outputs and outputs[node] != index",
        "test_training.py::test_outputs_that_share_memory[cpu]",
    ),
    Fault(
        "a-detached-result-counts-its-own-writes",
        "compiling.joint_graph:Alias.made",
        "self.views((args if self.of_argument else results)[self.source])",
        "self.views((args if self.of_argument else results)[self.source].data)",
        "test_training.py::test_outputs_that_share_memory[cpu]",
    ),
    Fault(
        "a-break-that-was-put-off-has-no-reason",
        "_torch.dynamo:graph_breaks",
        "first = delayed[1]",
        "pass",
        "test_advice.py::test_a_break_that_was_put_off",
    ),
    Fault(
        "torchvision-passes-for-torch",
        "_torch.dynamo",
        'os.path.join(path, "")',
        "str(path)",
        "test_advice.py::test_a_break_in_a_package_whose_name_begins_with_torch",
        anew=True,
    ),
    Fault(
        "a-detach-is-traced-as-an-alias",
        "_torch.autograd:trace_joint",
        "make_fx(function, decomposition_table={}, record_module_stack=True)",
        "make_fx(function, record_module_stack=True)",
        "test_training.py::test_outputs_that_share_memory[cpu]",
        since="2.15",
    ),
    Fault(
        "a-backward-is-kept-for-each-set-of-results",
        "calling.training:Training._traced",
        "self._leave(TOO_MANY_ABSENT if absent else TOO_MANY_PATTERNS)",
        "pass",
        "test_training.py::test_too_many_patterns[cpu]",
    ),
    Fault(
        "gradients-that-cannot-be-traced-are-an-error-each-time",
        "calling.training:Training._traced",
        "self._leave(f'it needs gradients, and some came in that it was not traced for: {why}')",
        "pass",
        "test_training.py::test_gradients_that_cannot_be_traced[cpu]",
    ),
    Fault(
        "a-gradient-is-placed-as-in-the-last-trace",
        "calling.training:Training.gradients",
        "zip(made, backward.wholes, strict=True)",
        "zip(made, self.halves._wholes(), strict=True)",
        "test_training.py::test_gradients_that_are_placed_otherwise_by_result[cpu]",
    ),
    Fault(
        "a-second-forward-draws-what-another-thread-left",
        "calling.training:Training._drawing_again",
        "not drawn.after.are_current()",
        "False",
        "test_training.py::test_a_second_forward_where_somebody_else_drew[cpu]",
    ),
    Fault(
        "a-write-to-a-subclass-is-not-noticed",
        "calling.training:_Call._take_inner",
        "index in forward.inputs",
        "False",
        "test_ranks.py::test_gradients_that_are_placed_otherwise[cpu]",
    ),
    Fault(
        "a-gradient-of-a-subclass-is-placed-like-its-weight",
        "compiling.flat_inputs:_Apart.backward",
        "plain[0].gradient_of.made(iter(plain))",
        "what.made(iter(plain))",
        "test_ranks.py::test_gradients_that_are_placed_otherwise[cpu]",
    ),
    Fault(
        "one-trace-for-all-floats",
        "calling.training_by_size:BySize.__call__",
        "[scalar_bytes(args[index]) for index in self._floats]",
        "[args[index].item() for index in self._floats]",  # -0.0 is 0.0
        "test_training.py::test_floats_that_vary[cpu]",
    ),
    Fault(
        "one-site-for-all-sizes",
        "compiling.halves:Halves.at",
        "twins.get(site) or site.twin()",
        "site",
        "test_training.py::test_sizes_that_vary[cpu-dynamic]",
    ),
    Fault(
        "results-of-two-dtypes-in-one-copy",
        "recordings.replay:_Writer._epilogue",
        "self._source(call).dtype if copies else len(groups)",
        "0",
        "test_replay.py::test_many_results_are_copied_together",
    ),
    Fault(
        "what-may-draw-is-computed-again",
        "compiling.halves:Halves._traced",
        "is_unknown(node.target)",
        "False",
        "test_training.py::test_graphs_inside[cpu-may draw]",
    ),
    Fault(
        "binding-gives-up-on-what-learns",
        "calling.bound:_why_never",
        "found_by(_torch.subjects_of(compiled), learning())",
        "()",
        "test_bound.py::test_binding_learns[cpu]",
    ),
    Fault(
        "dynamo-compiles-what-a-backward-calls",
        "_torch.as_python:hide_from_dynamo",
        "frames.set_code_exec_strategy(code, strategy)",
        "pass",
        "test_training.py::test_a_step_that_is_compiled_whole[cpu]",
        anew=True,
    ),
    Fault(
        "second-derivatives-of-marked-functions-are-lost",
        "_torch.autograd:once_differentiable",
        "leaves_behind([ctx])",
        "()",
        "test_functions_gradients.py::test_second_derivatives_are_an_error[cpu-autograd]",
    ),
    Fault(
        "a-second-forward-calls-ops-of-others",
        "compiling.forward_and_backward:_second_run",
        "any((is_unknown(node.target) for node in calls))",
        "False",
        "test_training.py::test_a_backward_that_eager_alone_can_run[cpu-calls-batches]",
    ),
    Fault(
        "a-second-forward-reads-what-the-first-has-written",
        "compiling.forward_and_backward:_second_run",
        "not depending.isdisjoint(results)",
        "False",
        "test_training.py::test_a_backward_that_eager_alone_can_run[cpu-writes-batches]",
    ),
    Fault(
        "a-second-forward-writes-statistics-again",
        "calling.training:Training.gradients_of_eager",
        "args.update({index: clone_exact(args[index]) for index in forward.copied})",
        "pass",
        "test_training.py::test_a_second_forward_with_statistics[cpu-function-batches]",
    ),
    Fault(
        "a-second-forward-takes-statistics-for-values",
        "compiling.forward_and_backward:_second_run",
        "_updated(node) if schema_name(node) in BATCH_NORMS else ()",
        "()",
        "test_training.py::test_a_second_forward_with_statistics[cpu-module-batches]",
    ),
    Fault(
        "a-batch-norm-that-does-not-train-writes",
        "compiling.forward_and_backward:_updated",
        "[] if reads else written_arguments(node)",
        "written_arguments(node)",
        "test_training.py::test_a_backward_that_eager_alone_can_run[cpu-reads-batches]",
    ),
    Fault(
        "a-second-forward-draws-under-vmap",
        "calling.training:Training.gradients_of_eager",
        "_torch.outside_of_vmap()",
        "nullcontext()",
        "test_training.py::test_a_second_forward_that_draws[cpu-batches]",
    ),
    Fault(
        "gradients-that-are-left-out-later-fail-for-ever",
        "calling.training:Training.gradients",
        "self._leave(f'it needs gradients, and {error.what}')",
        "None",
        "test_training.py::test_a_backward_that_gives_no_gradient_at_last[cpu]",
    ),
    Fault(
        "gradients-are-static",
        "calling.slots:HalfExecutor.plan",
        "replace(super().plan(), fresh_outputs=True)",
        "super().plan()",
        "test_training.py::test_gradients_are_fresh[cpu]",
    ),
    Fault(
        "too-little-memory-is-not-noticed",
        "calling.slots:HalfExecutor.record",
        "self.driver.has_room(needed(self.program, SpecialisedProgram.of(self.program, args).symbols))",
        "True",
        "test_training.py::test_too_little_memory[cpu]",
    ),
    Fault(
        "backwards-in-parts-are-not-noticed",
        "calling.first_backwards:_look",
        "looked.backward not in (None, backward)",
        "False",
        "test_training.py::test_results_that_are_run_backward_in_parts[cpu]",
    ),
    Fault(
        "a-second-forward-draws-anew",
        "calling.training:Training._drawing_again",
        "drawn.before.restore()",
        "None",
        "test_training.py::test_a_second_forward_that_draws[cpu-autocast]",
    ),
    Fault(
        "a-second-forward-moves-the-generator",
        "calling.training:Training._drawing_again",
        "now.restore()",
        "None",
        "test_training.py::test_a_second_forward_that_draws[cpu-autocast]",
    ),
    Fault(
        "a-graph-that-is-differentiated-twice-stays-captured",
        "calling.training:Training.gradients_of_eager",
        "again and not self.for_good",
        "False",
        "test_training.py::test_a_second_derivative_of_what_was_captured[cpu-leaf]",
    ),
    Fault(
        "a-second-forward-of-written-arguments",
        "calling.training:Training.gradients_of_eager",
        "args[index]._version != version and index not in forward.copied",
        "args[index] is None",
        "test_training.py::test_a_second_forward_whose_argument_was_written[cpu]",
    ),
    Fault(
        "a-second-forward-of-what-was-made-in-inference-mode",
        "calling.training:Training.gradients_of_eager",
        "version is None",
        "False",
        "test_training.py::test_an_argument_made_in_inference_mode[cpu]",
    ),
    Fault(
        "a-second-forward-of-other-memory",
        "calling.training:Training.gradients_of_eager",
        "args[index].data_ptr() != pointer",
        "False",
        "test_training.py::test_a_second_forward_whose_argument_has_other_memory[cpu]",
    ),
    Fault(
        "only-the-last-forward-is-looked-at",
        "calling.training:Training._learn",
        "seen is None",
        "True",
        "test_training.py::test_each_backward_behind_the_next_forward[cpu]",
    ),
    Fault(
        "an-empty-value-tells-a-plain-forward",
        "calling.slots:Lease.of",
        "constant.numel()",
        "True",
        "test_training.py::test_a_plain_forward_behind_captured_ones[cpu]",
    ),
    Fault(
        "graphs-inside-lose-their-marks",
        "compiling.halves:_Run.get_attr",
        "_Body(value)",
        "value",
        "test_training.py::test_graphs_inside[cpu-marked inside]",
    ),
    Fault(
        "what-was-saved-is-not-compared",
        "calling.training:_Captured.backward",
        "ctx.check is not None",
        "False",
        "test_training.py::test_compare_sees_what_is_saved[cpu]",
    ),
    Fault(
        "bridges-are-filled-on-the-capture-stream",
        "drivers.cuda:CudaDriver.allocating",
        "_torch.memory_as_it_is()",
        "torch.cuda.device(self.device)",
        "test_cuda.py::test_memory_between_captures_is_not_filled",
        gpu=True,
    ),
    # --- somebody else's captures ---
    Fault(
        "an-event-of-ours-in-a-foreign-capture",
        "drivers.ordering:Order.mark",
        "(self.several or stream != self.last) and is_captured(stream)",
        "False",
        "test_ordering.py::test_a_capture_of_the_last_stream_gets_no_event",
    ),
    Fault(
        "a-foreign-capture-waits-for-us",
        "drivers.ordering:Order.follow",
        "is_captured(stream)",
        "False",
        "test_ordering.py::test_work_in_somebody_elses_capture_is_in_no_order",
    ),
    Fault(
        "a-foreign-capture-holds-a-replay",
        "capturing.graph:BreakableCUDAGraph.replay",
        "captured.asks",
        "captured.breaks",
        "test_capture_hostile.py::test_no_foreign_capture_holds_a_replay[cpu-draws]",
    ),
    # --- marks ---
    Fault(
        "marks-that-meet-nothing-are-not-told",
        "marks.marking:Marks.unmet",
        "marked = self._missing(_marked - met, _marked_functions)",
        "marked: set[str] = set()",
        "test_contract_reasons.py::test_marks_without_effect_are_told[cpu]",
    ),
    Fault(
        "the-stream-of-captures-stays-current",
        "capturing.capture:_OngoingCapture.open",
        "stack.callback(_back_on, torch.cuda.current_stream(self.driver.device))",
        "pass",
        "test_capture.py::test_break_on_a_side_stream",
        gpu=True,
    ),
    # --- faults of the package ---
    Fault(
        "faults-in-a-call-are-nobodys",
        "calling.executor:Executor.__call__",
        "raise_if_ours(error, log)",
        "pass",
        "test_internal_errors.py::test_a_fault_in_a_call[cpu-check_places-2]",
    ),
    Fault(
        "what-has-no-frame-is-ours",
        "internal_errors:is_ours",
        "dis.opname[frame.f_code.co_code[instruction]] != calls_others",
        "dis.opname[frame.f_code.co_code[instruction]] != ''",
        "test_internal_errors.py::test_errors_of_functions_without_a_frame[cpu]",
    ),
    # --- what dies ---
    Fault(
        "the-host-waits-for-what-dies",
        "calling.compiled_graph:CompiledGraph._guards.drop",
        "graph._drop_set(addresses, 'a static input had died', wait=False)",
        "graph._drop_set(addresses, 'a static input had died')",
        "test_executor.py::test_a_death_does_not_wait[tape]",
    ),
    Fault(
        "what-dies-keeps-its-pool",
        "drivers.cuda:CudaDriver.settle",
        "self.release(())",
        "pass",
        "test_leaving.py::test_the_last_that_dies_takes_the_pool_along",
    ),
    Fault(
        "a-pool-goes-in-the-middle-of-a-call",
        "drivers.cuda:CudaDriver.settle",
        "not (self.busy or self._recordings) and self._live <= leaving",
        "self._live <= leaving",
        "test_leaving.py::test_the_pool_stays_in_a_call[busy]",
    ),
    # --- lifetimes ---
    Fault(
        "aliases-are-told-by-their-storage",
        "recordings.locations:Locations._behind",
        "memory.data_ptr() <= address < memory.data_ptr() + memory.nbytes()",
        "memory._cdata == tensor.untyped_storage()._cdata",
        "test_lifetimes.py::test_a_value_lives_until_its_last_reader[cpu-over_the_same-fresh]",
    ),
    Fault(
        "a-pool-is-never-outgrown",
        "calling.compiled_graph:CompiledGraph._make_way",
        "not driver.pool_size.holds(need)",
        "False",
        "test_lifetimes.py::test_smaller_keys_move_to_the_pool_of_a_larger_one[cpu-ascending]",
    ),
    Fault(
        "every-key-has-a-pool-to-itself",
        "drivers.pool_size:PoolSize.holds",
        "need <= self.largest or self.outgrown + self.largest <= max(SPARE, int(WASTE * need))",
        "self.outgrown + self.largest <= max(SPARE, int(WASTE * need))",
        "test_lifetimes.py::test_smaller_keys_move_to_the_pool_of_a_larger_one[cpu-descending]",
    ),
    Fault(
        "the-largest-is-forgotten",
        "drivers.pool_size:PoolSize.having",
        "self if need <= self.largest else PoolSize(need, self.outgrown + self.largest)",
        "PoolSize(need, self.outgrown + self.largest)",
        "test_pool_size.py::test_a_smaller_recording_finds_room",
    ),
    Fault(
        "an-empty-pool-has-room",
        "drivers.device:OpByOpDriver.release",
        "self.pool_size = PoolSize()",
        "pass",
        "test_lifetimes.py::test_an_empty_pool_has_no_room[cpu]",
    ),
    Fault(
        "nothing-is-spared",
        "drivers.pool_size:PoolSize.holds",
        "max(SPARE, int(WASTE * need))",
        "int(WASTE * need)",
        "test_lifetimes.py::test_what_is_spared_makes_no_move[cpu]",
    ),
    Fault(
        "bridges-take-no-memory",
        "ir.last_uses:needed",
        "alive.update(((name, _bytes(inputs[name], symbols)) for name in segment.inputs if name in inputs))",
        "pass",
        "test_lifetimes.py::test_what_is_needed_at_once[cpu]",
    ),
    Fault(
        "what-was-a-large-input-is-measured",
        "tools.measure:_kept_arguments",
        "clone_exact(bridge.tensor) if kept else Bridge.zeros(bridge.tensor).tensor",
        "clone_exact(bridge.tensor)",
        "test_measure.py::test_large_inputs_are_not_kept[cpu]",
    ),
    Fault(
        "measuring-writes-what-a-forward-saved",
        "tools.measure:_written",
        "recording.saved if slots is not None and slots.pending else ()",
        "()",
        "test_measure.py::test_a_pending_forward[cpu-False]",
    ),
    Fault(
        "expanded-arguments-are-measured-dense",
        "tools.measure:_kept_arguments",
        "clone_exact(bridge.tensor)",
        "bridge.tensor.clone()",
        "test_measure.py::test_a_pending_forward[cpu-False]",
    ),
    Fault(
        "a-pool-dies-before-a-pending-forward",
        "drivers.cuda:CudaDriver._drop_keeper",
        "self._kept is not None",
        "False",
        "test_training.py::test_a_pending_forward_outlives_its_recording[cuda]",
        gpu=True,
    ),
    Fault(
        "memory-of-pools-counts-as-room",
        "drivers.cuda:CudaDriver.has_room",
        "tuple(s['segment_pool_id']) == (0, 0)",
        "True",
        "test_training.py::test_free_memory_of_a_pool_is_no_room",
        gpu=True,
    ),
    Fault(
        "a-result-leaves-before-its-last-writer",
        "recordings.large_results:_by_last_toucher",
        "last[makers[storage]] = node",
        "pass",
        "test_large_results.py::test_results_that_leave_by_themselves[cpu-written_through_a_view-2]",
    ),
    Fault(
        "a-result-leaves-before-a-later-graph-reads-it",
        "recordings.large_results:LargeResults.__init__",
        "name in ended and name in returned",
        "name in returned",
        "test_large_results.py::test_results_that_leave_by_themselves[cpu-read_by_a_later_graph-1]",
    ),
    Fault(
        "a-part-leaves-as-the-whole",
        "recordings.large_results:LargeResults.take",
        "value.untyped_storage().nbytes() == target.untyped_storage().nbytes()",
        "True",
        "test_large_results.py::test_results_that_leave_by_themselves[cpu-the_first_part-0]",
    ),
    Fault(
        "one-of-two-views-leaves-alone",
        "recordings.large_results:_returned",
        "len(leaves) == 1",
        "True",
        "test_large_results.py::test_results_that_leave_by_themselves[cpu-in_one_storage-0]",
    ),
    Fault(
        "results-are-copied-where-the-last-ones-lie",
        "recordings.replay:_Writer._out",
        "f'    {outlet}.lead({name}.data_ptr())'",
        "'    pass'",
        "test_large_results.py::test_results_that_leave_by_themselves[cpu-plain-1]",
    ),
    Fault(
        "what-compare-mode-reads-leaves",
        "recordings.large_results:LargeResults.__init__",
        "plan.fresh_outputs and (not locations.keep)",
        "plan.fresh_outputs",
        "test_large_results.py::test_compare_mode_lets_nothing_out[cpu]",
    ),
    Fault(
        "a-value-goes-before-its-last-reader",
        "recordings.locations:Locations.retire",
        "self.lives.ends.get(position, ())",
        "self.lives.ends.get(position + 1, ())",
        "test_lifetimes.py::test_a_value_lives_until_its_last_reader[cpu-crosses-2-fresh]",
    ),
    Fault(
        "a-written-value-goes-before-its-last-reader",
        "ir.last_uses:Lifetimes.of",
        "(*segment.inputs, *segment.outputs)",
        "segment.outputs",
        "test_lifetimes.py::test_a_value_lives_until_its_last_reader[cpu-written_in_between-fresh]",
    ),
    Fault(
        "what-is-returned-goes-too",
        "recordings.locations:Locations.retire",
        """
        if name not in self.lives.returned:
            self._give_up(name)
            self.values.pop(name, None)
            self.read_from.pop(name, None)
        """,
        """
        if True:
            self._give_up(name)
            self.values.pop(name, None)
            self.read_from.pop(name, None)
        """,
        "test_lifetimes.py::test_a_value_lives_until_its_last_reader[cpu-returned_early-fresh]",
    ),
    Fault(
        "an-inputs-bridge-goes-before-its-last-reader",
        "recordings.locations:Locations.retire",
        "self.lives.unloaded.get(position, ())",
        "self.lives.unloaded.get(position + 2, ())",
        "test_lifetimes.py::test_a_value_lives_until_its_last_reader[cpu-an_input_twice-fresh]",
    ),
    Fault(
        "a-written-bridge-goes-before-the-result",
        "recordings.locations:Locations.retire",
        "name not in self.lives.returned or name in self.intact",
        "True",
        "test_lifetimes.py::test_a_value_lives_until_its_last_reader[cpu-a_bridge_that_was_written-fresh]",
    ),
    Fault(
        "a-bridge-goes-before-the-backward",
        "recordings.locations:Locations.retire",
        "name not in self.saved and (name not in self.lives.returned or name in self.intact)",
        "name not in self.lives.returned or name in self.intact",
        "test_lifetimes.py::test_a_bridge_that_a_backward_reads_lives[cpu]",
    ),
    Fault(
        "bridges-of-small-inputs-go",
        "recordings.locations:Locations._made_bridge",
        "self._is_kept(name) or small or value.numel() == 0",
        "self._is_kept(name) or value.numel() == 0",
        "test_report.py::test_text",
    ),
    Fault(
        "bridges-of-inputs-wait-for-eager-steps",
        "ir.last_uses:Lifetimes.of",
        "isinstance(segment, GraphSegment)",
        "True",
        "test_lifetimes.py::test_the_bridge_of_an_input_goes_with_its_last_captured_reader[cpu]",
    ),
    Fault(
        "what-is-held-last-counts",
        "recordings.locations:Locations.captured",
        "self.most.or_more(Held.by(self.owners.values()))",
        "Held.by(self.owners.values())",
        "test_lifetimes.py::test_what_is_needed_at_once[cpu]",
    ),
    Fault(
        "what-an-eager-step-hands-back-goes",
        "recordings.locations:Locations._give_up",
        "variable not in self._pinned",
        "True",
        "test_lifetimes.py::test_a_value_lives_until_its_last_reader[cpu-handed_back-fresh]",
    ),
    Fault(
        "what-a-segment-hands-back-goes",
        "recordings.locations:Locations.inside",
        "self.owners.get(place.name, self.values[place.name])",
        "self.values[place.name]",
        "test_lifetimes.py::test_a_value_lives_until_its_last_reader[cpu-echoed-fresh]",
    ),
    Fault(
        "a-bridge-that-a-segment-hands-back-goes",
        "recordings.locations:Locations.inside",
        "self.owners.get(bridge, self.values[bridge])",
        "self.values[bridge]",
        "test_lifetimes.py::test_a_value_lives_until_its_last_reader[cpu-echoed_bridge-fresh]",
    ),
    Fault(
        "static-results-go",
        "recordings.locations:Locations._is_kept",
        "self.static and name in self.lives.returned",
        "False",
        "test_lifetimes.py::test_static_results_are_held[cpu]",
    ),
    Fault(
        "static-results-hold-everything",
        "recordings.locations:Locations._is_kept",
        "self.static and name in self.lives.returned",
        "self.static",
        "test_lifetimes.py::test_memory_does_not_grow_with_breaks[cpu-chain-static]",
    ),
    Fault(
        "static-results-in-the-memory-of-others",
        "recordings.specialised:Plan.apart",
        "self.saved_from is not None or not self.fresh_outputs",
        "self.saved_from is not None",
        "test_lifetimes.py::test_a_static_result_is_in_nobody_elses_memory[fresh-late_step]",
        gpu=True,
    ),
    Fault(
        "static-results-are-read-late",
        "recordings.recorder:_Recorder._capture",
        "(*segment.inputs, *self._early())",
        "segment.inputs",
        "test_lifetimes.py::test_static_results_fed_back_to_a_late_reader[cpu]",
    ),
    Fault(
        "nothing-goes",
        "recordings.locations:Locations._give_up",
        "self.owners.pop(variable, None)",
        "pass",
        "test_lifetimes.py::test_memory_does_not_grow_with_breaks[cpu-chain-fresh]",
    ),
    Fault(
        "eager-steps-hold-memory",
        "recordings.locations:Locations.captured",
        "geometry.on(place)",
        "geometry.on(owner)",
        "test_lifetimes.py::test_nothing_is_held_between_calls[cpu-read_by_eager_steps]",
    ),
    Fault(
        "a-recording-holds-results-of-eager-steps",
        "recordings.recorder:_Recorder._capture",
        "del values[copy.value.name]",
        "pass",
        "test_lifetimes.py::test_results_of_eager_steps_go_during_a_recording[cpu]",
    ),
    Fault(
        "a-recording-holds-results-inside-of-an-eager-step",
        "recordings.recorder:_Recorder.eager",
        "del local[name]",
        "pass",
        "test_lifetimes.py::test_results_of_eager_steps_go_during_a_recording[cpu]",
    ),
    Fault(
        "compare-mode-looks-at-what-is-gone",
        "tools.compare:Compare",
        "True",
        "False",
        "test_lifetimes.py::test_compare_mode_keeps_everything[cpu]",
    ),
    Fault(
        "the-tape-spoils-nothing",
        "drivers.tape:TapeGraph.run",
        "lent.spoil()",
        "pass",
        "test_driver_contract.py::test_what_nobody_holds_is_overwritten",
    ),
    Fault(
        "the-tape-spoils-what-is-held",
        "drivers.tape:TapeDriver.free",
        "(lent for lent in self._lent.values() if not lent.is_held)",
        "(lent for lent in self._lent.values())",
        "test_driver_contract.py::test_lent_memory_is_somebodys[tape]",
    ),
    Fault(
        "the-tape-frees-what-it-lent",
        "drivers.tape:TapeDriver.lend",
        "self._given.append(storage)",
        "pass",
        "test_driver_contract.py::test_memory_between_captures_is_the_next_graphs",
    ),
    # --- the device is lost ---
    Fault(
        "a-release-raises-where-the-device-is-lost",
        "drivers.eager:EagerDriver.release",
        """
        with suppress(torch.AcceleratorError):
            if self._done is not None and (not self.is_capturing()):
                self._done.synchronize()
        """,
        """
        if True:
            if self._done is not None and (not self.is_capturing()):
                self._done.synchronize()
        """,
        "test_debug_eager.py::test_a_lost_device_is_no_error_of_a_release",
    ),
    # --- compile time ---
    Fault(
        "segments-get-code-at-once",
        "compiling.partition:_Draft.module",
        "_torch.lazy_module",
        "fx.GraphModule",
        "test_partition.py::test_segments_have_no_code_before_they_are_recorded",
    ),
    # --- imports ---
    Fault(
        "dynamo-compiles-what-a-break-calls",
        "_torch.dynamo:break_of_dynamo.around",
        "frames.set_code_exec_strategy(told.__code__, skip)",
        "assert skip",
        "test_capture.py::test_a_bare_break_in_compiled_code",
        anew=True,
    ),
    Fault(
        "the-import-brings-sympy",
        "ir.layout",
        """
        if TYPE_CHECKING:
            import sympy
        """,
        "import sympy",
        "test_public_api.py::test_an_import_brings_no_compiler",
    ),
    Fault(
        "errors-are-not-of-dynamos",
        "_torch.exceptions:_passed_on_by_dynamo",
        "CompileTimeError.__bases__ = (ShortenTraceback,)",
        "assert ShortenTraceback",
        "test_public_api.py::test_errors_pass_through_dynamo_whenever_it_was_imported",
        anew=True,
    ),
    # --- plain calls ---
    Fault(
        "plain-calls-go-through-the-graph-each-time",
        "calling.compiled_graph:CompiledGraph.plain_function",
        "self._plain_function = self.watched_function(None)",
        "return self.watched_function(None)",
        "test_plain.py::test_written_once[cpu]",
    ),
    Fault(
        "plain-calls-look-at-no-result-where-sizes-vary",
        "recordings.plain:_Graph._calls",
        "self.sources.keys() >= set(symbols)",
        "not symbols",
        "test_plain.py::test_wrong_layout_where_sizes_vary[cpu]",
    ),
    Fault(
        "plain-calls-draw-without-their-turn",
        "recordings.plain:_Graph._calls",
        "draws(node.target)",
        "not node",
        "test_plain.py::test_draws_have_their_turn_and_eager_steps_do_not[cpu]",
    ),
    Fault(
        "sources-of-plain-functions-stay",
        "recordings.generated_code:defined",
        "weakref.finalize(function, linecache.cache.pop, where, None).atexit = False",
        "pass",
        "test_plain.py::test_source_goes_with_what_was_compiled[cpu]",
    ),
    # --- bound calls ---
    Fault(
        "a-bound-call-takes-parameters-that-moved",
        "calling.bound:_Graph.checked.checked",
        "static and (not are_at(args, addresses, static))",
        "False",
        "test_bound.py::test_parameters_that_move[cpu-inputs-moves_data]",
    ),
    Fault(
        "a-bound-call-takes-the-last-addresses-for-its-own",
        "calling.bound:_Graph.checked.checked",
        "last if last is not None and last.pointers == addresses else None",
        "last",
        "test_bound.py::test_written_inputs[cpu-inputs]",
    ),
    Fault(
        "a-bound-call-takes-tensors-of-another-kind",
        "calling.bound:_Graph.checked.checked",
        "found and (not like(*tensors(handed)))",
        "False",
        "test_bound.py::test_tensors_that_are_no_arguments[cpu]",
    ),
    Fault(
        "a-bound-call-does-not-look-at-modes",
        "calling.bound:_State.__init__",
        "'settings()'",
        "'True'",
        "test_bound.py::test_state_around_it[cpu-gradients]",
    ),
    Fault(
        "a-bound-call-does-not-look-at-training",
        "calling.bound:_State.__init__",
        "[('list(map(training_of, modules)) == training', OTHER_TRAINING)] if modules else ()",
        "()",
        "test_bound.py::test_state_around_it[cpu-training]",
    ),
    Fault(
        "bound-values-are-compared-without-their-types",
        "calling.inputs:_source",
        "f'if type({name}) is not {constant(like.kind)} or {name} != {constant(like.value)}: return False'",
        "f'if {name} != {constant(like.value)}: return False'",
        "test_bound.py::test_misfits[cpu-an int that is a bool]",
    ),
    Fault(
        "bound-arguments-need-not-be-one-tensor",
        "calling.inputs:_source",
        "yield f'if {name} is not {places[like.number]}: return False'",
        "pass",
        "test_bound.py::test_one_tensor_for_two_arguments[cpu]",
    ),
    Fault(
        "code-around-a-compiled-function-is-left-out",
        "calling.bound:_bound",
        "not _torch.passes_on(around)",
        "False",
        "test_bound.py::test_code_around_a_compiled_function[cpu]",
    ),
    Fault(
        "a-bound-call-leaves-its-graph-behind",
        "_torch.frames:unguarded",
        "weakref.finalize(result, _take_out, function.__globals__, tuple(added)).atexit = False",
        "pass",
        "test_bound.py::test_the_model_goes[cpu]",
    ),
    Fault(
        "code-that-changes-objects-is-left-out",
        "calling.bound:_fast_path",
        "(run := entry.function) is None or lean.tensors or moves or (not fast_path.is_pure(binding.code))",
        "(run := entry.function) is None or lean.tensors or moves",
        "test_bound.py::test_what_needs_dynamos_code[cpu]",
    ),
    Fault(
        "parameters-of-eager-steps-are-left-out",
        "calling.fast_path:generate",
        "any((names_at[at] in named for at in static))",
        "False",
        "test_bound.py::test_what_needs_dynamos_code[cpu]",
    ),
    Fault(
        "addresses-are-not-looked-at",
        "calling.fast_path:look.same",
        "all(map(is_same, modules, children)) and are_at(found, addresses, places)",
        "all(map(is_same, modules, children))",
        "test_bound.py::test_parameters_that_move[cpu-inputs-moves_data]",
    ),
    Fault(
        "children-are-not-looked-at",
        "calling.fast_path:look.same",
        "all(map(is_same, modules, children)) and are_at(found, addresses, places)",
        "are_at(found, addresses, places)",
        "test_bound.py::test_parameters_that_move[cpu-inputs-replaces]",
    ),
    Fault(
        "what-is-bound-looks-idle",
        "calling.executor:Executor._locked",
        "keys.touch(entry, addresses, now)",
        "run is not None or keys.touch(entry, addresses, now)",
        "test_bound.py::test_what_is_bound_is_in_use[cpu]",
    ),
    Fault(
        "freed-memory-is-not-heard-of",
        "calling.fast_path:Memory.__init__",
        "(t, t.untyped_storage())",
        "(t,)",
        "test_bound.py::test_memory_that_goes_is_noticed[cpu-moves_data]",
    ),
    # --- forks ---
    Fault(
        "a-child-waits-for-locks-of-threads-that-it-lacks",
        "locks:_forked",
        "held._at_fork_reinit()",
        "pass",
        "test_concurrency.py::test_a_forked_child[in a replay]",
        anew=True,
    ),
    Fault(
        "a-child-is-in-its-parents-call",
        "drivers.device:DeviceDriver._forked",
        "not locks.is_ours(self.lock)",
        "False",
        "test_concurrency.py::test_a_forked_child[in a replay]",
        anew=True,
    ),
    Fault(
        "a-child-never-collects",
        "drivers.collector:_in_child",
        """
        if _holders:
            for thread in set(_holders) - {threading.get_ident()}:
                del _holders[thread]
            _settle()
        """,
        """
        if False:
            for thread in set(_holders) - {threading.get_ident()}:
                del _holders[thread]
            _settle()
        """,
        "test_concurrency.py::test_a_forked_child[in a recording]",
        anew=True,
    ),
    # --- what a call leaves out ---
    Fault(
        "bytes-are-copied-of-what-is-not-plain",
        "recordings.replay:_Writer._load",
        "f'    if {self._fits_still(value, TensorSpec.of(tensor))}:'",
        "f'    if True:'",
        "test_replay.py::test_bytes_of_what_is_not_plain",
    ),
    Fault(
        "a-graph-copies-from-where-a-value-was",
        "recordings.replay:_Writer._feed",
        "f'if not {fits} or {value}.data_ptr() != {feed}.source:'",
        "f'if not {fits}:'",
        "test_contract_stale.py::test_fresh_inputs[cpu]",
    ),
    Fault(
        "a-graph-copies-what-lies-otherwise",
        "recordings.replay:_Writer._feed",
        "f'if not {fits} or {value}.data_ptr() != {feed}.source:'",
        "f'if {value}.data_ptr() != {feed}.source:'",
        "test_replay.py::test_fed_values[tape]",
    ),
    Fault(
        "a-layout-is-not-asked-about-again",
        "recordings.replay:_Writer._call",
        "self.answers.pop(used_name, None)",
        "pass",
        "test_replay.py::test_a_fed_value_that_a_call_lays_out_anew",
    ),
    Fault(
        "a-graph-copies-what-is-read-lazily",
        "drivers.graph_copies:Fed.take",
        "_is_lazy(value) or not self._spec.accepts(value)",
        "not self._spec.accepts(value)",
        "test_driver_contract.py::test_a_feed_takes_what_lies_otherwise[tape]",
    ),
    Fault(
        "a-body-does-not-hold-its-bridge",
        "capturing.memory:CaptureMemory.bridge",
        "bridge.on(self.driver.lend(bridge.tensor).untyped_storage())",
        "bridge if self.driver.lend(bridge.tensor) is None else bridge",
        "test_capture_lifetimes.py::test_what_the_body_keeps_lives[cpu]",
    ),
    Fault(
        "a-copy-that-was-not-patched-counts",
        "drivers.graph_copies:Fed.take",
        "self.source = 0",
        "pass",
        "test_refused_copies.py::test_a_copy_that_could_not_be_patched",
    ),
    Fault(
        "a-capture-that-is-invalid-before-its-copies-goes-on",
        "drivers.cuda:CudaDriver.begin_capture",
        "self.abandon_capture(graph)",
        "pass",
        "test_refused_copies.py::test_a_capture_that_is_invalid_before_its_copies",
    ),
    Fault(
        "graphs-of-one-pool-share-memory",
        "capturing.capture:_OngoingCapture.open",
        "self.graph.shares_pool",
        "False",
        "test_capture_lifetimes.py::test_graphs_of_one_pool_keep_each_others_results[cuda-owner first]",
        gpu=True,
    ),
    Fault(
        "graphs-of-one-pool-are-nested",
        "capturing.graph:OnlyUser.__enter__",
        "self._driver.begin = _refuse_others",
        "pass",
        "test_capture_lifetimes.py::test_graphs_of_one_pool_are_not_nested[cpu-replay]",
    ),
    Fault(
        "a-graph-holds-what-the-body-has-dropped",
        "capturing.memory:CaptureMemory.place",
        "self.keep or _torch.storage_key(tensor) not in self.made or storage.nbytes() == 0",
        "True",
        "test_capture_lifetimes.py::test_nothing_that_was_dropped_is_held",
    ),
    Fault(
        "bytes-are-copied-of-what-has-gaps",
        "drivers.cuda:CudaGraph.copier",
        "size == 0 or _torch.extent(like.shape, like.stride()) != like.numel() or like.device.index != self._index",
        "size == 0 or like.device.index != self._index",
        "test_host_time.py::test_arguments_and_results_of_any_layout[cuda-with gaps]",
        gpu=True,
    ),
    Fault(
        "kept-results-are-handed-out",
        "marks.fast_calls:fast_call.check",
        "sys.getrefcount(made[place]) != _ALONE",
        "False",
        "test_host_time.py::test_marked_functions_are_called_straight[cpu-keeps]",
    ),
    Fault(
        "memory-of-others-is-handed-out",
        "marks.fast_calls:fast_call.check",
        "not _torch.is_sole_owner(made[place])",
        "False",
        "test_host_time.py::test_a_result_that_its_function_keeps_is_the_callers[cpu-keeps_a_view]",
    ),
    Fault(
        "results-of-any-layout-are-handed-out",
        "marks.fast_calls:fast_call.check",
        "not fits(made[place])",
        "False",
        "test_host_time.py::test_a_result_that_does_not_fit_is_an_error[cpu]",
    ),
    Fault(
        "a-kept-container-is-handed-out",
        "marks.fast_calls:fast_call.run_fast",
        """
        del returned
        if check(made):
            return made
        """,
        """
        if check(made):
            return made
        """,
        "test_host_time.py::test_marked_functions_are_called_straight[cpu-listed]",
    ),
    Fault(
        "pools-go-under-what-is-alive",
        "drivers.generator:Draws.leave",
        "tuple(kept[0]) not in gone",
        "False",
        "test_allocators.py::test_results_outlive_their_pool[expandable_segments:True]",
        gpu=True,
    ),
    Fault(
        "which-arguments-are-one-tensor-does-not-count",
        "marks.learning:Asked.of",
        "(tuple(needs), kind, given_as)",
        "(tuple(needs), kind)",
        "test_functions.py::test_one_tensor_given_twice[breakable_cg-cpu-inference]",
    ),
    Fault(
        "a-tensor-that-is-given-twice-is-copied-twice",
        "marks.call_sites:Site._modules",
        "id(tensor) not in copies",
        "True",
        "test_functions.py::test_one_tensor_given_twice[aot_eager-cpu-gradients]",
    ),
    Fault(
        "views-of-what-has-gaps-begin-where-they-did",
        "marks.structure:view_leaf",
        "_slices(base, where)",
        "None",
        "test_functions.py::test_view_of_an_argument_that_begins_elsewhere[breakable_cg-cpu-learned-gaps]",
    ),
    Fault(
        "containers-are-not-looked-at-again",
        "marks.fast_calls:caller",
        '[*made, f"returned = {call}", *looks, "return returned"]',
        '[*made, f"returned = {call}", "return returned"]',
        "test_learning.py::test_containers_that_a_later_call_changes[cpu-5-a list]",
    ),
    Fault(
        "eager-steps-read-static-results-late",
        "recordings.recorder:_Recorder.finish",
        "tuple(settled(self.specialised, locations, self.steps))",
        "()",
        "test_lifetimes.py::test_static_results_fed_back_to_an_eager_step[cpu-read_late]",
    ),
    Fault(
        "a-set-that-went-is-used",
        "calling.keys:Keys.take_set",
        "taken is self.last",
        "False",
        "test_executor.py::test_reset[tape]",
    ),
    Fault(
        "a-new-set-is-older-than-the-last",
        "calling.keys:Keys.add_set",
        "self.last = None",
        "pass",
        "test_executor.py::test_sets_stand_in_order_of_use[tape]",
    ),
    Fault(
        "copies-together-change-bits",
        "recordings.replay:_Writer._as_bits",
        "fused_as(tensors[0].dtype)",
        "tensors[0].dtype",
        "test_host_time.py::test_bits_of_arguments_that_are_loaded_together[cuda-torch.float16]",
        gpu=True,
    ),
    Fault(
        "a-bridge-is-loaded-with-itself",
        "recordings.replay:_Writer._load_together",
        "' and '.join(map(self._elsewhere, copies))",
        "self._elsewhere(copies[-1])",
        "test_replay.py::test_value_that_is_at_its_bridge[tape-a]",
    ),
    Fault(
        "clones-lose-their-strides",
        "recordings.copies:clones_exactly",
        "torch.empty_like(tensor, device='meta').stride() == tensor.stride()",
        "True",
        "test_bridges.py::test_clones_exactly[with_gaps-cpu]",
    ),
    Fault(
        "layouts-are-not-looked-at",
        "_torch.dynamo:tensors_like",
        "[list(t.stride()) for t in tensors]",
        "[[None] * t.dim() for t in tensors]",
        "test_bridges.py::test_quick_check[transposed-cpu]",
    ),
    Fault(
        "versions-of-written-arguments-stay",
        "compiling.lowering:without_wrappers.call",
        """
        if written:
            count_up([values[index] for index in written])
        """,
        """
        if False:
            count_up([values[index] for index in written])
        """,
        "test_host_time.py::test_version_of_a_written_argument[cpu]",
    ),
    Fault(
        "gradients-stay-off-behind-a-call",
        "compiling.lowering:without_wrappers.call",
        "set_grad_enabled(True)",
        "pass",
        "test_host_time.py::test_gradients_are_on_behind_a_call[cpu]",
    ),
    Fault(
        "gradients-stay-on-in-a-call",
        "compiling.lowering:without_wrappers.call",
        "set_grad_enabled(False)",
        "pass",
        "test_host_time.py::test_gradients_are_on_behind_a_call[cpu]",
    ),
    Fault(
        "wrappers-are-skipped-where-they-work",
        "_torch.aot:written_without_wrappers",
        "any(more) or not same or any(map(is_traceable_wrapper_subclass, tensors))",
        "not same or any(map(is_traceable_wrapper_subclass, tensors))",
        "test_host_time.py::test_wrappers_run_where_they_do_something[cpu-a view of an argument]",
    ),
    Fault(
        "subclasses-go-in-as-they-are",
        "_torch.aot:written_without_wrappers",
        "any(more) or not same or any(map(is_traceable_wrapper_subclass, tensors))",
        "any(more) or False",
        "test_host_time.py::test_wrappers_run_for_subclasses[cpu]",
    ),
    # --- growth ---
    Fault(
        "sites-for-ever",
        "marks.functions:_site",
        "not _torch.keep_with_code(site)",
        "True",
        "test_growth.py::test_sites_go_with_what_was_compiled[cpu]",
    ),
    Fault(
        "sites-of-exported-graphs-go",
        "_torch.dynamo:keep_with_code",
        "frame is not None and (not output.export)",
        "frame is not None",
        "test_growth.py::test_exported_graphs_outlive_dynamos_code[cpu-exported_by_dynamo]",
    ),
    Fault(
        "sites-of-nobody",
        "_torch.dynamo:keep_with_code",
        "output.cleanups.append(cast(Any, functools.partial(id, thing)))",
        "pass",
        "test_growth.py::test_sites_go_with_what_was_compiled[cpu]",
    ),
    Fault(
        "what-dynamo-skipped-is-not-told",
        "_torch.dynamo:skipped",
        "code in input_codes",
        "False",
        "test_report_reach.py::test_what_dynamo_skips[cpu-vmap]",
    ),
    Fault(
        "callees-that-dynamo-gave-up-are-not-told",
        "_torch.compiled_functions:_is_frame",
        "bool(_entries(code)) or (code in input_codes and _failure(code) is not None)",
        "bool(_entries(code))",
        "test_report_reach.py::test_what_dynamo_gives_up_in_a_callee[cpu-child]",
    ),
    Fault(
        "ddp-gets-fake-tensors",
        "_torch.aot:_real_first_call",
        "context.fakify_first_call = False",
        "pass",
        "test_ranks.py::test_buckets[cpu]",
    ),
    Fault(
        "a-copy-passes-for-compiled",
        "tools.report:_notes",
        "not _torch.holds_compiled(compiled)",
        "False",
        "test_copies.py::test_a_copy_of_what_was_compiled_in_place_can_be_compiled[cpu]",
    ),
    Fault(
        "flex-attention-takes-its-segment-along",
        "marks.rules:_CAPTURABLE_HIGHER_ORDER",
        "('invoke_subgraph', 'triton_kernel_wrapper_mutation')",
        "('invoke_subgraph', 'triton_kernel_wrapper_mutation', 'flex_attention')",
        "test_flex_attention.py::test_between_segments[cpu-plain]",
    ),
    Fault(
        "a-group-waits-for-graphs",
        "drivers.process_groups:_all_leave",
        "holder.leave",
        "str",
        "test_collectives.py::test_a_group_that_ends_releases[cpu]",
    ),
    # --- what a report reaches ---
    Fault(
        "callees-are-in-no-report",
        "_torch.compiled_functions:running_compiled",
        "frame.f_code is _compile_wrapper()",
        "False",
        "test_report_reach.py::test_a_callee_behind_an_object[cpu]",
    ),
    Fault(
        "compiled-children-are-in-no-report",
        "_torch.compiled_functions:_parts",
        "[thing.forward, *_wrappers_of_module(thing), *_frames_of_module(thing)]",
        "[thing.forward, *_frames_of_module(thing)]",
        "test_report_reach.py::test_reached[cpu-compiled functions in a dict of a plain module]",
    ),
    Fault(
        "what-dynamo-forgot-is-in-the-report",
        "backend:Backend.reset",
        "executor.callers.gone = True",
        "pass",
        "test_report_reach.py::test_nothing_is_left_after_dynamo_was_reset[cpu]",
    ),
    Fault(
        "who-calls-a-graph-that-is-there-is-not-noted",
        "calling.executor:Executor._not_replayed",
        "self.callers.note()",
        "pass",
        "test_report_reach.py::test_a_callee_behind_an_object[cpu]",
    ),
    # --- Python's collector ---
    Fault(
        "the-first-recording-to-end-lets-the-collector-go",
        "drivers.collector:_settle",
        "not _holders and gc.get_threshold()[0] == 0",
        "gc.get_threshold()[0] == 0",
        "test_driver_contract.py::test_recordings_in_two_threads_hold_off_the_collector[tape]",
    ),
    Fault(
        "a-threshold-of-the-users-is-lost",
        "drivers.collector:_settle",
        "not _holders and gc.get_threshold()[0] == 0",
        "not _holders",
        "test_driver_contract.py::test_recording_respects_who_disables_the_collector[tape]",
    ),
    # --- errors ---
    Fault(
        "errors-without-a-line",
        "errors:BreakableError.__init__",
        "files.short_line(where) or user_line()",
        "where",
        "test_catalogue.py::test_every_error_shows_the_users_line[unknown option]",
    ),
    Fault(
        "errors-show-a-line-of-the-package",
        "files:is_library",
        "(TORCH, PACKAGE)",
        "(TORCH, TORCH)",
        "test_catalogue.py::test_every_error_shows_the_users_line[is not an op]",
    ),
    Fault(
        "an-error-that-the-catalogue-lacks",
        "tools.export:_captured",
        "OptionsError('export: nothing was captured', fix='capture first: with capture(graph): ...')",
        "OptionsError('export: there is nothing', fix='capture first: with capture(graph): ...')",
        "test_catalogue.py::test_every_error_has_a_case",
        anew=True,
    ),
    Fault(
        "exports-compile-live-segments-anew",
        "tools.sources:whole",
        "_twin(segment.module)",
        "segment.module",
        "test_export.py::test_segments_stay_as_they_are[cpu]",
    ),
    Fault(
        "alignment-not-in-the-key",
        "calling.keys:KeyReader.shapes",
        """
        if args[index].data_ptr() % copies.ALIGNMENT:
            begins = [args[index].data_ptr() % copies.ALIGNMENT for index in self.bridged]
            return (*shapes, Alignments(begins))
        """,
        """
        if False:
            begins = [args[index].data_ptr() % copies.ALIGNMENT for index in self.bridged]
            return (*shapes, Alignments(begins))
        """,
        "test_contract_keys.py::test_alignments[cpu]",
    ),
    Fault(
        "bridges-aligned-as-the-allocator-likes",
        "recordings.copies:Bridge.like",
        "value.data_ptr() % ALIGNMENT",
        "0",
        "test_bridges.py::test_bridge_is_aligned_as_its_value[misaligned-cpu]",
    ),
    Fault(
        "no-shapes-and-gradients",
        "marks.call_sites:Site.fake",
        "[torch.empty(1, dtype=torch.int64, device='cpu')] if call.needs else []",
        "[]",
        "test_functions_gradients.py::test_fake_that_reads_values[eager-cpu]",
    ),
    Fault(
        "cuda-forgets-the-line-that-failed",
        "drivers.cuda:_failure",
        "CaptureError(first_line(error), where=user_line(error.__traceback__))",
        "CaptureError(first_line(error))",
        "test_catalogue.py::test_every_error_shows_the_users_line[drivers/cuda.py: _failure]",
    ),
    Fault(
        "a-swallowed-error-has-no-line",
        "capturing.capture:_OngoingCapture.close",
        "user_line(self.failed.__traceback__)",
        "None",
        "test_catalogue.py::test_every_error_shows_the_users_line[nothing was captured, since the body caught an error]",
    ),
    # --- marked functions in compiled code ---
    Fault(
        "unused-calls-of-marked-functions-go",
        "marks.call_ops:_define",
        "torch.fx.has_side_effect(op)",
        "op",
        "test_functions.py::test_one_node[aot_eager-cpu]",
        anew=True,
    ),
    Fault(
        "marked-functions-forget-autocast",
        "ir.ambient_modes:_Entered.__enter__",
        "self._enter(_torch.Autocast(device, dtype, cached))",
        "pass",
        "test_functions.py::test_autocast[aot_eager-cpu]",
    ),
    Fault(
        "marked-functions-lose-aliases",
        "marks.results:_Taker.take",
        "{_torch.storage_key(argument): type(argument) for argument in self.arguments}",
        "dict[int, type]()",
        "test_functions.py::test_aliases_of_arguments[eager-cpu]",
    ),
    Fault(
        "results-of-marked-functions-unchecked",
        "marks.call_sites:Site._check",
        "not want.accepts(root)",
        "False",
        "test_functions.py::test_other_result_than_the_fake[aot_eager-cpu-shape]",
    ),
    Fault(
        "structures-of-marked-functions-unchecked",
        "marks.call_sites:Site._check",
        "taken.structure != wanted.result",
        "False",
        "test_functions.py::test_other_result_than_the_fake[eager-cpu-plain]",
    ),
    Fault(
        "fake-run-for-every-trace",
        "marks.call_sites:Site._told",
        "key is not None and key in self.known",
        "False",
        "test_functions.py::test_fake_is_asked_once[aot_eager-cpu]",
    ),
    # --- what marked functions return is learned ---
    Fault(
        "nothing-counts-as-compiled",
        "_torch.as_python:_count_as_compiled",
        "count is not None and (compiled := count(-1)) >= 0",
        "False",
        "test_learning.py::test_calls_of_a_loop_over_layers[cpu-True]",
    ),
    Fault(
        "frames-that-learn-are-skipped-for-good",
        "_torch.as_python:_this_once",
        "ConvertFrameReturn(frame_exec_strategy=strategy, apply_to_code=False)",
        "ConvertFrameReturn()",
        "test_learning.py::test_calls_of_a_loop_over_layers[cpu-False]",
    ),
    Fault(
        "marked-functions-run-while-they-are-traced",
        "marks.call_ops:_define",
        "_torch.never_run_on_constants(op)",
        "pass",
        "test_learning.py::test_constant_tensors[cpu-aot_eager-fake]",
        anew=True,
    ),
    Fault(
        "dynamo-takes-us-for-the-caller",
        "_torch.as_python:_heed",
        "convert.__code__ = convert.__code__.replace(co_filename=plain.__code__.co_filename)",
        "pass",
        "test_learning.py::test_dynamo_sees_who_called[cpu]",
        anew=True,
    ),
    Fault(
        "numbers-that-are-written-are-constants",
        "compiling.partition:_takes_by_value",
        "position is not None and number in user.args[position:] and (number not in user.args[:position])",
        "True",
        "test_partition.py::test_numbers_that_are_no_constants",
    ),
    Fault(
        "what-is-never-called-so-is-learned-for-ever",
        "marks.call_sites:Site.settle",
        "self.learned.in_vain += not _torch.in_a_body()",
        "pass",
        "test_learning.py::test_code_that_is_traced_calls_it_otherwise[cpu-never]",
    ),
    Fault(
        "writes-that-are-unsaid-are-learned-too",
        "marks.functions:_not_declared",
        "not has_memory(tensor) or _torch.storage_key(tensor) not in declared",
        "False",
        "test_learning.py::test_arguments_that_are_written_unsaid[cpu]",
    ),
    Fault(
        "what-a-function-raises-is-no-reason",
        "marks.functions:_learn",
        "f'each call so far raised, the last one {type(error).__name__}: {first_line(error)}'",
        "''",
        "test_learning.py::test_a_function_that_always_raises[cpu-True]",
    ),
    Fault(
        "transforms-see-opaque-nodes",
        "marks.functions:_site",
        "_torch.functorch_active()",
        "False",
        "test_learning.py::test_under_a_transform[cpu-told-jvp]",
    ),
    Fault(
        "custom-ops-are-never-to-blame",
        "tools.compare:ComparedSegment._work_outside",
        "not nodes",
        "True",
        "test_compare.py::test_work_outside_of_the_capture",
    ),
    Fault(
        "changes-are-not-looked-for",
        "marks.functions:_learn",
        "learned.changes.update(changes())",
        "changes()",
        "test_changes.py::test_code_behind_sees_what_was_changed[cpu-attributes]",
    ),
    Fault(
        "what-is-set-once-is-a-break",
        "marks.changes:heed",
        "learned.changes_again",
        "True",
        "test_changes.py::test_one_program_where_nothing_reads_it[cpu-set_once]",
    ),
    Fault(
        "cells-are-not-read",
        "_torch.dynamo:places_read",
        "name in cells",
        "False",
        "test_changes.py::test_code_behind_sees_what_was_changed[cpu-a_cell]",
    ),
    Fault(
        "bodies-that-may-break-never-do",
        "_torch.dynamo:in_a_body",
        "str(tracer.source_target) not in _MAY_BREAK",
        "True",
        "test_learning.py::test_bodies_that_are_traced_call_it_otherwise[cpu-a checkpoint]",
    ),
    Fault(
        "checkpoints-find-handles-for-what-python-saved",
        "marks.call_ops:_define.differentiate",
        "capture is not None or _torch.saves_through_hooks()",
        "capture is not None",
        "test_training.py::test_checkpoints_of_blocks_with_marks[cpu]",
    ),
    Fault(
        "marks-of-a-compiled-model-are-not-seen-by-a-capture",
        "marks.call_sites:Site.record",
        "capture is None",
        "True",
        "test_capture_gradients.py::test_a_compiled_model[cpu-scaled]",
    ),
    Fault(
        "results-that-a-capture-holds-are-copied",
        "marks.call_sites:Site.record",
        "not capture",
        "True",
        "test_capture_gradients.py::test_a_compiled_model[cpu-every_other]",
    ),
    Fault(
        "writes-of-a-history-are-told-in-autograds-words",
        "_torch.autograd:is_about_leaves",
        "'leaf Variable that requires grad' in str(error)",
        "False",
        "test_training.py::test_arguments_with_a_history_that_are_written[cpu-a view]",
    ),
    Fault(
        "parts-of-a-root-get-the-gradient-of-all",
        "marks.saved_for_backward:part_of",
        "where is None",
        "True",
        "test_training.py::test_checkpoints_of_blocks_with_marks[cpu]",
    ),
    Fault(
        "branches-that-come-late-are-breaks",
        "marks.call_sites:Site.settle",
        "not _torch.in_a_body()",
        "1",
        "test_learning.py::test_in_a_branch_that_comes_late[cpu]",
    ),
    Fault(
        "bodies-are-traced-in-frames-that-are-not",
        "marks.functions:_mark",
        "frame_callback() is None",
        "True",
        "test_any_python.py::test_the_body_is_never_traced[cpu]",
    ),
    Fault(
        "modules-are-called-as-ever",
        "_torch.module_calls:_ask",
        "function is None",
        "True",
        "test_marked_modules.py::test_a_class_is_marked[cpu]",
    ),
    Fault(
        "one-module-for-all-of-its-class",
        "_torch.module_calls:_ask",
        "install_guard(self.source.make_guard(GuardBuilder.ID_MATCH))",
        "pass",
        "test_marked_modules.py::test_layers_that_share_code[cpu]",
    ),
    Fault(
        "arguments-that-lie-otherwise-are-not-noticed",
        "marks.functions:_learn",
        "lying != where_they_lie(passed)",
        "False",
        "test_functions.py::test_an_argument_that_lies_otherwise[cpu-<lambda>0]",
    ),
    Fault(
        "arguments-that-lie-otherwise-are-not-noticed-under-capture",
        "capturing.capture:_OngoingCapture._break",
        "lying != where_they_lie(filled)",
        "False",
        "test_capture_hostile.py::test_an_argument_that_lies_otherwise[cpu]",
    ),
    Fault(
        "iterators-that-are-used-up-are-not-noticed",
        "capturing.capture:_is_spent",
        "iterator.gi_frame is None",
        "False",
        "test_capture_hostile.py::test_an_iterator_that_is_used_up[cpu-<lambda>]",
    ),
    Fault(
        "quantised-tensors-are-traced-as-floats",
        "compiling.lowering:lower",
        "any((_torch.makes_quantised(target) for target in _targets(gm)))",
        "False",
        "test_contract_hostile.py::test_quantised_tensors[cpu-False-None]",
    ),
    Fault(
        "scales-that-depend-on-values-are-captured",
        "marks.rules",
        "_torch.makes_quantised(call.op)",
        "False",
        "test_contract_hostile.py::test_quantised_tensors_under_capture[cpu]",
    ),
    Fault(
        "classes-of-results-are-looked-up-in-traced-code",
        "marks.structure:for_dynamo",
        "structure[0] != 'node'",
        "True",
        "test_functions.py::test_containers_that_only_a_result_brings[cpu-<lambda>3-breakable_cg]",
    ),
    Fault(
        "containers-that-hold-a-class-are-traced",
        "marks.results:take_result",
        "remembers_code(structure)",
        "False",
        "test_functions.py::test_a_container_that_holds_a_class[cpu]",
    ),
    Fault(
        "layers-write-what-they-are-given",
        "marks.functions:_learn",
        "written()",
        "False",
        "test_marked_modules.py::test_a_layer_that_writes_its_argument[cpu-False]",
    ),
    Fault(
        "marked-modules-are-not-watched-under-capture",
        "capturing.capture:_OngoingCapture.open",
        "stack.enter_context(modules.watching())",
        "pass",
        "test_marked_modules.py::test_under_capture[cpu-class]",
    ),
    Fault(
        "every-thread-is-intercepted",
        "interception:_Intercepted.__init__",
        "self.interceptors.get(threading.get_ident())",
        "next(iter(self.interceptors.values()))",
        "test_capture_streams.py::test_methods_are_seen_in_one_thread",
    ),
    Fault(
        "marked-modules-are-kept-alive",
        "marks.modules:Modules.of",
        "weakref.ref(thing)",
        "(lambda thing=thing: thing)",
        "test_marked_modules.py::test_nothing_keeps_a_marked_module",
    ),
    Fault(
        "a-mark-of-a-module-without-effect-is-not-told",
        "marks.marking:Marks.unmet",
        "marked |= set(modules.marked().unmet((module for by, module in called if by == modules.MARK_EAGER)))",
        "pass",
        "test_marked_modules.py::test_a_mark_without_effect_is_told[cpu]",
    ),
    Fault(
        "wrong-guesses-stay",
        "marks.call_sites:Site._mismatch",
        "_torch.forget_code_of(self, f'{self.mark.name} returned something else')",
        "str(self)",
        "test_learning.py::test_varying_layouts_are_a_break[cpu]",
    ),
    Fault(
        "a-float-seen-once-is-a-constant",
        "marks.learning:_Sample.is_sure",
        "self.count > 1 or not _has_values(self.expected.result)",
        "True",
        "test_learning.py::test_varying_values[cpu-float]",
    ),
    Fault(
        "sizes-are-constants",
        "marks.learning:_term",
        "return (1, place, 0)",
        "continue",
        "test_learning.py::test_sizes[cpu-True]",
    ),
    Fault(
        "learning-knows-no-arguments-but-leaves",
        "ir.running_ops:is_view_to_autograd",
        "ends = [argument.grad_fn for argument in arguments]",
        "ends: list[Any] = []",
        "test_learning.py::test_gradients[cpu-eager]",
    ),
    # --- compare mode, and the first replay ---
    Fault(
        "first-replay-unchecked",
        "calling.compiled_graph:checked_once.first",
        "check_places(recording, args)",
        "pass",
        "test_compare.py::test_first_replay_looks_at_bridges[cpu-moved]",
    ),
    Fault(
        "every-replay-checked",
        "calling.compiled_graph:checked_once.first",
        "entry.run = replay.function",
        "pass",
        "test_compare.py::test_later_replays_do_not_look[cpu]",
    ),
    Fault(
        "first-replay-of-a-capture-unchecked",
        "capturing.graph:_checked_once.checked",
        "captured.check()",
        "pass",
        "test_compare.py::test_first_replay_of_a_capture[cpu-moved]",
    ),
    Fault(
        "first-replay-under-a-profiler-unchecked",
        "calling.compiled_graph:checked_once.first",
        "check_places(recording, args)",
        "torch.autograd._profiler_enabled() or check_places(recording, args)",
        "test_compare.py::test_first_replay_under_a_profiler[cpu-compile]",
    ),
    Fault(
        "steps-timed-in-the-modes-of-the-caller",
        "tools.measure:measure_graph",
        "graph.modes.enter()",
        "nullcontext()",
        "test_measure.py::test_captured_graph_in_its_modes[cpu]",
    ),
    Fault(
        "a-break-has-the-name-of-its-first-op",
        "tools.timing:_timed_steps",
        "max(calls, key=lambda call: max(call[1].host_us, call[1].gpu_us or 0.0))[0]",
        "calls[0][0]",
        "test_measure.py::test_a_break_has_the_name_of_its_costliest_op[cpu]",
    ),
    Fault(
        "an-int-of-eager-steps-is-frozen",
        "recordings.locations:Locations.__init__",
        "v.kind == 'number' and v.name not in program.passed_on",
        "v.kind == 'number'",
        "test_contract_keys.py::test_ints_of_eager_steps[cpu-None]",
    ),
    Fault(
        "an-int-that-a-shape-depends-on-is-not-in-the-key",
        "ir.program:Program.passed_on",
        "name not in taken and used.isdisjoint(_torch.free_symbols(value))",
        "name not in taken",
        "test_contract_keys.py::test_ints_that_more_depends_on[cpu-shape]",
    ),
    Fault(
        "empty-segments-count",
        "recordings.recording:Recording.num_segments",
        "isinstance(step, GraphStep) and not step.is_empty",
        "isinstance(step, GraphStep)",
        "test_capture.py::test_empty_segments[cpu-between]",
    ),
    Fault(
        "a-mark-in-compiled-code-is-not-told",
        "marks.functions:_mark",
        'by == BY_FUNCTION and "<locals>" in name',
        "False",
        "test_learning.py::test_a_mark_inside_of_compiled_code[cpu-marks_in_its_body]",
    ),
    Fault(
        "comparison-not-undone",
        "tools.compare:ComparedSegment._run",
        "undo.restore()",
        "pass",
        "test_compare.py::test_mutated_input[cpu]",
    ),
    Fault(
        "comparison-draws-for-the-caller",
        "tools.compare:ComparedSegment._run",
        "_drawn_by(watch.trace, drawn_from).restore()",
        "pass",
        "test_compare.py::test_equals_eager[cpu-drawing]",
    ),
    Fault(
        "comparison-of-makings-only",
        "tools.compare:ComparedSegment._first_wrong",
        "[*self._wrong_inside(ran), *self._wrong_outside(ran)]",
        "[*self._wrong_inside(ran)]",
        "test_compare.py::test_wrong_mutation[cpu]",
    ),
    Fault(
        "divergence-leaves-the-wrong-step-done",
        "tools.compare:ComparedSegment._take_back",
        "ran.undo.restore()",
        "pass",
        "test_compare.py::test_wrong_mutation[cpu]",
    ),
    Fault(
        "comparison-by-value",
        "tools.difference:_differs",
        "got.view(integer) != want.view(integer)",
        "got != want",
        "test_compare.py::test_difference_of_bits[cpu-dtype0]",
    ),
    Fault(
        "kept-arguments-unseen",
        "tools.witness:Witness.attend.attended",
        "self.kept += twins.kept(name, source)",
        "twins.kept(name, source)",
        "test_compare.py::test_argument_kept_while_recording[cpu]",
    ),
    Fault(
        "arguments-held-after-the-call",
        "tools.compare:Checker._clear",
        "held.clear()",
        "pass",
        "test_compare.py::test_nothing_of_a_call_is_held[cpu]",
    ),
    Fault(
        "undeclared-writes-unseen",
        "tools.compare:Checker._eager_ran",
        "self.undeclared[value.name] = (Maker.of(call), own)",
        "pass",
        "test_compare.py::test_stale_bridge_by_a_write_that_is_not_declared[cpu]",
    ),
    Fault(
        "results-uncompared",
        "tools.compare:Checker._finish",
        "self._compare_results(self.program, results)",
        "pass",
        "test_compare.py::test_wrong_result[cpu]",
    ),
    Fault(
        "races-unseen",
        "tools.compare:ComparedSegment.replay",
        "self._refuse_late()",
        "pass",
        "test_compare.py::test_late_values[cpu-False]",
    ),
    Fault(
        "numbers-of-the-fake-run",
        "marks.call_sites:Site._made",
        "torch.tensor(taken.ints, dtype=torch.int64, device='cpu')",
        "torch.tensor([1] * len(taken.ints), dtype=torch.int64, device='cpu')",
        "test_functions.py::test_numbers[aot_eager-cpu]",
    ),
    Fault(
        "functions-give-away-what-they-keep",
        "marks.results:_is_kept",
        "_torch.owners_of_storage(group[0]) > len(holders)",
        "False",
        "test_functions.py::test_what_a_function_keeps[eager-cpu]",
    ),
    Fault(
        "fresh-results-are-copied",
        "marks.results:_is_kept",
        """
        if recording:
            return False
        """,
        """
        if not recording:
            return True
        """,
        "test_functions.py::test_fresh_results_are_not_copied[cpu]",
    ),
    Fault(
        "writes-of-marked-functions-undeclared",
        "marks.call_ops:_define",
        "f'Tensor(a{number}!) written_{number}, '",
        "f'Tensor written_{number}, '",
        "test_functions.py::test_no_clone_of_what_is_written[cpu]",
    ),
    Fault(
        "modules-with-stale-buffers",
        "marks.call_sites:Site._settle",
        "stack.enter_context(_torch.swapped(module, other))",
        "pass",
        "test_functions.py::test_buffer_that_traced_code_wrote[aot_eager-cpu]",
    ),
    Fault(
        "fake-run-on-the-module-itself",
        "marks.call_sites:_twin.copied",
        "kind.__new__(kind)",
        "original",
        "test_functions.py::test_fake_run_leaves_a_module_alone[cpu]",
    ),
    Fault(
        "one-tape-for-all-calls",
        "marks.saved_for_backward:saved_behind",
        "_all_saved.get(int(handle.item()))",
        "_all_saved[min(_all_saved)]",
        "test_functions_gradients.py::test_two_forward_passes[aot_eager-cpu]",
    ),
    Fault(
        "tapes-freed-by-the-first-backward",
        "marks.saved_for_backward:SavedForBackward.backward",
        "_torch.gradients(outputs, leaves, given, retain_graph=True, allow_unused=True)",
        "_torch.gradients(outputs, leaves, given, retain_graph=False, allow_unused=True)",
        "test_functions_gradients.py::test_backward_twice[eager-cpu]",
    ),
    Fault(
        "tapes-for-ever",
        "marks.saved_for_backward",
        "_all_saved: weakref.WeakValueDictionary[int, SavedForBackward] = weakref.WeakValueDictionary()",
        "_all_saved: dict[int, SavedForBackward] = {}",
        "test_functions_gradients.py::test_nothing_is_left[aot_eager-cpu]",
    ),
    Fault(
        "tapes-on-memory-of-compiled-code",
        "marks.call_sites:Site._modules",
        "copies[id(tensor)] = copy_of(tensor)",
        "copies[id(tensor)] = tensor",
        "test_functions_gradients.py::test_memory_that_compiled_code_uses_again[inductor-cpu]",
    ),
    Fault(
        "results-on-memory-of-tapes",
        "marks.call_sites:Site._made",
        "[copy_of(root) for root in taken.roots] if traced else taken.roots",
        "taken.roots",
        "test_functions_gradients.py::test_memory_that_compiled_code_uses_again[inductor-cpu]",
    ),
    Fault(
        "hooks-of-parameters-run-twice",
        "marks.call_sites:Site._settle",
        "same and (not (recording and _torch.has_hooks(mine)))",
        "same",
        "test_functions_gradients.py::test_hooks_run_once[eager-cpu]",
    ),
    Fault(
        "every-result-needs-gradients",
        "marks.call_ops:_Node.forward",
        "ctx.mark_non_differentiable",
        "list",
        "test_functions_gradients.py::test_what_needs_none[eager-cpu]",
    ),
    Fault(
        "views-with-other-gradients",
        "marks.results:_Taker.take",
        "self.recording and (not is_view_to_autograd(tensor, self.arguments))",
        "False",
        "test_functions_gradients.py::test_view_with_a_gradient_of_its_own[eager-cpu]",
    ),
    Fault(
        "shared-gradients-count-twice",
        "marks.results:_shares",
        "[(tensor, where)]",
        "wanting",
        "test_functions_gradients.py::test_shared_results[eager-cpu]",
    ),
    Fault(
        "recompute-draws-anew",
        "marks.backward:recomputed.run",
        "checkpoint.checkpoint(packed, args, kwargs, use_reentrant=False)",
        "checkpoint.checkpoint(packed, args, kwargs, use_reentrant=False, preserve_rng_state=False)",
        "test_functions_gradients.py::test_recompute[eager-cpu]",
    ),
    Fault(
        "closures-lose-gradients",
        "marks.call_sites:Site._take",
        "self.modes.grad",
        "False",
        "test_functions_gradients.py::test_closures_are_refused[cpu]",
    ),
    Fault(
        "floats-of-conditions-are-not-evaluated",
        "_torch.symbols:evaluate",
        "isinstance(value, torch.SymFloat) and not result.is_Number",
        "False",
        "test_contract_keys.py::test_floats_of_conditions[cpu]",
    ),
    Fault(
        "negative-zero-is-zero",
        "compiling.traced:with_signs.call",
        "math.copysign(1, args[position]) < 0",
        "False",
        "test_contract_keys.py::test_floats_that_are_held_at_zero[cpu-False]",
    ),
    Fault(
        "zeros-without-signs-are-computed-with",
        "_torch.symbols:zero_floats",
        "isinstance(number, float | torch.SymFloat)",
        "False",
        "test_contract_keys.py::test_floats_that_are_held_at_zero[cpu-True]",
    ),
    # --- the second door ---
    Fault(
        "capture-keeps-no-inputs",
        "capturing.capture:_OngoingCapture._keep",
        "not isinstance(tensor, nn.Parameter)",
        "False",
        "test_capture.py::test_inputs_are_kept[cpu]",
    ),
    Fault(
        "capture-hands-out-kept-results",
        "marks.results:fresh_groups",
        "(key := _torch.storage_key(tensor)) not in known",
        "(key := _torch.storage_key(tensor))",
        "test_capture.py::test_result_that_cannot_be_written_back[cpu-alias lost]",
    ),
    Fault(
        "capture-clones-aliases-apart",
        "marks.results:fresh_groups",
        "groups.setdefault(key, [])",
        "groups.setdefault(position, [])",
        "test_doors.py::test_equals_eager[capture-cpu-results that share memory]",
    ),
    Fault(
        "capture-copies-arguments",
        "capturing.capture:_OngoingCapture._break",
        "set(map(_torch.storage_key, taken))",
        "set()",
        "test_doors.py::test_equals_eager[capture-cpu-result that is an input]",
    ),
    Fault(
        "segment-not-launched-at-its-end",
        "capturing.capture:_OngoingCapture._end",
        "graph.replay(self.stream)",
        "pass",
        "test_doors.py::test_equals_eager[capture-cpu-one break]",
    ),
    Fault(
        "zeros-on-the-host-have-no-sign",
        "capturing.eager_results:Parts._check_leaf",
        "torch.equal(_octets(value), _octets(leaf.value))",
        "torch.equal(value, leaf.value)",
        "test_capture.py::test_values_on_the_host",
    ),
    Fault(
        "plain-results-unchecked",
        "capturing.eager_results:Parts._check_leaf",
        "not (self.host_only or _is_same(value, leaf.value))",
        "False",
        "test_capture.py::test_result_that_cannot_be_written_back[cpu-plain]",
    ),
    Fault(
        "plain-fields-of-objects-unchecked",
        "capturing.eager_results:_parts",
        "_is_plain(item) or holds_tensors(item)",
        "holds_tensors(item)",
        "test_capture.py::test_result_that_cannot_be_written_back[cpu-field of an object]",
    ),
    Fault(
        "plain-lists-of-objects-unchecked",
        "capturing.eager_results:_is_plain",
        "value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)",
        "(value,)",
        "test_capture.py::test_result_that_cannot_be_written_back[cpu-list in an object]",
    ),
    Fault(
        "capture-with-a-warm-autocast-cache",
        "interception:without_autocast_cache",
        "_torch.any_autocast_enabled()",
        "False",
        "test_capture_streams.py::test_warm_autocast_cache[cpu]",
    ),
    Fault(
        "recording-with-a-warm-autocast-cache",
        "recordings.recorder:_Recorder._capture",
        """
        with without_autocast_cache():
            graph, results = driver.capture(functools.partial(captured, *inputs), fed)
        """,
        """
        if True:
            graph, results = driver.capture(functools.partial(captured, *inputs), fed)
        """,
        "test_contract_ambient.py::test_captured_op_in_a_warm_autocast_region[cpu]",
    ),
    Fault(
        "captures-without-autocast-clear-its-flag",
        "interception:without_autocast_cache",
        "_torch.any_autocast_enabled()",
        "True",
        "test_capture_streams.py::test_compiled_function_is_not_compiled_again[cpu]",
    ),
    Fault(
        "regions-in-a-capture-cache-casts",
        "interception:_enter_without_cache",
        "torch.set_autocast_cache_enabled(False)",
        "pass",
        "test_capture_streams.py::test_warm_autocast_cache[cpu]",
    ),
    Fault(
        "methods-stay-seen",
        "interception:_tidy",
        "setattr(owner, name, intercepted.method)",
        "pass",
        "test_capture_streams.py::test_nothing_is_left_of_a_capture[cpu]",
    ),
    Fault(
        "barrier-of-a-capture-forgotten",
        "capturing.capture:_OngoingCapture._break",
        "self.barrier",
        "None",
        "test_capture.py::test_barrier_of_a_capture[cpu]",
    ),
    Fault(
        "breaks-forget-events",
        "drivers.streams:StreamOrder._record",
        "self._recorded[id(event)] = (event, self._segment)",
        "pass",
        "test_capture_streams.py::test_break_while_streams_overlap[1]",
        gpu=True,
    ),
    Fault(
        "waits-for-work-outside-once",
        "drivers.streams:StreamOrder._wait",
        "self._waits[id(event)] = Wait(event, elsewhere)",
        "wait(event, self._caller)",
        "test_capture_streams.py::test_wait_for_work_outside[stream]",
        gpu=True,
    ),
    Fault(
        "events-of-segments-recorded-once",
        "drivers.streams:StreamOrder._wait",
        "self._used.append(event)",
        "pass",
        "test_capture_streams.py::test_event_of_a_segment_in_an_eager_function",
        gpu=True,
    ),
    Fault(
        "moved-weights-unnoticed",
        "capturing.graph:BreakableCUDAGraph._watch.moved",
        "alive() is not None",
        "False",
        "test_capture_hostile.py::test_parameter_that_moves[cpu]",
    ),
    Fault(
        "launches-past-hooks",
        "drivers.cuda:CudaGraph.replay",
        "self._hooks and any(self._hooks)",
        "False",
        "test_capture_streams.py::test_hooks_on_launches[own]",
    ),
    Fault(
        "lost-alias-unchecked",
        "capturing.eager_results:Parts._check_leaf",
        "leaf.group < 0 and value.data_ptr() != leaf.value and value.numel()",
        "False",
        "test_capture.py::test_result_that_cannot_be_written_back[cpu-alias lost]",
    ),
    Fault(
        "capture-forgets-autocast",
        "capturing.capture:_OngoingCapture._note",
        "modes if modes != self.modes else None",
        "None",
        "test_doors.py::test_equals_eager[capture-cpu-autocast in the model]",
    ),
    Fault(
        "capture-owns-parameters",
        "capturing.capture:_OngoingCapture._keep",
        "not isinstance(tensor, nn.Parameter)",
        "True",
        "test_capture.py::test_dropped_model[cpu]",
    ),
    Fault(
        "moved-buffers-unnoticed",
        "capturing.memory:CaptureMemory.reads",
        "tensor.grad_fn is None and key not in self.tensors",
        "False",
        "test_capture_hostile.py::test_a_buffer_or_an_input_that_moves[cpu]",
    ),
    Fault(
        "marked-in-marked-breaks-again",
        "capturing.capture:_OngoingCapture._break",
        "active.handler.set(None)",
        "active.handler.set(self)",
        "test_capture.py::test_is_capturing[cpu]",
    ),
    Fault(
        "failed-capture-keeps-its-graphs",
        "capturing.capture:_OngoingCapture.close",
        "self.driver.release(graphs, [*self.steps, self.constants, self.memory.held])",
        "pass",
        "test_capture.py::test_error_in_an_eager_function[cuda]",
        gpu=True,
    ),
    Fault(
        "replay-in-the-modes-of-the-caller",
        "capturing.graph:Captured.run",
        "not self.modes.are_current()",
        "False",
        "test_capture_hostile.py::test_modes_of_the_capture[cpu]",
    ),
    Fault(
        "graph-freed-while-it-is-replayed",
        "capturing.graph:BreakableCUDAGraph._expire",
        "not self._use",
        "True",
        "test_capture_hostile.py::test_reset_by_an_eager_step[cpu]",
    ),
    Fault(
        "graph-captured-while-it-is-replayed",
        "capturing.graph:BreakableCUDAGraph.being_captured",
        """
        if self._use:
            self._refuse_use(CaptureError)
        """,
        "pass",
        "test_capture_hostile.py::test_captured_while_in_use[cpu]",
    ),
    Fault(
        "replay-inside-a-capture-is-captured",
        "capturing.graph:BreakableCUDAGraph.replay",
        "_held() is not None and (handler := active.handler.get()) is not None",
        "_held() is not None and (handler := active.handler.get()) is not None and False",
        "test_capture_hostile.py::test_replay_inside_a_capture[cpu]",
    ),
    Fault(
        "other-tasks-are-captured",
        "capturing.capture:_OngoingCapture.op",
        "active.handler.get() is not self and threading.get_ident() == self.thread",
        "False",
        "test_capture_hostile.py::test_tasks[cpu]",
    ),
    Fault(
        "arguments-read-after-the-call",
        "capturing.capture:_OngoingCapture._break",
        """
        parts = Parts.of(result, known, self.driver.device, name, reason.source, mark.host_only, apart, places)
        """,
        """
        known |= set(map(_torch.storage_key, tensors_on(self.driver.device, (args, kwargs))))
        parts = Parts.of(result, known, self.driver.device, name, reason.source, mark.host_only, apart, places)
        """,
        "test_capture_hostile.py::test_object_that_a_function_changes[cpu]",
    ),
    Fault(
        "lazy-bits-of-results-lost",
        "_torch.tensors:with_lazy_bits",
        "tensor = tensor.conj() if conjugated else tensor",
        "pass",
        "test_capture_hostile.py::test_lazy_views[cpu]",
    ),
    Fault(
        "regions-are-captured",
        "marks.rules",
        "_IN_REGION if inside else ''",
        "''",
        "test_capture.py::test_region[cpu]",
    ),
    Fault(
        "what-goes-on-behind-a-break-is-another-function",
        "_torch.dynamo:code_under_compilation",
        "ContinueExecutionCache.generated_code_metadata.get(whole)",
        "None",
        "test_report_reach.py::test_a_callee_of_two_models[cpu]",
    ),
    # --- replay: generated source ---
    Fault(
        "emitted-skips-a-load",
        "recordings.replay:_Writer._loads",
        "step.loads",
        "step.loads[1:]",
        "test_contract_stale.py::test_fresh_inputs[cpu]",
    ),
    Fault(
        "emitted-skips-a-store",
        "recordings.replay:_Writer._launch",
        "step.stores",
        "()",
        "test_contract_stale.py::test_mutated_input[cpu]",
    ),
    Fault(
        "emitted-ignores-ambient-state",
        "recordings.replay:_Writer._call",
        "call.ambient is not None",
        "False",
        "test_contract_ambient.py::test_traced_autocast[cpu-True]",
    ),
    Fault(
        "emitted-keeps-dead-names",
        "recordings.replay:_deletions",
        "sorted((name for name in used if last[name] == position))",
        "[]",
        "test_replay.py::test_names_go_early",
    ),
    Fault(
        "emitted-checks-no-eager-result",
        "recordings.replay:_Writer._call",
        "call.spec is not None",
        "False",
        "test_replay.py::test_eager_result_is_checked[shape]",
    ),
    # --- recording: what enters and leaves captured segments ---
    Fault(
        "eager-write-to-a-bridged-input-is-missed",
        "recordings.locations:Locations.written",
        "self.loaded.discard(access.storage)",
        "pass",
        "test_contract_gaps.py::test_eager_write_between_two_graphs[cpu]",
    ),
    Fault(
        "eager-result-is-read-where-it-was",
        "recordings.locations:Locations.returned",
        "self.outside.add(name)",
        "pass",
        "test_contract_stale.py::test_eager_result_is_bridged[cpu]",
    ),
    Fault(
        "captured-write-to-an-eager-result-is-missed",
        "recordings.recorder:_Recorder._capture",
        "locations.written(segment)",
        "pass",
        "test_contract_aliases.py::test_aliases[cpu-eager_result_that_a_graph_writes]",
    ),
    Fault(
        "eager-write-to-an-eager-result-is-missed",
        "recordings.locations:Locations.written",
        "self.intact.pop(access.storage, None)",
        "pass",
        "test_contract_aliases.py::test_aliases[cpu-eager_result_that_eager_writes]",
    ),
    Fault(
        "recording-skips-the-store-back",
        "recordings.recorder:_Recorder._capture",
        """
        for copy in stores:
            self.copies += values[copy.bridge.name].store(values[copy.value.name])
        """,
        """
        for copy in ():
            self.copies += values[copy.bridge.name].store(values[copy.value.name])
        """,
        "test_contract_stale.py::test_mutated_input[cpu]",
    ),
    Fault(
        "views-of-arguments-are-constants",
        "recordings.locations:Locations.is_constant_view",
        "variable in self.constants",
        "variable in self.values",
        "test_contract_aliases.py::test_aliases[cpu-same_result_of_eager_twice]",
    ),
    Fault(
        "views-behind-views-by-storage-are-made-again",
        "recordings.specialised:SpecialisedProgram._call",
        "is_view(node)",
        "getattr(node.target, 'is_view', False)",
        "test_host_time.py::test_views_of_captured_memory_are_made_once[cpu]",
    ),
    Fault(
        "copies-are-constant-views",
        "recordings.locations:Locations.is_constant_view",
        "all((_torch.storage_key(tensor) in memory for tensor in tensors_of(made)))",
        "bool(memory)",
        "test_executor.py::test_a_copy_that_its_fake_takes_for_a_view[tape]",
    ),
    Fault(
        "outputs-cloned-apart",
        "recordings.epilogue:Epilogue.run",
        "behind[name] > 1",
        "behind[name] > 9",
        "test_contract_aliases.py::test_aliases[cpu-views_of_one_result]",
    ),
    Fault(
        "pool-memory-returned",
        "recordings.epilogue:Epilogue._is_to_copy",
        "place.name not in self.locations.inputs",
        "False",
        "test_contract_once.py::test_counts_of_the_silly_model[cpu]",
    ),
    Fault(
        "pool-memory-told-by-name",
        "recordings.epilogue:Epilogue._is_to_copy",
        "self.locations.is_ours(self.values[place.name])",
        "place.name in self.locations.constants",
        "test_contract_gaps.py::test_eager_op_that_returns_its_argument[cpu]",
    ),
    Fault(
        "static-inputs-held",
        "recordings.locations:Locations.__init__",
        "v.kind == 'constant'",
        "v.kind in ('constant', 'static')",
        "test_contract_release.py::test_dropped_model[cpu]",
    ),
    Fault(
        "failed-capture-leaves-loads-done",
        "recordings.recorder:_Recorder._capture_failed",
        "self.locations.unbridge(copy, position)",
        "pass",
        "test_contract_reasons.py::test_capture_that_fails[cpu]",
    ),
    Fault(
        "plain-call-checks-no-eager-result",
        "recordings.plain:_Graph._calls",
        "replace(call, spec=TensorSpec.of(fake, {}))",
        "call",
        "test_contract_exceptions.py::test_wrong_fake_implementation[cpu]",
    ),
    Fault(
        "interrupted-recording-is-kept",
        "recordings.recorder:record",
        """
        recorder.forget()
        driver.release(graphs)
        """,
        "pass",
        "test_contract_exceptions.py::test_driver_is_clean_after_an_error[cpu]",
    ),
    # --- executor: keys, bounds, calls ---
    Fault(
        "addresses-not-in-the-key",
        "calling.executor:Executor._locked",
        "addresses is known or reader.are_at(addresses.pointers, args)",
        "True",
        "test_contract_keys.py::test_swapped_parameter_data[cpu]",
    ),
    Fault(
        "ints-not-in-the-key",
        "calling.keys:KeyReader.shapes",
        "tuple([args[index] for index in self.numbers])",
        "()",
        "test_contract_keys.py::test_ints[cpu]",
    ),
    Fault(
        "open-layouts-not-in-the-key",
        "calling.keys:KeyReader.shapes",
        """
        if self.open_layouts:
            shapes += tuple(
                (args[i].shape, args[i].stride(), args[i].dtype, args[i].device) for i in self.open_layouts
            )
        """,
        "pass",
        "test_executor.py::test_key_reads_open_layouts[tape]",
    ),
    Fault(
        "minus-zero-is-zero",
        "calling.keys:scalar_bytes",
        "struct.pack('d', tensor.item())",
        "tensor.item()",
        "test_executor.py::test_scalar_bytes",
    ),
    Fault(
        "scalars-not-in-the-key",
        "calling.keys:KeyReader.shapes",
        "\n        if self.scalars:\n            shapes += tuple((scalar_bytes(args[index]) for index in self.scalars))\n        ",
        "\n        if False:\n            shapes += tuple((scalar_bytes(args[index]) for index in self.scalars))\n        ",
        "test_executor.py::test_scalar_with_many_values[tape]",
    ),
    Fault(
        "recorded-for-ever",
        "calling.eviction:admit",
        "now - keys.oldest_call < IDLE_FACTOR * max_recordings",
        "False",
        "test_contract_keys.py::test_few_recordings_and_many_keys[cpu]",
    ),
    Fault(
        "never-evicted",
        "calling.eviction:admit",
        "now - keys.oldest_call < IDLE_FACTOR * max_recordings",
        "True",
        "test_contract_keys.py::test_keys_that_are_no_longer_used[cpu]",
    ),
    Fault(
        "written-input-never-bridged",
        "calling.eviction:Variety.is_too_much",
        "len(values) > bound",
        "False",
        "test_contract_keys.py::test_mutated_input_at_many_addresses[cpu]",
    ),
    Fault(
        "reentrant-call-not-plain",
        "calling.executor:Executor.__call__",
        "outer is not None and (not outer.over)",
        "False",
        "test_concurrency.py::test_a_thread_with_the_context_of_an_eager_step[cpu]",
    ),
    Fault(
        "a-call-in-a-context-of-its-own-is-no-nested-one",
        "calling.executor:Executor.__call__",
        "driver.busy",
        "False",
        "test_concurrency.py::test_another_context_in_an_eager_step[cpu]",
    ),
    Fault(
        "a-copied-context-is-in-a-call-for-ever",
        "calling.executor:Executor.__call__",
        "(True, False)",
        "(False, False)",
        "test_concurrency.py::test_a_context_copied_in_an_eager_step[cpu]",
    ),
    Fault(
        "a-copied-context-is-in-a-capture-for-ever",
        "active:Scoped.reset",
        "held.value = self.default",
        "pass",
        "test_concurrency.py::test_a_context_copied_inside_a_capture[cpu]",
    ),
    Fault(
        "every-thread-is-in-a-capture-whose-context-it-has",
        "active:Scoped.get",
        "held is None or held.thread != threading.get_ident()",
        "held is None",
        "test_concurrency.py::test_a_thread_with_the_context_of_a_capture[cpu]",
    ),
    Fault(
        "a-report-waits-for-a-call",
        "calling.compiled_graph:CompiledGraph.snapshot",
        "self.keys.changing",
        "self.driver.lock",
        "test_concurrency.py::test_a_report_does_not_wait_for_a_call[cpu]",
    ),
    Fault(
        "dispatch-mode-does-not-see",
        "calling.executor:Executor.__call__",
        "_torch.dispatch_mode_active()",
        "False",
        "test_executor.py::test_under_a_dispatch_mode[tape]",
    ),
    Fault(
        "failed-capture-is-forgotten",
        "calling.compiled_graph:CompiledGraph.record",
        "\n        if failed:\n            self.run_eagerly(program, failed)\n        ",
        "pass",
        "test_contract_reasons.py::test_capture_that_fails[cpu]",
    ),
    # --- regions that a cut goes through ---
    Fault(
        "an-unknown-op-takes-its-region-with-it",
        "compiling.regions:may_be_cut",
        "any(map(is_opaque, _torch.overloads(node.target)))",
        "False",
        "test_regions.py::test_a_cut_through_regions[cpu-cannot be captured]",
    ),
    Fault(
        "rules-do-not-look-into-regions",
        "compiling.regions:_require_whole",
        "(reason := classify(inner, scope)) is not None",
        "False",
        "test_regions.py::test_rules_look_into_regions[cpu]",
    ),
    Fault(
        "each-region-is-traced-in-each-place",
        "compiling.regions:inline_regions",
        "all(map(wanted, bodies(node)))",
        "True",
        "test_regions.py::test_a_region_of_torchs_ops[cpu]",
    ),
    # --- ops that are found in a plain call ---
    Fault(
        "nobody-looks-into-ops",
        "calling.executor:Executor._warm_up",
        "self.options.auto_break and has_unknown_ops(program)",
        "False",
        "test_host_syncs.py::test_found_in_the_first_call[cpu-reads]",
    ),
    Fault(
        "ops-of-ops-are-not-seen",
        "recordings.host_syncs:_Look._issue",
        "with self.watching():\n    return kernel(*args, **kwargs)",
        "return kernel(*args, **kwargs)",
        "test_host_syncs.py::test_found_in_the_first_call[cpu-deep]",
    ),
    Fault(
        "found-in-one-place-only",
        "recordings.host_syncs:Finder.eager",
        "self._found.get(op_of(node))",
        "self._found.get(op_of(node)) if node.args[-1] is True else None",
        "test_host_syncs.py::test_known_in_every_place[cpu]",
    ),
    Fault(
        "a-capture-that-is-invalid-at-once-never-passes",
        "failure_kinds:_DISTURBED",
        '"status == cudaStreamCaptureStatus::cudaStreamCaptureStatusActive"',
        '"never"',
        "test_passing.py::test_causes_are_told[busy]",
    ),
    # --- ops that hand back an argument ---
    Fault(
        "nobody-looks-at-what-marked-ops-return",
        "calling.executor:Executor._warm_up",
        "inside or self.hands_back",
        "inside",
        "test_returned_arguments.py::test_a_write_reaches_both[cpu-by_an_eager_step]",
    ),
    Fault(
        "what-is-handed-on-is-not-followed",
        "recordings.returned_arguments:ReturnedArguments.reasons",
        "pair.union(*(g for g in groups if g & pair))",
        "pair",
        "test_returned_arguments.py::test_a_write_reaches_both[cpu-through_two]",
    ),
    Fault(
        "results-are-compared-with-arguments-alone",
        "recordings.returned_arguments:ReturnedArguments.look",
        "combinations(made, 2)",
        "()",
        "test_returned_arguments.py::test_a_write_reaches_both[cpu-two_results]",
    ),
    Fault(
        "memory-is-known-by-its-storage",
        "recordings.returned_arguments:_share",
        "Region.of(one).may_share(Region.of(other))",
        "_torch.storage_key(one) == _torch.storage_key(other)",
        "test_returned_arguments.py::test_a_write_reaches_both[cpu-over_the_same_memory]",
    ),
    Fault(
        "any-write-counts",
        "recordings.returned_arguments:ReturnedArguments._reasons",
        "order[node] > order[op]",
        "True",
        "test_returned_arguments.py::test_captured_where_it_does_not_matter[cpu-written_before]",
    ),
    # --- ops that only a capture refuses ---
    Fault(
        "the-whole-segment-is-eager",
        "recordings.recorder:_Recorder.capture",
        "self.repair.again or self._cut_around(position)",
        "self.repair.again",
        "test_repair.py::test_only_the_guilty_op[cpu]",
    ),
    Fault(
        "an-op-of-somebodys-fails-in-each-place",
        "recordings.repair:Repair.cut",
        "is_somebodys(blamed) or self._times[op_of(blamed)] > 1",
        "self._times[op_of(blamed)] > 1",
        "test_repair.py::test_one_op_in_every_layer[cpu]",
    ),
    Fault(
        "an-op-of-torchs-fails-in-each-place",
        "recordings.repair:Repair.cut",
        "is_somebodys(blamed) or self._times[op_of(blamed)] > 1",
        "is_somebodys(blamed)",
        "test_repair.py::test_an_op_of_torch_in_every_layer[cpu]",
    ),
    Fault(
        "captured-again-behind-an-effect",
        "recordings.repair:Repair.judge",
        "any(map(acts_outside, nodes[:nodes.index(body.node) + 1]))",
        "False",
        "test_repair.py::test_nothing_is_captured_again_behind_an_effect[cpu]",
    ),
    Fault(
        "an-op-is-blamed-for-another-thread",
        "recordings.repair:Repair.pauses",
        "{name: min(max(PAUSE * seconds, MIN_PAUSE), MAX_PAUSE)} if name else {}",
        "{}",
        "test_repair.py::test_disturbed_in_the_pause[cpu]",
    ),
    Fault(
        "an-op-on-another-gpu-runs-once",
        "marks.rules:LiveOp.elsewhere",
        "next(others, None)",
        "None",
        "test_marking.py::test_live_ops_on_another_gpu",
    ),
    Fault(
        "segments-mix-devices",
        "compiling.partition:_runs",
        "device = next(iter(places_of(node, scope)), device)",
        "pass",
        "test_multi_device.py::test_segments_of_two_devices_touch",
    ),
    Fault(
        "a-group-takes-the-first-lock-alone",
        "drivers.multi_device:_Locks.acquire",
        "enumerate(self._locks)",
        "enumerate(self._locks[:1])",
        "test_multi_device.py::test_a_call_has_the_locks_of_all",
    ),
    Fault(
        "a-group-forgets-what-waits",
        "drivers.multi_device:DeviceGroup._run_deferred",
        "driver.deferred.append(self._run_deferred)",
        "pass",
        "test_multi_device.py::test_what_waits_is_not_forgotten",
    ),
    Fault(
        "an-owner-goes-with-the-first-device",
        "drivers.multi_device:_Share.clear",
        "if not self._shares:\n    self._owner.clear()",
        "self._owner.clear()",
        "test_multi_device.py::test_owner_goes_with_the_last",
    ),
    Fault(
        "what-a-group-deferred-waits-for-its-own-call",
        "drivers.multi_device:_Deferred.append",
        "driver.deferred.append(self._run)",
        "pass",
        "test_multi_device.py::test_what_waits_runs_when_any_call_ends",
    ),
    Fault(
        "a-capture-that-cannot-end-takes-all-with-it",
        "recordings.repair:suspects_among",
        "[node for node in nodes if is_somebodys(node)]",
        "[]",
        "test_repair.py::test_a_capture_that_fails_at_its_end[cpu]",
    ),
    Fault(
        "cut-for-ever",
        "recordings.repair:Repair.cut",
        "len(self._apart) >= MAX_CUTS",
        "False",
        "test_repair.py::test_no_more_cuts_than_a_bound[cpu]",
    ),
    Fault(
        "a-hidden-error-is-blamed-on-the-next-op",
        "drivers.tape:TapeDriver.progress",
        "if tape.refusal is not None:\n    raise tape.refusal",
        "pass",
        "test_repair.py::test_an_op_that_hides_its_error[cpu]",
    ),
    Fault(
        "an-op-that-adds-nothing-is-captured",
        "recordings.repair:NodeByNode._look",
        "before == after",
        "False",
        "test_repair.py::test_an_op_that_adds_nothing[cpu]",
    ),
    Fault(
        "the-segment-before-is-run-again",
        "compiling.partition:_runs",
        "nodes[0].name not in apart",
        "True",
        "test_repair.py::test_each_place_in_a_segment[cpu]",
    ),
    Fault(
        "an-op-under-autocast-has-no-name",
        "ir.ambient_modes:Modes.around",
        "call.__wrapped__ = function",
        "pass",
        "test_repair.py::test_under_autocast[cpu]",
    ),
    Fault(
        "death-of-a-static-input-is-missed",
        "calling.release:watch",
        "weakref.ref(tensor, died)",
        "weakref.ref(tensor)",
        "test_contract_release.py::test_dropped_model[cpu]",
    ),
    Fault(
        "reset-releases-nothing",
        "calling.compiled_graph:CompiledGraph.reset",
        "when_idle(self.driver, self._drop_all)",
        "pass",
        "test_contract_release.py::test_reset_of_one_function[cpu]",
    ),
    Fault(
        "failed-warm-up-counts",
        "calling.executor:Executor._not_replayed",
        "outputs = self._warm_up(args)",
        """
        entry.warmed_up = True
        outputs = self._warm_up(args)
        """,
        "test_contract_gaps.py::test_first_call_that_raises_is_no_warm_up[cpu]",
    ),
    Fault(
        "recordings-under-old-keys-kept",
        "calling.compiled_graph:CompiledGraph.run_eagerly",
        "(self.keyed(), self.program.passed_on) != before",
        "False",
        "test_contract_gaps.py::test_keys_read_otherwise_after_a_failed_capture[cpu]",
    ),
    Fault(
        "lock-not-given-back",
        "calling.executor:Executor.__call__",
        """
        driver.lock.release()
        if driver.deferred:
            run_deferred(driver)
        """,
        """
        if driver.deferred:
            run_deferred(driver)
        """,
        "test_contract_gaps.py::test_lock_is_given_back[cpu]",
    ),
    Fault(
        "no-lock",
        "drivers.device:DeviceDriver.__init__",
        "self.lock = locks.lock()",
        "self.lock = __import__('unittest.mock').mock.MagicMock()",
        "test_passing.py::test_one_call_waits_for_a_busy_pool[tape]",
    ),
    # --- lowering: what AOT must keep, and the state around each node ---
    Fault(
        "unused-marked-call-dropped",
        "_torch.aot:traced_as_eager",
        "_side_effects((*keep_alive, *find_overloads('aten::_assert_async')))",
        "_side_effects(())",
        "test_contract_once.py::test_unused_marked_call[cpu]",
    ),
    Fault(
        "unused-draw-dropped",
        "_torch.aot:traced_as_eager",
        "config.patch(fallback_random=True)",
        "config.patch(fallback_random=False)",
        "test_contract_once.py::test_unused_random_draw[cpu-rand]",
    ),
    Fault(
        "mutation-in-an-epilogue",
        "_torch.aot:trace_inference",
        """
        aot_module_simplified(
            gm,
            example_inputs,
            cast(Any, compile_training),
            inference_compiler=cast(Any, compile_inference),
            keep_inference_input_mutations=True,
            disable_functionalization=True,
        )
        """,
        """
        aot_module_simplified(
            gm,
            example_inputs,
            cast(Any, compile_training),
            inference_compiler=cast(Any, compile_inference),
            keep_inference_input_mutations=True,
            disable_functionalization=False,
        )
        """,
        "test_contract_order.py::test_eager_reader_through_a_closure[cpu-WriteThenLook-2-1]",
    ),
    Fault(
        "parameters-are-copied",
        "_torch.aot:static_input_indices",
        "frozenset(context.fw_metadata.static_input_indices or ())",
        "frozenset()",
        "test_contract_aliases.py::test_results_that_are_parameters[cpu]",
    ),
    Fault(
        "classes-are-no-arguments",
        "marks.structure",
        "CONSTANTS = (enum.Enum, type)",
        "CONSTANTS = (enum.Enum,)",
        "test_callables.py::test_classes_as_arguments[cpu]",
        anew=True,
    ),
    Fault(
        "changed-classes-are-not-seen",
        "marks.changes:_State.__init__",
        "vars(kind).items()",
        "()",
        "test_callables.py::test_a_class_method_that_changes_its_class[cpu-True]",
    ),
    Fault(
        "caches-are-marked",
        "marks.functions:_mark",
        "hasattr(function, 'cache_info')",
        "False",
        "test_callables.py::test_a_cache_takes_no_tensors[lru_cache]",
    ),
    Fault(
        "stays-eager-in-silence",
        "calling.training:Training.__call__",
        "self.for_good and (not self.auto_break)",
        "False",
        "test_contract_reasons.py::test_auto_break_off_and_what_a_backward_shows[cpu-create_graph=True-4-None]",
    ),
    Fault(
        "inputs-without-names",
        "_torch.symbols:note_names",
        "_as_written(source, called)",
        "''",
        "test_names.py::test_names_of_inputs",
    ),
    Fault(
        "wrappers-hide-names",
        "_torch.symbols:note_names",
        "names_of_callers(root)",
        "{}",
        "test_names.py::test_names_behind_a_decorator",
    ),
    Fault(
        "differing-arguments-unnamed",
        "marks.functions:_called_otherwise",
        "learned_from(mark)",
        "()",
        "test_marked_modules.py::test_called_otherwise_while_it_is_traced[cpu]",
    ),
    Fault(
        "disabled-by-somebody",
        "_torch.dynamo:_told",
        "file.startswith(_PACKAGE)",
        "False",
        "test_learning.py::test_a_function_that_such_a_break_leaves_uncompiled[cpu]",
    ),
    Fault(
        "compiled-child-unmarked",
        "marks.modules:Modules.of",
        "_torch.original_of(thing)",
        "thing",
        "test_marked_modules.py::test_a_child_that_was_compiled_before[cpu]",
    ),
    Fault(
        "bound-functions-copied",
        "calling.bound:BoundCall.__reduce_ex__",
        "raise BindError('a bound function was copied or pickled, but it is bound to the modules and the graphs of this process', fix='copy the module, compile the copy, and bind that')",
        "return super().__reduce_ex__(protocol)",
        "test_copies.py::test_bound_functions[cpu-deepcopy]",
    ),
    Fault(
        "shapes-stay-in-the-graph",
        "backend:Backend._compile",
        "forget_shapes(lowered.module)",
        "pass",
        "test_functions.py::test_what_only_tracing_needs[cpu]",
    ),
    Fault(
        "no-gpu-is-noticed-late-in-training",
        "backend:Backend._compile",
        "require_cuda()",
        "pass",
        "test_messages.py::test_no_gpu_in_training",
    ),
    Fault(
        "a-reset-of-what-is-not-compiled-is-silent",
        "backend:reset",
        "compiled is None or _torch.holds_compiled(compiled) or executors_of(compiled)",
        "True",
        "test_contract_release.py::test_reset_of_what_is_not_compiled[cpu]",
    ),
    Fault(
        "errors-print-whole-tensors",
        "errors:shown",
        'f"a {type(value).__name__} of shape {list(shape)}"',
        "repr(value)",
        "test_messages.py::test_marks[mark_eager]",
    ),
    Fault(
        "an-option-that-no-optimizer-takes-on-the-cpu",
        "capturing.capture:_OngoingCapture.op",
        "'fused' if self.driver.device.type == 'cpu' else 'capturable'",
        "'capturable'",
        "test_capture.py::test_an_optimizer_that_counts_on_the_host[Adam]",
    ),
    Fault(
        "breaks-without-a-cure",
        "tools.report:_with_cause",
        "told[1].partition(CURED)",
        "(told[1].partition(CURED)[0], '', '')",
        "test_learning.py::test_a_break_says_what_to_do[cpu-writes]",
    ),
    Fault(
        "other-parameters-read-values",
        "marks.call_sites:Site._failed_on_fakes",
        "not began",
        "False",
        "test_functions.py::test_fake_with_other_parameters[cpu]",
    ),
    Fault(
        "every-key-the-first",
        "calling.compiled_graph:CompiledGraph.why_new",
        "self.keys.entries()",
        "()",
        "test_report.py::test_one_key_is_the_first_of_its_program",
    ),
    Fault(
        "wrong-size-padded",
        "tools.varies:_numbers",
        "last - int(size[2])",
        "0",
        "test_varies.py::test_a_size_before_the_last",
    ),
    Fault(
        "backward-without-names",
        "compiling.halves:Halves._joint_of",
        "_torch.name_inputs(placeholders[:count], self.gm)",
        "{}",
        "test_names.py::test_both_halves_of_training",
    ),
    Fault(
        "what-an-op-with-out-read-is-its-result",
        "compiling.lowering:returned_outs",
        "result == read != written",
        "False",
        "test_contract_hostile.py::test_what_an_op_with_out_reads[cpu-aten.slice_scatter.out]",
    ),
    Fault(
        "composites-have-no-meta-key",
        "_torch.asking:run_composite",
        "torch._C._dispatch_key_for_device(first.device.type)",
        "first.device.type.upper()",
        "test_contract_hostile.py::test_outs_behind_a_meta_kernel[cpu]",
    ),
    Fault(
        "outs-forgotten",
        "compiling.lowering:_traced.compiled_by_us",
        "lost_outs(module, outs)",
        "''",
        "test_contract_hostile.py::test_out_that_tracing_forgets[cpu]",
    ),
    Fault(
        "floats-become-tensors",
        "_torch.aot:trace_inference",
        "keep_floats",
        "not keep_floats",
        "test_contract_keys.py::test_floats_are_numbers[cpu-torch.float32]",
    ),
    Fault(
        "floats-computed-by-symbols",
        "compiling.partition:_Flow.of",
        "views if of_floats else sizes",
        "sizes",
        "test_contract_keys.py::test_floats_are_numbers[cpu-torch.float64]",
    ),
    Fault(
        "pythons-decompositions-stay",
        "_torch.aot:_eager_kernels",
        "_aten_overloads()",
        "list(_aten_overloads())[:0]",
        "test_sweep.py::test_as_eager[cpu-nn.functional.softshrink]",
    ),
    Fault(
        "decompositions-of-ops-that-were-asked-for-later-stay",
        "_torch.ops:_aten_overloads",
        "sum(len(vars(packet)) for packet in _aten_packets())",
        "0",
        "test_lowering.py::test_kernels_of_ops_that_were_asked_for_later",
    ),
    Fault(
        "values-come-with-vectors",
        "_torch.aot:_eager_kernels",
        "as_for_plain_tensors().items()",
        "()",
        "test_sweep.py::test_as_eager_with_breaks[cpu-linalg.cond]",
    ),
    Fault(
        "a-batch-of-one-is-folded",
        "_torch.asking:_matmul",
        "right = _repeated(right, left)",
        "pass",
        "test_lowering.py::test_products_of_batches[4x1-none-matmul]",
    ),
    Fault(
        "strides-of-fakes-decide-on-products",
        "_torch.asking:_matmul",
        "_is_large_matrix(batch)",
        "False",
        "test_lowering.py::test_products_of_one_row[attention-shape0]",
    ),
    Fault(
        "a-matrix-that-needs-a-gradient-is-repeated",
        "_torch.asking:_matmul",
        "not _keeps_whole(right)",
        "True",
        "test_lowering.py::test_products_of_views_with_a_matrix[(2, 3, 1, 4)-straight-needs a gradient]",
    ),
    Fault(
        "functions-that-are-no-ops-ignored",
        "compiling.lowering:lower",
        "marks.annotate(gm)",
        "pass",
        "test_contract_reasons.py::test_marks_of_what_is_taken_apart[cpu-no op-0-0-eager_ops]",
    ),
    Fault(
        "marks-of-what-is-taken-apart-ignored",
        "compiling.lowering:_traced",
        "marks.taken_apart(called_ops(gm))",
        "{}",
        "test_contract_reasons.py::test_marks_of_what_is_taken_apart[cpu-softmax-1-0-eager_ops]",
    ),
    Fault(
        "kernels-of-marked-ops-stay",
        "_torch.aot:_entered_around",
        "del op.py_kernels[_COMPOSITE]",
        "pass",
        "test_contract_reasons.py::test_a_mark_ends[cpu]",
    ),
    Fault(
        "marks-without-effect-are-silent",
        "tools.report:explain",
        "(*programs[0].notes, *_notes(compiled, executors, breaks))",
        "programs[0].notes",
        "test_contract_reasons.py::test_marks_without_effect_are_told[cpu]",
    ),
    Fault(
        "ops-ask-for-the-mode-of-a-capture",
        "_torch.observing:_as_without_modes.kernel",
        "_only_observed(args)",
        "False",
        "test_capture_bits.py::test_ops_that_ask_for_modes[cpu-svdvals-no_grad]",
    ),
    Fault(
        "marked-ops-are-taken-apart-above-the-mode",
        "_torch.observing:_as_without_modes.kernel",
        "_is_seen(op, args)",
        "False",
        "test_capture_bits.py::test_marks_of_ops_that_ask[cpu-no_grad]",
    ),
    Fault(
        "an-error-of-autograd-in-the-users-code-is-ours",
        "capturing.gradients:Backward.gradients",
        "_torch.gradients",
        "torch.autograd.grad",
        "test_capture_gradients.py::test_errors_of_autograd_in_the_users_code[cpu]",
    ),
    Fault(
        "an-error-of-autograd-in-a-marked-function-is-ours",
        "marks.saved_for_backward:SavedForBackward.backward",
        "_torch.gradients",
        "torch.autograd.grad",
        "test_functions_gradients.py::test_errors_of_autograd_in_a_marked_function[cpu]",
    ),
    Fault(
        "one-capture-at-a-time-sees-its-marked-ops",
        "_torch.observing:_seen_by.kernel",
        "tuple(asked)",
        "asked[-1:]",
        "test_capture_bits.py::test_marks_in_captures_of_two_threads",
    ),
    Fault(
        "autocast-comes-too-late",
        "_torch.observing:_as_without_modes.kernel",
        "any(map(keys.has, casts))",
        "False",
        "test_capture_bits.py::test_autocast_comes_first[cpu-dtype1]",
    ),
    Fault(
        "ops-under-modes-of-others-change",
        "_torch.observing:_only_observed",
        "len(_observers()) == number_of_dispatch_modes()",
        "True",
        "test_capture_bits.py::test_under_a_mode_of_the_user[cpu]",
    ),
    Fault(
        "gradients-of-a-capture-have-another-formula",
        "capturing.capture:_Watcher.with_other_gradient",
        "not self.under_way.capturing",
        "True",
        "test_capture_bits.py::test_gradients_by_another_formula[cpu-prod]",
    ),
    Fault(
        "eager-steps-run-under-our-modes",
        "capturing.capture:_OngoingCapture._break",
        "_torch.without_observers()",
        "ExitStack()",
        "test_capture_bits.py::test_eager_steps_see_no_mode[cpu]",
    ),
    Fault(
        "bridges-are-read-between-their-elements",
        "capturing.memory:CaptureMemory.bridge",
        "has_gaps(source)",
        "False",
        "test_capture_bits.py::test_memory_beside_a_result[cpu]",
    ),
    Fault(
        "shapes-change-once",
        "capturing.memory:CaptureMemory.refuse_other_shapes",
        "Written.of(before.tensor).lies != before.lies",
        "False",
        "test_capture_bits.py::test_a_tensor_from_outside_keeps_its_shape[cpu]",
    ),
    Fault(
        "memory-on-the-host-is-mapped-once",
        "calling.sharing:SharedMemory._places_in_files",
        "places_in_files(foreign)",
        "NOWHERE",
        "test_contract_processes.py::test_mapped_twice[cpu-mapped]",
    ),
    Fault(
        "files-are-one",
        "ir.mappings:_shared_mappings",
        "int(inode)",
        "0",
        "test_contract_processes.py::test_mapped_apart[cpu]",
    ),
    Fault(
        "tensors-grow-behind-a-capture",
        "capturing.memory:CaptureMemory.refuse_other_place",
        "now.memory != before.memory",
        "False",
        "test_capture_bits.py::test_a_tensor_that_gets_other_memory[cuda]",
        gpu=True,
    ),
    Fault(
        "numbers-are-read-in-a-capture",
        "marks.rules:_argument",
        "name in names",
        "False",
        "test_capture_bits.py::test_numbers_that_are_read_on_the_host[cpu]",
    ),
    Fault(
        "what-is-passed-twice-is-two",
        "capturing.capture:_OngoingCapture._note",
        "[passed[id(leaf)] for leaf in leaves]",
        "[self._argument(leaf, f'{base}_argument_{number}', calls, reason.source) for number, leaf in enumerate(leaves)]",
        "test_capture_bits.py::test_a_tensor_that_is_passed_twice[cpu]",
    ),
    Fault(
        "a-capture-sees-marked-ops-in-parts",
        "capturing.capture:_OngoingCapture._composite",
        "not self.capturing",
        "True",
        "test_contract_reasons.py::test_marks_of_composite_ops_in_a_capture[cpu-linear-no_grad]",
    ),
    Fault(
        "a-capture-sees-ops-of-other-threads",
        "capturing.capture:_OngoingCapture._composite",
        "active.handler.get() is not self",
        "False",
        "test_contract_reasons.py::test_marks_of_composite_ops_in_other_threads[cpu]",
    ),
    Fault(
        "marked-parts-are-captured-under-inference-mode",
        "capturing.capture:_OngoingCapture.op",
        "_torch.is_composite(func)",
        "False",
        "test_contract_reasons.py::test_marks_of_parts_in_a_capture[cpu]",
    ),
    Fault(
        "only-some-errors-of-aot-are-refusals",
        "compiling.lowering:_traced",
        "error in ours",
        "error in ours or not isinstance(error, RuntimeError)",
        "test_contract_hostile.py::test_whatever_aot_raises[cpu-KeyError]",
    ),
    Fault(
        "faults-of-our-own-pass-for-refusals",
        "compiling.lowering:_traced",
        """
        if error in ours:
            raise
        """,
        "pass",
        "test_contract_hostile.py::test_faults_of_our_own[cpu]",
    ),
    Fault(
        "faults-of-our-own-are-dynamos",
        "backend:Backend.__call__",
        "Exception",
        "ZeroDivisionError",
        "test_contract_hostile.py::test_faults_of_our_own[cpu]",
    ),
    # --- graphs that run as Dynamo traced them ---
    Fault(
        "checkpoints-run-as-dynamo-left-them",
        "compiling.traced:_INSTEAD",
        "'tag_activation_checkpoint'",
        "''",
        "test_traced.py::test_trains_as_eager[cpu-checkpoint]",
        since="2.13",
    ),
    Fault(
        "checkpoints-forget-their-contexts",
        "compiling.traced:checkpointed",
        "kwargs['context_fn'] = context",
        "pass",
        "test_traced.py::test_selective_checkpoint_saves[cpu]",
    ),
    Fault(
        "checkpoints-of-other-options",
        "compiling.traced:checkpointed",
        "checkpoint(body.forward, *args, **{'use_reentrant': False, **kwargs})",
        "checkpoint(body.forward, *args, use_reentrant=False)",
        "test_traced.py::test_trains_as_eager[cpu-no random state]",
    ),
    Fault(
        "regions-run-as-dynamo-left-them",
        "compiling.traced:_INSTEAD",
        "'invoke_subgraph'",
        "''",
        "test_traced.py::test_trains_as_eager[cpu-region]",
    ),
    Fault(
        "functions-run-as-dynamo-left-them",
        "compiling.traced:_INSTEAD",
        "'autograd_function_apply'",
        "''",
        "test_traced.py::test_saved_values_are_watched[cpu]",
    ),
    Fault(
        "second-derivatives-past-once-differentiable",
        "compiling.traced:_prepare_function",
        "None if refused else around",
        "around",
        "test_traced.py::test_once_differentiable[cpu]",
    ),
    Fault(
        "second-derivatives-past-switches",
        "compiling.traced:_prepare_function",
        "len(switches) == 2 and switches == [inside[0], inside[-1]] and (switches[0].args == (False,))",
        "bool(switches) or (switches == [inside[0], inside[-1]] and switches[0].args == (False,))",
        "test_traced.py::test_second_derivative_past_switches[cpu]",
    ),
    Fault(
        "results-hold-their-own-history",
        "compiling.traced:applied.Function.setup_context",
        "[None if i in saved_for_backward_idx else value for i, value in enumerate(kept)]",
        "list(kept)",
        "test_traced.py::test_saved_values_go_with_the_result[cpu]",
    ),
    # --- inputs that are no plain tensors ---
    Fault(
        "ragged-dimensions-are-numbers",
        "compiling.partition:_Builder._kind",
        "'ragged' if _torch.is_ragged(value) else 'number'",
        "'number'",
        "test_contract_inputs.py::test_ragged_sizes_are_this_calls[cpu]",
    ),
    Fault(
        "stolen-containers-are-kept",
        "compiling.flat_inputs:FlatGraph.around.flattening",
        "argument.clear()",
        "pass",
        "test_contract_inputs.py::test_lists_and_dicts[cpu-False]",
    ),
    Fault(
        "dynamos-graph-is-changed",
        "compiling.flat_inputs:FlatGraph.of",
        "return cls(fx.GraphModule(gm, graph), flat, tuple(stolen))",
        """
        gm.graph = graph
        return cls(gm, flat, tuple(stolen))
        """,
        "test_contract_inputs.py::test_lists_and_dicts[cpu-False]",
    ),
    Fault(
        "copies-of-known-dtypes-only",
        "recordings.copies:copied_as",
        "None if tensor.dtype in _COPIED else _BITS[tensor.element_size()]",
        "None",
        "test_bridges.py::test_copies_of_any_dtype[cpu-uint4]",
    ),
    Fault(
        "lazy-bits-are-copied-as-they-lie",
        "recordings.copies:_copy",
        "target.is_conj() or source.is_conj() or target.is_neg() or source.is_neg()",
        "False",
        "test_bridges.py::test_copies_of_conjugates[cpu-complex32]",
    ),
    Fault(
        "clones-of-known-dtypes-only",
        "recordings.copies:clone_exact",
        "tensor.dtype not in _COPIED",
        "False",
        "test_bridges.py::test_copies_of_any_dtype[cpu-uint4]",
    ),
    Fault(
        "layouts-without-strides-are-lowered",
        "compiling.lowering:lower",
        "(torch.strided, torch.jagged)",
        "(torch.strided, torch.jagged, torch._mkldnn)",
        "test_contract_inputs.py::test_layout_without_strides[cpu]",
    ),
    Fault(
        "callers-autocast-stays-on",
        "compiling.lowering:_traced.compiled_by_us",
        "None if autocast else _torch.written_without_wrappers(gm, module)",
        "_torch.written_without_wrappers(gm, module)",
        "test_contract_ambient.py::test_autocast_switched_off_inside_the_callers[cpu]",
    ),
    Fault(
        "callers-autocast-ignored",
        "compiling.lowering:note_ambient",
        "{cast[0]: cast for cast in now.autocast}",
        "{}",
        "test_contract_ambient.py::test_callers_autocast[cpu]",
    ),
    Fault(
        "traced-grad-mode-ignored",
        "compiling.lowering:_note",
        "grad = bool(node.args[0])",
        "pass",
        "test_contract_ambient.py::test_traced_grad_mode[cpu]",
    ),
    Fault(
        "callers-grad-mode-ignored",
        "compiling.lowering:note_ambient",
        "now.grad",
        "False",
        "test_contract_ambient.py::test_callers_grad_mode[cpu]",
    ),
    # --- partition and marks: what is captured, and in what order ---
    Fault(
        "writes-come-last",
        "compiling.partition:_Flow.of",
        "tuple(actions)",
        "tuple(sorted(actions, key=lambda node: bool(written_arguments(node))))",
        "test_contract_order.py::test_write_between[cpu]",
    ),
    Fault(
        "arguments-on-one-storage-are-one",
        "compiling.partition:_Flow.of",
        "roots.get(_torch.storage_key(value)) if node.op == 'call_function' else None",
        "roots.get(_torch.storage_key(value)) if True else None",
        "test_partition.py::test_arguments_that_share_a_storage",
    ),
    Fault(
        "result-of-an-in-place-op-is-the-whole",
        "compiling.partition:_Draft.resolve",
        "self.resolve(flow.source[node])",
        "self.resolve(flow.root[node])",
        "test_contract_aliases.py::test_aliases[cpu-of_an_in_place_op_on_a_view]",
    ),
    Fault(
        "captured-ops-ignore-ambient-state",
        "compiling.partition:_Builder._segment",
        "under_ambient(draft.graph)",
        "pass",
        "test_contract_ambient.py::test_captured_op_under_autocast[cpu]",
    ),
    Fault(
        "bodies-ignore-ambient-state",
        "compiling.partition:runnable",
        "under_ambient(module.graph)",
        "pass",
        "test_contract_ambient.py::test_cond_body_under_autocast[cpu]",
    ),
    Fault(
        "getitem-leaves-its-producer",
        "compiling.partition:_Flow.of",
        "attached.setdefault(call, [])",
        "actions",
        "test_partition.py::test_getitem_stays_with_its_producer",
    ),
    Fault(
        "min-kernels-ignored",
        "compiling.partition:_runs",
        "max(min_kernels, 1)",
        "1",
        "test_contract_reasons.py::test_min_kernels[cpu]",
    ),
    Fault(
        "regions-write-all-they-take",
        "ir.effects:_written_by_higher_order",
        "[operand for pairs in written for operand, place in pairs if place]",
        "[operand for pairs in written for operand, place in pairs]",
        "test_effects.py::test_a_region_reads[cpu]",
    ),
    Fault(
        "views-of-operands-not-followed",
        "ir.effects:_written",
        "not memory.isdisjoint(storages_of(place))",
        "False",
        "test_effects.py::test_a_region_writes[cpu-reads_and_writes]",
    ),
    Fault(
        "results-in-results-stay-behind",
        "ir.effects:producer_of",
        """
        while is_getitem(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        """,
        """
        if is_getitem(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        """,
        "test_effects.py::test_nested_results[cpu-captured]",
    ),
    Fault(
        "checks-with-no-symbol-left-are-dropped",
        "ir.effects:late_values",
        "comes_late or not symbols <= known or (not late.isdisjoint(node.all_input_nodes))",
        "comes_late or not symbols <= known",
        "test_effects.py::test_checks[cpu-equals]",
    ),
    Fault(
        "sizes-with-no-symbol-left-are-frozen",
        "ir.effects:late_values",
        "is_pinned(node)",
        "False",
        "test_effects.py::test_checks[cpu-counted]",
        since="2.13",
    ),
    Fault(
        "assertions-go-unnoticed",
        "_torch.aot:traced_as_eager",
        "(*keep_alive, *find_overloads('aten::_assert_async'))",
        "keep_alive",
        "test_effects.py::test_assertions[asserted]",
    ),
    Fault(
        "ops-without-a-result-are-dropped",
        "compiling.lowering:kept_ops",
        "not op._schema.returns",
        "False",
        "test_effects.py::test_ops_without_a_result[cpu]",
    ),
    Fault(
        "unused-batch-norms-are-dropped",
        "compiling.lowering:kept_ops",
        "found.update((op for name in WRITES_UNDECLARED for op in _torch.find_overloads(name)))",
        "None",
        "test_contract_once.py::test_unused_batch_norm[cpu]",
    ),
    Fault(
        "arguments-that-overlap-are-merged",
        "_torch.aot:apart",
        "tenants[storage_key(value)] > 1",
        "tenants[storage_key(value)] > 2",
        "test_overlap.py::test_one_memory[cpu-one storage]",
    ),
    Fault(
        "overlap-is-looked-for-once",
        "calling.sharing:SharedMemory.is_written",
        "(places, layouts) == addresses.apart",
        "addresses.apart[0]",
        "test_overlap.py::test_one_memory[cpu-by turns]",
    ),
    Fault(
        "written-memory-is-told-by-its-beginning",
        "ir.overlap:Region.may_share",
        "self.end <= other.start or other.end <= self.start",
        "self.start != other.start",
        "test_overlap.py::test_one_memory[cpu-two storages]",
    ),
    Fault(
        "columns-are-taken-for-one-piece",
        "ir.overlap:Region.of",
        "math.gcd(period, step)",
        "0",
        "test_overlap.py::test_what_lies_apart[columns]",
    ),
    Fault(
        "slices-of-marked-functions-are-joined",
        "marks.call_sites:Site.look_for_overlaps",
        "_torch.storage_key(tensor) == _torch.storage_key(target) and (not known_apart(tensor, target))",
        "_torch.storage_key(tensor) == _torch.storage_key(target)",
        "test_overlap.py::test_slices_in_a_marked_function[cpu-aot_eager]",
    ),
    Fault(
        "kernels-of-users-are-dropped",
        "compiling.lowering:kept_ops",
        "found.union((target for target in _targets(gm) if isinstance(target, _torch.HigherOrderOperator)))",
        "found",
        "test_triton.py::test_a_kernel_writes",
        gpu=True,
    ),
    Fault(
        "waits-stay-behind-the-cut",
        "compiling.partition:_Builder._draft",
        "draft.wait_for(node)",
        "pass",
        "test_collectives.py::test_a_segment_waits[cpu-over_a_break]",
    ),
    Fault(
        "the-tape-waits-for-nothing",
        "drivers.tape:_Awaited.__call__",
        "_torch.pytree.tree_map_only(torch.Tensor, _torch.wait_tensor(), result)",
        "result",
        "test_collectives.py::test_the_tape_waits_for_each_result",
    ),
    Fault(
        "collectives-are-issued-while-taping",
        "drivers.tape:_Tape._run",
        "_torch.results_like(func, args, kwargs) if asynchronous else func(*args, **kwargs)",
        "_torch.results_like(func, args, kwargs) if False else func(*args, **kwargs)",
        "test_collectives.py::test_collectives[cpu-gathered]",
    ),
    Fault(
        "marks-in-bodies-ignored",
        "ir.effects:effective_ops",
        "bodies(node)",
        "()",
        "test_effects.py::test_effective_ops_of_a_subgraph",
    ),
    Fault(
        "masks-are-captured",
        "marks.rules:RULES",
        "boolean_index",
        "sparse",
        "test_contract_reasons.py::test_rule[cpu-masked_write]",
    ),
    # --- drivers ---
    Fault(
        "tape-keeps-writes-of-the-capture",
        "drivers.tape:_Tape.undo",
        "self._undo.restore()",
        "pass",
        "test_driver_contract.py::test_capture_writes_nothing[tape]",
    ),
    Fault(
        "tape-keeps-draws-of-the-capture",
        "drivers.tape:TapeSession._undo",
        "self._states.restore()",
        "pass",
        "test_driver_contract.py::test_capture_leaves_the_generator[tape-rand]",
    ),
    Fault(
        "tape-does-not-poison",
        "drivers.tape:_Tape.undo",
        "_poison(storage, dtype)",
        "pass",
        "test_driver_contract.py::test_poison_of_booleans",
    ),
    Fault(
        "tape-reads-freed-memory",
        "drivers.tape:TapeGraph.run",
        "memory.check(self._brought)",
        "pass",
        "test_driver_contract.py::test_freed_memory_is_not_read",
    ),
    Fault(
        "random-graph-launched-directly",
        "drivers.cuda:CudaGraph._replay_through_torch",
        """
        if not self.draws_random:
            self._executable = self._handle
        """,
        """
        if True:
            self._executable = self._handle
        """,
        "test_cuda.py::test_hidden_synchronisation_runs_eagerly",
        gpu=True,
    ),
    Fault(
        "streams-not-ordered",
        "drivers.ordering:Order.follow",
        "self._streams[stream].wait_event(self._end)",
        "pass",
        "test_contract_gaps.py::test_streams_wait_for_each_other",
        gpu=True,
    ),
    Fault(
        "pool-leaked",
        "drivers.cuda:CudaDriver._give_back",
        "wait and (not self._live) and (not self._leaving)",
        "False",
        "test_cuda.py::test_reset_gives_memory_back",
        gpu=True,
    ),
    Fault(
        "generator-left-in-capture-mode",
        "drivers.cuda:CudaDriver._repair",
        "self._open_pool()",
        "self._draws.stuck, self._pool = (False, torch.cuda.graph_pool_handle())",
        "test_cuda.py::test_hidden_synchronisation_runs_eagerly",
        gpu=True,
    ),
    Fault(
        "a-capture-that-has-begun-goes-on",
        "drivers.generator:Draws.spoilt",
        "status",
        "False",
        "test_cuda_threads.py::test_a_capture_that_torch_fails_to_begin_is_ended[a segment's-some error]",
        gpu=True,
    ),
    Fault(
        "captures-on-a-stream-of-torchs",
        "drivers.generator:Draws.__init__",
        "_new_stream(device)",
        "torch.cuda.Stream(device)",
        "test_cuda_threads.py::test_no_stream_of_torchs_is_captured",
        gpu=True,
    ),
    Fault(
        "pool-of-a-failed-capture-kept",
        "drivers.generator:Draws.spoilt",
        "_torch.release_pool(self.index, pool)",
        "pass",
        "test_cuda.py::test_failed_captures_leave_no_memory",
        gpu=True,
    ),
    Fault(
        "draws-during-captures",
        "drivers.generator:draws",
        "captures if _torch.ONE_CAPTURE_STATE else Turns()",
        "Turns()",
        "test_cuda_threads.py::test_a_crowd_that_captures_replays_and_drops",
        gpu=True,
    ),
    Fault(
        "plain-draws-during-captures",
        "recordings.plain:_Turn.enter",
        """
        with self.drawing(), self.state.enter() if self.state is not None else nullcontext():
            yield
        """,
        """
        with self.state.enter() if self.state is not None else nullcontext():
            yield
        """,
        "test_cuda_threads.py::test_a_plain_call_that_draws_waits_for_a_capture_that_draws",
        gpu=True,
    ),
    Fault(
        "daemon-threads-in-a-launch",
        "drivers.cuda",
        "atexit.register(_leave)",
        "pass",
        "test_process_end.py::test_ends_quietly[daemon threads replay]",
        gpu=True,
    ),
    Fault(
        "events-for-ever",
        "drivers.ordering:Order.mark",
        "self._alone < IDLE",
        "True",
        "test_ordering.py::test_streams_that_are_idle_are_forgotten",
    ),
    Fault(
        "a-turn-that-others-had-is-given-up",
        "drivers.generator:Turns.take",
        "self._count == before",
        "True",
        "test_ordering.py::test_many_short_turns_are_waited_for",
    ),
    Fault(
        "eviction-waits",
        "calling.release:release",
        "driver.release(graphs, owner, wait=wait)",
        "driver.release(graphs, owner)",
        "test_executor.py::test_eviction_does_not_wait[tape]",
    ),
    Fault(
        "disturbed-once-eager-for-good",
        "recordings.recorder:_Recorder._capture_failed",
        "self.repair.judge(passing(error), body, nodes)",
        "''",
        "test_passing.py::test_recorded_again_once_it_has_passed[tape-memory]",
    ),
    Fault(
        "tried-again-at-every-call",
        "calling.retries:Trials.is_due",
        "call >= self.next_call",
        "True",
        "test_passing.py::test_pauses[tape-memory]",
    ),
    Fault(
        "pauses-stay-short",
        "calling.retries:Trials.failed",
        "min(2 ** min(self.row, MAX_PAUSE), MAX_PAUSE)",
        "1",
        "test_retries.py::test_pauses_double",
    ),
    Fault(
        "a-segment-is-blamed-for-memory",
        "calling.retries:Trials.blames_the_segment",
        "self.cause == 'disturbed' and self.disturbed > MAX_DISTURBED",
        "self.row > MAX_DISTURBED",
        "test_retries.py::test_what_surely_passes_is_never_the_segments_fault[memory]",
    ),
    Fault(
        "a-failed-recording-keeps-its-graphs",
        "recordings.recorder:_Recorder.capture",
        "self._give_back(position, self.put_off.cause)",
        "self.locations.keep_nothing(self.specialised.program, 0)",
        "test_passing.py::test_the_rest_of_the_call_has_the_memory[tape]",
    ),
    Fault(
        "the-rest-is-captured-after-a-failure",
        "recordings.recorder:_Recorder.capture",
        "self.put_off is None",
        "True",
        "test_passing.py::test_the_rest_of_the_call_has_the_memory[tape]",
    ),
    Fault(
        "a-swollen-pool-keeps-its-memory",
        "recordings.recorder:_Recorder._give_back",
        """
        if cause == 'memory':
            self.driver.vacate()
        """,
        "pass",
        "test_passing.py::test_others_vacate_a_pool[tape]",
    ),
    Fault(
        "what-is-vacated-is-gone-for-good",
        "calling.compiled_graph:CompiledGraph.vacate",
        "release(self.keys.entries(), self.statistics, self.keys, self.driver, wait=True)",
        "\n        release(self.keys.entries(), self.statistics, self.keys, self.driver, wait=True)\n        self.keys.sets.clear()\n        ",
        "test_passing.py::test_others_vacate_a_pool[tape]",
    ),
    Fault(
        "results-that-find-no-memory-end-the-call",
        "recordings.recorder:record",
        "recorder.give_up(error)",
        "raise",
        "test_passing.py::test_no_memory_for_the_results[tape]",
    ),
    Fault(
        "a-launch-that-fails-in-a-capture-is-forgotten",
        "capturing.capture:_OngoingCapture._end",
        "Exception",
        "KeyError",
        "test_passing.py::test_a_launch_that_fails[cpu]",
    ),
    Fault(
        "placed-errors-do-not-pass",
        "capturing.capture:_placed",
        "as_passing(placed, error)",
        "placed",
        "test_passing.py::test_a_block_that_could_not_begin[cpu-2]",
    ),
    Fault(
        "what-libraries-hide-is-never-another-threads",
        "failure_kinds:passing",
        "_HIDDEN in text and threading.active_count() > 1",
        "False",
        "test_passing.py::test_what_libraries_hide",
    ),
    Fault(
        "each-call-waits-for-a-busy-pool",
        "calling.executor:Executor._without_pool",
        "lose_patience(self.driver)",
        "pass",
        "test_passing.py::test_one_call_waits_for_a_busy_pool[tape]",
    ),
    Fault(
        "no-call-ever-waits-again",
        "calling.release:lose_patience",
        "driver.deferred.append(functools.partial(setattr, driver, 'patience', LOCK_TIMEOUT))",
        "pass",
        "test_passing.py::test_one_call_waits_for_a_busy_pool[tape]",
    ),
    Fault(
        "memory-that-ran-out-in-an-op-of-its-own-error",
        "failure_kinds:passing",
        "passing(error.__cause__) if error.__cause__ is not None else ''",
        "''",
        "test_passing.py::test_causes_are_told[memory]",
    ),
    Fault(
        "errors-of-the-device-name-nothing",
        "calling.executor:Executor._locked",
        "blame(error, driver, self.name, keys.latest())",
        "pass",
        "test_process_end.py::test_an_eager_steps_error_of_the_device_is_the_same_object",
    ),
    Fault(
        "advice-of-torchs-counts-as-an-assertion",
        "failure_kinds:is_device_error",
        "message(error)",
        "str(error)",
        "test_process_end.py::test_device_errors_are_told_from_others",
    ),
    Fault(
        "callers-that-nobody-can-refer-to-weakly",
        "callers:_weakly",
        "TypeError",
        "KeyError",
        "test_report_reach.py::test_reached[cpu-method of an object with slots]",
    ),
    Fault(
        "a-lost-device-wraps-what-an-eager-step-raised",
        "calling.device_errors:blame",
        "isinstance(error, ReplayError) or is_generated(error) or is_ours(error)",
        "True",
        "test_process_end.py::test_an_eager_steps_error_of_the_device_is_the_same_object",
    ),
    Fault(
        "workspace-left-in-the-pool",
        "drivers.cuda:CudaDriver.recording",
        "_torch.clear_cublas_workspaces()",
        "pass",
        "test_cuda.py::test_reset_gives_memory_back",
        gpu=True,
    ),
    Fault(
        "workspaces-in-the-pool-of-a-failed-capture",
        "drivers.cuda:CudaDriver._open_pool",
        "_torch.clear_cublas_workspaces()",
        "pass",
        "test_cuda.py::test_workspaces_of_a_failed_capture",
        gpu=True,
    ),
    Fault(
        "dropped-executor-releases-nothing",
        "calling.compiled_graph:CompiledGraph.__init__",
        "weakref.finalize(self, release_all, self.keys, self.statistics, driver).atexit = False",
        "pass",
        "test_executor.py::test_executor_that_is_dropped[cuda]",
        gpu=True,
    ),
    Fault(
        "other-kernels-than-eager",
        "_torch.aot:traced_as_eager",
        "stack.enter_context(_eager_kernels())",
        "pass",
        "test_cuda.py::test_kernels_as_in_eager[conv batchnorm train-dtype0]",
        gpu=True,
    ),
    Fault(
        "host-scalars-frozen",
        "calling.keys:KeyReader.shapes",
        "\n        if self.scalars:\n            shapes += tuple((scalar_bytes(args[index]) for index in self.scalars))\n        ",
        "\n        if False:\n            shapes += tuple((scalar_bytes(args[index]) for index in self.scalars))\n        ",
        "test_cuda.py::test_host_scalars_are_keyed_then_eager",
        gpu=True,
    ),
    # --- what tools see ---
    Fault(
        "fills-count-as-kernels",
        "drivers.cuda:CudaGraph.kernels",
        "(node.name for node in self.nodes() if node.kind == 'kernel')",
        "(node.name for node in self.nodes())",
        "test_cuda.py::test_nodes_that_are_no_kernels",
        gpu=True,
    ),
    Fault(
        "child-graphs-are-skipped",
        "drivers.graph_nodes:_nodes",
        "yield from _nodes(child)",
        "del child",
        "test_graph_nodes.py::test_reads_nodes",
    ),
    Fault(
        "replays-run-from-no-file",
        "recordings.replay:emit",
        "file(source, name) if file is not None else None",
        "None if file is None or file(source, name) else None",
        "test_sources.py::test_replay_runs_from_its_file[cpu]",
    ),
    Fault(
        "segments-run-from-no-file",
        "tools.sources:_run_from",
        "(type(module).forward.__code__, _) = _forward(module, tree, file)",
        "pass",
        "test_sources.py::test_segment_runs_from_its_file[cpu-eager-hits0]",
    ),
    Fault(
        "segments-are-captured-from-no-file",
        "tools.sources:DepyfFiles.captured",
        "self.debug is None",
        "False",
        "test_sources.py::test_segment_runs_from_its_file[cpu-None-hits1]",
    ),
    Fault(
        "nobody-looks-behind-ops-in-files",
        "tools.sources:_Stepped.run",
        "body.ends(nodes[name], result)",
        "None",
        "test_sources.py::test_a_capture_from_files_finds_the_guilty_op[cpu]",
    ),
    Fault(
        "files-are-overwritten",
        "tools.sources:place",
        "path.exists()",
        "number < 0",
        "test_export.py::test_again",
    ),
    Fault(
        "every-replay-is-named",
        "tools.profiling:Profiling",
        "staticmethod(_torch.profiler_enabled)",
        "staticmethod(lambda: True)",
        "test_profiling.py::test_nothing_without_a_profiler[cpu]",
    ),
    Fault(
        "an-error-leaves-its-range-open",
        "tools.profiling:_Named.__call__",
        "self._ranges.end()",
        "pass",
        "test_profiling.py::test_an_error_ends_its_range[cpu]",
    ),
    Fault(
        "profiled-replays-count-apart",
        "tools.profiling:_Named.__call__",
        "emit(self._recording, self._ranges.begin, tally=self._tally)",
        "emit(self._recording, self._ranges.begin)",
        "test_profiling.py::test_one_tally[cpu]",
    ),
    Fault(
        "plain-calls-are-told-each",
        "tools.journal:Journal.plain",
        "why not in self._whys",
        "True",
        "test_journal.py::test_limits_are_warned_of_once[cpu]",
    ),
    Fault(
        "recordings-are-traced-nowhere",
        "tools.journal:Journal.recorded",
        "self.artifact(f'recording {number}', lambda: {'why': why, **facts, 'steps': step_names(recording)})",
        "''.format(f'recording {number}', lambda: {'why': why, **facts, 'steps': step_names(recording)})",
        "test_journal.py::test_trace",
        anew=True,
    ),
    # --- tables of ops ---
    Fault(
        "a-table-with-a-misspelt-op",
        "marks.rules:READS_HOST",
        "_torch.aten('_local_scalar_dense item is_nonzero equal _assert_scalar')",
        "_torch.aten('_local_scalar_dense item is_non_zero equal _assert_scalar')",
        "test_op_tables.py::test_each_name_is_an_op_of_the_torches_that_have_it",
    ),
    Fault(
        "a-table-that-looks-its-ops-up",
        "drivers.tape:COPIES",
        "_torch.aten('_to_copy copy_')",
        "frozenset((getattr(aten, name)._qualified_op_name for name in ('_to_copy', 'copy_')))",
        "test_op_tables.py::test_a_torch_without_the_ops_of_the_tables",
    ),
    # --- the page ---
    Fault(
        "a-source-line-ends-the-data",
        "tools.page:_embedded",
        "text.replace('&', '\\\\u0026').replace('<', '\\\\u003c')",
        "text.replace('&', '\\\\u0026')",
        "test_page.py::test_data_cannot_break_out",
    ),
    Fault(
        "advice-about-inputs-behind-a-break-of-dynamos",
        "tools.verdict:_in_place_inputs",
        "f' in {RESUMED}' in source_line(node)",
        "False",
        "test_measure.py::test_no_advice_about_inputs_behind_a_break_of_dynamos",
    ),
    Fault(
        "a-marked-function-that-is-a-graph-has-no-place",
        "marks.rules:user_line_of",
        "source_line(node) or call_ops.definition_of(op_of(node), node.args)",
        "source_line(node)",
        "test_report.py::test_text_of_a_marked_function_by_itself",
    ),
    Fault(
        "loads-count-to-the-break-before-them",
        "recordings.replay:_Writer.source",
        "start, _ = spans.get(statement.step, (len(lines), 0))",
        "start = len(lines)",
        "test_page.py::test_source_lines[cpu-several]",
    ),
)


def path_of(test: str) -> Path:
    """The file of a test, relative to the folder of the project: no two have one name."""
    return _FILES[test.partition("::")[0]]


_FILES = {path.name: path.relative_to(ROOT) for path in TESTS.rglob("test_*.py")}


def copy_to(root: Path) -> None:
    """Copy the package, its tests and their settings to ``root``; compiled files are made there, once for all runs."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in (PACKAGE, TESTS.name):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)


def run(
    root: Path, tests: Iterable[str], *options: str, gpu: bool = False, limit: float = TIMEOUT
) -> tuple[int | None, str]:
    """Run ``tests`` on the copy in ``root``, with more ``options`` of pytest's; returns pytest's exit code, and its output.

    The code is None if they ran for more than ``limit`` seconds.

    Processes are forked from one that has imported torch and compiled something; where CUDA is used, which does not
    survive a fork, each imports torch by itself.
    """
    output = root / "output.txt"
    output.unlink(missing_ok=True)
    process = fresh.process(_run_here, str(root), list(tests), options, output=output, forked=not gpu)
    process.start()
    process.join(limit)
    if hung := process.is_alive():
        process.kill()
        process.join()
    return None if hung else process.exitcode, output.read_text(encoding="utf-8")


def _run_here(root: str, tests: Sequence[str], options: Sequence[str]) -> None:
    os.chdir(root)
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    sys.path.insert(0, root)
    import breakable_backend

    assert Path(breakable_backend.__file__).is_relative_to(root), breakable_backend.__file__
    ids = [f"{path_of(test)}{''.join(test.partition('::')[1:])}" for test in tests]
    sys.exit(pytest.main([*OPTIONS, *options, *ids]))
