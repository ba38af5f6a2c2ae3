"""``@eager_on_graph`` under ``torch.compile``: one opaque node for each call, whatever the backend."""

from __future__ import annotations

import dataclasses
import timeit
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from breakable_backend import EagerOutputError, OptionsError, PartitionError, eager_on_graph, explain, is_capturing

BACKENDS = ["breakable_cg", "eager", "aot_eager", "inductor"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(params=BACKENDS)
def compile_with(request: pytest.FixtureRequest, options: dict[str, Any]) -> Callable[..., Any]:
    """Compiles with each backend."""
    ours = {"options": options} if request.param == "breakable_cg" else {}
    return lambda function, **kwargs: torch.compile(function, backend=request.param, **ours, **kwargs)


@pytest.fixture
def compile_ours(options: dict[str, Any]) -> Callable[..., Any]:
    return lambda function, **kwargs: torch.compile(function, backend="breakable_cg", options=options, **kwargs)


runs: list[Any] = []


@pytest.fixture(autouse=True)
def no_runs() -> None:
    runs.clear()


@eager_on_graph(fake=lambda x, scale=2.0: torch.empty_like(x))
def bend(x: Tensor, scale: float = 2.0) -> Tensor:
    """What nothing can trace: Python that looks at values."""
    runs.append(scale)
    return x * scale if x.sum().item() > 0 else x - 1


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)  # Inductor's kernels are not eager's


# --- calls ------------------------------------------------------------------------------------------------------------------


def test_one_node(compile_with: Callable[..., Any], device: torch.device) -> None:
    """With fullgraph too: the body runs once a call, on real tensors, in order, its result used or not."""

    def model(x: Tensor) -> Tensor:
        bend(x + 1, 5.0)  # unused
        y = bend(x.sin() + 1)
        z = bend(x.sin() + 1)  # equal calls are two
        return (y * 3).cos() + z

    compiled = compile_with(model, fullgraph=True)
    for number in range(4):
        x = torch.full((4,), number - 1.5, device=device)
        want = model(x)
        runs.clear()
        assert close(compiled(x), want)
        assert runs == [5.0, 2.0, 2.0]


def test_bit_equal_and_reported(compile_ours: Callable[..., Any], device: torch.device) -> None:
    """With this backend a marked call is an eager step, equal bit for bit, with its name and line in the report."""

    def model(x: Tensor) -> Tensor:
        return (bend(x.sin() + 1) * 3).cos() + 1

    compiled = compile_ours(model, fullgraph=True)
    for number in range(4):
        x = torch.full((4,), number - 1.5, device=device)
        assert torch.equal(compiled(x), model(x))
    (program,) = explain(compiled).programs
    assert (program.num_graph_segments, program.num_eager_segments, program.replays) == (2, 1, 2)
    (reason,) = program.reasons
    assert (reason.op, reason.text) == ("bend", "marked by eager_on_graph")
    assert "return (bend(x.sin() + 1) * 3).cos() + 1" in reason.source
    assert "bend(" in program.recordings[0].source


def test_shapes_from_the_function_itself(compile_with: Callable[..., Any], device: torch.device) -> None:
    """Without ``fake`` the function runs on fake tensors; ``.item()`` in it is no obstacle, at most once for each shape."""
    fakes = []

    @eager_on_graph
    def scaled(x: Tensor) -> Tensor:
        fakes.append(isinstance(x, torch._subclasses.FakeTensor))
        return x * x.max().item()

    def model(x: Tensor) -> Tensor:
        return scaled(x + 1) - 1

    compiled = compile_with(model, fullgraph=True)
    x = torch.randn(4, device=device)
    assert close(compiled(x), model(x))
    assert fakes.count(True) == 1
    assert close(compiled(x + 1), model(x + 1))
    assert fakes.count(True) == 1


def test_inside_another_one(compile_ours: Callable[..., Any], device: torch.device) -> None:
    """A marked function that a marked one calls is part of its break."""
    seen = []

    @eager_on_graph(fake=lambda x: torch.empty_like(x))
    def outer(x: Tensor) -> Tensor:
        seen.append(is_capturing())
        return bend(x) + 1

    compiled = compile_ours(lambda x: outer(x.sin() + 1).cos() * 2, fullgraph=True)
    for _ in range(3):
        compiled(torch.ones(4, device=device))
    assert seen == [False] * 3
    assert len(runs) == 3
    assert explain(compiled).programs[0].num_eager_segments == 1


