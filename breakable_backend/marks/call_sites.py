"""Calls of marked functions in compiled code: what they return, by ``fake`` or by earlier calls, and how they run."""

from __future__ import annotations

import ctypes
import functools
import itertools
import operator
import os
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

import torch

from breakable_backend import _torch, active, locks
from breakable_backend.callers import Callers
from breakable_backend.errors import BreakableError, EagerOutputError, PartitionError, ReplayError, first_line
from breakable_backend.ir.ambient_modes import Modes
from breakable_backend.ir.layout import TensorSpec
from breakable_backend.ir.overlap import known_apart
from breakable_backend.marks.fast_calls import Run, fast_call
from breakable_backend.marks.learning import Asked, Expected, Given, Learned
from breakable_backend.marks.results import Result, Unholdable, copy_of, take_result
from breakable_backend.marks.saved_for_backward import Member, SavedForBackward, reaches_others
from breakable_backend.marks.structure import (
    LEAVES,
    Structure,
    contents,
    in_words,
    is_changed,
    is_still,
    is_the_same,
    module_leaves,
    put_together,
)


@dataclass(frozen=True, eq=False)
class Mark:
    """A marked function with the options of its mark."""

    function: Callable[..., Any]
    name: str
    """The qualified name, as reports show it."""
    source: str
    """Its definition, as ``file.py:12 in name: code``."""
    mutates_args: tuple[str, ...] = ()
    fake: Callable[..., Any] | None = None
    host_only: bool = False
    capture_stub: Callable[..., Any] | None = None
    barrier: Callable[[], None] | None = None
    recompute: bool = False
    backward: Callable[..., Any] | None = None
    by: str = "eager_on_graph"
    """What has marked it; for a function that calls a module, ``mark_eager`` or ``eager_ops``."""
    original: Callable[..., Any] | None = None
    """The user's function, if ``function`` is a wrapper of it for ``recompute`` or ``backward``."""
    sites: dict[int, Site] = field(default_factory=dict, repr=False)
    """Its calls in graphs that outlive Dynamo's code, such as exported ones. Other calls live as long as the code."""
    known: weakref.WeakKeyDictionary[Any, dict[Any, dict[Any, Expected]]] = field(
        default_factory=weakref.WeakKeyDictionary, repr=False
    )
    """Results by structure of the arguments and by their layouts, for each compilation. In another compilation, modules
    and what the function closes over may be others."""

    @property
    def why(self) -> str:
        """Why its calls are eager steps."""
        return "named in eager_ops" if self.by == "eager_ops" else f"marked by {self.by}"

    @property
    def body(self) -> Callable[..., Any]:
        return self.original or self.function


def learned_of(mark: Mark, key: tuple[Any, ...], modules: Iterable[int]) -> Learned:
    """What calls of ``mark`` with the same structure of arguments and the same modes returned, since Dynamo was reset.

    Args:
        mark: the function.
        key: the structure of the arguments, and the modes.
        modules: addresses of modules among the arguments. What is known about them is dropped when they die.
    """
    by_mark = _torch.until_reset().setdefault("breakable_cg", weakref.WeakKeyDictionary())
    entries: list[tuple[tuple[Any, ...], Learned, list[Any]]] = by_mark.setdefault(mark, [])
    for entry in list(entries):
        if entry[0] == key and all(module() is not None for module in entry[2]):
            return entry[1]
    held = [weakref.ref(ctypes.cast(address, ctypes.py_object).value) for address in modules]
    made = key, Learned(), held
    entries[:] = [entry for entry in entries if all(module() is not None for module in entry[2])]
    entries.append(made)
    return made[1]


def learned_from(mark: Mark) -> list[Structure]:
    """The arguments of calls that ran as Python, of which something was learned."""
    entries = _torch.until_reset().get("breakable_cg", {}).get(mark, ())
    return [key[0] for key, learned, _ in list(entries) if learned.has_samples]


@dataclass(eq=False)
class Learning:
    """A function whose call ran as Python, so that the result of a marked function is learned."""

    mark: Mark
    callers: Callers


def learning() -> list[Learning]:
    """Functions that are not compiled yet, since marked functions in them have not run, or not often enough."""
    known = [learned for _, learned in _all_learned() if not learned.why_not]
    return [waiting for learned in known for waiting in learned.waiting.values()]


