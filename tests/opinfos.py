"""PyTorch's own databases of ops and modules, as programs to compare with eager: ``sweep.py`` runs them all.

A *case* is one op, dtype and variant, with a few samples. Each is run in two *forms*: ``alone``, and ``between`` two
eager steps, where every tensor comes through a bridge and every result is read by an eager step. What has gradients is an
entry of its own, too: it is run ``alone``, forward and backward, with ``options={"training": True}``.

There are two *doors*: ``torch.compile``, and ``with capture(graph)``. At the second each graph is captured once, and
replayed once for each of the values that are written into its inputs.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import linecache
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.testing._internal.opinfo.core import BinaryUfuncInfo, UnaryUfuncInfo
from torch.utils import _pytree as pytree

import breakable_backend
from breakable_backend.recordings.recording import EagerStep, GraphStep
from checks import aliases, bits, looks, random_states

CALLS = 5
NOTHING = "nothing to launch"
"""Why nothing was captured of views."""
SAMPLES = 3
LOOKED_AT = 40
"""Samples of an op among which small ones are chosen."""
LARGE = 20_000
"""Elements of a sample that is passed over while there are smaller ones."""

UNINITIALISED = "empty empty_like empty_permuted empty_strided new_empty new_empty_strided".split()
HOST_RESULTS = ("torch.ops.aten._efficient_attention_forward",)
"""Return tensors on the host, of which their fake kernels know nothing: no eager step can be told what it gets."""
INTEGERS = (torch.int64, torch.int32, torch.uint8, torch.bool)
COMPILE, CAPTURE = "compile", "capture"
"""The doors."""
BACKWARD = "backward of "
"""What the name of an entry begins with that is run forward and backward."""

# --- the eager steps before and after an op ---------------------------------------------------------------------------------


def twin(tensor: Tensor) -> Tensor:
    """A copy in memory of its own, with the same strides, gaps and overlaps."""
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        return tensor.clone()
    made = flat(tensor).clone()
    return made.as_strided(tensor.shape, tensor.stride())


def whole_twin(tensor: Tensor) -> Tensor:
    """A copy of a tensor and all of its storage."""
    if tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg() or tensor.is_quantized:
        return tensor.clone()
    storage = tensor.untyped_storage().clone()
    made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return made.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def flat(tensor: Tensor) -> Tensor:
    """The memory of a tensor from its first element to its last."""
    extent = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent if tensor.numel() else 0,), (1,))


@torch.library.custom_op("sweep::step", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def step(tensors: list[Tensor]) -> list[Tensor]:
    """An eager step that returns copies of what it is given."""
    return [twin(tensor) for tensor in tensors]


@step.register_fake
def _(tensors: list[Tensor]) -> list[Tensor]:
    return [
        torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        for tensor in tensors
    ]


def stepped(tree: Any) -> Any:
    """The tree with its tensors passed through an eager step."""
    leaves, spec = pytree.tree_flatten(tree)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    if places:
        for place, tensor in zip(places, step([leaves[place] for place in places]), strict=True):
            leaves[place] = tensor
    return pytree.tree_unflatten(leaves, spec)


# --- cases ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """The arguments of one call of the function under test: for each of the calls, its own values."""

    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]


@dataclass(frozen=True)
class Case:
    """A function and a few samples of its arguments."""

    name: str
    """The op as its database names it."""
    what: str
    """dtype and variant."""
    function: Callable[..., Any]
    samples: tuple[Sample, ...]
    owner: torch.nn.Module | None = None
    """The module, where the function is one."""
    writes: bool = False
    """It writes its arguments: all calls get the same ones, with new values, since their addresses belong to the key."""
    training: bool = False
    """Each call runs its backward too. Tensors of the samples say whether they get gradients."""
    door: str = COMPILE

    @property
    def keeps_arguments(self) -> bool:
        """Whether all calls get the same tensors, with new values in them."""
        return self.writes or self.door == CAPTURE


def seed(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


def ops() -> dict[str, Any]:
    """All entries of both databases by name."""
    found: dict[str, Any] = {}
    for info in op_db:
        found[info.name + (f".{info.variant_test_name}" if info.variant_test_name else "")] = info
    for info in module_db:
        found[f"module {info.name}"] = info
    return found | {BACKWARD + name: info for name, info in found.items() if getattr(info, "supports_autograd", True)}


def is_backward(name: str) -> bool:
    """Whether an entry is run forward and backward."""
    return name.startswith(BACKWARD)


def dtypes_of(info: Any, device: torch.device) -> list[torch.dtype]:
    """float32, bfloat16 and one integer dtype, as far as the op takes them; else the first that it does take."""
    supported = info.supported_dtypes(device.type) if hasattr(info, "supported_dtypes") else set(info.dtypes)
    chosen = [dtype for dtype in (torch.float32, torch.bfloat16) if dtype in supported]
    chosen += [dtype for dtype in INTEGERS if dtype in supported][:1]
    return chosen or sorted(supported, key=str)[:1]


def cases(info: Any, device: torch.device, training: bool = False) -> Iterator[Case]:
    """What is tried of one entry; ``training``: forward and backward."""
    if hasattr(info, "module_cls"):
        yield from module_cases(info, device, training)
    elif training:
        yield from training_cases(info, device)
    else:
        yield from op_cases(info, device)


def op_cases(info: Any, device: torch.device) -> Iterator[Case]:
    name = info.name + (f".{info.variant_test_name}" if info.variant_test_name else "")
    inplace = info.inplace_variant
    for position, dtype in enumerate(dtypes_of(info, device)):
        short = str(dtype).removeprefix("torch.")
        samples = samples_of(info, device, dtype)
        yield Case(name, short, info.op, samples, writes=any(writes(info.op, sample) for sample in samples))
        if position:
            continue
        if inplace is not None:
            yield Case(name, f"{short} in place", inplace, inplace_samples(info, samples), writes=True)
        if info.supports_out:
            yield from out_case(info, name, short, samples)


def training_cases(info: Any, device: torch.device) -> Iterator[Case]:
    """What has gradients, in the first dtype that has some; nothing that writes its arguments."""
    name = info.name + (f".{info.variant_test_name}" if info.variant_test_name else "")
    supported = info.supported_backward_dtypes(device.type)
    for dtype in [d for d in (torch.float32, torch.float64, torch.complex64) if d in supported][:1]:
        samples = samples_of(info, device, dtype, gradients=True)
        samples = tuple(sample for sample in samples if not writes(info.op, sample))
        yield Case(name, str(dtype).removeprefix("torch."), info.op, samples, training=True)


def samples_of(info: Any, device: torch.device, dtype: torch.dtype, gradients: bool = False) -> tuple[Sample, ...]:
    """A few samples that differ in shape, the last of them not contiguous if it can be."""

    def generate() -> Iterator[Any]:
        return cast(Iterator[Any], info.sample_inputs(device, dtype, requires_grad=gradients))

    chosen = choose(generate)
    made = [calls_of(generate, place) for place in chosen]
    samples = [Sample(calls_from([as_args(each) for each in variants])) for variants in made]
    for variants in made:
        with contextlib.suppress(RuntimeError):  # a sparse tensor cannot be
            strided = [as_args(each.noncontiguous()) for each in variants]
            if layouts(strided[0]) != layouts(as_args(variants[0])):
                samples.append(Sample(calls_from(strided)))
                break
    if isinstance(info, UnaryUfuncInfo | BinaryUfuncInfo):
        for sample in samples:
            special(sample)
    return tuple(samples)


def special(sample: Sample) -> None:
    """Zeros of both signs, infinities and NaN among the values of the last call."""
    values = torch.tensor([-0.0, 0.0, torch.inf, -torch.inf, torch.nan, -0.25, 0.25, 1.0])
    for tensor in tensors_in(sample.calls[-1]):
        if tensor.is_floating_point() and tensor.layout is torch.strided:
            place = flat(tensor.detach())[::3]
            place.copy_(values.repeat(1 + place.numel() // len(values))[: place.numel()])


def as_args(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (sample.input, *sample.args), dict(sample.kwargs)


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def layouts(tree: Any) -> list[Any]:
    return [(tensor.shape, tensor.stride(), tensor.storage_offset()) for tensor in tensors_in(tree)]


def choose(generate: Callable[[], Iterator[Any]]) -> list[int]:
    """Which samples: small ones with elements, of different shapes and arguments."""
    seed(0)
    ranked, seen = [], set()
    for place, sample in enumerate(itertools.islice(generate(), LOOKED_AT)):
        args = as_args(sample)
        sizes = [tensor.numel() for tensor in tensors_in(args)]
        mark = repr([tuple(t.shape) for t in tensors_in(args)]) + repr(
            [leaf for leaf in pytree.tree_leaves(args) if not isinstance(leaf, Tensor)]
        )
        rank = (sum(sizes) > LARGE, mark in seen, not sum(sizes), 0 in sizes)
        seen.add(mark)
        ranked.append((rank, place))
    return sorted(place for _, place in sorted(ranked)[:SAMPLES])


def calls_of(generate: Callable[[], Iterator[Any]], place: int) -> list[Any]:
    """The same sample with other values, once per call."""
    made = []
    for call in range(CALLS):
        seed(call)
        made.append(next(itertools.islice(generate(), place, None)))
    return made


def calls_from(variants: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]) -> tuple[Any, ...]:
    """Only the values of tensors may differ from call to call; what differs otherwise is taken from the first."""
    first, spec = pytree.tree_flatten(variants[0])
    calls = []
    for variant in variants:
        leaves, other = pytree.tree_flatten(variant)
        if other != spec:
            leaves = first
        leaves = [
            mine if isinstance(mine, Tensor) and isinstance(theirs, Tensor) and alike(mine, theirs) else theirs
            for mine, theirs in zip(leaves, first, strict=True)
        ]
        calls.append(fresh(pytree.tree_unflatten(leaves, spec)))
    return tuple(calls)


def alike(mine: Tensor, theirs: Tensor) -> bool:
    if mine.layout is not torch.strided or theirs.layout is not torch.strided:
        return False
    return looks(mine) == looks(theirs) and mine.storage_offset() == theirs.storage_offset()


def inplace_samples(info: Any, samples: Sequence[Sample]) -> tuple[Sample, ...]:
    return tuple(sample for sample in samples if runs(info.inplace_variant, sample))


def runs(function: Callable[..., Any], sample: Sample) -> bool:
    """Whether eager takes it."""
    args, kwargs = fresh(sample.calls[0])
    try:
        with torch.no_grad():
            function(*args, **kwargs)
    except Exception:  # noqa: BLE001 - whatever it is, it is eager's
        return False
    return True


def writes(function: Callable[..., Any], sample: Sample) -> bool:
    """Whether eager writes an argument."""
    given = fresh(sample.calls[0])
    before = content(given)
    try:
        with torch.no_grad():
            function(*given[0], **given[1])
    except Exception:  # noqa: BLE001
        return False
    return content(given) != before


def out_case(info: Any, name: str, short: str, samples: Sequence[Sample]) -> Iterator[Case]:
    """The ``out=`` variant: the first sample, with tensors that are made from eager's result."""
    for sample in samples:
        args, kwargs = fresh(sample.calls[0])
        try:
            with torch.no_grad():
                result = info.op(*args, **kwargs)
        except Exception:  # noqa: BLE001
            continue
        leaves = tensors_in(result)
        if not leaves or any(leaf.layout is not torch.strided for leaf in leaves):
            continue
        with_out = Sample(
            tuple(
                (args, {**kwargs, "out": pytree.tree_map_only(Tensor, torch.empty_like, result)})
                for args, kwargs in sample.calls
            )
        )
        for _, kwargs in with_out.calls:
            for leaf in tensors_in(kwargs["out"]):
                leaf.zero_()
        if runs(info.op, with_out):
            yield Case(name, f"{short} out=", info.op, (with_out,), writes=True)
            return


