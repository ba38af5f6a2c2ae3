"""Training: eager calls until a backward was observed, then a captured forward, which takes a slot, and its backward.

The first calls of a graph that needs gradients run as Dynamo traced them. Hooks observe their backwards. Once one was
run, it is known which gradients come in and with which layouts. Then the graph is traced
(:mod:`breakable_backend.compiling.halves`), and both halves are captured. From then on each forward
takes a *slot*: a recording with its own memory for what it saves. The slot is taken until autograd drops what that
forward saved: at its backward, or later if the graph is retained, or when nobody can run it backward any more. So
forwards may be pending while others run. If all slots are taken, a forward runs as Dynamo traced it.

The backward is a program with its own executor. What a slot saved is at fixed addresses, so for that executor it is a
static input like a parameter, and each slot has its own recordings.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch

from breakable_backend import _torch, locks
from breakable_backend.active import handler, in_call
from breakable_backend.callers import Callers
from breakable_backend.calling.compiled_graph import REFILLED
from breakable_backend.calling.executor import Executor
from breakable_backend.calling.first_backwards import IN_PARTS, WATCHED, FirstBackwards, alive, refusal
from breakable_backend.calling.registry import EagerGraph
from breakable_backend.calling.slots import ALL_TAKEN, BackwardExecutor, ForwardExecutor, Outputs
from breakable_backend.compiling.flat_inputs import Whole
from breakable_backend.compiling.forward_and_backward import Backward
from breakable_backend.compiling.halves import Halves
from breakable_backend.compiling.joint_graph import Pattern
from breakable_backend.compiling.lowering import CannotLower
from breakable_backend.errors import EagerOutputError, PartitionError, ReplayError
from breakable_backend.ir.ambient_modes import Modes
from breakable_backend.ir.layout import Geometry, TensorSpec
from breakable_backend.ir.running_ops import RandomStates, generators_of
from breakable_backend.marks.call_ops import Absent
from breakable_backend.recordings.copies import clone_exact
from breakable_backend.recordings.observer import Saved

log = logging.getLogger(__name__)

MAX_PATTERNS = 16
"""For how many patterns of gradients a backward of one graph is traced."""

LEARNING = "it needs gradients, and no backward has been seen that tells how"
"""Why the first calls are eager."""

CHANGED = (
    "a parameter was frozen, unfrozen, or given another layout, and Dynamo has not noticed: "
    "torch._dynamo.config.use_recursive_dict_tags_for_guards = False has it look"
)

SHARED = "its backward reads an argument that it writes through another one"

WAY_OUT = "compile it with options={'training': False}"


class _Drawn(NamedTuple):
    """The random states before and after a forward."""

    before: RandomStates
    after: RandomStates

    @classmethod
    def between(cls, before: RandomStates | None, after: RandomStates | None) -> _Drawn | None:
        return None if before is None or after is None else cls(before, after)


class _Held(NamedTuple):
    """What a forward of several outputs saves, a second time: autograd gives all of it, or nothing if a part was written."""

    moving: Sequence[torch.Tensor]
    inputs: Sequence[torch.Tensor]
    written: Callable[[Sequence[int], Sequence[int]], bool]
    """Whether an input, or a result that is checked, was written since the forward. They are given by their places."""

    @classmethod
    def of(
        cls, moving: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor], checked: Sequence[torch.Tensor]
    ) -> _Held:
        results = [value.detach() for value in checked]  # a result has this node, and would be kept by it
        versions = [[value._version for value in values] for values in (inputs, results)]

        def written(*places: Sequence[int]) -> bool:
            return any(
                values[place]._version != version[place]
                for values, version, some in zip((inputs, results), versions, places, strict=True)
                for place in some
            )

        return cls(moving, inputs, written)


_Other = tuple[Any, int | None, int]
"""An input, or a weak reference to it, with its version, which a tensor made in inference mode lacks, and its address."""

Make = Callable[..., Any]
"""Makes an executor of a class for a lowered graph, under a name; further arguments go to the class."""


class Training:
    """A graph that needs gradients, as Dynamo calls it. Several threads may call it.

    Args:
        halves: the graph.
        eager: runs it as Dynamo traced it.
        make: makes an executor of a class for a lowered graph, under a name; further arguments go to the class.
        name: the name of the graph.
        source: the user's last line in it.
        warn: warns the user, once for each text.
        auto_break: whether it may stay eager. Otherwise each call is an error once it is known that it has to.
    """

    def __init__(
        self,
        halves: Halves,
        eager: Callable[..., Any],
        make: Make,
        name: str,
        source: str,
        warn: Callable[[str], None],
        auto_break: bool,
    ) -> None:
        self.halves, self.eager, self.make, self.name, self.source = halves, eager, make, name, source
        self.warn, self.auto_break = warn, auto_break
        self.callers = Callers()
        self.parts = halves.parts
        self.why = LEARNING
        """Why it is eager; empty once it is not."""
        self.for_good = False
        self.forward: ForwardExecutor | None = None
        self.backwards: dict[tuple[Pattern, Absent, frozenset[str]], Executor] = {}
        self._guess: tuple[Pattern, Absent, frozenset[str]] | None = None
        """A key of :attr:`backwards` that was made before any forward was captured, as if nothing that it saves moves."""
        self._seen: FirstBackwards | None = None
        self._storages: tuple[list[int], list[weakref.ref[torch.Tensor]], list[_torch.StorageWeakRef]] | None = None
        """The addresses of static inputs in the last call, these inputs, and their storages."""
        self._refilled: frozenset[int] = frozenset()
        """Static inputs that are copied in, since their memory is freed between calls."""
        self._lock = locks.lock()
        self._modes = Modes.current()

    @property
    def uncaptured(self) -> EagerGraph | None:
        """What the report says about it while nothing is captured."""
        return EagerGraph(self.name, self.why, self.source) if self.why else None

    @property
    def executors(self) -> list[Executor]:
        """The executors of both halves."""
        forward = [self.forward] if self.forward is not None else []
        return [*forward, *list(self.backwards.values())]

    def __call__(self, *args: Any) -> Any:
        """Run the forward once, and give autograd the node that runs the backward."""
        if why := _not_now():
            if self.forward is not None:
                return self._as_traced(args, why)
            if self._seen is None and not self.for_good:
                self.why = f"it needs gradients, and {why}"
            return self.eager(*args)
        if self.why and (self.for_good or not self._ready(args)):
            if self.for_good and not self.auto_break:
                raise PartitionError(
                    f"{self.name} cannot be captured: {self.why}",
                    where=self.source,
                    fix=f"let it run eagerly: auto_break=True; or {WAY_OUT}",
                )
            return self._learn(args)
        forward = self.halves.forward
        assert self.forward is not None
        if _torch.may_keep_stale_graphs() and self._changed(args):
            return self._as_traced(args, CHANGED, logging.WARNING)
        call = _Call(self, args)
        if not self.forward.has_slot(call.args):
            return self._as_traced(args, ALL_TAKEN, logging.WARNING)
        if forward.written and not _count_up(args, forward.written, forward.watched):
            return self._as_traced(args, SHARED)  # eager's autograd notices it
        made = _torch.apply_plainly(_Captured, call, *(args[index] for index in self.halves.wanted))
        results, call.results = call.results, []
        for index, output in zip(forward.differentiable, made, strict=True):
            results[index] = output
        for place, output in enumerate(made if len(made) > 1 else ()):
            if place in forward.inner:
                call.inner.append(weakref.ref(output))
                _torch.hear_of_hooks(output, functools.partial(self.refuse, WATCHED))
            else:
                _torch.hear_of_hooks(output, None)
        for alias in forward.aliases:
            results[alias.output] = alias.made(args, results)
        return results

    def _changed(self, args: Sequence[Any]) -> bool:
        """Whether a static input is not as it was when the graph was traced. 0.3 us for each, where Dynamo does not look."""
        inputs = self.halves.inputs
        return any(
            args[index].requires_grad is not inputs[index][1] or not inputs[index][0].accepts(args[index])
            for index in self.halves.static
        )

    def _as_traced(self, args: Sequence[Any], why: str, level: int = logging.INFO) -> Any:
        """A call of a captured graph that runs as Dynamo traced it."""
        assert self.forward is not None
        self.forward.statistics.calls += 1
        self.forward.count_plain(why, level)
        return self.eager(*args)

    # until a backward has been seen

    def _learn(self, args: Sequence[Any]) -> Any:
        """An eager call whose backward is observed."""
        outputs = self.eager(*args)
        if self.for_good:
            return outputs
        differentiable = {
            index: value
            for index, value in enumerate(outputs)
            if isinstance(value, torch.Tensor) and value.requires_grad
        }
        if any(value.grad_fn is None for value in differentiable.values()):
            with self._lock:
                self._give_up(f"it needs gradients, and {LEAF}")
            return outputs
        seen = self._seen
        if seen is None:
            storages = {i: _torch.retains(args[i]) for i in self.halves.static if args[i].numel()}
            self._seen = seen = FirstBackwards(storages)
            self.why = LEARNING
        if not seen.came:  # of all forwards until then, since a backward may come after a later forward
            seen.observe(differentiable, self.warn)
        return outputs

    def _ready(self, args: Sequence[Any]) -> bool:
        """Whether both halves exist. They are traced as soon as a backward was seen."""
        seen = self._seen
        if seen is None or not (seen.came or seen.refused):
            return False
        with self._lock:
            if not self.why:
                return True
            if self.for_good:
                return False
            if seen.refused:
                self._give_up(seen.refused)
                return False
            try:
                forward = self.halves.trace(args, seen.layouts)
                if not _count_up(args, forward.written, forward.inputs):
                    raise CannotLower(SHARED)
                self._refilled = frozenset(seen.refilled)
                lowered = replace(forward.lowered, static=forward.lowered.static - self._refilled)
                self.forward = self.make(
                    ForwardExecutor, lowered, f"forward of {self.name}", replace(forward, lowered=lowered)
                )
                self.forward.note_copied_in(self._refilled, REFILLED)
                self.forward.callers = self.callers
            except CannotLower as why:
                self.source = why.source or self.source
                self._give_up(f"it needs gradients, and is not captured: {why}")
                return False
            self.why = ""
            log.info("%s: its forward and its backward are captured from now on", self.name)
            return True

    def _give_up(self, why: str) -> None:
        self.why, self.for_good, self._seen = why, True, None
        log.info("%s: stays as Dynamo traced it, because %s", self.name, why)

    # the backward

    def gradients(self, ctx: Any, moving: Sequence[Any], inputs: Sequence[Any], grads: Sequence[Any]) -> list[Any]:
        """The gradients of one forward for the inputs that need some."""
        pattern = _pattern_of(grads)
        if not any(pattern):
            return [None] * len(self.halves.wanted)
        backward, absent, saved = self._chosen(pattern, ctx, moving)
        executor = self._executor(backward, pattern, absent, ctx.static if ctx.captured else None)
        given = dict(zip(self.halves.forward.inputs, inputs, strict=True))
        args = [
            *(saved[name] for name in backward.saved),
            *(given[index] for index in backward.inputs),
            *(grads[place] for place in backward.gradients),
        ]
        try:
            made = backward.gradients_in(
                executor(args) if ctx.captured else executor.plain(args, "its forward ran plainly")
            )
        except EagerOutputError as error:
            self._leave(f"it needs gradients, and {error.what}")
            raise
        made = [
            clone_exact(value) if place in backward.entangled and value is not None else value
            for place, value in enumerate(made)
        ]
        for value, whole in zip(made, backward.wholes, strict=True):
            if value is not None and whole is not None:
                value.gradient_of = whole
        return made

    def read_by(self, ctx: Any, moving: Sequence[Any], grads: Sequence[Any]) -> tuple[Sequence[int], Sequence[int]]:
        """Which inputs and which checked results the backward for ``grads`` reads, by their places among what is saved."""
        pattern = _pattern_of(grads)
        if not any(pattern):
            return (), ()
        backward, *_ = self._chosen(pattern, ctx, moving)
        return tuple(map(self.halves.forward.inputs.index, backward.inputs)), backward.checked

    def _chosen(
        self, pattern: Pattern, ctx: Any, moving: Sequence[Any]
    ) -> tuple[Backward, Absent, dict[str, torch.Tensor]]:
        """The backward for ``pattern``, the gradients that marked functions will not give, and what was saved, by name."""
        forward = self.halves.forward
        left = iter(moving)
        saved = {
            name: next(left) if value is None else value for name, value in zip(forward.saved, ctx.saved, strict=True)
        }
        backward, absent = self._traced(pattern), frozenset[tuple[int, int]]()
        while more := backward.absent_from(saved) - absent:  # then later calls may give nothing either
            absent |= more
            backward = self._traced(pattern, absent)
        return backward, absent, saved

    def _traced(self, pattern: Pattern, absent: Absent = frozenset()) -> Backward:
        """The backward for ``pattern`` in which marked functions do not give the ``absent`` gradients."""
        known = self.halves.backwards
        found = known.get((pattern, absent))
        if found is not None:
            return found
        with self._lock:
            if len(known) == MAX_PATTERNS and (pattern, absent) not in known:
                self._leave(TOO_MANY_ABSENT if absent else TOO_MANY_PATTERNS)
            try:
                with self._modes.enter():
                    return self.halves.backward(pattern, absent)
            except CannotLower as why:
                self._leave(f"it needs gradients, and some came in that it was not traced for: {why}")
                raise ReplayError(
                    f"the backward of {self.name} got gradients that it was not traced for: {why}",
                    where=why.source or self.source,
                    fix=f"call it again, since it is eager from now on; or {WAY_OUT}",
                ) from None

    def _executor(
        self, backward: Backward, pattern: Pattern, absent: Absent, static: frozenset[str] | None
    ) -> Executor:
        """The executor of a backward for a forward whose ``static`` values are fixed (None: plain)."""
        guess = None
        if static is None:
            known = (key for key in list(self.backwards) if key[:2] == (pattern, absent))
            guess = pattern, absent, frozenset(self.halves.forward.saved)
            static = next(known, guess)[2]
        found = self.backwards.get((pattern, absent, static))
        if found is not None:
            return found
        with self._lock:
            if (pattern, absent, static) not in self.backwards:
                if self._guess is not None and self._guess[:2] == (pattern, absent):
                    del self.backwards[self._guess]  # it has served plain forwards alone
                self._guess = None
                lowered = backward.lowered(self.halves.static - self._refilled, static)
                executor = self.make(BackwardExecutor, lowered, self._named(pattern, absent, static))
                places = enumerate(backward.inputs, len(backward.saved))
                executor.note_copied_in([place for place, index in places if index in self._refilled], REFILLED)
                executor.callers = self.callers
                self.backwards[pattern, absent, static], self._guess = executor, guess
            return self.backwards[pattern, absent, static]

    def _named(self, pattern: Pattern, absent: Absent, static: frozenset[str]) -> str:
        """A name that no other backward of this graph has, and that tells how this one differs from the first."""
        name = f"backward of {self.name}"
        first, _, fixed = next(iter(self.backwards), (pattern, absent, static))
        given = [place for place, spec in enumerate(pattern) if spec is not None]
        if given != [place for place, spec in enumerate(first) if spec is not None]:
            results = ", ".join(str(self.halves.forward.differentiable[place]) for place in given)
            name += f" for result{'s' * (len(given) > 1)} {results}"
        elif pattern != first:
            name += " for gradients with another layout"
        if moving := len(fixed - static):
            name += f", with {moving} saved value{'s' * (moving > 1)} that move{'s' * (moving == 1)}"
        if absent:
            name += f", without {len(absent)} gradient{'s' * (len(absent) > 1)} of marked functions"
        taken = [executor.name for executor in self.backwards.values()]
        return name if name not in taken else f"{name} ({1 + len(taken)})"

    def saved(self, made: Outputs, results: Sequence[Any]) -> list[Saved]:
        """The values that a captured forward keeps at fixed addresses for a backward, for observers."""
        forward = self.halves.forward
        assert made.saved is not None
        leaves: Any = forward.lowered.module.graph.output_node().args[0]
        makers = dict(zip(forward.saved, leaves[forward.num_outputs :], strict=True))
        there = dict(zip(forward.saved, made.saved, strict=True))
        copies = {leaves[index]: results[index] for index in forward.checked}
        return [Saved(name, there[name], makers[name], copies.get(makers[name])) for name in made.static]

    # the memory of what it reads

    def storages(self, inputs: Sequence[torch.Tensor], pointers: Sequence[int]) -> list[_torch.StorageWeakRef]:
        """The storages of static inputs that a backward needs, read again only if an address or an input is another one.

        FSDP may gather the weights of one block where those of another were.
        """
        there = [pointers[place] for place in self._static_places]
        static = [inputs[place] for place in self._static_places]
        known = self._storages
        if (
            known is None
            or known[0] != there
            or any(ref() is not one for ref, one in zip(known[1], static, strict=True))
        ):
            known = self._storages = there, list(map(weakref.ref, static)), list(map(_torch.retains, static))
        return known[2]

    def have_other_storages(self, inputs: Sequence[torch.Tensor], ctx: Any, read: Sequence[int]) -> bool:
        """Whether an input that moved, of those that the backward ``read``s, has another storage than in its forward.

        A storage that was freed and filled again (FSDP does that) is read at its new place, by views too, as in eager.
        Eager's views of an input that got another storage still read the old one.
        """
        before = dict(zip(self._static_places, ctx.storages, strict=True))
        return any(
            place not in before or before[place].cdata != _torch.storage_key(inputs[place])
            for place in read
            if inputs[place].data_ptr() != ctx.pointers[place]
        )

    @functools.cached_property
    def _static_places(self) -> tuple[int, ...]:
        """The positions of static inputs that backwards need."""
        return tuple(place for place, index in enumerate(self.halves.forward.inputs) if index in self.halves.static)

    # what only eager can run backward

    def others(self, args: Sequence[Any]) -> list[_Other]:
        """The inputs that only a second forward would need. Those that move are held weakly."""
        static = self.halves.static
        found = []
        for index in self._others:  # the address takes 0.04 us: a version does not tell that a tensor got other memory
            value = args[index]
            version = None if value.is_inference() else value._version
            found.append((value if index in static else weakref.ref(value), version, value.data_ptr()))
        return found

    @functools.cached_property
    def _others(self) -> tuple[int, ...]:
        return tuple(sorted(set(range(len(self.halves.inputs))) - set(self.halves.forward.inputs)))

    def gradients_of_eager(self, why: str, ctx: Any, inputs: Sequence[Any], grads: Sequence[Any]) -> Sequence[Any]:
        """The gradients by a second, eager forward, for a backward that only eager's autograd can run.

        If that backward is to be differentiated again, later calls are eager: the second derivatives of this one may
        add up in another order than eager's.
        """
        forward, others = self.halves.forward, ctx.others
        if others is None:
            self.refuse(f"{why}, and {forward.once or 'an argument is no plain tensor'}")
        if ctx.random is None:
            self.refuse(f"{why}, and somebody was capturing during its forward")
        args = dict(zip(forward.inputs, inputs, strict=True))
        for index, (kept, version, pointer) in zip(self._others, others, strict=True):
            args[index] = kept() if isinstance(kept, weakref.ref) else kept
            if version is None:
                self.refuse(f"{why}, and an argument was made in inference mode, where nothing counts writes")
            if args[index] is None or (args[index]._version != version and index not in forward.copied):
                self.refuse(f"{why}, and an argument is gone or was written")
            if args[index].data_ptr() != pointer:
                self.refuse(f"{why}, and an argument was given other memory since its forward")
        copied = {_torch.storage_key(args[index]) for index in forward.copied}
        if copied and any(_torch.storage_key(args[index]) in copied for index in args.keys() - set(forward.copied)):
            self.refuse(f"{why}, and an argument that it writes shares memory with another")
        args.update({index: clone_exact(args[index]) for index in forward.copied})
        with self._modes.enter(), _torch.outside_of_vmap(), self._drawing_again(ctx.random, why):
            outputs = self.eager(*(args[index] for index in range(len(args))))
        pairs = [
            (outputs[index], grad)
            for index, grad in zip(forward.differentiable, grads, strict=True)
            if grad is not None
        ]
        if not pairs:
            return [None] * len(self.halves.wanted)
        self._note_again(why)
        wanted = [args[index] for index in self.halves.wanted]
        differentiated, given = zip(*pairs, strict=True)
        again = torch.is_grad_enabled()
        if again and not self.for_good:
            self._leave(f"it needs gradients, and {why}")
        return torch.autograd.grad(differentiated, wanted, given, create_graph=again, allow_unused=True)

    @contextmanager
    def _drawing_again(self, drawn: _Drawn, why: str) -> Iterator[None]:
        """Draw what a forward has ``drawn``. Afterwards the generators are where they were.

        If they end elsewhere than after that forward, somebody else drew while it ran, and it drew something else.
        """
        assert self.forward is not None
        with self.forward.driver.drawing() if drawn.before else nullcontext():
            now = RandomStates.of(generator for generator, _ in drawn.before)
            try:
                drawn.before.restore()
                yield
                if not drawn.after.are_current():
                    self.refuse(f"{why}, and another thread drew random numbers during its forward")
            finally:
                now.restore()

    def _leave(self, why: str) -> None:
        """Give up what was captured. Forwards that are pending keep what they saved."""
        with self._lock:
            self._give_up(why)
        for executor in self.executors:
            executor.leave(why)

    def _note_again(self, why: str) -> None:
        assert self.forward is not None
        text = f"its forward is run once more, eagerly, where {why}"
        with self.forward.keys.changing:
            known = text in self.forward.notes
            if not known:
                self.forward.notes.append(text)
        if not known:
            self.forward.observers.noted(text, logging.WARNING)

    def refuse(self, why: str) -> NoReturn:
        """Raise for a backward that only eager can run. Later calls are eager."""
        self._leave(f"it needs gradients, and {why}")
        raise ReplayError(
            f"{self.name} was captured, and {why}: only a call that ran eagerly supports that",
            where=self.source,
            fix=f"call it again, since it is eager from now on; or run such a backward in its first step; or {WAY_OUT}",
        )


LEAF = "an output that needs some has no history: it is a leaf, or was made under no_grad"

TOO_MANY_PATTERNS = f"it needs gradients, and more than {MAX_PATTERNS} sets of its results, or layouts, came with some"

TOO_MANY_ABSENT = (
    f"it needs gradients, and more than {MAX_PATTERNS} sets of them were missing where marked functions gave none"
)


def _not_now() -> str:
    """Why this call is eager whatever was captured."""
    if _torch.saves_through_hooks():
        return "saved_tensors_hooks are active"
    if _torch.dispatch_mode_active():
        return "a dispatch mode is active"
    if _torch.functorch_active():
        return "a transform of torch.func is active"
    if torch.is_anomaly_enabled():
        return "anomaly detection is on"
    if _torch.compiled_autograd_active():
        return "compiled autograd is on"
    if handler.get() is not None:
        return "called inside capture"
    if in_call():
        return "called inside an eager step"
    return ""


class _Call:
    """One call on its way through autograd."""

    def __init__(self, training: Training, args: Sequence[Any]) -> None:
        self.training, self.args = training, args
        self.wholes: list[torch.Tensor] = []
        """Subclasses that the backward needs."""
        if training.parts:
            self._take_inner(training)
        self.results: list[Any] = []
        self.inner: list[weakref.ref[torch.Tensor]] = []
        """Results from which others are computed."""

    def _take_inner(self, training: Training) -> None:
        """Have the arguments be tensors that live as long as the subclasses that they are parts of."""
        self.args, forward = list(self.args), training.halves.forward
        for index in training.parts:
            whole: Whole = self.args[index].whole
            self.args[index] = whole.inner
            if index in forward.inputs:
                self.wholes.append(whole.outer)


class _Captured(torch.autograd.Function):
    """The autograd node of a call. Autograd saves its values outside of the slot, and checks whether they were written."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *_differentiable: torch.Tensor) -> tuple[torch.Tensor, ...]:
        training, args = call.training, call.args
        executor, forward = training.forward, training.halves.forward
        assert executor is not None
        token = torch.empty(0)
        # A second forward draws the same. For graphs that draw, 4 us for each generator.
        drawing = () if forward.once else forward.drawing
        begun = _random_states(drawing)
        with _without_autocast():
            made = executor.run(list(args), token)
        ctx.random = _Drawn.between(begun, _random_states(drawing))
        count = forward.num_outputs
        results = [_on_its_own(value) for value in made[:count]]
        if made.saved is not None:
            ctx.saved = [
                value if name in made.static else None for name, value in zip(forward.saved, made.saved, strict=True)
            ]
            moving = [value for name, value in zip(forward.saved, made.saved, strict=True) if name not in made.static]
        else:
            ctx.saved, moving = [None] * len(forward.saved), made[count:]
        ctx.captured, ctx.static, ctx.owners = made.saved is not None, made.static, made.owners
        ctx.training, ctx.num_moving = training, len(moving)
        inputs = [args[index] for index in forward.inputs]
        observers = executor.observers
        ctx.check = observers.saved(training.saved(made, results)) if observers.reads_values and made.saved else None
        # 0.04 us for each: autograd's check of versions does not notice that an input got other memory
        ctx.pointers = [value.data_ptr() for value in inputs]
        ctx.storages = training.storages(inputs, ctx.pointers)
        ctx.others = None if forward.once or training.parts else training.others(args)
        checked = [results[index] for index in forward.checked]
        several = len(forward.differentiable) > 1 and not training.parts
        ctx.held = _Held.of(moving, inputs, checked) if several else None
        ctx.save_for_backward(token, *moving, *inputs, *checked, *call.wholes)
        ctx.set_materialize_grads(False)
        ctx.given = [True] * len(forward.differentiable)
        call.results, call.args, ctx.inner = results, (), call.inner
        return tuple(results[index] for index in forward.differentiable)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        training: Training = ctx.training
        held: _Held | None = ctx.held
        if any(result is not None and result.retains_grad and result.grad_fn is ctx for result in alive(ctx.inner)):
            training.refuse(WATCHED)
        why = refusal(grads)
        moving: Sequence[torch.Tensor]
        inputs: Sequence[torch.Tensor]
        try:
            _, *saved = ctx.saved_tensors  # raises if it was freed or written
            moving, inputs = saved[: ctx.num_moving], saved[ctx.num_moving :][: len(training.halves.forward.inputs)]
        except RuntimeError:
            if any(now is not None and not before for now, before in zip(grads, ctx.given, strict=True)):
                training.refuse(IN_PARTS)  # in eager the results may share nothing
            if held is None or why or held.written(*training.read_by(ctx, held.moving, grads)):
                raise
            moving, inputs = held.moving, held.inputs  # in eager nodes for other results have saved what was written
        if not _torch.graph_is_kept():
            ctx.given, ctx.held = [grad is not None for grad in grads], None
        everything = list(range(len(inputs)))
        if not _torch.are_at(list(inputs), ctx.pointers, everything) and training.have_other_storages(
            inputs, ctx, everything if why else training.read_by(ctx, moving, grads)[0]
        ):
            training.refuse("an argument or a parameter was given other memory between a forward and its backward")
        gradients: Sequence[Any]
        if why:
            gradients = training.gradients_of_eager(why, ctx, inputs, grads)
        else:
            if ctx.check is not None:
                ctx.check()
            with _without_autocast():
                gradients = training.gradients(ctx, moving, inputs, grads)
        if any(gradient is None for gradient in gradients):
            _torch.spare_hooks(ctx.next_functions, gradients)
        return None, *gradients