def _code_being_traced() -> int:
    """The identity of the code that Dynamo is tracing, of the user's function or of torch's; 0 if there is none."""
    code = _torch.code_under_compilation()
    return id(code[1]) if code is not None else 0


def why_a_break(mark: Mark, why: str) -> Learned | None:
    """What was learned of calls that are graph breaks for the reason ``why``; None if no result gave this reason."""
    found = (learned for other, learned in _all_learned() if other is mark and learned.why_not == why)
    return next(found, None)


def _all_learned() -> list[tuple[Mark, Learned]]:
    by_mark: Mapping[Mark, list[tuple[Any, Learned, Any]]] = _torch.until_reset().get("breakable_cg", {})
    return [(mark, learned) for mark, entries in list(by_mark.items()) for _, learned, _ in list(entries)]


def see_result(mark: Mark, learned: Learned, given: Given, asked: Asked, holder: list[Any]) -> None:
    """Learn from the result of a call that ran as Python. Nothing of the result is kept."""
    recording, declared, arguments = any(given.needs), mark.backward is not None, given.tensors
    try:
        taken = take_result(holder, arguments, recording=recording, exact=not declared, copies=False)
        if not (recording and declared):
            _refuse_others(taken, arguments, recording, torch.is_grad_enabled())
    except Unholdable as error:
        learned.why_not, learned.cure = f"it returned {error.what}", error.fix
        learned.error = error.with_traceback(None)  # the traceback would keep the result alive
    except Exception as error:  # noqa: BLE001 - some tensors have no strides; the call itself was right
        learned.why_not = f"nobody can tell how its result is laid out: {first_line(error)}"
    else:
        learned.add(asked, expected_of(taken, declared))