def module_cases(info: Any, device: torch.device, gradients: bool = False) -> Iterator[Case]:
    """A module with parameters of its own for each of the first few inputs, in evaluation and in training."""
    modes = (False, True) if info.train_and_eval_differ else (False,)
    dtypes = [d for d in dtypes_of(info, device) if d.is_floating_point][: 1 if gradients else None]
    for training, dtype in itertools.product(modes, dtypes):
        short = str(dtype).removeprefix("torch.") + (" training" if training else "")
        how = {"device": device, "dtype": dtype, "requires_grad": gradients, "training": training}
        inputs = []
        for call in range(CALLS):
            seed(call)
            inputs.append(list(info.module_inputs_func(info, **how)))
        usable = [place for place, made in enumerate(inputs[0]) if made.forward_input is not None]
        for place in usable[:SAMPLES]:
            seed(0)
            made = inputs[0][place].constructor_input
            module = info.module_cls(*made.args, **made.kwargs).to(device=device, dtype=dtype).train(training)
            variants = [
                (tuple(each[place].forward_input.args), dict(each[place].forward_input.kwargs))
                for each in inputs
                if place < len(each)
            ]
            while len(variants) < CALLS:
                variants.append(variants[0])
            sample = Sample(calls_from(variants))
            name, what = f"module {info.name}", f"{short} {inputs[0][place].desc or place}"
            yield Case(name, what, module, (sample,), owner=module, training=gradients)


