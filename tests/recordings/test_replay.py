"""Replay: the generated function equals the interpreter, step by step, and is code like any other."""

from __future__ import annotations

import ctypes
import enum
import gc
import linecache
import operator
import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from breakable_backend import EagerOutputError, ReplayError, _torch
from breakable_backend.drivers import CaptureDriver
from breakable_backend.drivers.tape import TapeDriver, TapeGraph
from breakable_backend.ir.ambient_modes import Modes
from breakable_backend.ir.layout import TensorSpec, extent
from breakable_backend.ir.program import Reason
from breakable_backend.recordings.copies import Bridge, clone_exact
from breakable_backend.recordings.recording import Call, Copy, EagerStep, GraphStep, Held, Recording, Step, Variable
from breakable_backend.recordings.replay import Replay, Tally, emit
from graphs import golden
from interpreter import interpret

REASON = Reason("marked", "tagged cudagraph_unsafe", "silly::triple", "model.py:12 in forward: y = triple(x)")


# --- recordings by hand -----------------------------------------------------------------------------------------------------


class Maker:
    """Makes recordings by hand. What it captures is given back when the test ends."""

    def __init__(self, driver: CaptureDriver) -> None:
        self.driver, self.device = driver, driver.device
        self.constants: dict[str, Any] = {}
        self.steps: list[Step] = []
        self.callers: list[Tensor] = []
        """What only the caller owns, and captured segments use at its address."""
        self._graphs: list[Any] = []

    def bridge(self, name: str, like: Tensor) -> Tensor:
        """A bridge for ``name``; returns what captured segments see."""
        bridge = self.constants[f"{name}_bridge"] = Bridge.like(like, self.device)
        return bridge.tensor

    def capture(
        self,
        body: Callable[[], Mapping[str, Tensor]],
        loads: Sequence[str] = (),
        stores: Sequence[str] = (),
        fed: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A captured step. What ``body`` returns become constants by their names; the graph copies what is ``fed``."""
        pairs = [(self.constants[f"{name}_bridge"].tensor, value) for name, value in (fed or {}).items()]
        with self.driver.lock:
            stream = self.driver.begin()
            try:
                with self.driver.recording():
                    graph, made = self.driver.capture(body, pairs)
                graph.replay(stream)
            finally:
                self.driver.end(stream)
        self._graphs.append(graph)
        self.constants.update(made)
        copies = [replace(self._copy(name), feed=feed) for name, feed in zip(fed or {}, graph.feeds, strict=True)]
        self.steps.append(GraphStep(graph, (*map(self._copy, loads), *copies), tuple(map(self._copy, stores))))

    def eager(self, *calls: Call) -> None:
        self.steps.append(EagerStep(calls, (REASON,)))

    def recording(
        self,
        arguments: Sequence[str],
        returned: Sequence[Any],
        epilogue: Sequence[Call] = (),
        specs: Mapping[str, TensorSpec] | None = None,
    ) -> Recording:
        return Recording(
            tuple(arguments), specs or {}, tuple(self.steps), tuple(epilogue), tuple(returned), self.constants
        )

    def stream(self) -> int:
        return self.driver.begin()

    def release(self) -> None:
        self.constants.clear()
        self.steps.clear()
        with self.driver.lock:
            self.driver.release(self._graphs)
        self._graphs.clear()

    def _copy(self, name: str) -> Copy:
        return Copy(Variable(f"{name}_bridge"), Variable(name), self.device)


@pytest.fixture
def maker(driver: CaptureDriver) -> Iterator[Maker]:
    """Makes recordings on each driver."""
    maker = Maker(driver)
    yield maker
    maker.release()


@pytest.fixture
def tape() -> Iterator[Maker]:
    """Makes recordings on the tape driver, for what is the same on each."""
    maker = Maker(TapeDriver(torch.device("cpu")))
    yield maker
    maker.release()


def triple(x: Tensor) -> Tensor:
    """What the recordings call eagerly."""
    return x * 3


def call(result: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
    return Call(result, function, args, kwargs, getattr(function, "__name__", "function"))


def checked(result: str, like: Tensor, function: Callable[..., Any], *args: Any, source: str = "") -> Call:
    """A call whose result has to look like ``like``."""
    return Call(result, function, args, {}, "silly::triple", source, TensorSpec.of(like))


def one_of_each(maker: Maker) -> Recording:
    """``x`` (by a bridge) and ``w`` (at its address): ``y = x * w``, ``z = 3 y`` eagerly, ``(z + x).t()`` copied."""
    like = torch.zeros(2, 3, device=maker.device)
    w = torch.full((2, 3), 2.0, device=maker.device)
    maker.callers.append(w)
    x = maker.bridge("x", like)
    maker.capture(lambda: {"y": x * w}, loads=["x"])
    maker.eager(checked("z", like, triple, Variable("y"), source="model.py:12"))
    z = maker.bridge("z", like)
    maker.capture(lambda: {"sum": z + x}, loads=["z"])
    return maker.recording(
        ["x", "w"],
        [Variable("t"), None, 7],
        [call("sum_fresh", clone_exact, Variable("sum")), call("t", torch.ops.aten.t.default, Variable("sum_fresh"))],
        {"x": TensorSpec.of(like)},
    )


def several_bridges(maker: Maker) -> Recording:
    """Several bridges at once, of two dtypes, one of them of a value whose elements share memory."""
    x = maker.bridge("x", torch.zeros(2, 3, device=maker.device))
    y = maker.bridge("y", torch.zeros(2, 1, device=maker.device).expand(2, 3))
    z = maker.bridge("z", torch.zeros(2, 3, device=maker.device, dtype=torch.int64))
    maker.capture(lambda: {"sum": x + y * z}, loads=["x", "y", "z"])
    return maker.recording(["x", "y", "z"], [Variable("c")], [call("c", clone_exact, Variable("sum"))])


def bridges_together(maker: Maker) -> Recording:
    """Bridges of few dtypes, so that several are loaded by one launch, and one by itself."""
    like = torch.zeros(2, 3, device=maker.device)
    dtypes = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float32, "d": torch.bfloat16, "e": torch.int64}
    inside = [maker.bridge(name, like.to(dtype)) for name, dtype in dtypes.items()]

    def total() -> dict[str, Tensor]:
        return {"sum": sum(inside[1:], inside[0]) + 1}

    maker.capture(total, loads=[*dtypes])
    return maker.recording([*dtypes], [Variable("f")], [call("f", clone_exact, Variable("sum"))])


def expanded_bridge(maker: Maker) -> Recording:
    """One bridge alone, of a value whose elements share memory."""
    x = maker.bridge("x", torch.zeros(2, 1, device=maker.device).expand(2, 3))
    maker.capture(lambda: {"y": x + 1}, loads=["x"])
    return maker.recording(["x"], [Variable("c")], [call("c", clone_exact, Variable("y"))])


def written_input(maker: Maker) -> Recording:
    """An input that a captured segment writes comes in and goes back, before the eager step looks."""
    x = maker.bridge("x", torch.zeros(2, 3, device=maker.device))

    def write() -> dict[str, Tensor]:
        x.add_(1)
        return {}

    maker.capture(write, loads=["x"], stores=["x"])
    maker.eager(call("z", triple, Variable("x")))
    return maker.recording(["x"], [Variable("z"), Variable("x")])


class Side(enum.IntEnum):
    """Numbers that do not print as source."""

    LEFT = 1


class Half(float):
    """A float that does not either, as numpy's."""

    def __repr__(self) -> str:
        return "numpy.half(0.5)"


def all_kinds_of_arguments(maker: Maker) -> Recording:
    """Every kind of argument that a call can have."""
    table = maker.constants["table"] = torch.arange(6.0, device=maker.device).view(2, 3)

    def odd(*args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        return args[0] + table, (args[1:], kwargs)

    maker.eager(
        call(
            "pair",
            odd,
            Variable("x"),
            [Variable("x"), [1, (Variable("table"),)]],
            (),
            None,
            True,
            -0.0,
            float("inf"),
            float("nan"),
            "it's",
            torch.float16,
            maker.device,
            2**70,
            1j,
            Side.LEFT,
            Half(0.5),
            by=Variable("table"),
            slices=[slice(None)],
        ),
        call("first", operator.getitem, Variable("pair"), 0),
        call("second", operator.getitem, Variable("pair"), 1),
    )
    return maker.recording(["x"], [Variable("first"), Variable("second")])


def arguments_in_a_dict(maker: Maker) -> Recording:
    """A call with tensors in a dictionary, as the higher-order op for a user's Triton kernel takes them."""

    def launch(*, kwargs: dict[str, Any], grid: list[Any]) -> Tensor:
        return kwargs["x"] * kwargs["by"]

    maker.eager(call("y", launch, kwargs={"x": Variable("x"), "by": 2, "c": None}, grid=[(1, 1, 1)]))
    return maker.recording(["x"], [Variable("y")])


def ambient_call(maker: Maker) -> Recording:
    """A call under an autocast that only it has."""
    kind = maker.device.type

    def product(x: Tensor) -> Tensor:
        assert torch.is_grad_enabled()
        return x @ x.t()

    step = call("y", product, Variable("x"))
    ambient = Modes(((kind, torch.bfloat16, True),), grad=True)
    maker.eager(Call(step.result, step.function, step.args, step.kwargs, step.label, ambient=ambient))
    return maker.recording(["x"], [Variable("y")])


def nothing(maker: Maker) -> Recording:
    """No arguments, no steps, no results."""
    return maker.recording([], [])


def input_itself(maker: Maker) -> Recording:
    """An input that is returned as it is, twice, and one that nobody uses."""
    return maker.recording(["x", "unused"], [Variable("x"), Variable("x")])


def names_that_are_taken(maker: Maker) -> Recording:
    """Variables, labels and helpers of the generated code that have one name."""
    x = maker.bridge("x", torch.zeros(2, 3, device=maker.device))
    maker.capture(lambda: {"load_all": x + 1}, loads=["x"])
    maker.eager(
        Call("graph_0", triple, (Variable("x"),), {}, "x"),
        Call("lambda_1", triple, (Variable("graph_0"),), {}, "lambda"),
        Call("x_shape", triple, (Variable("load_all"),), {}, "3rd op"),
    )
    return maker.recording(
        ["x"],
        [Variable("lambda_1"), Variable("x_shape")],
        specs={"x": TensorSpec.of(torch.zeros(2, 3, device=maker.device))},
    )


def results_named_like_helpers(maker: Maker) -> Recording:
    """Results with the names of what the generated code itself uses: ops may be called anything."""
    x = maker.bridge("x", torch.zeros(2, 3, device=maker.device))
    y = maker.bridge("y", torch.zeros(2, 3, device=maker.device))
    maker.capture(lambda: {"made": x + y}, loads=["x", "y"])
    names = ["args", "stream", "copied", "load_all", "clone_exact", "reject", "check_argument"]
    previous = "made"
    for name in names:
        maker.eager(checked(name, x, triple, Variable(previous)))
        previous = name
    maker.capture(lambda: {"more": x - y}, loads=["x", "y"])
    return maker.recording(["x", "y"], [Variable(previous), Variable("c")], [call("c", clone_exact, Variable("more"))])


def many_results(maker: Maker) -> Recording:
    """Results of two dtypes that are copied behind each other, and a view of one of them between two runs of those."""
    x = maker.bridge("x", torch.zeros(2, 3, device=maker.device))
    names = [f"{kind}_{number}" for number in range(5) for kind in ("wide", "half")]
    maker.capture(
        lambda: {
            name: (x * place).bfloat16() if name.startswith("half") else x.t() + place
            for place, name in enumerate(names)
        },
        loads=["x"],
    )
    copies = [call(f"{name}_copy", clone_exact, Variable(name)) for name in names]
    turned = call("turned", torch.ops.aten.t.default, Variable("wide_0_copy"))
    returned = [*(Variable(copy.result) for copy in copies), Variable("turned")]
    return maker.recording(["x"], returned, [*copies[:9], turned, *copies[9:]])


RECORDINGS = [
    one_of_each,
    several_bridges,
    bridges_together,
    expanded_bridge,
    written_input,
    all_kinds_of_arguments,
    arguments_in_a_dict,
    ambient_call,
    nothing,
    input_itself,
    names_that_are_taken,
    results_named_like_helpers,
    many_results,
]


def inputs(recording: Recording, seed: int, device: torch.device) -> list[Any]:
    """New arguments, the same for the same seed."""
    torch.manual_seed(seed)
    values: list[Any] = []
    for name in recording.arguments:
        bridge = recording.constants.get(f"{name}_bridge")
        if bridge is None:
            values.append(torch.rand(2, 3, device=device))
        elif bridge.flat is not None:
            values.append(torch.rand(2, 1, device=device).expand(2, 3))
        else:
            values.append((torch.rand(2, 3, device=device) * 10).to(bridge.tensor.dtype))
    return values


def snapshot(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else repr(leaf), tree)


def same(mine: Any, theirs: Any) -> bool:
    """Equal trees: tensors bit for bit, other leaves by their text."""
    left, right = (torch.utils._pytree.tree_flatten(tree) for tree in (mine, theirs))
    return left[1] == right[1] and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        for a, b in zip(left[0], right[0], strict=True)
    )


@pytest.mark.parametrize("build", RECORDINGS, ids=lambda build: build.__name__)
def test_emit_equals_interpret(build: Callable[[Maker], Recording], maker: Maker) -> None:
    """Generated function and interpreter return the same, write the same inputs and count the same copies."""
    recording = build(maker)
    replay, tally = emit(recording), Tally()
    stream = maker.stream()
    for seed in range(5):
        for _ in range(2):  # the second time with all inputs where they were
            mine, theirs = (inputs(recording, seed, maker.device) for _ in range(2))
            got = replay.function([*mine], stream)
            got_now = snapshot((got, mine))
            want = interpret(recording, theirs, stream, tally)
            assert same(got_now, snapshot((want, theirs)))
            assert replay.tally.copies == tally.copies
    maker.driver.end(stream)


# --- copies of bytes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def copied_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Has the tape copy bytes as a CUDA graph does; how many, each time."""
    sizes: list[int] = []

    def copier(self: TapeGraph, like: Tensor) -> Callable[[int, int, int], None] | None:
        size = like.numel() * like.element_size()
        if size == 0 or extent(like) != like.numel():
            return None

        def copy(target: int, source: int, stream: int) -> None:
            sizes.append(size)
            ctypes.memmove(target, source, size)

        return copy

    monkeypatch.setattr(TapeGraph, "copier", copier)
    return sizes


@pytest.mark.parametrize("build", RECORDINGS, ids=lambda build: build.__name__)
def test_bytes_are_copied(build: Callable[[Maker], Recording], tape: Maker, copied_bytes: list[int]) -> None:
    """A replay that copies bytes equals the interpreter."""
    test_emit_equals_interpret(build, tape)
    plain = (one_of_each, several_bridges, bridges_together, written_input)
    assert bool(copied_bytes) or build not in plain


def test_many_results_are_copied_together(tape: Maker, copied_bytes: list[int]) -> None:
    """Results of one dtype that are copied behind each other are one launch, on storages of their own; few are copied as bytes."""
    recording = many_results(tape)
    replay = emit(recording)
    assert replay.source.count("clones(results)") == 1
    assert replay.source.count("copy_together") == 1
    assert replay.source.count("copy_bytes(") == 1
    one, other = (replay.function([torch.full((2, 3), float(value))], 0) for value in (1, 2))
    assert len({value.untyped_storage().data_ptr() for value in (*one[:-1], *other[:-1])}) == 20
    assert one[-1].data_ptr() == one[0].data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clones_together_keep_all_bits(dtype: torch.dtype, device: torch.device) -> None:
    """Clones of a list have the bits and the strides of what they are of: each kind of NaN, both zeros, what is denormal."""
    bits = torch.int32 if dtype is torch.float32 else torch.int64
    inf = torch.tensor(torch.inf, dtype=dtype).view(bits).item()
    odd = [0, 1, inf, inf + 1, inf + (inf & -inf) // 2 + 1, 2 * inf.bit_length()]
    least = torch.iinfo(bits).min
    values = torch.tensor([*odd, *(value + least for value in odd)], dtype=bits, device=device).view(dtype)
    given = [values, values.view(3, 4).t(), values[:0], values[3:9]]
    for mine, theirs in zip(given, _torch.clones_together(given), strict=True):
        assert torch.equal(mine.view(bits), theirs.view(bits))
        assert mine.stride() == theirs.stride()
        assert mine.numel() == 0 or mine.data_ptr() != theirs.data_ptr()


def test_bytes_of_what_is_not_plain(tape: Maker, copied_bytes: list[int]) -> None:
    """What does not lie as its bridge, is read lazily, or is no plain tensor, is copied by torch."""
    like = torch.zeros(2, 3)
    x = tape.bridge("x", like)
    tape.capture(lambda: {"y": x + 1}, loads=["x"])
    recording = tape.recording(["x"], [Variable("y")])
    replay = emit(recording)
    z = torch.rand(2, 3, dtype=torch.complex64)
    lazy = z.conj().imag
    assert lazy.is_neg()
    values = [torch.rand(3, 2).t(), torch.rand(2, 6)[:, ::2], lazy, nn.Parameter(torch.rand(2, 3), requires_grad=False)]
    for value in values:
        assert torch.equal(replay.function([value], 0)[0], value + 1)
    assert copied_bytes == []
    value = torch.rand(2, 3)
    assert torch.equal(replay.function([value], 0)[0], value + 1)
    assert copied_bytes == [24]


# --- copies that a graph makes by itself ---------------------------------------------------------------------------------


def test_fed_values(maker: Maker) -> None:
    """A graph that copies by itself reads the values of each call, wherever and however they lie, as the interpreter has it."""
    like = torch.zeros(4, 3, device=maker.device)
    x, y = maker.bridge("x", like), maker.bridge("y", like)
    maker.capture(lambda: {"sum": x - y}, fed={"x": like, "y": like + 1})
    recording = maker.recording(["x", "y"], [Variable("sum")])
    replay, tally = emit(recording), Tally()
    base = torch.rand(3, 4, device=maker.device)
    for call in range(6):
        one, other = torch.rand(4, 3, device=maker.device), torch.rand(3, 4, device=maker.device).t()
        values = [[one, one * 2], [other, one], [one, y], [x, other + 1], [base.view(4, 3), one], [base.t(), one]][call]
        want = values[0] - values[1]
        assert torch.equal(replay.function(list(values), maker.stream())[0], want)
        assert torch.equal(interpret(recording, values, maker.stream(), tally)[0], want)
    assert replay.tally.copies == tally.copies == 10


def test_a_fed_value_that_a_call_lays_out_anew(tape: Maker) -> None:
    """Where a call had the tensor in its hands, how it lies is asked about anew."""
    like = torch.zeros(3, 3)
    x = tape.bridge("x", like)
    turns = [lambda x: x, Tensor.t_]
    tape.eager(call("none", lambda x: turns.pop(0)(x), Variable("x")))
    tape.capture(lambda: {"y": x + 1}, fed={"x": like})
    replay = emit(tape.recording(["x"], [Variable("y")], specs={"x": TensorSpec.of(like)}))
    value = torch.rand(3, 3)
    for want in (value + 1, value.t() + 1):  # at one address
        assert torch.equal(replay.function([value], 0)[0], want)


def test_a_fed_value_is_held_until_the_launch(tape: Maker) -> None:
    """What a graph copies by itself is deleted behind the launch, and its layout is asked about once."""
    like = torch.zeros(2, 3)
    x, z = tape.bridge("x", like), tape.bridge("z", like)
    tape.capture(lambda: {"y": x + 1}, fed={"x": like})
    tape.eager(checked("z", like, triple, Variable("y")))
    tape.capture(lambda: {"sum": z + x}, fed={"z": like + 1})
    golden(
        emit(tape.recording(["x"], [Variable("sum")], specs={"x": TensorSpec.of(like)})).source,
        """\
def replay(args, stream):
    x = args[0]
    args.clear()
    if not (x_fits := fits(x)):
        check_argument('x', x_spec, x)
    if not x_fits or x.data_ptr() != x_bridge_feed.source:
        x_held = x_bridge_feed.take(x)
    graph_0(stream)
    copied.copies += x_bridge_feed.copies
    del x
    # eager: silly::triple: tagged cudagraph_unsafe at model.py:12 in forward: y = triple(x)
    z = silly_triple(y)
    if not (z_fits := fits(z)):
        reject(z_call, z)
    if not z_fits or z.data_ptr() != z_bridge_feed.source:
        z_held = z_bridge_feed.take(z)
    graph_1(stream)
    copied.copies += z_bridge_feed.copies
    del z
    return [sum]
""",
    )


# --- the source ---------------------------------------------------------------------------------------------------------------


def test_source(tape: Maker) -> None:
    """The generated source: names from the graph, a comment with each break's reason, each name deleted at its last use."""
    golden(
        emit(one_of_each(tape)).source,
        """\
def replay(args, stream):
    x = args[0]
    args.clear()
    if not (x_fits := fits(x)):
        check_argument('x', x_spec, x)
    if x.data_ptr() != x_bridge_address:
        x_bridge.copy_(x)
        copied.copies += 1
    del x
    graph_0(stream)
    # eager: silly::triple: tagged cudagraph_unsafe at model.py:12 in forward: y = triple(x)
    z = silly_triple(y)  # model.py:12
    if not (z_fits := fits(z)):
        reject(z_call, z)
    if z.data_ptr() != z_bridge_address:
        z_bridge.copy_(z)
        copied.copies += 1
    del z
    graph_1(stream)
    sum_fresh = sum.clone()
    t = aten_t_default(sum_fresh)
    del sum_fresh
    return [t, None, 7]
""",
    )


def test_source_of_written_input(tape: Maker) -> None:
    """A value is stored right after the launch that wrote it."""
    golden(
        emit(written_input(tape)).source,
        """\
def replay(args, stream):
    x = args[0]
    args.clear()
    if x.data_ptr() != x_bridge_address:
        x_bridge.copy_(x)
        copied.copies += 1
    graph_0(stream)
    copied.copies += x_bridge_1.store(x)
    # eager: silly::triple: tagged cudagraph_unsafe at model.py:12 in forward: y = triple(x)
    z = triple(x)
    return [z, x]
""",
    )


def test_source_of_several_bridges(tape: Maker) -> None:
    """Several bridges are loaded by one call."""
    golden(
        emit(several_bridges(tape)).source,
        """\
def replay(args, stream):
    x = args[0]
    y = args[1]
    z = args[2]
    args.clear()
    if x.data_ptr() != x_bridge_address:
        x_bridge.copy_(x)
        copied.copies += 1
    del x
    copied.copies += load_all((y_bridge,), (y,))
    del y
    if z.data_ptr() != z_bridge_address:
        z_bridge.copy_(z)
        copied.copies += 1
    del z
    graph_0(stream)
    c = sum.clone()
    return [c]
""",
    )


def test_source_of_bridges_together(tape: Maker) -> None:
    """Bridges of one dtype are loaded by one launch; those of two bytes as integers, so that all bits are kept."""
    golden(
        emit(bridges_together(tape)).source,
        """\
def replay(args, stream):
    a = args[0]
    b = args[1]
    c = args[2]
    d = args[3]
    e = args[4]
    args.clear()
    if a.data_ptr() != a_bridge_address and c.data_ptr() != c_bridge_address:
        copy_together(bridges, [a, c])
        copied.copies += 2
    else:
        copied.copies += load_all((a_bridge, c_bridge,), (a, c,))
    del a, c
    if b.data_ptr() != b_bridge_address and d.data_ptr() != d_bridge_address:
        copy_together(bridges_1, [b.view(torch_int16), d.view(torch_int16)])
        copied.copies += 2
    else:
        copied.copies += load_all((b_bridge, d_bridge,), (b, d,))
    del b, d
    if e.data_ptr() != e_bridge_address:
        e_bridge.copy_(e)
        copied.copies += 1
    del e
    graph_0(stream)
    f = sum.clone()
    return [f]
""",
    )


@pytest.mark.parametrize("there", ["a", "b", "e"])
def test_value_that_is_at_its_bridge(there: str, maker: Maker) -> None:
    """A value that lies where its bridge is already is not copied; the others are."""
    recording = bridges_together(maker)
    replay = emit(recording)
    values = inputs(recording, 0, maker.device)
    (want,) = interpret(recording, values, stream := maker.stream())
    place = recording.arguments.index(there)
    values[place] = recording.constants[f"{there}_bridge"].tensor
    (got,) = replay.function([*values], stream)
    maker.driver.end(stream)
    assert torch.equal(got, want)
    assert replay.tally.copies == 4


def test_source_is_stable(tape: Maker) -> None:
    """A recording gives the same source each time."""
    recording = one_of_each(tape)
    assert emit(recording).source == emit(recording).source


def failing(tape: Maker, error: Exception) -> Recording:
    def explode(x: Tensor) -> Tensor:
        raise error

    tape.eager(call("y", triple, Variable("x")), call("z", explode, Variable("y")))
    return tape.recording(["x"], [Variable("z")])


def test_linecache(tape: Maker) -> None:
    """The source is filed under its own name, for as long as the function lives."""
    replay = emit(failing(tape, KeyError()))
    file = replay.file
    assert "".join(linecache.getlines(file)) == replay.source
    linecache.checkcache()
    assert "".join(linecache.getlines(file)) == replay.source
    del replay
    assert linecache.getlines(file) == []


def test_traceback(tape: Maker) -> None:
    """The traceback of an error in an eager op shows the generated line; the error is the op's own."""
    error = KeyError("mine")
    replay = emit(failing(tape, error))
    with pytest.raises(KeyError) as caught:
        replay.function([torch.zeros(2, device=tape.device)], 0)
    assert caught.value is error
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == replay.file]
    assert [(frame.name, frame.line) for frame in frames] == [("replay", "z = explode(y)")]


def test_two_replays_have_two_files(tape: Maker) -> None:
    """Each replay has a file of its own."""
    recording = one_of_each(tape)
    assert emit(recording).file != emit(recording).file


# --- lifetimes ----------------------------------------------------------------------------------------------------------------


def test_names_go_early(tape: Maker) -> None:
    """A value goes with its last use, arguments too, although later steps still run."""
    alive: dict[str, bool] = {}
    watched: dict[str, weakref.ref[Tensor]] = {}

    def watch(name: str, x: Tensor) -> Tensor:
        watched[name] = weakref.ref(x)
        return x + 1

    def look(x: Tensor) -> Tensor:
        alive.update({name: ref() is not None for name, ref in watched.items()})
        return x

    tape.eager(
        call("a", lambda x: watch("x", x), Variable("x")),
        call("b", lambda a: watch("a", a), Variable("a")),
        call("c", lambda b: watch("b", b), Variable("b")),
        call("d", look, Variable("b")),
        call("unused", lambda: None),
    )
    recording = tape.recording(["x", "unused_input"], [Variable("c"), Variable("d")])
    replay = emit(recording)
    args = [torch.zeros(2, device=tape.device), torch.zeros(2, device=tape.device)]
    replay.function(args, 0)
    assert args == []
    assert alive == {"x": False, "a": False, "b": True}


def test_constants_go_with_the_replay(tape: Maker) -> None:
    """Recording and function gone, the constants go at once: nothing is a cycle that waits for the collector."""
    constant = torch.zeros(2, device=tape.device)
    tape.constants["constant"] = constant
    tape.eager(call("y", torch.add, Variable("x"), Variable("constant")))
    recording = tape.recording(["x"], [Variable("y")])
    replay = emit(recording)
    replay.function([torch.ones(2, device=tape.device)], 0)
    seen = weakref.ref(constant)
    gc.disable()
    try:
        tape.constants, tape.steps = {}, []
        del constant, recording
        assert seen() is not None
        del replay
        assert seen() is None
    finally:
        gc.enable()


def test_failed_replay_keeps_nothing(tape: Maker) -> None:
    """After an error, arguments and intermediate values go with its traceback."""
    replay = emit(failing(tape, KeyError()))
    x = torch.zeros(2, device=tape.device)
    seen = weakref.ref(x)
    args = [x]
    del x
    with pytest.raises(KeyError) as caught:
        replay.function(args, 0)
    assert args == []
    caught.value.__traceback__ = None
    del caught
    gc.collect()
    assert seen() is None


# --- checks -------------------------------------------------------------------------------------------------------------------


def runs(replay: Replay, recording: Recording) -> list[Callable[[list[Any]], Any]]:
    return [lambda args: replay.function(args, 0), lambda args: interpret(recording, args, 0)]


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(3),
        torch.zeros(2, dtype=torch.float64),
        torch.zeros(2, device="meta"),
        None,
        (torch.zeros(2),),
    ],
    ids=["shape", "dtype", "device", "none", "tuple"],
)
def test_eager_result_is_checked(wrong: Any, tape: Maker) -> None:
    """A result that does not look as recorded is an error, from both ways to replay."""
    result: list[Any] = [torch.zeros(2)]
    tape.eager(checked("y", torch.zeros(2), lambda: result[0], source="model.py:12"))
    recording = tape.recording([], [Variable("y")])
    for run in runs(emit(recording), recording):
        result[0] = torch.zeros(2)
        run([])
        result[0] = wrong
        with pytest.raises(EagerOutputError, match="silly::triple returned"):
            run([])


