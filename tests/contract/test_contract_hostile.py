"""Programs that were once wrong, or did not compile: arguments that share memory, absolute offsets, hostile names."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import breakable_backend
import silly
from breakable_backend import BreakableCUDAGraph, CaptureError, InternalError, _torch, backend, capture
from checks import assert_same


@torch.library.custom_op("hostile::add_into", mutates_args=("target",), tags=(torch.Tag.cudagraph_unsafe,))
def add_into(target: Tensor, x: Tensor) -> None:
    """Add ``x`` to ``target``: an eager step that writes its argument."""
    target.add_(x)


library = torch.library.Library("hostile", "FRAGMENT")
library.define("add_into_some(Tensor(a!)?[] targets, Tensor x) -> ()")


@torch.library.impl(library, "add_into_some", "CompositeExplicitAutograd")
def _add_into_some(targets: list[Tensor | None], x: Tensor) -> None:
    for target in targets:
        if target is not None:
            target.add_(x)


@torch.library.register_fake("hostile::add_into_some", lib=library)
def _(targets: list[Tensor | None], x: Tensor) -> None:
    return None


def named(name: str) -> Callable[[Tensor], Tensor]:
    """A marked op of a given name that triples its argument."""
    op = torch.library.custom_op(f"hostile::{name}", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))(tripled)
    op.register_fake(torch.empty_like)
    return op


def tripled(x: Tensor) -> Tensor:
    """Three times ``x``."""
    return x * 3


attn, attn_bridge, attn_inside, attn_fresh = map(named, ("attn", "attn_bridge", "attn_inside", "attn_fresh"))


def equal_to_eager(
    function: Any, make: Callable[[int], tuple[Tensor, ...]], options: dict[str, Any], calls: int = 8
) -> Any:
    """Call ``function`` compiled and eagerly on arguments that are made alike, and compare results and arguments."""
    compiled = torch.compile(function, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        for call in range(calls):
            torch.manual_seed(call)
            mine = make(call)
            torch.manual_seed(call)
            theirs = make(call)
            got, want = compiled(*mine), function(*theirs)
            mine_now = [*torch.utils._pytree.tree_leaves(got), *mine]
            theirs_now = [*torch.utils._pytree.tree_leaves(want), *theirs]
            assert all(torch.equal(a, b) for a, b in zip(mine_now, theirs_now, strict=True)), f"call {call}"
    return compiled


def overlapping(device: torch.device, *, late: bool) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Two arguments that share memory: in every call, or in all but the first."""

    def make(call: int) -> tuple[Tensor, Tensor]:
        base = torch.rand(10, device=device)
        apart = late and call == 0
        return base[:6], (torch.rand(6, device=device) if apart else base[3:9])

    return make


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("written_by", ["eager", "captured"])
def test_arguments_that_share_memory(
    late: bool, written_by: str, device: torch.device, options: dict[str, Any]
) -> None:
    """Lines 3 and 5: what is written through one argument is read through another, also when Dynamo does not guard on it."""

    def eager(a: Tensor, b: Tensor) -> Tensor:
        c = a * 2
        add_into(b, c)
        return a * 3

    def captured(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        c = a * 2
        b.add_(1)
        return a * 3, silly.triple(c)

    function = eager if written_by == "eager" else captured
    compiled = equal_to_eager(function, overlapping(device, late=late), options, calls=9)
    report = str(breakable_backend.explain(compiled))
    assert "share memory, and one is written" in report or "share their memory" in report


def test_row_of_a_written_buffer(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: an argument may be any row of a buffer that the module writes."""

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("rows", torch.zeros(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            self.rows.add_(1)
            return x * 2

    module = Rows().to(device)
    compiled = torch.compile(module, backend="breakable_cg", options={**options, "min_kernels": 1})
    with torch.no_grad():
        for call in range(6):
            module.rows.copy_(torch.arange(16.0, device=device).view(4, 4))
            want = (torch.arange(16.0, device=device).view(4, 4)[call % 2] + 1) * 2
            assert torch.equal(compiled(module.rows[call % 2]), want)


def test_view_of_an_overlapping_argument(device: torch.device, options: dict[str, Any]) -> None:
    """Line 5: a view of an argument that shares memory with a written one is returned as in eager."""

    def function(a: Tensor, b: Tensor) -> Tensor:
        b.mul_(2)
        return a.t()

    def make(call: int) -> tuple[Tensor, Tensor]:
        base = torch.rand(16, device=device)
        return base[:8].view(2, 4), base[4:12].view(2, 4)

    equal_to_eager(function, make, options)


def test_absolute_offset(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: ``as_strided`` with an offset reaches the caller's storage, not a bridge."""
    compiled = equal_to_eager(
        lambda x: x.as_strided((3,), (1,), 1) + 1, lambda _: (torch.rand(10, device=device)[2:8],), options
    )
    assert "absolute offset" in str(breakable_backend.explain(compiled))


@pytest.mark.parametrize("op", ["as_strided", "as_strided_copy", "as_strided_scatter"])
def test_memory_between_elements(op: str, device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: ``as_strided`` reads what lies between an argument's elements from the caller's storage, not a bridge."""

    def function(x: Tensor) -> Tensor:
        if op == "as_strided_scatter":
            return torch.as_strided_scatter(x, x[:2] * 0, (2,), (5,)).as_strided((11,), (1,)) + 1
        return getattr(torch, op)(x, (6,), (1,)) + 1

    compiled = equal_to_eager(function, lambda _: (torch.rand(12, device=device)[::2],), options)
    assert "between its elements" in str(breakable_backend.explain(compiled))


def test_out_that_tracing_forgets(device: torch.device, options: dict[str, Any]) -> None:
    """Line 5: what ``out=`` names is written, also where torch's own kernel forgets it when it is traced."""
    compiled = torch.compile(
        lambda a, out: (torch.linalg.matrix_rank(a, out=out), out + 1), backend="breakable_cg", options=options
    )
    for rank in (1, 2, 3, 2):
        out = torch.zeros((), dtype=torch.int64, device=device)
        with torch.no_grad():
            result, more = compiled(torch.diag(torch.arange(4.0, device=device) < rank).float(), out)
        assert (result.item(), more.item(), out.item()) == (rank, rank + 1, rank)
        assert result is out
    (graph,) = breakable_backend.explain(compiled).eager_graphs
    assert graph.why == "linalg_matrix_rank leaves its out= unwritten when it is traced"


@pytest.mark.parametrize("op", [torch.ops.aten.slice_scatter.out, torch.ops.aten.copy.out], ids=str)
def test_what_an_op_with_out_reads(op: Any, device: torch.device, options: dict[str, Any]) -> None:
    """Line 1: what an op with ``out=`` has read is read unchanged after it, though torch's fakes return it in place of ``out``."""
    more = (0, 0, 2) if op is torch.ops.aten.slice_scatter.out else ()

    def function(x: Tensor, source: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        result = op(y, source, *more, out=out)
        return y, y + 1, result * 3, x

    compiled = torch.compile(function, backend="breakable_cg", options=options)
    outs = [torch.zeros(4, 3, device=device) for _ in range(2)]
    with torch.no_grad():
        for _ in range(5):
            x, source = torch.rand(4, 3, device=device), torch.rand(2 if more else 4, 3, device=device)
            assert_same((compiled(x, source, outs[0]), outs[0]), (function(x, source, outs[1]), outs[1]))
    assert breakable_backend.explain(compiled).programs[0].replays > 0


def test_outs_behind_a_meta_kernel(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a composite op whose fake kernel calls ``matmul`` is traced, and no ``AttributeError`` keeps its graph eager."""
    compiled = torch.compile(lambda a, out: torch.linalg.pinv(a, out=out), backend="breakable_cg", options=options)
    with torch.no_grad():
        for _ in range(4):
            a, outs = torch.rand(3, 3, device=device), [torch.empty(3, 3, device=device) for _ in range(2)]
            assert_same((compiled(a, outs[0]), outs[0]), (torch.linalg.pinv(a, out=outs[1]), outs[1]))
    assert not breakable_backend.explain(compiled).eager_graphs


def test_outs_are_captured(device: torch.device, options: dict[str, Any]) -> None:
    """Line 5: other calls with ``out=`` are captured, on arguments and on what the program makes."""

    def function(a: Tensor, out: Tensor) -> Tensor:
        between = torch.empty_like(a)
        torch.add(a, 1, out=between)
        torch.topk(between, 2, out=(out, torch.empty(2, dtype=torch.int64, device=device)))
        torch.linalg.vector_norm(a, out=out[0])
        return torch.matmul(a, a, out=between[0]) + out

    compiled = equal_to_eager(
        lambda a: function(a, torch.empty(2, device=device)), lambda _: (torch.rand(4, device=device),), options
    )
    (program,) = breakable_backend.explain(compiled).programs
    assert program.num_graph_segments == 1


@pytest.mark.parametrize("inplace", ["transpose_", "swapaxes_", "swapdims_", "t_", "squeeze_", "unsqueeze_"])
def test_inplace_views_of_an_eager_result(inplace: str, device: torch.device, options: dict[str, Any]) -> None:
    """Line 5: what changes a tensor's shape in place is a view, whose root keeps its shape: also an eager step's result."""
    arguments = {"t_": (), "unsqueeze_": (0,), "squeeze_": (0,)}.get(inplace, (0, 1))

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = silly.triple(x)
        z = getattr(y, inplace)(*arguments) + 1
        return silly.triple(y), z

    equal_to_eager(function, lambda _: (torch.rand(1 if inplace == "squeeze_" else 2, 3, device=device),), options)


def test_ops_named_like_slots(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: an op may be called as our own variables are."""

    def function(x: Tensor) -> tuple[Tensor, ...]:
        y = attn(x)
        z = attn_inside(y.sin())
        u = attn_bridge(z.cos())
        v = attn_fresh(u + y)
        return y.cos() + z.exp() + u, silly.triple(y), y.sin(), z.sin(), v, (v + y).sin()

    equal_to_eager(function, lambda _: (torch.rand(4, device=device),), options)


@pytest.mark.parametrize("how", ["set_", "resize_"])
def test_moved_storage(how: str, device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a program that moves a storage runs eagerly, and may return a view of it."""

    def function(x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        y = x.sin()
        if how == "set_":
            y.set_(z)
        else:
            torch.ops.aten.resize_.default(y, [2, 2])
        return y[0], silly.triple(y)

    equal_to_eager(function, lambda _: (torch.rand(4, device=device), torch.rand(4, device=device)), options, calls=4)


def test_what_aot_refuses(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: a graph that AOTAutograd does not take runs eagerly, and the report says why."""
    compiled = equal_to_eager(
        lambda x: x.abs().add(1).polygamma_(1) * 2, lambda _: (torch.rand(4, device=device),), options, calls=4
    )
    assert "AOTAutograd does not take it" in str(breakable_backend.explain(compiled))


REFUSALS = [AssertionError("a\nb"), AttributeError("append"), KeyError(3), NotImplementedError(), TypeError("no")]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda error: type(error).__name__)
def test_whatever_aot_raises(
    refusal: Exception, device: torch.device, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line 9: whatever AOTAutograd raises, the graph runs eagerly, and the report says what it was."""

    def refuse(*args: Any) -> None:
        raise refusal

    monkeypatch.setattr(_torch, "trace_inference", refuse)
    compiled = equal_to_eager(lambda x: x.sin() * 2, lambda _: (torch.rand(4, device=device),), options, calls=4)
    (graph,) = breakable_backend.explain(compiled).eager_graphs
    assert graph.why.startswith(f"AOTAutograd does not take it: {type(refusal).__name__}")
    assert "\n" not in graph.why


def test_written_list_with_gaps(device: torch.device, options: dict[str, Any]) -> None:
    """Line 9: an op that writes a list with a None in it, which AOTAutograd does not know, runs eagerly."""

    def function(kept: Tensor, x: Tensor) -> Tensor:
        y = x.sin() * 2
        torch.ops.hostile.add_into_some([kept, None], y)
        return (y + kept).cos()

    rand = lambda _: (torch.zeros(3, device=device), torch.rand(3, device=device))  # noqa: E731
    assert breakable_backend.explain(equal_to_eager(function, rand, options, calls=4)).eager_graphs


def test_faults_of_our_own(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Line 9: what goes wrong inside of this package names it, and a way out, and sends nobody to PyTorch."""

    def fails(*args: Any) -> None:
        raise KeyError("segment 3")

    monkeypatch.setattr(backend, "Executor", fails)
    with torch.no_grad(), pytest.raises(InternalError) as caught:
        torch.compile(torch.sin, backend="breakable_cg", options=options)(torch.ones(2))
    assert isinstance(caught.value.original, KeyError)
    assert "PyTorch: please report it there" in caught.value.fix
    assert "TORCHDYNAMO" not in str(caught.value)
    assert "breakable_backend" in caught.value.fix
    assert "backend='eager'" in caught.value.fix


def test_inference_mode_inside(device: torch.device, options: dict[str, Any]) -> None:
    """Line 7: inference mode entered inside the function is as in eager."""

    def function(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return silly.triple(x.sin())

    compiled = torch.compile(function, backend="breakable_cg", options=options)
    with torch.no_grad():
        assert [compiled(torch.rand(3, device=device)).is_inference() for _ in range(4)] == [True] * 4


def test_trilinear(device: torch.device, options: dict[str, Any]) -> None:
    """Resampling in three dimensions has eager's arithmetic."""
    equal_to_eager(
        lambda x: nn.functional.interpolate(x, scale_factor=1.7, mode="trilinear") + 1,
        lambda _: (torch.rand(1, 2, 4, 4, 4, device=device),),
        options,
        calls=4,
    )


def test_compiled_modules_can_be_copied(device: torch.device, options: dict[str, Any]) -> None:
    """A compiled module can be copied, and pickled, before and after its first call."""
    module = torch.compile(nn.Linear(3, 3).to(device), backend="breakable_cg", options=options)
    x = torch.rand(2, 3, device=device)
    with torch.no_grad():
        for _ in range(2):
            twin = copy.deepcopy(module)
            assert torch.equal(twin(x), module(x))
    assert pickle.loads(pickle.dumps(breakable_backend.breakable_cg)) is breakable_backend.breakable_cg


def test_address_that_is_used_again(device: torch.device, options: dict[str, Any]) -> None:
    """Line 3: a new argument may come to the address of one that is gone, and is read there."""

    def function(x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2

    compiled = torch.compile(function, backend="breakable_cg", options=options)
    with torch.no_grad():
        for call in range(8):
            x = torch.full((1000,), float(call), device=device)
            assert compiled(x)[0].item() == (call + 1) * 2
            assert x[0].item() == call + 1
            del x


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
@pytest.mark.parametrize("debug", [None, "compare"])
@pytest.mark.parametrize("fixed", [False, True])
def test_quantised_tensors(device: torch.device, options: dict[str, Any], fixed: bool, debug: str | None) -> None:
    """A graph that makes quantised tensors, which tracing takes for floats, runs as traced, with that reason."""
    zero = torch.zeros((), dtype=torch.int32, device=device)

    def model(x: Tensor) -> tuple[Tensor, Tensor]:
        scale, point = (0.02, 3) if fixed else (x.abs().max() / 100, zero)
        made = torch.quantize_per_tensor(x.sin(), scale, point, torch.qint8)
        return made, made.dequantize() + tripled(x + 1)

    compiled = torch.compile(model, backend="breakable_cg", options={**options, "debug": debug})
    with torch.no_grad():
        for call in range(5):
            x = torch.randn(4, 6, device=device) * (call + 1)
            (mine, mine_sum), (theirs, their_sum) = compiled(x), model(x)
            assert mine.dtype is torch.qint8
            assert (mine.q_scale(), mine.q_zero_point()) == (theirs.q_scale(), theirs.q_zero_point())
            assert torch.equal(mine.int_repr(), theirs.int_repr())
            assert torch.equal(mine_sum, their_sum)
    report = breakable_backend.explain(compiled)
    # torch 2.11 breaks its graph there.
    assert report.graph_breaks or "it makes quantised tensors, which tracing takes for floats" in str(report)


@pytest.mark.filterwarnings("ignore:.*quantize_per_tensor")
def test_quantised_tensors_under_capture(device: torch.device, kind: str) -> None:
    """A scale that depends on values is an error, and a number is captured."""
    x, zero = torch.randn(4, device=device), torch.zeros((), dtype=torch.int32, device=device)
    with torch.no_grad():
        refused = BreakableCUDAGraph(driver=kind)
        with pytest.raises(CaptureError, match="a replay would not renew its scale"), capture(refused):
            torch.quantize_per_tensor(x, x.abs().max() / 100, zero, torch.qint8)
        graph = BreakableCUDAGraph(driver=kind)
        with capture(graph):
            y = torch.quantize_per_tensor(x, 0.02, 3, torch.qint8).dequantize() + 1
        for _ in range(3):
            x.copy_(torch.randn(4))
            graph.replay()
            assert torch.equal(y, torch.quantize_per_tensor(x, 0.02, 3, torch.qint8).dequantize() + 1)
