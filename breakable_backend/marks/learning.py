"""What earlier calls of a marked function returned, as seen in calls that ran as Python.

A *sample* is one call: those properties of its arguments on which the layout of the result may depend, and the layout
of the result. If sizes are symbols, each number of the result's layout is explained by numbers of the arguments, so
that all samples agree. Every later call checks the explanation.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from breakable_backend import _torch, locks
from breakable_backend.ir.layout import TensorSpec, dense_order, dense_strides
from breakable_backend.marks.structure import Structure, in_words, leaves_of


@dataclass(frozen=True)
class Expected:
    """The layout of a call's result."""

    result: tuple[Any, ...] = ("plain", None)
    specs: tuple[TensorSpec, ...] = ()
    """The specs of the roots, which are the tensors that own the memory of the fresh results."""
    differentiable: tuple[bool, ...] = ()
    num_ints: int = 0
    rule: Rule | None = field(default=None, compare=False)
    """How symbolic sizes follow from those of the arguments. None: there are no symbols, or ``fake`` gave the
    layout."""

    def without_symbols(self) -> Expected:
        return replace(self, specs=tuple(spec.without_symbols() for spec in self.specs))


WITHOUT_FULLGRAPH = "; or compile without fullgraph=True"
"""What helps against an error, and not against a graph break."""

# --- what a call was given ----------------------------------------------------------------------------------------------


class Given(NamedTuple):
    """What the op of a call takes."""

    needs: Sequence[bool]
    """Which tensors need gradients; empty if none does."""
    tensors: Sequence[torch.Tensor]
    ints: Sequence[Any]
    floats: Sequence[Any]


Values = tuple[tuple[Any, ...], tuple[str | None, ...]]
"""The numbers in a call's arguments: sizes, strides of tensors that are not dense, and ints; and its floats, bit for
bit."""


@dataclass(frozen=True)
class Asked:
    """The arguments of a call, as far as the layout of the result may depend on them."""

    kind: tuple[Any, ...]
    """Which tensors need gradients; dtype, device and order in memory of each; which arguments are the same tensor."""
    numbers: tuple[Any, ...]
    """Sizes, strides of tensors that are not dense, and ints. Some may be symbols."""
    floats: tuple[Any, ...]
    num_sizes: int
    """How many of the numbers are sizes or strides; the others are ints."""

    @property
    def needs(self) -> tuple[bool, ...]:
        """Which tensors need gradients; empty if none does."""
        return self.kind[0]  # type: ignore[no-any-return]

    @classmethod
    def of(cls, given: Given) -> Asked:
        needs, tensors, ints, floats = given
        orders = tuple(_order_in_memory(tensor) for tensor in tensors)
        kind = tuple(
            (t.dtype, t.device, t.dim(), t.requires_grad, order) for t, order in zip(tensors, orders, strict=True)
        )
        numbers = _numbers(tensors, orders)
        given_as = tuple(next(at for at, other in enumerate(tensors) if other is tensor) for tensor in tensors)
        return cls((tuple(needs), kind, given_as), (*numbers, *ints), tuple(floats), len(numbers))

    @property
    def is_symbolic(self) -> bool:
        return not all(type(number) in (int, float) for number in (*self.numbers, *self.floats))

    @property
    def can_be_specialised(self) -> bool:
        return self.is_symbolic and all(_torch.has_hint(number) for number in (*self.numbers, *self.floats))

    def specialised(self) -> Asked:
        """The same with numbers for the symbols. Dynamo guards on them then."""
        return replace(self, numbers=tuple(map(int, self.numbers)), floats=tuple(map(float, self.floats)))

    @property
    def values(self) -> Values:
        """The key by which samples are looked up, with None for each symbol."""
        floats = tuple(value.hex() if type(value) is float else None for value in self.floats)  # -0.0 is not 0.0
        return tuple(number if type(number) is int else None for number in self.numbers), floats

    def agrees(self, sample: Values) -> bool:
        """Whether ``sample`` may be of a call with these arguments, for some values of the symbols."""
        pairs = (
            pair for ours, other in zip(self.values, sample, strict=True) for pair in zip(ours, other, strict=True)
        )
        return all(mine is None or mine == theirs for mine, theirs in pairs)


def _numbers(tensors: Sequence[torch.Tensor], orders: Sequence[Any]) -> tuple[Any, ...]:
    found: list[Any] = []
    for tensor, order in zip(tensors, orders, strict=True):
        found.extend(tensor.shape)
        if order is None:
            found.extend(tensor.stride())
    return tuple(found)


