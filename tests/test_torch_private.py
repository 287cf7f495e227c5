"""Every private use of torch still does what it is used for."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from graphpar.frontend import torch_private as private


class Point(NamedTuple):
    x: int
    y: int


@pytest.mark.parametrize(
    "tree", [(1, [2, {"b": 3, "a": None}]), [], {}, 5, (Point(1, 2), "text"), {"k": (torch.ones(1),)}]
)
def test_trees_are_flattened_and_put_back(tree: Any) -> None:
    leaves, spec = private.flatten(tree)
    assert private.unflatten(leaves, spec) == tree
    assert private.flatten(tree)[1] == spec
    assert isinstance(spec, private.TreeSpec)


def test_registered_classes_are_flattened() -> None:
    class Output(dict[str, int]):
        pass

    def give(output: Output) -> tuple[list[Any], Any]:
        return list(output.values()), list(output)

    def take(values: Any, keys: Any) -> Output:
        return Output(zip(keys, values, strict=True))

    _pytree.register_pytree_node(Output, give, take, serialized_type_name="tests.Output")
    leaves, spec = private.flatten(Output(a=1, b=2))
    assert leaves == [1, 2] and isinstance(private.unflatten(leaves, spec), Output)


class Both(nn.Module):
    def forward(self, x: torch.Tensor) -> Mapping[str, torch.Tensor]:
        with torch.no_grad():
            y = x * 2
        return {"y": y, "x": x.view(-1)}


class Second(nn.Module):
    def forward(self, made: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return helper(made["y"]) + made["x"].sum()


def helper(x: torch.Tensor) -> torch.Tensor:
    return x.relu()


@pytest.fixture(scope="module")
def program() -> torch.export.ExportedProgram:
    return torch.export.export(Both(), (torch.ones(2, 2),), strict=False)


def test_the_output_structure_of_an_exported_program(program: torch.export.ExportedProgram) -> None:
    assert private.unflatten([1, 2], private.output_spec(program)) == {"y": 1, "x": 2}


def test_nodes_are_named(program: torch.export.ExportedProgram) -> None:
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert "wrap_with_set_grad_enabled" in [private.higher_order_name(t) for t in calls]
    assert "aten.view.default" in [private.op_name(t) for t in calls]
    assert private.op_name(len) is None and private.higher_order_name(len) is None


def test_views_share_storage_in_exported_metadata(program: torch.export.ExportedProgram) -> None:
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    assert private.shares_storage(values["view"], values["x"])


def test_shared_storage() -> None:
    a = torch.ones(2, 4)
    assert private.shares_storage(a.t(), a) and private.shares_storage(torch.chunk(a, 2), a)
    assert not private.shares_storage(a.clone(), a) and not private.shares_storage(None, a)
    assert not private.shares_storage(a, None)


@pytest.mark.parametrize("target", ["aten.linear.default", "aten.add.Tensor", "aten.__and__.Scalar"])
def test_operators_are_looked_up_by_name(target: str) -> None:
    assert private.op_name(private.lookup_op(target)) == target


@pytest.mark.parametrize("target", ["aten.frobnicate.default", "aten.add.Frob", "nothing.at.all"])
def test_missing_operators_are_an_attribute_error(target: str) -> None:
    with pytest.raises(AttributeError):
        private.lookup_op(target)


@pytest.mark.parametrize(
    ("target", "random", "mutated", "view"),
    [
        ("aten.add.Tensor", False, (), False),
        ("aten.add_.Tensor", False, (0,), False),
        ("aten.view.default", False, (), True),
        ("aten.split.Tensor", False, (), True),
        ("aten.dropout.default", True, (), True),
        ("aten.bernoulli_.float", True, (0,), False),
        ("aten.matmul.default", False, (), False),
        ("aten.arange.default", False, (), False),
    ],
)
def test_schemas_and_tags(target: str, random: bool, mutated: tuple[int, ...], view: bool) -> None:
    function = private.lookup_op(target)
    assert private.is_random(function) is random
    assert private.mutated_arguments(function) == mutated
    assert private.views_first_argument(function) is view


def test_functions_memory_and_hooks() -> None:
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    class Seen(private.DispatchMode):  # type: ignore[misc]
        names: tuple[str, ...] = ()

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Seen.names += (str(func),)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Seen():
        assert private.apply_function(Twice, x).tolist() == [2.0, 2.0]
    assert Seen.names == ("aten.mul.Tensor",)
    before = private.writes_to(x)
    assert private.writes_to(x.add_(1)) == before + 1
    assert private.memory_of(x[:1]) == private.memory_of(x) != private.memory_of(x.clone())
    layer = nn.Linear(2, 2)
    assert not private.has_gradient_hook(layer) and not private.has_gradient_hook(layer.weight)
    layer.weight.register_hook(lambda g: g)  # type: ignore[no-untyped-call]
    layer.register_full_backward_hook(lambda m, a, b: None)
    layer.bias.register_post_accumulate_grad_hook(lambda p: None)  # type: ignore[no-untyped-call]
    parts = (layer, layer.weight, layer.bias)
    assert all(private.has_gradient_hook(part) for part in parts)


def test_operators_with_out_have_one_without() -> None:
    aten = torch.ops.aten
    assert private.without_out(aten.div.out) is aten.div.Tensor
    assert private.without_out(aten.mm.out) is aten.mm.default
    assert private.without_out(aten.randn.out) is None  # the other one also takes a type and a device
    assert private.without_out(len) is None


def test_in_place_operators_have_twins_by_what_they_take() -> None:
    aten = torch.ops.aten
    assert private.functional_twin(aten.pow_.Scalar) is aten.pow.Tensor_Scalar
    assert private.functional_twin(aten.floor_divide_.Tensor) is aten.floor_divide.default
    assert private.functional_twin(aten.bernoulli_.float) is aten.bernoulli.p
    assert private.functional_twin(aten.fill_diagonal_.default) is None
    assert private.functional_twin(aten.mul.Tensor) is None


def test_arguments_of_a_conversion_are_told_apart() -> None:
    wanted = (torch.device("cpu"), torch.float16, None)
    assert private.parsed_conversion("cpu", torch.float16) == wanted
    assert private.parsed_conversion(torch.empty(0, dtype=torch.float16)) == wanted


class Mapped(nn.Module):
    def forward(self, x: torch.Tensor) -> Any:
        return torch.vmap(lambda row, i: row[i].exp(), out_dims=-1)(x, torch.arange(2))


def test_a_vmap_is_exported_with_its_levels_and_traced_below_autograd() -> None:
    x = torch.ones(2, 3)
    with private.vmap_can_be_exported():
        program = torch.export.export(Mapped(), (x,), strict=False)
    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    for known in (private.prepares_vmap, private.enters_vmap, private.leaves_vmap):
        assert sum(map(known, targets)) == 1

    def total(row: torch.Tensor) -> torch.Tensor:
        return row.exp().sum()

    traced = private.traced_below_autograd(torch.vmap(total), (x,))
    made = [str(n.target) for n in traced.graph.nodes if n.op == "call_function"]
    assert made == ["aten.exp.default", "aten.sum.dim_IntList"]
    assert private.sets_gradient_mode(torch._C._set_grad_enabled)


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_short_stacks_are_what_torch_keeps_of_long_ones() -> None:
    model = nn.Sequential(Both(), Second())
    example = (torch.ones(2, 2),)

    def stacks() -> list[Any]:
        nodes = torch.export.export(model, example, strict=False).graph.nodes
        return [node.meta.get("stack_trace") for node in nodes]

    long = stacks()
    with private.short_stacks():
        assert stacks() == long
    assert sum("in forward" in stack and "Second" not in stack for stack in long if stack) >= 4


def test_a_failing_export_is_quiet(capfd: pytest.CaptureFixture[str]) -> None:
    with private.quiet_failures(), pytest.raises(Exception, match="data-dependent"):
        torch.export.export(Branches(), (torch.ones(2),), strict=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("made", [torch.func.grad, torch.func.jacrev, torch.func.jacfwd])
def test_functional_gradients_call_a_function_first(made: Any) -> None:
    calls: list[int] = []
    with private.functional_gradients_call(lambda: calls.append(1)):
        made(lambda x: x.sum())(torch.ones(2))
    made(lambda x: x.sum())(torch.ones(2))
    assert len(calls) == 1


class Islands(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ x
            with torch.no_grad():
                y = y.exp()
            return y * x


def test_gradient_modes_are_kept_in_autocast() -> None:
    x = torch.ones(2, 2, requires_grad=True)
    with private.gradient_modes_in_autocast():
        program = torch.export.export(Islands(), (x,), strict=False)
    names = [
        private.higher_order_name(node.target)
        for part in program.graph_module.modules()
        if isinstance(part, torch.fx.GraphModule)
        for node in part.graph.nodes
    ]
    assert names.count("wrap_with_set_grad_enabled") == 1 and "wrap_with_autocast" in names
    with private.fake_tensors():
        assert torch.empty(10**9, 10**9).shape == (10**9, 10**9)


def test_checkpointed_parts_can_be_run_within_something() -> None:
    said: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        said.append("before")
        yield
        said.append("after")

    def part(x: torch.Tensor) -> torch.Tensor:
        said.append("part")
        return x.exp()

    with private.checkpoints_within(around):
        checkpoint(part, torch.ones(2, requires_grad=True), use_reentrant=False)
    assert said == ["before", "part", "after"]
