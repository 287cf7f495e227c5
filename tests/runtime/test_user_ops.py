"""Operators that torch does not know by itself reach the workers."""

import runpy
from pathlib import Path

import pytest
import scaled_op
import torch
from helpers import check_inference, check_training, force, straight
from torch import nn

from graphpar.errors import RunError
from graphpar.runtime.user_ops import foreign_targets, load_code, needed_code


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = scaled_op.scaled(self.first(x), 1.5)
        result: torch.Tensor = scaled_op.scaled(self.second(h), 0.5).square().mean()
        return result


def test_operator_of_a_module() -> None:
    model, batch = Scaled(), (torch.randn(6, 4),)
    check_training(model, batch, lines=straight(2), by_op=True)
    check_inference(model, batch, lines=straight(2), by_op=True)


def test_only_stages_that_call_it_import_the_module() -> None:
    forced = force(Scaled(), (torch.randn(6, 4),), lines=straight(2), by_op=True)
    assert forced.lower is not None
    (graph,) = forced.lower(forced.prepared.graph, forced.plan.partition, None).graphs
    assert [foreign_targets(graph, s) for s in (0, 1, 2)] == [
        ["graphpar_tests.scaled.default"],
        ["graphpar_tests.scaled.default"],
        [],
    ]
    assert needed_code(["graphpar_tests.scaled.default"]) == (("scaled_op",), b"")
    assert needed_code([]) == ((), b"")


def test_module_that_is_missing_is_named() -> None:
    with pytest.raises(RunError, match=r"no_such_module_of_ops.*PYTHONPATH"):
        load_code(["no_such_module_of_ops"], b"")


def test_operator_that_nobody_defines_is_left_to_torch() -> None:
    assert needed_code(["no_such_namespace_of_ops.op.default"]) == ((), b"")


SCRIPT = """
import torch
import graphpar

@torch.library.custom_op("script::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * factor

@doubled.register_fake
def _(x):
    return torch.empty_like(x)

doubled.register_autograd(lambda ctx, g: g * factor)
factor = 2.0

@torch.library.custom_op("script::track", mutates_args={"seen"})
def track(x: torch.Tensor, seen: torch.Tensor) -> None:
    seen.add_(x.sum())

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        track(x, self.seen)
        return doubled(self.layer(x)).square().mean()

x, model = torch.ones(4, 3), Model()
training = graphpar.Training(optimizer=lambda p: torch.optim.SGD(p, lr=0.01))
with graphpar.compile(model, {"devices": [{"kind": "cpu", "threads": 1}]}, (x,), train=training) as job:
    assert torch.allclose(job.step(x), model(x))
    assert job.step(x) < model(x)
    assert job.state_dict()["seen"] == 24.0
print("equal")
"""


def test_operator_of_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    runpy.run_path(str(script), run_name="__main__")
    assert capsys.readouterr().out == "equal\n"