def _order_in_memory(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions from the outermost in memory to the innermost, without those of size 1; None if there are gaps."""
    if not all(_torch.has_hint(number) for number in (*tensor.shape, *tensor.stride())):
        return tuple(range(tensor.dim()))
    shape, stride = list(map(_torch.hint_of, tensor.shape)), list(map(_torch.hint_of, tensor.stride()))
    order = dense_order(shape, stride)
    return None if order is None else tuple(dim for dim in order if shape[dim] != 1)


# --- what calls returned ------------------------------------------------------------------------------------------------

Term = tuple[Any, ...]
"""How a number of a result's layout is computed: ``(a,)`` is the constant ``a``; ``(a, p, b)`` is ``a`` times the
number ``p`` of the arguments, plus ``b``; ``(p, q)`` is the product of two numbers of the arguments."""


def _value(term: Term, numbers: Sequence[Any]) -> Any:
    if len(term) == 1:
        return term[0]
    if len(term) == 2:
        return numbers[term[0]] * numbers[term[1]]
    scaled = numbers[term[1]] if term[0] == 1 else numbers[term[1]] * term[0]
    return scaled + term[2] if term[2] else scaled


@dataclass(frozen=True)
class Rule:
    """How the sizes of a result follow from those of the arguments."""

    orders: tuple[Any, ...]
    """The order in memory of each argument, which decides which of its numbers are used."""
    shapes: tuple[tuple[Term, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    """The order in memory of each root."""

    def specs(self, like: Sequence[TensorSpec], numbers: Sequence[Any]) -> tuple[TensorSpec, ...]:
        made = []
        for spec, terms, order in zip(like, self.shapes, self.strides, strict=True):
            shape = tuple(_value(term, numbers) for term in terms)
            made.append(replace(spec, shape=shape, stride=dense_strides(shape, order)))
        return tuple(made)

    def specs_of(self, like: Sequence[TensorSpec], given: Given) -> tuple[TensorSpec, ...]:
        return self.specs(like, (*_numbers(given.tensors, self.orders), *given.ints))


@dataclass
class _Sample:
    expected: Expected
    count: int = 1

    @property
    def is_sure(self) -> bool:
        """Whether the result is more than a coincidence: a float or bool often depends on values."""
        return self.count > 1 or not _has_values(self.expected.result)


class Learned:
    """What calls of one marked function with the same structure of arguments returned."""

    def __init__(self) -> None:
        self.why_not = ""
        """Why such calls are graph breaks from now on; empty if they are not."""
        self.cure = (
            "return the same structure, layout and plain values wherever the arguments are laid out alike; a number that "
            f"varies is returned as a tensor, or as an int{WITHOUT_FULLGRAPH}"
        )
        """What the user can do in that case."""
        self.error: Exception | None = None
        """The exception that caused it, if there was one."""
        self.in_vain = 0
        """How many calls in a row ran as Python without a call of the function like this one."""
        self.raised = ""
        """The exception of the last call that ran as Python, until one of them returns."""
        self.changes: dict[_torch.Place, str] = {}
        """The Python values that such calls have changed, in words."""
        self.changes_again = False
        """Whether ``changes`` are of calls after the first one whose changes mattered. A value that is set once changes
        no more."""
        self.waiting: dict[int, Any] = {}
        """The functions that run as Python until this is known, by the identity of their code."""
        self._samples: dict[tuple[Any, ...], dict[Values, _Sample]] = {}
        self._lock = locks.lock()

    def add(self, asked: Asked, expected: Expected) -> None:
        """Note the result of a call."""
        with self._lock:
            self.in_vain, self.raised = 0, ""
            samples = self._samples.setdefault(asked.kind, {})
            sample = samples.get(asked.values)
            if sample is None:
                if len(samples) >= MAX_SAMPLES:
                    samples.pop(next(iter(samples)))
                samples[asked.values] = _Sample(expected)
            elif sample.expected == replace(expected, differentiable=sample.expected.differentiable):
                either = zip(sample.expected.differentiable, expected.differentiable, strict=True)
                sample.expected = replace(expected, differentiable=tuple(one or other for one, other in either))
                sample.count += 1
            else:
                self.why_not = f"its result differs from call to call: {_difference(sample.expected, expected)}"

    @property
    def has_samples(self) -> bool:
        return bool(self._samples)

    def find(self, asked: Asked) -> Expected | None:
        """The layout of a call's result; None if it is not known yet."""
        with self._lock:
            samples = dict(self._samples.get(asked.kind, {}))
        return _explained(asked, samples) if asked.is_symbolic else _known(asked, samples)


MAX_SAMPLES = 64
"""How many calls of one kind are remembered."""


def _known(asked: Asked, samples: Mapping[Values, _Sample]) -> Expected | None:
    sample = samples.get(asked.values)
    if sample is not None:
        return sample.expected if sample.is_sure else None
    sizes = asked.numbers[: asked.num_sizes]
    alike = [sample.expected for (numbers, _), sample in samples.items() if numbers[: asked.num_sizes] == sizes]
    # Independent of the numbers.
    return alike[0] if len(alike) > 1 and all(other == alike[0] for other in alike) else None


def _explained(asked: Asked, samples: Mapping[Values, _Sample]) -> Expected | None:
    """The layout of a result with symbolic sizes, explained by all samples that may be of the same kind of call."""
    found = {given: sample for given, sample in samples.items() if asked.agrees(given)}
    if not found or (len(found) < 2 and not _is_now(next(iter(found)), asked)):
        return None
    like = next(iter(found.values())).expected
    if _has_views(like.result) or not all(_is_alike(sample.expected, like) for sample in found.values()):
        return None
    if _has_values(like.result) and sum(sample.count for sample in found.values()) < 2:
        return None
    given = [numbers for numbers, _ in found]
    shapes, strides = [], []
    for number in range(len(like.specs)):
        specs = [sample.expected.specs[number] for sample in found.values()]
        terms = [_term([spec.shape[dim] for spec in specs], given, asked, dim) for dim in range(len(specs[0].shape))]
        order = _common_order(specs)
        if order is None or None in terms:
            return None
        shapes.append(tuple(terms))
        strides.append(order)
    rule = Rule(tuple(order for *_, order in asked.kind[1]), tuple(shapes), tuple(strides))  # type: ignore[arg-type]
    return replace(like, specs=rule.specs(like.specs, asked.numbers), rule=rule)


def _is_now(sample: Values, asked: Asked) -> bool:
    """Whether a sample has the sizes of the call that is being traced, as far as they are known."""
    hints = (_torch.hint_of(number) if _torch.has_hint(number) else None for number in asked.numbers)
    return all(hint is None or hint == number for hint, number in zip(hints, sample[0], strict=True))


def _common_order(specs: Sequence[TensorSpec]) -> tuple[int, ...] | None:
    """The order in memory that all of these have; None if they differ or have gaps."""
    telling = [spec for spec in specs if 1 not in spec.shape and 0 not in spec.shape] or specs
    orders = {dense_order(spec.shape, spec.stride) for spec in telling}
    return orders.pop() if len(orders) == 1 else None


def _term(values: list[int], samples: list[tuple[int, ...]], asked: Asked, dim: int) -> Term | None:
    """How one number of the results follows from the arguments; None if no simple term fits all samples."""
    symbols = [place for place, number in enumerate(asked.numbers) if type(number) is not int]
    # Try the same dimension, then other sizes, then ints.
    symbols.sort(key=lambda place: (place != dim, place >= asked.num_sizes))
    for place in symbols:
        if all(sample[place] == value for sample, value in zip(samples, values, strict=True)):
            return 1, place, 0
    if len(set(values)) == 1:
        return (values[0],)
    for place in symbols:
        points = dict(zip((sample[place] for sample in samples), values, strict=True))
        (x, y), (u, v) = list(points.items())[:2] if len(points) > 1 else [(0, 0), (0, 0)]
        if u == x or (v - y) % (u - x):
            continue
        slope = (v - y) // (u - x)
        if all(slope * (sample[place] - x) + y == value for sample, value in zip(samples, values, strict=True)):
            return slope, place, y - slope * x
    for place, other in itertools.combinations_with_replacement(symbols, 2):
        if all(sample[place] * sample[other] == value for sample, value in zip(samples, values, strict=True)):
            return place, other
    return None


def _is_alike(one: Expected, other: Expected) -> bool:
    return (one.result, one.differentiable, one.num_ints) == (other.result, other.differentiable, other.num_ints) and [
        (len(spec.shape), spec.dtype, spec.device) for spec in one.specs
    ] == [(len(spec.shape), spec.dtype, spec.device) for spec in other.specs]


def _has_views(structure: Structure) -> bool:
    return any(leaf[0] == "view" for leaf in leaves_of(structure))


def _has_values(structure: Structure) -> bool:
    """Whether a result contains plain values that often depend on the values of tensors."""
    return any(leaf[0] == "plain" and isinstance(leaf[1], bool | float) for leaf in leaves_of(structure))


def _difference(one: Expected, other: Expected) -> str:
    if one.result == other.result:
        for first, second in zip(one.specs, other.specs, strict=False):
            if first != second:
                return f"{first}, and {second}"
    before, now = in_words(one.result), in_words(other.result)
    return f"{before}, and {now}" if before != now else f"{before}, with other aliases"