def run_inline(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call ``function``. Marked functions that it calls run inside its eager step."""
    if active.handler.held.get() is None:
        return function(*args, **kwargs)
    token = active.handler.set(None)
    try:
        return function(*args, **kwargs)
    finally:
        active.handler.reset(token)


# --- a call -------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Site:
    """A call of a marked function in compiled code, which owns it. Graphs contain its number."""

    number: int
    mark: Mark
    arguments: Structure
    order: tuple[int, ...]
    num_written: int
    modes: Modes
    modules: dict[int, weakref.ref[torch.nn.Module]]
    known: dict[Any, Expected]
    """The results of ``fake``, by the layouts of the arguments. Equal sites share it."""
    learned: Learned
    """What such calls returned."""
    is_known: bool = False
    expected: Expected = field(default_factory=Expected)
    gradients: tuple[tuple[int, torch.dtype, torch.device], ...] = ()
    """Dimensions, dtype and device of the gradients that the backward computes."""
    left_out: frozenset[int] = frozenset()
    """Those of them that a backward which autograd ran did not give."""
    unforeseen: frozenset[int] = frozenset()
    """Those of :attr:`left_out` that had a way to a result: a backward of the user's returned None."""
    seen: frozenset[int] = frozenset()
    """Roots that needed gradients in calls outside of traced code."""
    traced: tuple[bool, ...] = ()
    """Which roots need gradients in traced code."""
    is_captured: bool = False
    """Whether both halves were traced. What is seen from then on does not change them."""
    error: PartitionError | None = None
    overlaps: dict[int, tuple[int, int]] = field(default_factory=dict)
    """Tensors that are read and lie in the memory of a written one: which one, and how many elements after it."""

    @property
    def declared(self) -> bool:
        """Whether layouts or gradients come from ``fake`` or ``backward``: results then do not show who needs gradients."""
        return self.mark.fake is not None or self.mark.backward is not None

    def saw(self, members: Sequence[Sequence[Any]]) -> None:
        """Note which roots needed gradients in a call. Earlier ones may have needed none: they left out every expert."""
        if not self.is_captured:
            self.seen |= {place for place, some in enumerate(members) if some}

    def traced_as(self) -> tuple[bool, ...]:
        """Which roots need gradients in the code that is traced now."""
        self.traced = tuple(some or place in self.seen for place, some in enumerate(self.expected.differentiable))
        return self.traced

    def twin(self) -> Site:
        """Another site of the same call, for arguments of some sizes only. The caller owns it."""
        made = replace(self, number=next(numbers))
        sites[made.number] = made
        return made

    # on fake tensors

    def fake(self, call: Given) -> list[torch.Tensor]:
        """The results of the op, as fake tensors."""
        expected = self.learn(call)
        if not self.is_known:
            return [torch.empty(1, dtype=torch.int64, device="cpu")] if call.needs else []  # a handle for autograd
        made = [spec.empty() for spec in expected.specs]
        if expected.num_ints:
            made.append(torch.empty(expected.num_ints, dtype=torch.int64, device="cpu"))
        if call.needs:
            made.append(torch.empty(1, dtype=torch.int64, device="cpu"))
        return made

    def learn(self, call: Given) -> Expected:
        """Find out what the call returns for arguments of these layouts, which are fake tensors."""
        if call.needs:
            wanting = [tensor for tensor, need in zip(call.tensors, call.needs, strict=True) if need]
            self.gradients = tuple((tensor.dim(), tensor.dtype, tensor.device) for tensor in wanting)
        expected = self._remember(call) if self.mark.fake is None else self._told(call)
        self.is_known = expected is not None
        if expected is None:
            return Expected()
        self.expected = expected.without_symbols()
        return expected

    def settle(self) -> Expected:
        """What the call that was just traced returns.

        Raises:
            PartitionError: it is not known.
        """
        if self.error is not None:
            raise self.error
        if not self.is_known:
            if not _torch.can_run_as_python():
                unknown = "nothing yet: its result is not known before its first call"
                raise self._failure(unknown, GIVE_FAKE, PartitionError)
            self.learned.in_vain += not _torch.in_a_body()  # there a break is an error, and a branch may come late
            self.run_as_python("has not run yet, and its result is not known")
        if self.learned.waiting:
            self.learned.waiting.pop(_code_being_traced(), None)
        return self.expected

    def run_as_python(self, why: str) -> NoReturn:
        """Have the frame that Dynamo is tracing run once as Python, to learn from the call."""
        self.learned.waiting[_code_being_traced()] = Learning(self.mark, Callers())
        _torch.run_as_python(f"{self.mark.name} {why}")

    def _remember(self, call: Given) -> Expected | None:
        asked = Asked.of(call)
        found = self.learned.find(asked)
        if found is None and asked.can_be_specialised:
            found = self.learned.find(asked.specialised())
        if found is None and self.is_known:  # a compiler that asks again may give arguments another layout
            found, rule = self.expected, self.expected.rule
            if rule is not None:
                found = replace(found, specs=rule.specs(found.specs, asked.numbers))
        return found

    def _told(self, call: Given) -> Expected | None:
        """The result of ``fake``, which is called once for the same layouts."""
        key = _layouts(call)
        if key is not None and key in self.known:
            return self.known[key]
        try:
            with _torch.ignore_fresh_symbols(call.tensors), self.modes.enter():
                expected = self._ask(call)
        except PartitionError as error:
            self.error = error
            return None
        except _torch.dynamo_error():
            raise
        except Exception as error:  # noqa: BLE001 - fake tensors have no values, so anything may be raised
            self.error = self._failed_on_fakes(error)
            return None
        if key is not None:
            self.known[key] = expected
        return expected

    def _ask(self, call: Given) -> Expected:
        given = [tensor.detach() for tensor in call.tensors]
        modules = {}
        with _torch.above_autograd():
            for tensor, need in zip(given, call.needs or _needing(call.tensors), strict=True):
                tensor.requires_grad_(need)
            for leaf in module_leaves(self.arguments):
                own = dict(zip(leaf[2], (given[place] for place in leaf[3]), strict=True))
                modules[leaf[1]] = _twin(self.module(leaf[1]), own)
            holder = [self._call(self.mark.fake, call._replace(tensors=given), modules)]  # type: ignore[arg-type]
            taken = self._take(holder, given, bool(call.needs), PartitionError)
        return expected_of(taken, self.declared)

    def look_for_overlaps(self, tensors: Sequence[torch.Tensor]) -> None:
        """Note which tensors share memory with a written one. A compiler that functionalises separates them later."""
        for written, target in enumerate(tensors[: self.num_written]):
            for place, tensor in enumerate(tensors[self.num_written :], self.num_written):
                apart = tensor.storage_offset() - target.storage_offset()
                together = _torch.storage_key(tensor) == _torch.storage_key(target) and not known_apart(tensor, target)
                if together and type(apart) is int:
                    self.overlaps[place] = written, apart

    # on real ones

    def run(self, call: Given, traced: bool, *, own: bool = False) -> list[torch.Tensor]:
        """Call the function on real tensors, once.

        Args:
            call: its tensors, the written ones first, and numbers. ``needs`` is empty if there will be no backward.
            traced: whether the code around it was compiled by AOTAutograd, and may reuse memory that a backward still
                reads.
            own: whether the caller enters autocast and grad mode, and passes the modules' own tensors, as a replay
                does.

        Raises:
            EagerOutputError: the result differs from what ``fake`` or earlier calls returned.
        """
        if own and not call.needs:
            modules = {address: self.module(address) for address in self.modules}
            holder = [self._call(self._function, call, modules)]
            taken = self._take(holder, call.tensors, False, EagerOutputError)
        else:
            with self.modes.enter(), self._modules(call, traced, own) as (call, modules), _torch.above_autograd():
                holder = [self._call(self._function, call, modules)]
                if call.needs:
                    self._look_at_leaves(call)
                taken = self._take(holder, call.tensors, bool(call.needs), EagerOutputError)
        made = self._made(taken, traced, call)
        if call.needs:
            if traced and any(some and not known for some, known in zip(taken.members, self.traced, strict=True)):
                raise self._needs_gradients(call, taken)
            leaves = [tensor for tensor, need in zip(call.tensors, call.needs, strict=True) if need]
            made = [*made, SavedForBackward.handle(leaves, taken.members)]
        return made

    def record(self, call: Given, capture: Any) -> list[tuple[torch.Tensor, Sequence[Member]]]:
        """Call the function where autograd, and a capture if one is under way, sees what it does.

        Returns the results of :meth:`run`, and the members of each.
        """

        def function(*args: Any, **kwargs: Any) -> Any:
            if capture is None:
                return self._function(*args, **kwargs)
            return capture.call(self.mark, args, kwargs)

        with self.modes.enter(), self._modules(call, False, False) as (call, modules):
            holder = [self._call(function, call, modules)]
            # A capture holds the results of its eager steps in memory of its own.
            taken = self._take(holder, call.tensors, True, EagerOutputError, copies=not capture)
        made = self._made(taken, False, call)
        return [(root, taken.members[place] if place < len(taken.members) else ()) for place, root in enumerate(made)]

    def fast_run(self) -> Run:
        """:meth:`run` as a replay calls it, by a shorter path if there is one."""

        def run(needs: list[bool], traced: bool, *given: Any) -> list[Any]:
            return self.run(Given(needs, *given), traced, own=True)

        def take(holder: list[Any], *given: Any) -> list[Any]:
            call = Given([], *given)
            return self._made(self._take(holder, call.tensors, False, EagerOutputError), False, call)

        def look(now: Sequence[Any], before: Sequence[Any]) -> None:
            if not is_still(now, before):
                raise self._changed_a_container()

        capture, expected = active.handler.held.get, self.expected
        return fast_call(self.mark.function, self.arguments, expected.result, expected.specs, capture, run, take, look)

    def _made(self, taken: Result, traced: bool, call: Given) -> list[torch.Tensor]:
        """What the op returns for the result of a call: its roots, and after them its ints."""
        self._check(taken, call)
        made = [copy_of(root) for root in taken.roots] if traced else taken.roots
        if taken.ints:
            made = [*made, torch.tensor(taken.ints, dtype=torch.int64, device="cpu")]
        return made

    def _check(self, taken: Result, call: Given) -> None:
        wanted = self.expected
        if taken.structure != wanted.result and not is_the_same(
            taken.structure, wanted.result, call.tensors, bool(call.needs)
        ):
            got, expected = in_words(taken.structure), in_words(wanted.result)
            if got == expected:  # other tensors in it are one tensor, or share memory
                told = "earlier calls had" if self.mark.fake is None else "fake= tells"
                got, expected = f"{got} with other aliases", f"those that {told}"
            raise self._mismatch(call, taken, got, expected)
        specs = wanted.specs if wanted.rule is None else wanted.rule.specs_of(wanted.specs, call)
        for root, want in zip(taken.roots, specs, strict=True):
            if not want.accepts(root):
                raise self._mismatch(call, taken, str(TensorSpec.of(root)), str(want))

    def _function(self, *args: Any, **kwargs: Any) -> Any:
        return run_inline(self.mark.function, *args, **kwargs)

    def module(self, address: int) -> torch.nn.Module:
        """The module at ``address`` among the arguments."""
        module = self.modules[address]()
        assert module is not None, "Dynamo guards on the module"
        return module

    @contextmanager
    def _modules(self, call: Given, traced: bool, own: bool) -> Iterator[tuple[Given, dict[int, Any]]]:
        """The call with the tensors, and the modules, to call the function with."""
        needs, given = call.needs, list(call.tensors)
        for place, (written, apart) in self.overlaps.items():
            tensor, target = given[place], given[written]
            if _torch.storage_key(tensor) != _torch.storage_key(target) and tensor.dtype is target.dtype:
                try:
                    given[place] = target.as_strided(tensor.shape, tensor.stride(), target.storage_offset() + apart)
                except RuntimeError:
                    raise ReplayError(
                        f"{self.mark.name} writes a tensor and reads memory around it, but the backend passed a copy of the tensor alone",
                        where=self.mark.source,
                        fix="pass the whole tensor, and name it in mutates_args; or make clones of the parts before",
                    ) from None
        tensors = list(given)
        if needs:
            copies: dict[int, torch.Tensor] = {}
            for place, (tensor, need) in enumerate(zip(tensors, needs, strict=True)):
                if (
                    traced
                    and place >= self.num_written
                    and place not in self._of_modules
                    and place not in self.overlaps
                ):
                    if id(tensor) not in copies:  # a tensor that is passed twice stays one tensor
                        copies[id(tensor)] = copy_of(tensor)
                    tensor = copies[id(tensor)]
                given[place] = tensor.detach().requires_grad_(need)
        modules = {address: self.module(address) for address in self.modules}
        with ExitStack() as stack:
            if needs or not own:
                for leaf in module_leaves(self.arguments):
                    self._settle(leaf, modules[leaf[1]], tensors, given, bool(needs), stack)
            yield call._replace(tensors=given), modules

    def _settle(
        self, leaf: Structure, module: Any, tensors: list[Any], given: list[Any], recording: bool, stack: ExitStack
    ) -> None:
        """Have a module use the tensors that the op was given. They are its own, unless a compiler has replaced them."""
        other = {}
        for name, place in zip(leaf[2], leaf[3], strict=True):
            mine = operator.attrgetter(name)(module)
            same = mine.data_ptr() == tensors[place].data_ptr() and mine.shape == tensors[place].shape
            if same and not (recording and _torch.has_hooks(mine)):
                given[place] = mine
            else:
                other[name] = given[place]
        if other:
            stack.enter_context(_swapping)
            stack.enter_context(_torch.swapped(module, other))

    def _look_at_leaves(self, call: Given) -> None:
        """Raise if the function had gradients of an argument seen, or have it raised later: a leaf is not what eager has."""
        leaves = []
        for place, (leaf, need) in enumerate(zip(call.tensors, call.needs, strict=True)):
            if need and place not in self._of_modules:
                leaves.append(leaf)
            elif need and _torch.has_hooks(leaf):
                raise self._no_node(*WATCHED_AN_ARGUMENT)
        if used := history_used(leaves, self._watching):
            raise self._no_node(*used)

    @functools.cached_property
    def _of_modules(self) -> frozenset[int]:
        """The places of tensors that modules hold."""
        return frozenset(place for leaf in module_leaves(self.arguments) for place in leaf[3])

    @functools.cached_property
    def _watching(self) -> dict[int, Callable[[torch.Tensor], None]]:
        site = weakref.ref(self)

        def refuse(_: torch.Tensor) -> None:
            if (alive := site()) is not None:
                raise alive._no_node(*DIFFERENTIATED_AN_ARGUMENT)

        return {0: refuse}

    # either

    def _call(self, function: Callable[..., Any], call: Given, modules: dict[int, Any]) -> Any:
        places: dict[str, Any] = {"tensor": call.tensors, "int": call.ints, "float": call.floats, "module": modules}

        def leaf(structure: Structure) -> Any:
            kind, place = structure[0], structure[1]
            return place if kind == "plain" else places[kind][place]

        args, kwargs = put_together(self.arguments, leaf)
        if not self._gets_containers or function is self.mark.fake:
            return function(*args, **kwargs)
        before = contents((args, kwargs))
        result = function(*args, **kwargs)
        if is_changed((args, kwargs), before):
            raise self._changed_a_container()
        return result

    @functools.cached_property
    def _gets_containers(self) -> bool:
        """Whether the arguments contain containers that the function could change."""

        def can_be_written(structure: Structure) -> bool:
            if structure[0] in LEAVES:
                return False
            return structure[0] not in ("tuple", "named", "size") or any(map(can_be_written, structure[-1]))

        positional, named = self.arguments[-1]
        return any(map(can_be_written, (*positional[-1], *named[-1])))

    def _take(
        self,
        holder: list[Any],
        arguments: Sequence[torch.Tensor],
        recording: bool,
        kind: type[BreakableError],
        *,
        copies: bool = True,
    ) -> Result:
        try:
            taken = take_result(holder, arguments, recording=recording, exact=not self.declared, copies=copies)
            _refuse_others(taken, arguments, recording, self.modes.grad)
        except Unholdable as error:
            if self.mark.fake is None:
                self.learned.why_not, self.learned.cure = f"it returned {error.what}", error.fix
                _torch.forget_code_of(self, f"{self.mark.name} returned what compiled code cannot hold")
            raise self._failure(error.what, error.fix, kind) from None
        return taken

    # errors

    def _changed_a_container(self) -> EagerOutputError:
        if self.mark.fake is None:
            self.learned.why_not = CHANGED_A_CONTAINER
            _torch.forget_code_of(self, f"{self.mark.name} changed a container")
        return EagerOutputError(
            f"{self.mark.name}: {CHANGED_A_CONTAINER}, and in compiled code that is a copy",
            where=self.mark.source,
            fix="return the new element, and store it outside of the function",
        )

    def _no_node(self, why: str, cure: str) -> EagerOutputError:
        """The error for a call whose arguments have to be eager's. From the next one on such calls are graph breaks."""
        self.learned.why_not, self.learned.cure = why, cure
        _torch.forget_code_of(self, f"{self.mark.name}: {why}")
        return EagerOutputError(
            f"{self.mark.name}: {why}, and in compiled code arguments have no history",
            where=self.mark.source,
            fix=f"{cure}; or call again: from now on such calls are graph breaks",
        )

    def _failed_on_fakes(self, error: Exception) -> PartitionError:
        code = getattr(self.mark.fake, "__code__", None)
        began = any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))
        if isinstance(error, TypeError) and code is not None and not began:
            failed = PartitionError(
                f"fake= of {self.mark.name} does not take the arguments of the call: {first_line(error)}",
                where=self.mark.source,
                fix=f"give it the parameters of {self.mark.name}",
            )
        else:
            failed = PartitionError(
                f"fake= of {self.mark.name} cannot run on fake tensors, which have no values: {first_line(error)}",
                where=self.mark.source,
                fix="compute the layout of the result from those of the arguments, as in torch.empty_like(x)",
            )
        failed.__cause__ = error
        return failed

    def _mismatch(self, call: Given, taken: Result, got: str, wanted: str) -> BreakableError:
        if self.mark.fake is not None:
            fix = "return the same structure and plain values at each call, and the layouts that fake= tells"
        else:
            self.learned.add(Asked.of(call), expected_of(taken, self.declared))
            _torch.forget_code_of(self, f"{self.mark.name} returned something else")
            fix = (
                "call again: from now on such calls are graph breaks; for one graph return the same structure, plain values and "
                "layout wherever the layouts of the arguments are the same"
            )
        return self._failure(f"{got}, but was compiled for {wanted}", fix, EagerOutputError)

    def _needs_gradients(self, call: Given, taken: Result) -> BreakableError:
        self.learned.add(Asked.of(call), expected_of(taken, self.declared))
        _torch.forget_code_of(self, f"{self.mark.name} returned a tensor that needs gradients")
        return EagerOutputError(
            f"{self.mark.name} returned a tensor that needs gradients, and needed none in the calls before it was compiled",
            where=self.mark.source,
            fix="call again: the function around it is compiled anew",
        )

    def _failure(self, what: str, fix: str, kind: type[BreakableError]) -> BreakableError:
        return kind(f"{self.mark.name} returned {what}", where=self.mark.source, fix=fix)