# --- a run ------------------------------------------------------------------------------------------------------------------


def fresh(tree: Any) -> Any:
    """The tree with tensors of its own, strides and all; tensors that are one stay one, and leaves of autograd's are some."""
    made: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            made[id(tensor)] = whole_twin(tensor.detach()).requires_grad_(tensor.requires_grad)
        return made[id(tensor)]

    return pytree.tree_map_only(Tensor, copied, tree)


def alone(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """``count`` samples in one graph."""
    return straight("def program({samples}):", "    return [{results}]", function, count)


def between(function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """``count`` samples in one graph, between two eager steps; what they write is returned too.

    Copies of the results are captured in any case: also behind an op that runs eagerly.
    """
    before = """
def program({samples}):
    samples = stepped(({samples},))
    {samples}, = samples
"""
    after = """
    results = [{results}]
    copies = tree_map_only(Tensor, clone, results)
    return results, samples, stepped((results, samples, copies))
"""
    return straight(before, after, function, count)


def straight(before: str, after: str, function: Callable[..., Any], count: int) -> Callable[..., Any]:
    """A program that calls ``function`` once for each sample, in straight lines: a break in a loop would cost all of it."""
    samples = ", ".join(f"sample{number}" for number in range(count))
    results = ", ".join(f"result{number}" for number in range(count))
    calls = [f"    result{number} = function(*sample{number}[0], **sample{number}[1])" for number in range(count)]
    lines = [before.format(samples=samples), *calls, after.format(results=results)]
    scope = {
        "function": function,
        "stepped": stepped,
        "tree_map_only": pytree.tree_map_only,
        "Tensor": Tensor,
        "clone": torch.clone,
    }
    source = "\n".join(lines)
    name = f"<sweep {next(_numbers)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), scope)
    return cast(Callable[..., Any], scope["program"])


_numbers = itertools.count()


FORMS = {"alone": alone, "between": between}


@dataclass
class Seen:
    """What can be seen of a run, call by call: :meth:`differs` compares two."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def differs(self, other: Seen) -> str:
        """What is not the same, in words; empty if nothing."""
        for position, (mine, theirs) in enumerate(zip(self.calls, other.calls, strict=True)):
            for part in mine:
                if mine[part] != theirs[part]:
                    return f"call {position + 1}: {part}"
        return ""


def refilled(given: Any, values: Any) -> Any:
    """The same tensors with new values."""
    for mine, theirs in zip(tensors_in(given), tensors_in(values), strict=True):
        flat(mine.detach()).copy_(flat(theirs.detach()))
    return given


def watch(
    function: Callable[..., Any], owner: Any, samples: Sequence[Sample], device: torch.device, case: Case
) -> Seen:
    """Call ``function`` with the values of each call, from the same seed, and write down all that can be seen.

    Where the arguments are written every call gets the same tensors. What an op leaves uninitialised has no bits.

    Results are looked at when they come and again at the end: a later call must not have changed them. (At the second
    door it does: they belong to the graph.) There the call after the last one has the values of the first.
    """
    seen, kept, given = Seen(), [], None
    blank = case.name in UNINITIALISED
    for position in (*range(CALLS), 0) if case.door == CAPTURE else range(CALLS):
        values = [fresh(sample.calls[position]) for sample in samples]
        given = refilled(given, values) if case.keeps_arguments and given is not None else values
        seed(1000 + position)
        with torch.set_grad_enabled(case.training):
            result = function(*given)
        random_state = random_states(device)
        named = [(f"output {i}", leaf) for i, leaf in enumerate(pytree.tree_leaves(result))]
        named += [(f"input {i}", leaf) for i, leaf in enumerate(pytree.tree_leaves(given))]
        state = [*owner.named_parameters(), *owner.named_buffers()] if owner is not None else []
        apart = case.training and case.door == COMPILE
        gradients = gradients_of(result, [given, [tensor for _, tensor in state]], []) if apart else []
        seen.calls.append(
            {
                "shapes, dtypes or strides": [describe(leaf) for leaf in pytree.tree_leaves(result)],
                "bits": [] if blank else content(result),
                "inputs afterwards": content(given),
                "parameters or buffers": content([tensor for _, tensor in state]),
                "aliases": aliases([*named, *state]),
                "random state": random_state,
                "whether there are gradients": [gradient is not None for gradient in gradients],
                "shapes, dtypes or strides of gradients": [describe(gradient) for gradient in gradients],
                "gradients": content(gradients),
            }
        )
        kept.append(result)
    for call, result in zip(seen.calls, kept, strict=True) if case.door == COMPILE else ():
        call["bits at the end"] = [] if blank else content(result)
    return seen


def gradients_of(result: Any, given: Any, grads: list[Tensor]) -> list[Tensor | None]:
    """Run the backward, and take the gradients of what was given. It begins with ``grads``; an empty list is filled."""
    leaves = {id(tensor): tensor for tensor in tensors_in(given) if tensor.requires_grad}
    outputs = [tensor for tensor in tensors_in(result) if tensor.requires_grad]
    if outputs and not grads:
        generator = torch.Generator().manual_seed(0)
        grads += [torch.randn(o.shape, generator=generator, dtype=o.dtype).to(o.device) for o in outputs]
    if outputs:
        torch.autograd.backward(outputs, grads)
    found = [leaf.grad for leaf in leaves.values()]
    for leaf in leaves.values():
        leaf.grad = None
    return found


def describe(value: Any) -> Any:
    if isinstance(value, Tensor) and value.layout is not torch.strided:
        return type(value).__name__, value.dtype, value.layout, tuple(value.shape)
    if isinstance(value, float):
        return "float", repr(value)
    return looks(value)


def content(tree: Any) -> list[bytes]:
    return [value_bits(tensor) for tensor in tensors_in(tree)]


def value_bits(tensor: Tensor) -> bytes:
    """The bits of the values; one NaN is like another."""
    plain = tensor.detach()
    if plain.is_quantized:
        plain = plain.int_repr()
    if plain.is_complex():
        plain = torch.view_as_real(plain.resolve_conj().resolve_neg())
    if plain.is_floating_point() and plain.layout is torch.strided:
        plain = torch.where(plain.isnan(), torch.full_like(plain, torch.nan), plain)
    if plain.layout is not torch.strided:
        return bits(plain)
    return bits(torch.empty(plain.numel(), dtype=plain.dtype, device=plain.device).copy_(plain.reshape(-1)))


@dataclass
class Outcome:
    """How one form of one case came out."""

    differs: str = ""
    """What is not as it should be; empty: nothing."""
    reference: str = "eager"
    """``dynamo``: with backend="eager" it differs from eager as well, and that is what it was compared with.
    ``nothing``: eager differs from itself."""
    captured: bool = False
    reasons: list[str] = field(default_factory=list)
    """Why something ran eagerly."""
    failed: str = ""
    """It could not be run: by eager, by Dynamo alone, or by the backend."""
    aot: str = ""
    """How ``backend="aot_eager"`` differs from eager, which has nothing of ours; looked at where there are gradients."""


def try_case(case: Case, form: str, samples: Sequence[Sample], device: torch.device) -> Outcome:
    """Run a case in one form, compiled and not."""
    with deterministic() if case.training else contextlib.nullcontext():
        return (_try_capture if case.door == CAPTURE else _try_case)(case, FORMS[form], samples, device)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """Kernels that add up in one order alone, as far as there are some: gradients on a GPU are added up in any order else."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _try_case(case: Case, program: Any, samples: Sequence[Sample], device: torch.device) -> Outcome:
    outcome = Outcome()
    function, owner = twins(case)
    try:
        want = watch(program(function, len(samples)), owner, samples, device, case)
    except Exception as error:  # noqa: BLE001
        outcome.failed = f"eager: {first_line(error)}"
        return outcome
    options = {"driver": "cuda" if device.type == "cuda" else "tape", "min_kernels": 1, "training": case.training}
    torch._dynamo.reset()
    breakable_backend.reset()
    function, owner = twins(case)
    compiled = torch.compile(program(function, len(samples)), backend="breakable_cg", options=options)
    try:
        got = watch(compiled, owner, samples, device, case)
    except Exception as error:  # noqa: BLE001
        outcome.failed = f"backend: {first_line(error)}"
        got = None
    if got is not None:
        outcome.captured, outcome.reasons = report_of(compiled)
        outcome.differs = got.differs(want)
    if got is None or outcome.differs:
        dynamo(case, program, samples, device, outcome, got)

    def again() -> Seen:
        function, owner = twins(case)
        return watch(program(function, len(samples)), owner, samples, device, case)

    if got is not None and outcome.differs and not same_again(again, device, want):
        outcome.reference, outcome.differs = "nothing", ""
    del compiled
    if case.training and outcome.reference != "nothing":
        outcome.aot = aot(case, program, samples, device, want)
    return outcome


def _try_capture(case: Case, program: Any, samples: Sequence[Sample], device: torch.device) -> Outcome:
    """The same at the second door."""
    outcome, grads = Outcome(), list[Tensor]()

    def body(function: Callable[..., Any], owner: Any) -> Callable[..., Any]:
        made = program(function, len(samples))
        return with_backward(made, owner, grads) if case.training else made

    def eager() -> Seen:
        function, owner = twins(case)
        return watch(body(function, owner), owner, samples, device, case)

    if any(tensor.layout is not torch.strided for tensor in tensors_in([sample.calls for sample in samples])):
        outcome.failed = "eager: an argument has no strides, so new values cannot be written into it"
        return outcome
    try:
        want = eager()
    except Exception as error:  # noqa: BLE001
        outcome.failed = f"eager: {first_line(error)}"
        return outcome
    function, owner = twins(case)
    captured = Captured(body(function, owner), device)
    try:
        got = watch(captured, owner, samples, device, case)
    except breakable_backend.InternalError as error:
        outcome.failed = f"backend: {first_line(error)}"
    except breakable_backend.BreakableError as error:
        outcome.failed = f"refused: {type(error).__name__}: {error.what}"
    except Exception as error:  # noqa: BLE001
        outcome.failed = f"backend: {first_line(error)}"
    else:
        outcome.captured, outcome.reasons = captured.report()
        outcome.differs = got.differs(want)
    if outcome.differs and not same_again(eager, device, want):
        outcome.reference, outcome.differs = "nothing", ""
    return outcome


class Captured:
    """A program that is captured in its first call, with the arguments of that call, and replayed in later ones."""

    def __init__(self, program: Callable[..., Any], device: torch.device) -> None:
        self.program = program
        self.graph = breakable_backend.BreakableCUDAGraph(driver="cuda" if device.type == "cuda" else "tape")
        self.called = False

    def __call__(self, *given: Any) -> Any:
        if self.called:
            self.graph.replay()
        else:
            self.called = True
            with breakable_backend.capture(self.graph):
                self.result = self.program(*given)
        return self.result

    def report(self) -> tuple[bool, list[str]]:
        """Whether a segment has ops, and why the rest is eager."""
        recording = self.graph.recording
        assert recording is not None
        captured = any(isinstance(step, GraphStep) and step.ops for step in recording.steps)
        steps = [step for step in recording.steps if isinstance(step, EagerStep)]
        reasons = {f"{why.op}: {why.text}" for step in steps for why in step.reasons if not why.op.startswith("sweep")}
        return captured, sorted(reasons) or ([] if captured else [NOTHING])


def with_backward(program: Callable[..., Any], owner: Any, grads: list[Tensor]) -> Callable[..., Any]:
    """The program and its backward, from the same gradients in each call; it returns those of all leaves as well."""

    def run(*given: Any) -> Any:
        result = program(*given)
        state = list(owner.parameters()) if owner is not None else []
        return result, gradients_of(result, [given, state], grads)

    return run


def aot(case: Case, program: Any, samples: Sequence[Sample], device: torch.device, want: Seen) -> str:
    """How AOTAutograd alone differs from eager; empty: it does not."""
    torch._dynamo.reset()
    function, owner = twins(case)
    try:
        compiled = torch.compile(program(function, len(samples)), backend="aot_eager")
        return watch(compiled, owner, samples, device, case).differs(want)
    except Exception as error:  # noqa: BLE001
        return first_line(error)


def twins(case: Case) -> tuple[Callable[..., Any], Any]:
    """The function, and its module: a copy where there is one, so that what it writes is its own."""
    if case.owner is None:
        return case.function, None
    owner = copy.deepcopy(case.owner)
    return owner, owner


def dynamo(
    case: Case, program: Any, samples: Sequence[Sample], device: torch.device, outcome: Outcome, got: Seen | None
) -> None:
    """Whether it is Dynamo's alone: the same with backend="eager"."""
    torch._dynamo.reset()
    function, owner = twins(case)
    try:
        reference = watch(torch.compile(program(function, len(samples)), backend="eager"), owner, samples, device, case)
    except Exception as error:  # noqa: BLE001
        if got is None:
            outcome.failed = f"dynamo: {first_line(error)}"
        return
    if got is not None and not got.differs(reference):
        outcome.reference, outcome.differs = "dynamo", ""


def same_again(again: Callable[[], Seen], device: torch.device, want: Seen) -> bool:
    """Whether eager does the same each time: not if it is not deterministic, or leaves memory uninitialised."""
    for filling in (0.0, -3.0e38, torch.nan):
        litter = [torch.full((2**size,), filling, device=device) for size in range(4, 20) for _ in range(8)]
        del litter
        if again().differs(want):
            return False
    return True


def report_of(compiled: Any) -> tuple[bool, list[str]]:
    """Whether something was captured and replayed, and why the rest was not."""
    report = breakable_backend.explain(compiled)
    captured = any(program.num_graph_segments and program.replays for program in report.programs)
    reasons = [
        f"{reason.op}: {reason.text}"
        for program in report.programs
        for reason in program.reasons
        if not str(reason.op).startswith("sweep")
    ]
    reasons += [
        f"refused: {recording.refused}"
        for program in report.programs
        for recording in program.recordings
        if recording.refused
    ]
    reasons += [f"graph: {graph.why}" for graph in report.eager_graphs]
    reasons += [f"graph break: {text.splitlines()[0].split(', at ')[0]}" for text in report.graph_breaks]
    if not (captured or reasons):
        reasons = [NOTHING if report.programs else "Dynamo compiles nothing of it"]
    return captured, sorted(set(reasons))


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def outcomes(
    name: str, info: Any, device: torch.device, door: str = COMPILE
) -> Iterator[tuple[str, str, int, Outcome]]:
    """All that is tried of one entry: dtype and variant, form, number of samples, and how it came out.

    The samples of a case are tried in one graph first, since compiling takes the time; one by one where that is not
    captured as a whole, or is not the same.
    """
    for case in cases(info, device, is_backward(name)):
        case = replace(case, door=door)
        for form in ["alone"] if case.training else FORMS:
            if form == "between" and name in HOST_RESULTS:
                continue
            if not case.samples:
                yield case.what, form, 0, Outcome(failed="the database has no sample")
                continue
            outcome = try_case(case, form, case.samples, device)
            whole = (outcome.captured and not outcome.reasons) or outcome.reasons == [NOTHING]
            clean = whole and not (outcome.differs or outcome.failed)
            if clean or len(case.samples) == 1:
                yield case.what, form, len(case.samples), outcome
                continue
            for number, sample in enumerate(case.samples):
                yield f"{case.what} #{number}", form, 1, try_case(case, form, [sample], device)


@contextlib.contextmanager
def traceable() -> Iterator[None]:
    """The databases' functions without their seeds and saved random states, for the time of a ``with`` statement.

    Dynamo does not trace those, so such an op would be compared with itself. Each call has a seed of its own here.
    """
    seeding = common_methods_invocations.wrapper_set_seed
    common_methods_invocations.wrapper_set_seed = lambda op, *args, **kwargs: op(*args, **kwargs)
    try:
        yield
    finally:
        common_methods_invocations.wrapper_set_seed = seeding