def test_harmless_strides_pass(tape: Maker) -> None:
    """Strides that say nothing are let through, by both ways to replay."""
    result = torch.zeros(2, 1).as_strided((2, 1), (1, 5))
    tape.eager(checked("y", torch.zeros(2, 1), lambda: result))
    recording = tape.recording([], [Variable("y")])
    for run in runs(emit(recording), recording):
        assert run([])[0] is result


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.int64), torch.zeros(2, device="meta")])
def test_argument_is_checked(wrong: Tensor, tape: Maker) -> None:
    """An argument that does not look as recorded is an error before anything runs."""
    ran: list[int] = []
    tape.eager(call("y", lambda: ran.append(1)))
    recording = tape.recording(["x"], [Variable("x")], specs={"x": TensorSpec.of(torch.zeros(2))})
    for run in runs(emit(recording), recording):
        with pytest.raises(ReplayError, match="argument x is"):
            run([wrong])
    assert ran == []


def test_lines_of_a_step_without_any(tape: Maker) -> None:
    """A step that leaves nothing to do in a replay has no lines: it ends where the one before it does."""
    recording = several_bridges(tape)
    graph, nothing = recording.steps[0], EagerStep((), ())
    recording = replace(recording, steps=(nothing, graph, nothing, nothing))
    made = emit(recording)
    (_, first), (start, end), *others = made.steps
    assert first == 0 < start < end
    assert "graph_0(" in "".join(made.source.splitlines()[start:end])
    assert others == [(end, end)] * 2


def test_needs_add_up() -> None:
    """What is held for good and what is held at most in between add up, bridges and values each by themselves."""
    assert Held(1, 20) + Held(300, 4000) == Held(301, 4020)
    assert Held(1, 20).or_more(Held(300, 4)) == Held(300, 20)


def test_numbers_of_a_recording(tape: Maker) -> None:
    """A recording counts its graphs, copies and bridge bytes."""
    recording = several_bridges(tape)
    assert len(recording.graphs) == 1
    assert recording.num_copies == 3
    assert recording.held.bridges == 6 * 4 + 2 * 4 + 6 * 8