def expected_of(taken: Result, declared: bool) -> Expected:
    """The :class:`Expected` for a result.

    Args:
        taken: the result, taken apart.
        declared: whether the function does not compute its gradients itself, so that results cannot tell what needs
            gradients.
    """
    if declared:
        differentiable = tuple(root.is_floating_point() or root.is_complex() for root in taken.roots)
    else:
        differentiable = tuple(map(bool, taken.members))
    return Expected(taken.structure, tuple(map(TensorSpec.of, taken.roots)), differentiable, len(taken.ints))


def _refuse_others(taken: Result, arguments: Sequence[torch.Tensor], recording: bool, grad: bool) -> None:
    """Raise if a result needs gradients of a tensor that is no argument, which compiled code would lose.

    Args:
        taken: the result, taken apart.
        arguments: of the call.
        recording: whether some of them need gradients.
        grad: the grad mode of the call.
    """
    if recording:
        lost = reaches_others(taken.members, [*arguments, *(tensor.grad_fn for tensor in arguments)])
    else:
        lost = grad and any(root.requires_grad for root in taken.roots)
    if lost:
        raise Unholdable(
            "a tensor with gradients of what the function closes over, which compiled code does not support",
            "pass that tensor or module as an argument, or compute under torch.no_grad()",
        )