# A function that runs the backward may be compiled itself. Dynamo would then compile what this calls.
_torch.hide_from_dynamo(_Captured.backward.__code__)


def _pattern_of(grads: Sequence[Any]) -> Pattern:
    return tuple(None if grad is None else TensorSpec.of(grad) for grad in grads)


def _count_up(args: Sequence[Any], written: Sequence[int], needed: Sequence[int]) -> bool:
    """Count up the versions of arguments that a forward writes. Returns whether no other needed tensor shares one."""
    before = [args[index]._version + (index in written) for index in needed]
    torch.autograd.graph.increment_version([args[index] for index in written])
    return before == [args[index]._version for index in needed]


def _random_states(devices: Sequence[torch.device]) -> RandomStates | None:
    """The states of the default generators of some devices; None during somebody's capture, which reads none."""
    if any(device.type == "cuda" for device in devices) and _torch.is_stream_capturing():
        return None
    return RandomStates.of(generators_of(device)[-1] for device in devices)


def _on_its_own(value: Any) -> Any:
    """An output as a tensor that is not a view: autograd refuses later writes to a view made without gradients."""
    if isinstance(value, torch.Tensor) and _torch.base_of_view(value) is not None:
        return Geometry.of(value).on(value.untyped_storage())
    return value


def _without_autocast() -> AbstractContextManager[None]:
    """No autocast inside the block: the casts of the two halves are ops of their graphs."""
    return Modes().enter() if _torch.any_autocast_enabled() else nullcontext()
