"""One-line faults in the package, each with the test that has to notice it: ``test_sabotage.py`` proves that it does.

A fault is an exact replacement in one file of a copy of the package. The named test then has to fail, in a process of
its own that imports the copy.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = "breakable_backend"
TIMEOUT = 300.0
"""Seconds after which a run counts as hung."""
PRELOADED = ["torch._dynamo.testing", "torch._functorch.aot_autograd", "hypothesis.strategies", "pytest", "rich.table"]
"""What takes seconds to import, and is imported once for all faults."""

OPTIONS = "-x -q --tb=short --show-capture=no --assert=plain -p no:cacheprovider".split()


@dataclass(frozen=True)
class Fault:
    """``old``, which occurs once in ``module``, replaced by ``new``, has to turn ``test`` red."""

    name: str
    module: str
    """A file of the package."""
    old: str
    new: str
    test: str
    """Node id below the folder of tests."""
    gpu: bool = False
    """Whether only a GPU shows it."""

    def source(self) -> str:
        """The text of the module with the fault in it."""
        text = (ROOT / PACKAGE / self.module).read_text(encoding="utf-8")
        assert text.count(self.old) == 1, f"{self.name}: {self.old!r} is {text.count(self.old)} times in {self.module}"
        assert self.old != self.new
        return text.replace(self.old, self.new)

    def apply(self, root: Path) -> None:
        """Put the fault into the copy of the package in ``root``."""
        (root / PACKAGE / self.module).write_text(self.source(), encoding="utf-8")


FAULTS = (
    # --- growth ---
    Fault(
        "sites-for-ever",
        "functions.py",
        "if not _torch.keep_with_code(site):",
        "if True:",
        "test_growth.py::test_sites_go_with_what_was_compiled[cpu]",
    ),
    Fault(
        "sites-of-nobody",
        "_torch.py",
        "            InstructionTranslator.current_tx().output.cleanups.append(cast(Any, functools.partial(id, thing)))\n",
        "",
        "test_growth.py::test_sites_go_with_what_was_compiled[cpu]",
    ),
    Fault(
        "what-dynamo-skipped-is-not-told",
        "_torch.py",
        "code in input_codes and code not in _MODULE_CALLS",
        "False and code not in _MODULE_CALLS",
        "test_report_reach.py::test_what_dynamo_skips[cpu-vmap]",
    ),
    # --- what a report reaches ---
    Fault(
        "callees-are-in-no-report",
        "_torch.py",
        "if frame.f_code is _COMPILE_WRAPPER:",
        "if False:",
        "test_report_reach.py::test_reached[cpu-module that calls a function with a break]",
    ),
    Fault(
        "compiled-children-are-in-no-report",
        "_torch.py",
        "*_wrappers_of_module(thing), *_frames_of_module(thing)]",
        "*_frames_of_module(thing)]",
        "test_report_reach.py::test_reached[cpu-compiled functions in a dict of a plain module]",
    ),
    Fault(
        "what-dynamo-forgot-is-in-the-report",
        "backend.py",
        "            executor.callers.gone = True",
        "            pass",
        "test_report_reach.py::test_nothing_is_left_after_dynamo_was_reset[cpu]",
    ),
    Fault(
        "who-calls-a-graph-that-is-there-is-not-noted",
        "executor.py",
        "        self.callers.note()\n",
        "",
        "test_report_reach.py::test_a_callee_behind_an_object[cpu]",
    ),
    # --- Python's collector ---
    Fault(
        "the-first-recording-to-end-lets-the-collector-go",
        "drivers/collector.py",
        "if not _holders and gc.get_threshold()[0] == 0:",
        "if gc.get_threshold()[0] == 0:",
        "test_driver_contract.py::test_recordings_in_two_threads_hold_off_the_collector[tape]",
    ),
    Fault(
        "a-threshold-of-the-users-is-lost",
        "drivers/collector.py",
        "if not _holders and gc.get_threshold()[0] == 0:",
        "if not _holders:",
        "test_driver_contract.py::test_recording_respects_who_disables_the_collector[tape]",
    ),
    # --- errors ---
    Fault(
        "errors-without-a-line",
        "errors.py",
        "where or user_line(), fix",
        "where, fix",
        "test_catalogue.py::test_every_error_shows_the_users_line[unknown option]",
    ),
    Fault(
        "errors-show-a-line-of-the-package",
        "errors.py",
        "(os.path.dirname(torch.__file__), os.path.dirname(__file__), ",
        "(os.path.dirname(torch.__file__), os.path.dirname(torch.__file__), ",
        "test_catalogue.py::test_every_error_shows_the_users_line[is not an op]",
    ),
    Fault(
        "an-error-that-the-catalogue-lacks",
        "export.py",
        'raise OptionsError("export: nothing was captured", ',
        'raise OptionsError("export: there is nothing", ',
        "test_catalogue.py::test_every_error_has_a_case",
    ),
    Fault(
        "no-shapes-and-gradients",
        "sites.py",
        '            return [torch.empty(1, dtype=torch.int64, device="cpu")] if needs else []',
        "            return []",
        "test_functions_gradients.py::test_no_shapes_where_gradients_are_needed[cpu]",
    ),
    Fault(
        "cuda-forgets-the-line-that-failed",
        "drivers/cuda.py",
        ", where=user_line(error.__traceback__)",
        "",
        "test_catalogue.py::test_every_error_shows_the_users_line[drivers/cuda.py: capture]",
    ),
    Fault(
        "a-swallowed-error-has-no-line",
        "capture.py",
        "                where=user_line(self.failed.__traceback__),\n",
        "",
        "test_catalogue.py::test_every_error_shows_the_users_line[nothing was captured, since an error was caught inside]",
    ),
    # --- marked functions in compiled code ---
    Fault(
        "unused-calls-of-marked-functions-go",
        "ops.py",
        "    torch.fx.has_side_effect(op)  #",
        "    op  #",
        "test_functions.py::test_one_node[aot_eager-cpu]",
    ),
    Fault(
        "marked-functions-forget-autocast",
        "sites.py",
        "stack.enter_context(torch.autocast(device, dtype=dtype))",
        "pass",
        "test_functions.py::test_autocast[aot_eager-cpu]",
    ),
    Fault(
        "marked-functions-lose-aliases",
        "structure.py",
        "            owners.setdefault(_torch.storage_key(argument), number)",
        "            pass",
        "test_functions.py::test_aliases_of_arguments[eager-cpu]",
    ),
    Fault(
        "results-of-marked-functions-unchecked",
        "sites.py",
        "if not want.fits(root):",
        "if False:",
        "test_functions.py::test_other_result_than_the_fake[aot_eager-cpu-shape]",
    ),
    Fault(
        "structures-of-marked-functions-unchecked",
        "sites.py",
        "if taken.structure != self.expected.result:",
        "if False:",
        "test_functions.py::test_other_result_than_the_fake[eager-cpu-plain]",
    ),
    Fault(
        "fake-run-for-every-trace",
        "sites.py",
        "        if key is None or key not in self.known:",
        "        if True:",
        "test_functions.py::test_shapes_from_the_function_itself[aot_eager-cpu]",
    ),
    # --- compare mode, and the first replay ---
    Fault(
        "first-replay-unchecked",
        "executor.py",
        "        check_places(recording, args)\n",
        "",
        "test_compare.py::test_first_replay_looks_at_bridges[cpu-moved]",
    ),
    Fault(
        "every-replay-checked",
        "executor.py",
        "        entry.replay = replay\n        return replay.function(args, stream)",
        "        return replay.function(args, stream)",
        "test_compare.py::test_later_replays_do_not_look[cpu]",
    ),
    Fault(
        "first-replay-of-a-capture-unchecked",
        "graph.py",
        "        captured.check()\n        captured.replay = replay\n",
        "        captured.replay = replay\n",
        "test_compare.py::test_first_replay_of_a_capture[cpu-moved]",
    ),
    Fault(
        "first-replay-under-a-profiler-unchecked",
        "executor.py",
        "            check_places(entry.recording, args)  # this may be the first replay\n",
        "",
        "test_compare.py::test_first_replay_under_a_profiler[cpu-compile]",
    ),
    Fault(
        "steps-timed-in-the-modes-of-the-caller",
        "measure.py",
        "with graph.modes.enter():",
        "if True:",
        "test_measure.py::test_captured_graph_in_its_modes[cpu]",
    ),
    Fault(
        "comparison-not-undone",
        "compare.py",
        "            undo.restore()\n",
        "",
        "test_compare.py::test_mutated_input[cpu]",
    ),
    Fault(
        "comparison-draws-for-the-caller",
        "compare.py",
        "            generator.set_state(state)",
        "            pass",
        "test_compare.py::test_equals_eager[cpu-drawing]",
    ),
    Fault(
        "comparison-of-makings-only",
        "compare.py",
        "found = [*self._wrong_inside(position, ran), *self._wrong_outside(position, ran)]",
        "found = [*self._wrong_inside(position, ran)]",
        "test_compare.py::test_wrong_mutation[cpu]",
    ),
    Fault(
        "divergence-leaves-the-wrong-step-done",
        "compare.py",
        "        ran.undo.restore()\n",
        "",
        "test_compare.py::test_wrong_mutation[cpu]",
    ),
    Fault(
        "comparison-by-value",
        "difference.py",
        "differs = got.view(integer) != want.view(integer)",
        "differs = got != want",
        "test_compare.py::test_difference_of_bits[cpu-dtype0]",
    ),
    Fault(
        "kept-arguments-unseen",
        "witness.py",
        "            self.kept += twins.kept(name, source)",
        "            twins.kept(name, source)",
        "test_compare.py::test_argument_kept_while_recording[cpu]",
    ),
    Fault(
        "arguments-held-after-the-call",
        "compare.py",
        "            held.clear()",
        "            pass",
        "test_compare.py::test_nothing_of_a_call_is_held[cpu]",
    ),
    Fault(
        "undeclared-writes-unseen",
        "compare.py",
        "                    self.undeclared[value.name] = call.label, call.source, own",
        "                    pass",
        "test_compare.py::test_stale_bridge_by_a_write_that_is_not_declared[cpu]",
    ),
    Fault(
        "results-uncompared",
        "compare.py",
        "            self._compare_results(self.program, results)",
        "            pass",
        "test_compare.py::test_wrong_result[cpu]",
    ),
    Fault(
        "races-unseen",
        "compare.py",
        "        self._refuse_late(position)\n",
        "",
        "test_compare.py::test_late_values[cpu-False]",
    ),
    Fault(
        "numbers-of-the-fake-run",
        "sites.py",
        "torch.tensor(taken.ints, dtype",
        "torch.tensor([1] * len(taken.ints), dtype",
        "test_functions.py::test_numbers[aot_eager-cpu]",
    ),
    Fault(
        "functions-give-away-what-they-keep",
        "structure.py",
        "    return _torch.owners_of_storage(group[0]) > len(holders)",
        "    return False",
        "test_functions.py::test_what_a_function_keeps[eager-cpu]",
    ),
    Fault(
        "fresh-results-are-copied",
        "structure.py",
        "    if recording:\n        return False\n    holders",
        "    if not recording:\n        return True\n    holders",
        "test_functions.py::test_fresh_results_are_not_copied[cpu]",
    ),
    Fault(
        "writes-of-marked-functions-undeclared",
        "ops.py",
        'f"Tensor(a{number}!) written_{number}, "',
        'f"Tensor written_{number}, "',
        "test_functions.py::test_no_clone_of_what_is_written[cpu]",
    ),
    Fault(
        "modules-with-stale-buffers",
        "sites.py",
        "            stack.enter_context(_torch.swapped(module, other))",
        "            pass",
        "test_functions.py::test_buffer_that_traced_code_wrote[aot_eager-cpu]",
    ),
    Fault(
        "fake-run-on-the-module-itself",
        "sites.py",
        "made = twins[id(original)] = kind.__new__(kind)",
        "made = twins[id(original)] = original",
        "test_functions.py::test_fake_run_leaves_a_module_alone[cpu]",
    ),
    Fault(
        "one-tape-for-all-calls",
        "tapes.py",
        "    return _tapes.get(int(handle.item()))",
        "    return _tapes[min(_tapes)]",
        "test_functions_gradients.py::test_two_forward_passes[aot_eager-cpu]",
    ),
    Fault(
        "tapes-freed-by-the-first-backward",
        "tapes.py",
        "retain_graph=True",
        "retain_graph=False",
        "test_functions_gradients.py::test_backward_twice[eager-cpu]",
    ),
    Fault(
        "tapes-for-ever",
        "tapes.py",
        "weakref.WeakValueDictionary[int, Tape] = weakref.WeakValueDictionary()",
        "dict[int, Tape] = {}",
        "test_functions_gradients.py::test_nothing_is_left[aot_eager-cpu]",
    ),
    Fault(
        "tapes-on-memory-of-compiled-code",
        "sites.py",
        "(copy_of(tensor) if copied else tensor)",
        "tensor",
        "test_functions_gradients.py::test_memory_that_compiled_code_uses_again[inductor-cpu]",
    ),
    Fault(
        "results-on-memory-of-tapes",
        "sites.py",
        "            made = [copy_of(root) for root in made]",
        "            pass",
        "test_functions_gradients.py::test_memory_that_compiled_code_uses_again[inductor-cpu]",
    ),
    Fault(
        "hooks-of-parameters-run-twice",
        "sites.py",
        "if same and not (recording and _torch.has_hooks(mine)):",
        "if same:",
        "test_functions_gradients.py::test_hooks_run_once[eager-cpu]",
    ),
    Fault(
        "every-result-needs-gradients",
        "ops.py",
        "ctx.mark_non_differentiable(*(",
        "list((",
        "test_functions_gradients.py::test_what_needs_none[eager-cpu]",
    ),
    Fault(
        "views-with-other-gradients",
        "structure.py",
        "elif self.recording and not _is_view(tensor):",
        "elif False:",
        "test_functions_gradients.py::test_view_with_a_gradient_of_its_own[eager-cpu]",
    ),
    Fault(
        "shared-gradients-count-twice",
        "structure.py",
        "            return [(tensor, where)]",
        "            return wanting",
        "test_functions_gradients.py::test_shared_results[eager-cpu]",
    ),
    Fault(
        "recompute-draws-anew",
        "gradients.py",
        "use_reentrant=False)",
        "use_reentrant=False, preserve_rng_state=False)",
        "test_functions_gradients.py::test_recompute[eager-cpu]",
    ),
    Fault(
        "closures-lose-gradients",
        "sites.py",
        "return self.grad and any(",
        "return False and any(",
        "test_functions_gradients.py::test_closures_are_refused[cpu]",
    ),
    # --- the second door ---
    Fault(
        "capture-keeps-no-inputs",
        "capture.py",
        "        else:\n            self.held[key] = tensor.untyped_storage()",
        "        else:\n            pass",
        "test_capture.py::test_inputs_are_kept[cpu]",
    ),
    Fault(
        "capture-hands-out-kept-results",
        "results.py",
        "and _torch.storage_key(leaf) not in known:",
        "and False:",
        "test_capture.py::test_function_that_keeps_its_result[cpu]",
    ),
    Fault(
        "capture-clones-aliases-apart",
        "results.py",
        "by_storage.setdefault(_torch.storage_key(leaf), [])",
        "by_storage.setdefault(id(leaf), [])",
        "test_doors.py::test_equals_eager[capture-cpu-results that share memory]",
    ),
    Fault(
        "capture-copies-arguments",
        "capture.py",
        "known |= set(map(_torch.storage_key, taken))",
        "known |= set()",
        "test_doors.py::test_equals_eager[capture-cpu-result that is an input]",
    ),
    Fault(
        "segment-not-launched-at-its-end",
        "capture.py",
        "        graph.replay(self.stream)",
        "        pass",
        "test_doors.py::test_equals_eager[capture-cpu-one break]",
    ),
    Fault(
        "plain-results-unchecked",
        "results.py",
        "if not (self.host_only or _is_same(value, leaf.value)):",
        "if False:",
        "test_capture.py::test_result_that_cannot_be_written_back[cpu-plain]",
    ),
    Fault(
        "plain-fields-of-objects-unchecked",
        "results.py",
        "if _is_plain(item) or _holds_tensors(item)}",
        "if _holds_tensors(item)}",
        "test_capture.py::test_result_that_cannot_be_written_back[cpu-field of an object]",
    ),
    Fault(
        "plain-lists-of-objects-unchecked",
        "results.py",
        "items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)",
        "items = (value,)",
        "test_capture.py::test_result_that_cannot_be_written_back[cpu-list in an object]",
    ),
    Fault(
        "capture-with-a-warm-autocast-cache",
        "seen.py",
        "    if _torch.any_autocast_enabled():\n",
        "    if False:\n",
        "test_capture_streams.py::test_warm_autocast_cache[cpu]",
    ),
    Fault(
        "recording-with-a-warm-autocast-cache",
        "recording.py",
        "            with without_autocast_cache():",
        "            if True:",
        "test_contract_ambient.py::test_captured_op_in_a_warm_autocast_region[cpu]",
    ),
    Fault(
        "captures-without-autocast-clear-its-flag",
        "seen.py",
        "    if _torch.any_autocast_enabled():\n",
        "    if True:\n",
        "test_capture_streams.py::test_compiled_function_is_not_compiled_again[cpu]",
    ),
    Fault(
        "regions-in-a-capture-cache-casts",
        "seen.py",
        "    entered = enter(region)\n    torch.set_autocast_cache_enabled(False)\n",
        "    entered = enter(region)\n",
        "test_capture_streams.py::test_warm_autocast_cache[cpu]",
    ),
    Fault(
        "methods-stay-seen",
        "seen.py",
        "                setattr(owner, name, seen.method)",
        "                    pass",
        "test_capture_streams.py::test_nothing_is_left_of_a_capture[cpu]",
    ),
    Fault(
        "barrier-of-a-capture-forgotten",
        "capture.py",
        "for barrier in (self.barrier, mark",
        "for barrier in (None, mark",
        "test_capture.py::test_barrier_of_a_capture[cpu]",
    ),
    Fault(
        "breaks-forget-events",
        "drivers/streams.py",
        "            self._recorded[id(event)] = event, self._segment",
        "            pass",
        "test_capture_streams.py::test_break_while_streams_overlap[1]",
        gpu=True,
    ),
    Fault(
        "waits-for-work-outside-once",
        "drivers/streams.py",
        "            self._waits[id(event)] = Wait(event, elsewhere)",
        "            wait(event, self._caller)",
        "test_capture_streams.py::test_wait_for_work_outside[stream]",
        gpu=True,
    ),
    Fault(
        "events-of-segments-recorded-once",
        "drivers/streams.py",
        "                self._used.append(event)",
        "                pass",
        "test_capture_streams.py::test_event_of_a_segment_in_an_eager_function",
        gpu=True,
    ),
    Fault(
        "moved-weights-unnoticed",
        "graph.py",
        "            if alive() is not None:\n",
        "            if False:\n",
        "test_capture_hostile.py::test_parameter_that_moves[cpu]",
    ),
    Fault(
        "launches-past-hooks",
        "drivers/cuda.py",
        "or (self._hooks and any(self._hooks)):",
        "or False:",
        "test_capture_streams.py::test_hooks_on_launches[own]",
    ),
    Fault(
        "lost-alias-unchecked",
        "results.py",
        "if leaf.group < 0 and value.data_ptr() != leaf.value and value.numel():",
        "if False:",
        "test_capture.py::test_result_that_cannot_be_written_back[cpu-alias lost]",
    ),
    Fault(
        "capture-forgets-autocast",
        "capture.py",
        "ambient = modes if modes != self.modes else None",
        "ambient = None",
        "test_doors.py::test_equals_eager[capture-cpu-autocast in the model]",
    ),
    Fault(
        "capture-owns-parameters",
        "capture.py",
        "            if isinstance(tensor, nn.Parameter):",
        "            if False:",
        "test_capture.py::test_dropped_model[cpu]",
    ),
    Fault(
        "marked-in-marked-breaks-again",
        "capture.py",
        "token = active.handler.set(None)",
        "token = active.handler.set(self)",
        "test_capture.py::test_is_capturing[cpu]",
    ),
    Fault(
        "failed-capture-keeps-its-graphs",
        "capture.py",
        "                self.driver.release(graphs, [*self.steps, self.constants, self.held])",
        "                pass",
        "test_capture.py::test_error_in_an_eager_function[cuda]",
        gpu=True,
    ),
    Fault(
        "compiled-call-inside-capture-keeps-its-breaks",
        "executor.py",
        "(handler := door.get()) is not None:",
        "(handler := door.get()) is not None and False:",
        "test_capture.py::test_compiled_function_inside[cpu]",
    ),
    Fault(
        "replay-in-the-modes-of-the-caller",
        "graph.py",
        "if self.breaks and not self.modes.are_current():",
        "if False:",
        "test_capture_hostile.py::test_modes_of_the_capture[cpu]",
    ),
    Fault(
        "graph-freed-while-it-is-replayed",
        "graph.py",
        "        if not self._use:\n            self._free()",
        "        if True:\n            self._free()",
        "test_capture_hostile.py::test_reset_by_an_eager_step[cpu]",
    ),
    Fault(
        "graph-captured-while-it-is-replayed",
        "graph.py",
        "        if self._use:\n            self._refuse_use(error)\n",
        "",
        "test_capture_hostile.py::test_captured_while_in_use[cpu]",
    ),
    Fault(
        "replay-inside-a-capture-is-captured",
        "graph.py",
        "(handler := active.handler.get()) is not None:",
        "(handler := active.handler.get()) is not None and False:",
        "test_capture_hostile.py::test_replay_inside_a_capture[cpu]",
    ),
    Fault(
        "other-tasks-are-captured",
        "capture.py",
        "if active.handler.get() is not self and threading.get_ident() == self.thread:",
        "if False:",
        "test_capture_hostile.py::test_tasks[cpu]",
    ),
    Fault(
        "arguments-read-after-the-call",
        "capture.py",
        "            parts = Parts.of(",
        "            known |= set(map(_torch.storage_key, tensors_on(self.driver.device, (args, kwargs))))\n"
        "            parts = Parts.of(",
        "test_capture_hostile.py::test_object_that_a_function_changes[cpu]",
    ),
    Fault(
        "lazy-bits-of-results-lost",
        "_torch.py",
        "tensor = tensor.conj() if conjugated else tensor",
        "pass",
        "test_capture_hostile.py::test_lazy_views[cpu]",
    ),
    Fault(
        "regions-are-captured",
        "marking.py",
        "if found is None and REGION_KEY in",
        "if False and REGION_KEY in",
        "test_capture.py::test_region[cpu]",
    ),
    Fault(
        "what-goes-on-behind-a-break-is-another-function",
        "_torch.py",
        "while (resumed := ContinueExecutionCache.generated_code_metadata.get(whole)) is not None:",
        "while (resumed := None) is not None:",
        "test_report_reach.py::test_a_callee_of_two_models[cpu]",
    ),
    # --- replay: generated source ---
    Fault(
        "emitted-skips-a-load",
        "replay.py",
        "yield from self._loads(step.loads)",
        "yield from self._loads(step.loads[1:])",
        "test_contract_stale.py::test_fresh_inputs[cpu]",
    ),
    Fault(
        "emitted-skips-a-store",
        "replay.py",
        "for copy in step.stores:",
        "for copy in ():",
        "test_contract_stale.py::test_mutated_input[cpu]",
    ),
    Fault(
        "emitted-ignores-ambient-state",
        "replay.py",
        "if call.ambient is not None:",
        "if False:",
        "test_contract_ambient.py::test_traced_autocast[cpu-True]",
    ),
    Fault(
        "emitted-keeps-dead-names",
        "replay.py",
        "dead = sorted(name for name in names if last[name] == position)",
        "dead = []",
        "test_replay.py::test_names_go_early",
    ),
    Fault(
        "emitted-checks-no-eager-result",
        "replay.py",
        "if call.spec is not None:",
        "if False:",
        "test_replay.py::test_eager_result_is_checked[shape]",
    ),
    Fault(
        "interpreter-skips-a-load",
        "replay.py",
        "for copy in step.loads)",
        "for copy in step.loads[1:])",
        "test_contract_stale.py::test_fresh_inputs[cpu]",
    ),
    # --- recording: what enters and leaves captured segments ---
    Fault(
        "eager-write-to-a-bridged-input-is-missed",
        "recording.py",
        "self.loaded.discard(access.storage)",
        "pass",
        "test_contract_gaps.py::test_eager_write_between_two_graphs[cpu]",
    ),
    Fault(
        "eager-result-is-read-where-it-was",
        "recording.py",
        "self.outside.add(name)\n\n    def _is_constant_view",
        "pass\n\n    def _is_constant_view",
        "test_contract_stale.py::test_eager_result_is_bridged[cpu]",
    ),
    Fault(
        "captured-write-to-an-eager-result-is-missed",
        "recording.py",
        "graph.replay(self.stream)\n        for access in segment.writes:",
        "graph.replay(self.stream)\n        for access in ():",
        "test_contract_aliases.py::test_aliases[cpu-eager_result_that_a_graph_writes]",
    ),
    Fault(
        "eager-write-to-an-eager-result-is-missed",
        "recording.py",
        "self.loaded.discard(access.storage)\n            self.intact.pop(access.storage, None)",
        "self.loaded.discard(access.storage)",
        "test_contract_aliases.py::test_aliases[cpu-eager_result_that_eager_writes]",
    ),
    Fault(
        "recording-skips-the-store-back",
        "recording.py",
        "for copy in stores:",
        "for copy in ():",
        "test_contract_stale.py::test_mutated_input[cpu]",
    ),
    Fault(
        "views-of-arguments-are-constants",
        "recording.py",
        "all(slot.name in self.constants for slot in slots)",
        "all(slot.name in self.values for slot in slots)",
        "test_contract_aliases.py::test_aliases[cpu-same_result_of_eager_twice]",
    ),
    Fault(
        "outputs-cloned-apart",
        "recording.py",
        "behind[name] > 1 else home",
        "behind[name] > 9 else home",
        "test_contract_aliases.py::test_aliases[cpu-views_of_one_result]",
    ),
    Fault(
        "pool-memory-returned",
        "recording.py",
        "return not self._is_input(place.name) and",
        "return False and",
        "test_contract_once.py::test_counts_of_the_silly_model[cpu]",
    ),
    Fault(
        "pool-memory-told-by-name",
        "recording.py",
        "_torch.storage_key(local[place.name]) in self._owned_storages()",
        "place.name in self.constants",
        "test_contract_gaps.py::test_eager_op_that_returns_its_argument[cpu]",
    ),
    Fault(
        "static-inputs-held",
        "recording.py",
        'if value.kind == "constant":',
        'if value.kind in ("constant", "static"):',
        "test_contract_release.py::test_dropped_model[cpu]",
    ),
    Fault(
        "failed-capture-leaves-loads-done",
        "recording.py",
        "self._unbridge(copy.value.name)",
        "pass",
        "test_contract_reasons.py::test_capture_that_fails[cpu]",
    ),
    Fault(
        "plain-call-checks-no-eager-result",
        "recording.py",
        "if call.spec is not None and not call.spec.accepts(result):",
        "if False:",
        "test_contract_exceptions.py::test_wrong_fake_implementation[cpu]",
    ),
    Fault(
        "interrupted-recording-is-kept",
        "recording.py",
        "recorder.forget()\n        driver.release(graphs)",
        "pass",
        "test_contract_exceptions.py::test_driver_is_clean_after_an_error[cpu]",
    ),
    # --- executor: keys, bounds, calls ---
    Fault(
        "addresses-not-in-the-key",
        "executor.py",
        "return Key(addresses, shapes)",
        "return Key((), shapes)",
        "test_contract_keys.py::test_swapped_parameter_data[cpu]",
    ),
    Fault(
        "ints-not-in-the-key",
        "executor.py",
        "shapes: ShapeKey = tuple([args[index] for index in self.numbers])",
        "shapes: ShapeKey = ()",
        "test_contract_keys.py::test_ints[cpu]",
    ),
    Fault(
        "open-layouts-not-in-the-key",
        "executor.py",
        "if self.open_layouts:",
        "if False:",
        "test_executor.py::test_key_reads_open_layouts[tape]",
    ),
    Fault(
        "minus-zero-is-zero",
        "executor.py",
        'struct.pack("d", tensor.item())',
        "tensor.item()",
        "test_executor.py::test_scalar_bytes",
    ),
    Fault(
        "scalars-not-in-the-key",
        "executor.py",
        "if self.scalars:",
        "if False:",
        "test_executor.py::test_scalar_with_many_values[tape]",
    ),
    Fault(
        "recorded-for-ever",
        "executor.py",
        "if now - oldest_entry.last_call < IDLE_FACTOR * limit:",
        "if False:",
        "test_contract_keys.py::test_few_recordings_and_many_keys[cpu]",
    ),
    Fault(
        "never-evicted",
        "executor.py",
        "if now - oldest_entry.last_call < IDLE_FACTOR * limit:",
        "if True:",
        "test_contract_keys.py::test_keys_that_are_no_longer_used[cpu]",
    ),
    Fault(
        "written-input-never-bridged",
        "executor.py",
        "if len(values) <= limit:",
        "if True:",
        "test_contract_keys.py::test_mutated_input_at_many_addresses[cpu]",
    ),
    Fault(
        "reentrant-call-not-plain",
        "executor.py",
        'if in_call():\n            return self._plain(args, "called inside an eager step")\n        ',
        "",
        "test_concurrency.py::test_a_thread_with_the_context_of_an_eager_step[cpu]",
    ),
    Fault(
        "a-call-in-a-context-of-its-own-is-no-nested-one",
        "executor.py",
        "if driver.busy:  # with",
        "if False:  # with",
        "test_concurrency.py::test_another_context_in_an_eager_step[cpu]",
    ),
    Fault(
        "a-copied-context-is-in-a-call-for-ever",
        "executor.py",
        "call.over, driver.busy = True, False",
        "call.over, driver.busy = False, False",
        "test_concurrency.py::test_a_context_copied_in_an_eager_step[cpu]",
    ),
    Fault(
        "a-copied-context-is-in-a-capture-for-ever",
        "active.py",
        "held.value = self.default",
        "pass",
        "test_concurrency.py::test_a_context_copied_inside_a_capture[cpu]",
    ),
    Fault(
        "every-thread-is-in-a-capture-whose-context-it-has",
        "active.py",
        "held is None or held.thread != threading.get_ident():",
        "held is None:",
        "test_concurrency.py::test_a_thread_with_the_context_of_a_capture[cpu]",
    ),
    Fault(
        "a-report-waits-for-a-call",
        "executor.py",
        "with self._changing:\n            # A replay moves",
        "with self.driver.lock:\n            # A replay moves",
        "test_concurrency.py::test_a_report_does_not_wait_for_a_call[cpu]",
    ),
    Fault(
        "dispatch-mode-does-not-see",
        "executor.py",
        "if _torch.dispatch_mode_active():",
        "if False:",
        "test_executor.py::test_under_a_dispatch_mode[tape]",
    ),
    Fault(
        "failed-capture-is-forgotten",
        "executor.py",
        "if failed:",
        "if False:",
        "test_contract_reasons.py::test_capture_that_fails[cpu]",
    ),
    Fault(
        "death-of-a-static-input-is-missed",
        "executor.py",
        "weakref.ref(args[v.index], died)",
        "weakref.ref(args[v.index])",
        "test_contract_release.py::test_dropped_model[cpu]",
    ),
    Fault(
        "reset-releases-nothing",
        "executor.py",
        "self.driver.deferred.append(self._drop_all)",
        "pass",
        "test_contract_release.py::test_reset_of_one_function[cpu]",
    ),
    Fault(
        "failed-warm-up-counts",
        "executor.py",
        'outputs = self._plain(args, "warm-up")',
        'entry.warm = True\n        outputs = self._plain(args, "warm-up")',
        "test_contract_gaps.py::test_first_call_that_raises_is_no_warm_up[cpu]",
    ),
    Fault(
        "recordings-under-old-keys-kept",
        "executor.py",
        "if self._keyed() != keyed:",
        "if False:",
        "test_contract_gaps.py::test_keys_read_otherwise_after_a_failed_capture[cpu]",
    ),
    Fault(
        "lock-not-given-back",
        "executor.py",
        "driver.lock.release()\n            if driver.deferred:",
        "if driver.deferred:",
        "test_contract_gaps.py::test_lock_is_given_back[cpu]",
    ),
    Fault(
        "no-lock",
        "drivers/tape.py",
        "self.lock = locks.lock()",
        'self.lock = __import__("unittest.mock").mock.MagicMock()',
        "test_executor.py::test_busy_pool[tape]",
    ),
    # --- lowering: what AOT must keep, and the state around each node ---
    Fault(
        "unused-marked-call-dropped",
        "_torch.py",
        "stack.enter_context(_side_effects(kept))",
        "stack.enter_context(_side_effects(()))",
        "test_contract_once.py::test_unused_marked_call[cpu]",
    ),
    Fault(
        "unused-draw-dropped",
        "_torch.py",
        "fallback_random=True",
        "fallback_random=False",
        "test_contract_once.py::test_unused_random_draw[cpu-rand]",
    ),
    Fault(
        "mutation-in-an-epilogue",
        "_torch.py",
        "disable_functionalization=True",
        "disable_functionalization=False",
        "test_contract_order.py::test_eager_reader_through_a_closure[cpu-WriteThenLook-2-1]",
    ),
    Fault(
        "parameters-are-copied",
        "_torch.py",
        "return frozenset(context.fw_metadata.static_input_indices or ())",
        "return frozenset()",
        "test_contract_aliases.py::test_results_that_are_parameters[cpu]",
    ),
    Fault(
        "outs-forgotten",
        "lowering.py",
        "if lost := lost_outs(module, outs):",
        'if lost := "":',
        "test_contract_hostile.py::test_out_that_tracing_forgets[cpu]",
    ),
    Fault(
        "floats-become-tensors",
        "_torch.py",
        "        if keep_floats:\n",
        "        if not keep_floats:\n",
        "test_contract_keys.py::test_floats_are_numbers[cpu-torch.float32-softplus]",
    ),
    Fault(
        "floats-computed-by-symbols",
        "partition.py",
        "(views if of_floats else sizes).add(node)",
        "sizes.add(node)",
        "test_contract_keys.py::test_floats_are_numbers[cpu-torch.float64-in Python]",
    ),
    Fault(
        "pythons-decompositions-stay",
        "_torch.py",
        "for op in _aten_overloads() for key",
        "for op in list(_aten_overloads())[:0] for key",
        "test_sweep.py::test_as_eager[cpu-nn.functional.softshrink]",
    ),
    Fault(
        "functions-that-are-no-ops-ignored",
        "lowering.py",
        "    marks.annotate(gm)\n",
        "",
        "test_contract_reasons.py::test_marks_of_what_is_taken_apart[cpu-no op-0-0-eager_ops]",
    ),
    Fault(
        "marks-of-what-is-taken-apart-ignored",
        "lowering.py",
        "around = marks.taken_apart(_called_ops(gm))",
        "around = {}",
        "test_contract_reasons.py::test_marks_of_what_is_taken_apart[cpu-softmax-1-0-eager_ops]",
    ),
    Fault(
        "kernels-of-marked-ops-stay",
        "_torch.py",
        "            del op.py_kernels[key]\n",
        "            pass\n",
        "test_contract_reasons.py::test_a_mark_ends[cpu]",
    ),
    Fault(
        "marks-without-effect-are-silent",
        "report.py",
        "notes=(*programs[0].notes, *notes)",
        "notes=programs[0].notes",
        "test_contract_reasons.py::test_marks_without_effect_are_told[cpu]",
    ),
    Fault(
        "a-capture-does-not-tell-what-it-sees-in-parts",
        "capture.py",
        "if parts := seen_in_parts():",
        "if False:",
        "test_contract_reasons.py::test_marks_that_a_capture_sees_in_parts[cpu]",
    ),
    Fault(
        "only-some-errors-of-aot-are-refusals",
        "lowering.py",
        "    except Exception as error:  # AOTAutograd raises",
        "    except RuntimeError as error:  # AOTAutograd raises",
        "test_contract_hostile.py::test_whatever_aot_raises[cpu-KeyError]",
    ),
    Fault(
        "faults-of-our-own-pass-for-refusals",
        "lowering.py",
        "        if error in ours:\n            raise\n",
        "",
        "test_contract_hostile.py::test_faults_of_our_own[cpu]",
    ),
    Fault(
        "faults-of-our-own-are-dynamos",
        "backend.py",
        "        except Exception as error:  # Dynamo would ask",
        "        except ZeroDivisionError as error:  # Dynamo would ask",
        "test_contract_hostile.py::test_faults_of_our_own[cpu]",
    ),
    # --- graphs that run as Dynamo traced them ---
    Fault(
        "checkpoints-run-as-dynamo-left-them",
        "traced.py",
        '    "tag_activation_checkpoint": checkpointed,\n',
        "",
        "test_traced.py::test_trains_as_eager[cpu-checkpoint]",
    ),
    Fault(
        "checkpoints-forget-their-contexts",
        "traced.py",
        'kwargs["context_fn"] = context',
        "pass",
        "test_traced.py::test_selective_checkpoint_saves[cpu]",
    ),
    Fault(
        "checkpoints-of-other-options",
        "traced.py",
        '**{"use_reentrant": False, **kwargs})',
        "use_reentrant=False)",
        "test_traced.py::test_trains_as_eager[cpu-no random state]",
    ),
    Fault(
        "regions-run-as-dynamo-left-them",
        "traced.py",
        '    "invoke_subgraph": region,\n',
        "",
        "test_traced.py::test_trains_as_eager[cpu-region]",
    ),
    Fault(
        "functions-run-as-dynamo-left-them",
        "traced.py",
        '    "autograd_function_apply": applied,\n',
        "",
        "test_traced.py::test_saved_values_are_watched[cpu]",
    ),
    Fault(
        "second-derivatives-past-once-differentiable",
        "traced.py",
        "= None if refused else around",
        "= around",
        "test_traced.py::test_once_differentiable[cpu]",
    ),
    Fault(
        "second-derivatives-past-switches",
        "traced.py",
        "around = len(switches) == 2 and",
        "around = bool(switches) or",
        "test_traced.py::test_second_derivative_past_switches[cpu]",
    ),
    Fault(
        "results-hold-their-own-history",
        "traced.py",
        "[None if i in saved_for_backward_idx else value for i, value in enumerate(kept)]",
        "list(kept)",
        "test_traced.py::test_saved_values_go_with_the_result[cpu]",
    ),
    # --- inputs that are no plain tensors ---
    Fault(
        "ragged-dimensions-are-numbers",
        "partition.py",
        'return "ragged" if _torch.is_ragged(value) else "number"',
        'return "number"',
        "test_contract_inputs.py::test_ragged_sizes_are_this_calls[cpu]",
    ),
    Fault(
        "stolen-containers-are-kept",
        "flat.py",
        "                    argument.clear()",
        "                    pass",
        "test_contract_inputs.py::test_lists_and_dicts[cpu-False]",
    ),
    Fault(
        "dynamos-graph-is-changed",
        "flat.py",
        "return cls(fx.GraphModule(gm, graph), flat",
        "gm.graph = graph\n        return cls(gm, flat",
        "test_contract_inputs.py::test_lists_and_dicts[cpu-False]",
    ),
    Fault(
        "copies-of-known-dtypes-only",
        "buffers.py",
        "return None if tensor.dtype in _COPIED else _BITS[tensor.element_size()]",
        "return None",
        "test_buffers.py::test_copies_of_any_dtype[cpu-uint4]",
    ),
    Fault(
        "lazy-bits-are-copied-as-they-lie",
        "buffers.py",
        "if target.is_conj() or source.is_conj() or target.is_neg() or source.is_neg():",
        "if False:",
        "test_buffers.py::test_copies_of_conjugates[cpu-complex32]",
    ),
    Fault(
        "clones-of-known-dtypes-only",
        "buffers.py",
        "    if tensor.dtype not in _COPIED:\n",
        "    if False:\n",
        "test_buffers.py::test_copies_of_any_dtype[cpu-uint4]",
    ),
    Fault(
        "layouts-without-strides-are-lowered",
        "lowering.py",
        "value.layout not in (torch.strided, torch.jagged)",
        "value.layout not in (torch.strided, torch.jagged, torch._mkldnn)",
        "test_contract_inputs.py::test_layout_without_strides",
    ),
    Fault(
        "callers-autocast-ignored",
        "lowering.py",
        "_note(gm, dict(_caller_autocast()), torch.is_grad_enabled())",
        "_note(gm, {}, torch.is_grad_enabled())",
        "test_contract_ambient.py::test_callers_autocast[cpu]",
    ),
    Fault(
        "traced-grad-mode-ignored",
        "lowering.py",
        "grad = bool(node.args[0])",
        "pass",
        "test_contract_ambient.py::test_traced_grad_mode[cpu]",
    ),
    Fault(
        "callers-grad-mode-ignored",
        "lowering.py",
        "_note(gm, dict(_caller_autocast()), torch.is_grad_enabled())",
        "_note(gm, dict(_caller_autocast()), False)",
        "test_contract_ambient.py::test_callers_grad_mode[cpu]",
    ),
    # --- partition and marks: what is captured, and in what order ---
    Fault(
        "writes-come-last",
        "partition.py",
        "tuple(actions),\n            root,",
        "tuple(sorted(actions, key=lambda node: bool(written_arguments(node)))),\n            root,",
        "test_contract_order.py::test_write_between[cpu]",
    ),
    Fault(
        "arguments-on-one-storage-are-one",
        "partition.py",
        'if node.op == "call_function" else None',
        "if True else None",
        "test_contract_stale.py::test_views_of_inputs_inside_one_another[cpu]",
    ),
    Fault(
        "result-of-an-in-place-op-is-the-whole",
        "partition.py",
        "self.resolve(flow.source[node])",
        "self.resolve(flow.root[node])",
        "test_contract_aliases.py::test_aliases[cpu-of_an_in_place_op_on_a_view]",
    ),
    Fault(
        "captured-ops-ignore-ambient-state",
        "partition.py",
        "under_ambient(draft.graph)",
        "pass",
        "test_contract_ambient.py::test_captured_op_under_autocast[cpu]",
    ),
    Fault(
        "bodies-ignore-ambient-state",
        "partition.py",
        "under_ambient(module.graph)",
        "pass",
        "test_contract_ambient.py::test_cond_body_under_autocast[cpu]",
    ),
    Fault(
        "getitem-leaves-its-producer",
        "partition.py",
        "attached.setdefault(call, []).append(node)",
        "actions.append(node)",
        "test_partition.py::test_getitem_stays_with_its_producer",
    ),
    Fault(
        "min-kernels-ignored",
        "partition.py",
        "count < max(min_kernels, 1)",
        "count < 1",
        "test_contract_reasons.py::test_min_kernels[cpu]",
    ),
    Fault(
        "regions-write-all-they-take",
        "effects.py",
        "for operand, place in pairs if place]",
        "for operand, place in pairs]",
        "test_effects.py::test_a_region_reads[cpu]",
    ),
    Fault(
        "views-of-operands-not-followed",
        "effects.py",
        "or any(_torch.storage_key(tensor) in memory ",
        "or any(False ",
        "test_effects.py::test_a_region_writes[cpu-reads_and_writes]",
    ),
    Fault(
        "results-in-results-stay-behind",
        "effects.py",
        "    while is_getitem(node) and isinstance(node.args[0], fx.Node):",
        "    if is_getitem(node) and isinstance(node.args[0], fx.Node):",
        "test_effects.py::test_nested_results[cpu-captured]",
    ),
    Fault(
        "checks-with-no-symbol-left-are-dropped",
        "effects.py",
        "if comes_late or not symbols <= known or not late.isdisjoint(node.all_input_nodes):",
        "if comes_late or not symbols <= known:",
        "test_effects.py::test_checks[cpu-equals]",
    ),
    Fault(
        "sizes-with-no-symbol-left-are-frozen",
        "effects.py",
        "or is_pinned(node):",
        "or False:",
        "test_effects.py::test_checks[cpu-counted]",
    ),
    Fault(
        "assertions-go-unnoticed",
        "_torch.py",
        '(*keep_alive, *find_overloads("aten::_assert_async"))',
        "keep_alive",
        "test_effects.py::test_assertions[asserted]",
    ),
    Fault(
        "ops-without-a-result-are-dropped",
        "lowering.py",
        "or not op._schema.returns",
        "or False",
        "test_effects.py::test_ops_without_a_result[cpu]",
    ),
    Fault(
        "arguments-that-overlap-are-merged",
        "_torch.py",
        "tenants[storage_key(value)] > 1}",
        "tenants[storage_key(value)] > 2}",
        "test_overlap.py::test_one_memory[cpu-one storage]",
    ),
    Fault(
        "overlap-is-looked-for-once",
        "executor.py",
        "if addresses is not None and (places, layouts) == addresses.apart:",
        "if addresses is not None and addresses.apart[0]:",
        "test_overlap.py::test_one_memory[cpu-by turns]",
    ),
    Fault(
        "written-memory-is-told-by-its-beginning",
        "overlap.py",
        "if self.end <= other.start or other.end <= self.start:",
        "if self.start != other.start:",
        "test_overlap.py::test_one_memory[cpu-two storages]",
    ),
    Fault(
        "columns-are-taken-for-one-piece",
        "overlap.py",
        "                period = math.gcd(period, step)",
        "                period = 0",
        "test_overlap.py::test_what_lies_apart[columns]",
    ),
    Fault(
        "slices-of-marked-functions-are-joined",
        "sites.py",
        " and not known_apart(tensor, target)",
        "",
        "test_overlap.py::test_slices_in_a_marked_function[cpu-aot_eager]",
    ),
    Fault(
        "kernels-of-users-are-dropped",
        "lowering.py",
        "    return found.union(target for target in targets if isinstance(target, _torch.HigherOrderOperator))",
        "    return found",
        "test_triton.py::test_a_kernel_writes",
        gpu=True,
    ),
    Fault(
        "waits-stay-behind-the-cut",
        "partition.py",
        "            draft.wait_for(node)",
        "            pass",
        "test_collectives.py::test_a_segment_waits[cpu-over_a_break]",
    ),
    Fault(
        "the-tape-waits-for-nothing",
        "drivers/tape.py",
        "        return _torch.pytree.tree_map_only(torch.Tensor, _torch.wait_tensor(), result)",
        "        return result",
        "test_collectives.py::test_collectives[cpu-gathered]",
    ),
    Fault(
        "collectives-are-issued-while-taping",
        "drivers/tape.py",
        "if asynchronous else func(*args, **kwargs)",
        "if False else func(*args, **kwargs)",
        "test_collectives.py::test_collectives[cpu-gathered]",
    ),
    Fault(
        "marks-in-bodies-ignored",
        "effects.py",
        "    for body in bodies(node):",
        "    for body in ():",
        "test_contract_models.py::test_higher_order_ops[cpu-subgraph_marked]",
    ),
    Fault(
        "masks-are-captured",
        "marking.py",
        "    boolean_index,\n",
        "",
        "test_contract_reasons.py::test_rule[cpu-masked_write]",
    ),
    # --- drivers ---
    Fault(
        "tape-keeps-writes-of-the-capture",
        "drivers/tape.py",
        "storage.copy_(before)",
        "pass",
        "test_driver_contract.py::test_capture_writes_nothing[tape]",
    ),
    Fault(
        "tape-keeps-draws-of-the-capture",
        "drivers/tape.py",
        "generator.set_state(state)",
        "pass",
        "test_driver_contract.py::test_capture_leaves_the_generator[tape-rand]",
    ),
    Fault(
        "tape-does-not-poison",
        "drivers/tape.py",
        "_poison(storage, dtype)\n",
        "pass\n",
        "test_driver_contract.py::test_poison_of_booleans",
    ),
    Fault(
        "tape-reads-freed-memory",
        "drivers/tape.py",
        "memory.check(self._brought)",
        "pass",
        "test_driver_contract.py::test_freed_memory_is_not_read",
    ),
    Fault(
        "random-graph-launched-directly",
        "drivers/cuda.py",
        "if not self.draws_random:",
        "if True:",
        "test_cuda.py::test_hidden_synchronisation_runs_eagerly",
        gpu=True,
    ),
    Fault(
        "streams-not-ordered",
        "drivers/ordering.py",
        "self._streams[stream].wait_event(self._end)",
        "pass",
        "test_contract_gaps.py::test_streams_wait_for_each_other",
        gpu=True,
    ),
    Fault(
        "pool-leaked",
        "drivers/cuda.py",
        "if wait and not self._live and not self._leaving:",
        "if False:",
        "test_cuda.py::test_reset_gives_memory_back",
        gpu=True,
    ),
    Fault(
        "generator-left-in-capture-mode",
        "drivers/cuda.py",
        "self._draws.spoilt(self._pool)\n        self._open_pool()",
        "self._draws.spoilt(self._pool)\n        self._draws.stuck, self._pool = False, torch.cuda.graph_pool_handle()",
        "test_cuda.py::test_hidden_synchronisation_runs_eagerly",
        gpu=True,
    ),
    Fault(
        "captures-on-a-stream-of-torchs",
        "drivers/generator.py",
        "self.stream = _new_stream(device)",
        "self.stream = torch.cuda.Stream(device)",
        "test_cuda_threads.py::test_no_stream_of_torchs_is_captured",
        gpu=True,
    ),
    Fault(
        "pool-of-a-failed-capture-kept",
        "drivers/generator.py",
        "_torch.release_pool(self.index, pool)",
        "pass",
        "test_cuda.py::test_failed_captures_leave_no_memory",
        gpu=True,
    ),
    Fault(
        "draws-during-captures",
        "drivers/generator.py",
        "draws = captures if _torch.ONE_CAPTURE_STATE else Turns()",
        "draws = Turns()",
        "test_cuda_threads.py::test_a_crowd_that_captures_replays_and_drops",
        gpu=True,
    ),
    Fault(
        "plain-draws-during-captures",
        "recording.py",
        "with drawing() if _draws(segment) else nullcontext():",
        "with nullcontext():",
        "test_cuda_threads.py::test_a_crowd_that_captures_replays_and_drops",
        gpu=True,
    ),
    Fault(
        "daemon-threads-in-a-launch",
        "drivers/cuda.py",
        "atexit.register(_leave)",
        "pass",
        "test_process_end.py::test_ends_quietly[daemon threads replay]",
        gpu=True,
    ),
    Fault(
        "events-for-ever",
        "drivers/ordering.py",
        "self.several = self._alone < IDLE",
        "self.several = True",
        "test_ordering.py::test_streams_that_are_idle_are_forgotten",
    ),
    Fault(
        "a-turn-that-others-had-is-given-up",
        "drivers/generator.py",
        "if self._count == before:",
        "if True:",
        "test_ordering.py::test_many_short_turns_are_waited_for",
    ),
    Fault(
        "eviction-waits",
        "executor.py",
        "driver.release(graphs, owner, wait=wait)",
        "driver.release(graphs, owner)",
        "test_executor.py::test_eviction_does_not_wait[tape]",
    ),
    Fault(
        "disturbed-once-eager-for-good",
        "recording.py",
        "(self.disturbed if error.passing else self.failed)[position] = reason",
        "self.failed[position] = reason",
        "test_executor.py::test_a_disturbed_capture_is_made_again[tape-1]",
    ),
    Fault(
        "errors-of-the-device-name-nothing",
        "executor.py",
        "blame(error, driver, self.name, self._latest())",
        "pass",
        "test_process_end.py::test_an_eager_steps_error_of_the_device_is_the_same_object",
    ),
    Fault(
        "advice-of-torchs-counts-as-an-assertion",
        "device_errors.py",
        "any(text in _first_line(error) for",
        "any(text in str(error) for",
        "test_process_end.py::test_device_errors_are_told_from_others",
    ),
    Fault(
        "callers-that-nobody-can-refer-to-weakly",
        "callers.py",
        "except TypeError:",
        "except KeyError:",
        "test_report_reach.py::test_reached[cpu-method of an object with slots]",
    ),
    Fault(
        "a-lost-device-wraps-what-an-eager-step-raised",
        "device_errors.py",
        "if isinstance(error, ReplayError) or _is_ours(error):",
        "if True:",
        "test_process_end.py::test_an_eager_steps_error_of_the_device_is_the_same_object",
    ),
    Fault(
        "workspace-left-in-the-pool",
        "drivers/cuda.py",
        "finally:\n                    _torch.clear_cublas_workspaces()",
        "finally:\n                    pass",
        "test_cuda.py::test_reset_gives_memory_back",
        gpu=True,
    ),
    Fault(
        "dropped-executor-releases-nothing",
        "executor.py",
        "weakref.finalize(self, _release_all, self.sets, self.statistics, driver).atexit = False",
        "pass",
        "test_executor.py::test_executor_that_is_dropped[cuda]",
        gpu=True,
    ),
    Fault(
        "other-kernels-than-eager",
        "_torch.py",
        "        stack.enter_context(_eager_kernels())\n",
        "",
        "test_cuda.py::test_kernels_as_in_eager[conv batchnorm train-dtype0]",
        gpu=True,
    ),
    Fault(
        "host-scalars-frozen",
        "executor.py",
        "if self.scalars:",
        "if False:",
        "test_cuda.py::test_host_scalars_are_keyed_then_eager",
        gpu=True,
    ),
    # --- what tools see ---
    Fault(
        "fills-count-as-kernels",
        "drivers/cuda.py",
        'for node in self.nodes() if node.kind == "kernel")',
        "for node in self.nodes())",
        "test_cuda.py::test_nodes_that_are_no_kernels",
        gpu=True,
    ),
    Fault(
        "child-graphs-are-skipped",
        "drivers/nodes.py",
        "yield from _nodes(child)",
        "del child",
        "test_nodes.py::test_reads_nodes",
    ),
    Fault(
        "replays-run-from-no-file",
        "replay.py",
        "    file = show_replay(source, name)\n",
        "    show_replay(source, name)\n    file = None\n",
        "test_sources.py::test_replay_runs_from_its_file[cpu]",
    ),
    Fault(
        "segments-run-from-no-file",
        "sources.py",
        "    forward.__code__ = scope[_class_name(module)].forward.__code__\n",
        "",
        "test_sources.py::test_segment_runs_from_its_file[cpu-eager-hits0]",
    ),
    Fault(
        "files-are-overwritten",
        "sources.py",
        "while path.exists() and path.read_text",
        "while number < 0 and path.read_text",
        "test_export.py::test_again",
    ),
    Fault(
        "every-replay-is-named",
        "executor.py",
        "return self._profiled(entry, args, stream) if active() else",
        "return self._profiled(entry, args, stream) if True else",
        "test_profiling.py::test_nothing_without_a_profiler[cpu]",
    ),
    Fault(
        "an-error-leaves-its-range-open",
        "profiling.py",
        "            finally:\n                self._end()",
        "            finally:\n                pass",
        "test_profiling.py::test_an_error_ends_its_range[cpu]",
    ),
    Fault(
        "profiled-replays-count-apart",
        "executor.py",
        "name=name, tally=entry.replay.tally), marks",
        "name=name), marks",
        "test_profiling.py::test_one_tally[cpu]",
    ),
    Fault(
        "plain-calls-are-told-each",
        "journal.py",
        "if what not in self._said:",
        "if True:",
        "test_journal.py::test_limits_are_warned_of_once[cpu]",
    ),
    Fault(
        "recordings-are-traced-nowhere",
        "journal.py",
        'self.artifact(f"recording {number}"',
        '"".format(f"recording {number}"',
        "test_journal.py::test_trace",
    ),
    # --- tables of ops ---
    Fault(
        "a-table-with-a-misspelt-op",
        "marking.py",
        "item is_nonzero equal",
        "item is_non_zero equal",
        "test_op_tables.py::test_each_name_is_an_op_of_the_torches_that_have_it",
    ),
    Fault(
        "a-table-that-looks-its-ops-up",
        "drivers/tape.py",
        'COPIES = _torch.aten("_to_copy copy_")',
        'COPIES = frozenset(getattr(aten, name)._qualified_op_name for name in ("_to_copy", "copy_"))',
        "test_op_tables.py::test_a_torch_without_the_ops_of_the_tables",
    ),
    # --- the page ---
    Fault(
        "a-source-line-ends-the-data",
        "page.py",
        r'.replace("<", "\\u003c")',
        "",
        "test_page.py::test_data_cannot_break_out",
    ),
    Fault(
        "loads-count-to-the-break-before-them",
        "page.py",
        "starts.append(_first_load(lines, launch))",
        "starts.append(launch)",
        "test_page.py::test_source_lines[cpu-several]",
    ),
)


def copy_to(root: Path) -> None:
    """Copy the package, its tests and their settings to ``root``."""
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in (PACKAGE, TESTS.name):
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", root)


def run(root: Path, tests: Iterable[str], *, gpu: bool = False) -> tuple[int | None, str]:
    """Run ``tests`` on the copy in ``root``; returns pytest's exit code, None if it hung, and its output.

    Processes are forked from one that has imported torch, but not where CUDA is used, which a fork does not survive.
    """
    context = multiprocessing.get_context("spawn" if gpu else "forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=_run_here, args=(str(root), list(tests)))
    process.start()
    process.join(TIMEOUT)
    if hung := process.is_alive():
        process.kill()
        process.join()
    return None if hung else process.exitcode, (root / "output.txt").read_text(encoding="utf-8")


def _run_here(root: str, tests: Sequence[str]) -> None:
    os.chdir(root)
    output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.pop("PYTEST_ADDOPTS", None)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    gc.freeze()  # what was imported before the fork is not garbage, and is much to look through
    sys.path.insert(0, root)
    import breakable_backend

    assert Path(breakable_backend.__file__).is_relative_to(root), breakable_backend.__file__
    ids = [f"{TESTS.name}/{test}" for test in tests]
    sys.exit(pytest.main([*OPTIONS, *ids]))