CHANGED_A_CONTAINER = "it changed a list or dict among its arguments"

WATCHED_AN_ARGUMENT = (
    "it registered a hook on an argument, or had an argument retain its gradient",
    "do so with a copy that the function returns, as in y = x.clone()",
)
"""Why an argument that needs gradients has to be eager's, and what to do about it."""

DIFFERENTIATED_AN_ARGUMENT = (
    "a gradient came to an argument otherwise than through what it returned",
    "return what is differentiated later",
)
"""The same for an argument from which something that is no result was computed."""


def history_used(leaves: Iterable[torch.Tensor], later: dict[int, Callable[[torch.Tensor], None]]) -> tuple[str, ...]:
    """Why arguments, which a marked function got as autograd ``leaves``, have to be eager's, and what to do; empty if not.

    ``later``: what is called (by 0) if a backward comes to one of them by another way than the results.
    """
    for leaf in leaves:
        if _torch.num_watching(leaf):
            return WATCHED_AN_ARGUMENT
        if leaf.grad is not None:
            return DIFFERENTIATED_AN_ARGUMENT
        _torch.watch_accumulation(leaf, later)
    return ()


GIVE_FAKE = "give its layout: @eager_on_graph(fake=...), with the same signature, such as lambda x: torch.empty_like(x)"