def test_autocast(compile_with: Callable[..., Any], device: torch.device) -> None:
    """The body runs under the autocast of its place."""
    dtypes: list[torch.dtype] = []

    @eager_on_graph(fake=lambda x, w: x.new_empty(x.shape, dtype=torch.float32))
    def project(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        dtypes.append(y.dtype)
        return y.float()

    def model(x: Tensor, w: Tensor) -> Tensor:
        a = project(x, w)
        with torch.autocast(device.type, torch.bfloat16):
            b = project(x, w)
        return a + b

    compiled = compile_with(model)
    x, w = torch.randn(4, 4, device=device), torch.randn(4, 4, device=device)
    for _ in range(3):
        dtypes.clear()
        compiled(x, w)
        assert dtypes == [torch.float32, torch.bfloat16]
    with torch.autocast(device.type, torch.bfloat16):  # around the compiled call
        dtypes.clear()
        compiled(x, w)
        assert dtypes == [torch.bfloat16, torch.bfloat16]


def test_dynamic_shapes(compile_ours: Callable[..., Any], device: torch.device) -> None:
    """Sizes that vary reach the function, and its results have them."""

    def model(x: Tensor, n: int) -> Tensor:
        return bend(x.sin() + n) * 2 + 1

    compiled = compile_ours(model, dynamic=True, fullgraph=True)
    for size in (3, 5, 3, 7):
        for n in (2, 4):
            x = torch.randn(size, device=device)
            assert torch.equal(compiled(x, n), model(x, n))


# --- structure --------------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    first: Tensor
    second: Any


@dataclasses.dataclass
class Routed:
    weights: Tensor
    name: str
    count: int | None


@eager_on_graph
def structured(pair: Pair, parts: list[Any], *, extra: dict[str, Any], routed: Routed) -> Any:
    runs.append((parts[1], extra["flag"], routed.name))
    total = pair.first + parts[0][0] * parts[1] + extra["bias"] * extra["scale"] + routed.weights
    return {"total": total, "pair": Pair(total * 2, "named"), "data": [Routed(total - 1, "x", None), (3, 2.5, True)]}


def test_structures(compile_with: Callable[..., Any], device: torch.device) -> None:
    """Arguments and results are nests of tensors and plain values in any of the containers."""

    def model(x: Tensor) -> Tensor:
        extra = {"bias": x, "scale": 2.5, "flag": True}
        out = structured(Pair(x, None), [(x + 1,), 3], extra=extra, routed=Routed(x * 2, "r", 1))
        data, plain = out["data"]
        assert out["pair"].second == "named"
        assert data.count is None
        return out["total"] * plain[0] + out["pair"].first * plain[1] + data.weights

    compiled = compile_with(model, fullgraph=True)
    for _ in range(3):
        x = torch.randn(4, device=device)
        assert close(compiled(x), model(x))
        assert runs[-1] == (3, True, "r")


def test_aliases_of_arguments(compile_with: Callable[..., Any], device: torch.device) -> None:
    """A result that is, or views, an argument is that argument's alias for the caller."""

    @eager_on_graph
    def same(x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x[1:]

    def model(x: Tensor) -> Tensor:
        y = x + 1
        again, tail = same(y)
        again.mul_(2)
        tail.add_(1)
        return y * 3

    compiled = compile_with(model, fullgraph=True)
    for _ in range(3):
        x = torch.randn(4, device=device)
        assert close(compiled(x), model(x))


def test_method_of_a_module(compile_with: Callable[..., Any], device: torch.device) -> None:
    """A module as an argument makes a graph break: right for each instance, and refused by fullgraph."""

    class Layer(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.linear, self.scale = nn.Linear(4, 4), scale

        @eager_on_graph
        def route(self, x: Tensor) -> Tensor:
            return self.linear(x) * self.scale if x.sum() > 0 else x - self.scale

        def forward(self, x: Tensor) -> Tensor:
            return self.route(x + 1) * 2

    layers = nn.ModuleList(Layer(scale) for scale in (1.0, 2.0, 3.0)).to(device)
    compiled = [compile_with(layer) for layer in layers]
    for _ in range(3):
        x = torch.randn(4, device=device)
        for mine, layer in zip(compiled, layers, strict=True):
            assert close(mine(x), layer(x))
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compile_with(layers[0], fullgraph=True)(torch.randn(4, device=device))


def test_argument_that_is_written(compile_with: Callable[..., Any], device: torch.device) -> None:
    """What a function writes with ``mutates_args`` the caller sees, once a call."""

    @eager_on_graph(mutates_args=("cache",))
    def append(cache: Tensor, x: Tensor) -> Tensor:
        cache[int(cache[0].item()) + 1] = x.sum()
        cache[0] += 1
        return cache[1:] * 2

    def model(cache: Tensor, x: Tensor) -> Tensor:
        return append(cache, x + 1) + cache.sum()

    compiled = compile_with(model)
    cache, mirror = torch.zeros(8, device=device), torch.zeros(8, device=device)
    for number in range(4):
        x = torch.full((2,), float(number), device=device)
        assert close(compiled(cache, x), model(mirror, x))
        assert torch.equal(cache, mirror)


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore:breakable_cg runs graphs that need gradients")
def test_gradients(compile_with: Callable[..., Any], device: torch.device) -> None:
    """Gradients flow through a marked function, also with two forward passes pending."""

    @eager_on_graph
    def branch(x: Tensor) -> Tensor:
        return x * x if x.sum() > 0 else x * 3

    def model(x: Tensor) -> Tensor:
        return branch(x * 2).sin()

    compiled = compile_with(model)
    with torch.enable_grad():
        for _ in range(2):
            x = [torch.randn(4, device=device, requires_grad=True) for _ in range(2)]
            y = [tensor.detach().clone().requires_grad_() for tensor in x]
            got = [compiled(tensor) for tensor in x]
            want = [model(tensor) for tensor in y]
            for g, w in zip(reversed(got), reversed(want), strict=True):
                g.sum().backward()
                w.sum().backward()
            for a, b in zip(x, y, strict=True):
                assert a.grad is not None
                assert b.grad is not None
                assert close(a.grad, b.grad)


# --- errors -----------------------------------------------------------------------------------------------------------------


def test_no_shapes(compile_ours: Callable[..., Any], device: torch.device) -> None:
    """A function that cannot run on fake tensors is an error with the line and the signature to write."""

    @eager_on_graph
    def undecided(x: Tensor, bias: float = 0.5) -> Tensor:
        return x * 2 if x.sum() > 0 else x[:1] + bias

    with pytest.raises(PartitionError, match="undecided cannot run on fake tensors") as caught:
        compile_ours(lambda x: undecided(x + 1) * 2, fullgraph=True)(torch.ones(4, device=device))
    assert "test_functions.py" in caught.value.where
    assert "def shapes(x: 'Tensor', bias: 'float' = 0.5)" in caught.value.fix


BAD: dict[str, tuple[Callable[[Tensor], Any], Callable[[Tensor], Any], str]] = {
    "shape": (lambda x: x * 2, lambda x: x[:2] * 2, r"returned float32\[2\] .* compiled for float32\[4\]"),
    "dtype": (lambda x: x * 2, lambda x: x.half(), r"returned float16\[4\]"),
    "structure": (lambda x: (x * 2,), lambda x: [x * 2], "put together as"),
    "plain": (lambda x: (x * 2, 1), lambda x: (x * 2, 2), "put together as"),
    "alias": (lambda x: x * 2, lambda x: x, "put together as"),
}


@pytest.mark.parametrize("name", BAD)
def test_other_result_than_the_fake(compile_with: Callable[..., Any], device: torch.device, name: str) -> None:
    """A result at run time that is not what the fake one was is an error that names the function."""
    fake, real, text = BAD[name]
    marked = eager_on_graph(fake=fake)(real)

    def model(x: Tensor) -> Tensor:
        out = marked(x + 1)
        return (out if isinstance(out, Tensor) else out[0]) * 2

    with pytest.raises(EagerOutputError, match=text) as caught:
        compile_with(model)(torch.ones(4, device=device))
    assert "lambda" in str(caught.value)


def test_error_of_the_function(compile_with: Callable[..., Any], device: torch.device) -> None:
    """What the function raises reaches the caller as the same object, and the next call is right."""
    error: Exception | None = None

    @eager_on_graph(fake=lambda x: torch.empty_like(x))
    def fails(x: Tensor) -> Tensor:
        if error is not None:
            raise error
        return x * 2

    compiled = compile_with(lambda x: fails(x + 1) - 1)
    x = torch.ones(4, device=device)
    for _ in range(4):
        assert close(compiled(x), torch.full_like(x, 3))
        error = KeyError("mine")
        with pytest.raises(KeyError) as caught:
            compiled(x)
        assert caught.value is error
        error = None


def test_bad_marks() -> None:
    """Names that are no parameters are refused where the mark is made."""
    with pytest.raises(OptionsError, match="there is no parameter 'cash'"):
        eager_on_graph(mutates_args=("cash",))(lambda cache: None)
    with pytest.raises(OptionsError, match="tuple of names"):
        eager_on_graph(mutates_args="cache")(lambda cache: None)  # type: ignore[arg-type]


def test_cost_outside() -> None:
    """A marked function called as it is costs next to nothing: far below a microsecond."""

    def nothing(x: Any) -> Any:
        return x

    marked = eager_on_graph(nothing)
    plain, wrapped = (min(timeit.repeat(lambda f=f: f(1), number=2000, repeat=20)) / 2000 for f in (nothing, marked))
    assert wrapped - plain < 5e-6  # 0.2 us where nothing else runs; this only finds a slip of another order