_swapping = locks.lock()
"""Held while a module has tensors that are not its own."""


def _twin(module: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """A copy of a module with its submodules, with other parameters and buffers. Everything else in it is shared."""
    twins: dict[int, torch.nn.Module] = {}

    def copied(original: torch.nn.Module) -> torch.nn.Module:
        if id(original) not in twins:
            kind = type(original)
            # ``copy.copy`` calls ``__getstate__``, which may leave things out.
            made = twins[id(original)] = kind.__new__(kind)
            made.__dict__.update(original.__dict__)
            for name in ("_parameters", "_buffers"):
                held = original.__dict__[name].items()
                made.__dict__[name] = {key: other.get(id(value), value) for key, value in held}
            children = original.__dict__["_modules"].items()
            made.__dict__["_modules"] = {name: child and copied(child) for name, child in children}
        return twins[id(original)]

    other = {id(operator.attrgetter(name)(module)): tensor for name, tensor in tensors.items()}
    return copied(module)


def _needing(tensors: Sequence[torch.Tensor]) -> list[bool]:
    return [tensor.requires_grad for tensor in tensors]


def _layouts(call: Given) -> Any:
    """The key by which results are looked up; None if a size or number is symbolic."""
    needs, tensors, ints, floats = call
    specs = tuple(map(TensorSpec.of, tensors))
    numbers = [*ints, *floats, *(size for spec in specs for size in (*spec.shape, *spec.stride))]
    if not all(type(number) in (int, float) for number in numbers):
        return None
    return (tuple(needs or _needing(tensors)), specs, *ints, *(value.hex() for value in floats))  # -0.0 is not 0.0


numbers = itertools.count(int.from_bytes(os.urandom(4), "little") << 24)
"""A number is never used again in another process, so that code which Inductor keeps on disk is never found for another
site."""


class _Sites(weakref.WeakValueDictionary[int, Site]):
    def __getitem__(self, number: int) -> Site:
        try:
            return super().__getitem__(number)
        except KeyError:
            raise ReplayError(
                "code calls a marked function that this process does not know: it contains the number of the call, and not "
                "the function",
                fix="an exported program that was saved cannot hold marked functions: export in the process that runs it",
            ) from None


sites: weakref.WeakValueDictionary[int, Site] = _Sites()
"""Sites by their number, which is what a graph can contain."""
