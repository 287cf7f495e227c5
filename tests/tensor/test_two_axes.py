"""The prices of a mesh, with which `benchmarks/two_axes.py` asks what a second axis would buy."""

import sys
from functools import cache
from math import inf
from pathlib import Path

import pytest
import torch
from choices import NVLINK, PCIE, gpus
from test_bytes import Block, Shape
from threads import one_stage

from graphpar.cost import LinkCost
from graphpar.cost_models.group_times import ShardingOptions
from graphpar.cost_models.sharding import choose_sharding
from graphpar.ir.shards import Split
from graphpar.preparation import Prepared, prepare
from graphpar.training import Training

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from mesh_programme import Layouts, Mesh, MeshPrices, MeshProgramme

SHAPE = Shape(width=512, heads=8, keys=4, inner=1024, length=256, samples=8)
OPTIONS = ShardingOptions(samples=SHAPE.samples, state_ratio=6.0)


@cache
def block(is_whole: bool = True) -> Prepared:
    """A block of Llama, or its perceptron without a gate."""
    with torch.device("meta"):
        x = torch.zeros(SHAPE.samples, SHAPE.length, SHAPE.width)
        up, down = (torch.nn.Linear(*size) for size in ((512, 2048), (2048, 512)))
        model = Block(SHAPE) if is_whole else torch.nn.Sequential(up, torch.nn.ReLU(), down)
    training = Training(optimizer=torch.optim.SGD, loss=torch.nn.functional.mse_loss)
    return prepare(model, (x, x.clone()), {}, training)


@pytest.mark.parametrize("link", [NVLINK, PCIE], ids=["nvlink", "pcie"])
def test_one_axis_is_the_programme_of_groups(link: LinkCost) -> None:
    prepared = block()
    found = choose_sharding(one_stage(prepared.graph), 0, prepared.chain, gpus(4, link), OPTIONS)
    seconds, bound = MeshProgramme(prepared, Mesh((4,)), link, OPTIONS).solve(inf)
    assert seconds == pytest.approx(found.objective_s, rel=1e-5)
    assert bound <= seconds <= bound * 1.0001


def test_a_mesh_can_do_what_one_axis_does() -> None:
    """And what fits in less memory takes no less time; what cannot be held takes for ever."""
    one, two = (MeshProgramme(block(False), Mesh(axes), PCIE, OPTIONS) for axes in ((4,), (2, 2)))
    share = one.weight_bytes() / 4
    tight, free = (two.solve(limit)[0] for limit in (1.1 * share, inf))
    assert free <= tight <= one.solve(1.1 * share)[0] * 1.0001
    assert free <= one.solve(inf)[0] * 1.0001
    assert two.solve(0.9 * share)[0] == inf


def test_conversions_along_each_axis() -> None:
    graph = one_stage(block().graph)
    x = next(op for op in graph.ops if op.target == "aten.linear.default")
    prices = MeshPrices(graph, Mesh((2, 2)), PCIE, OPTIONS)
    size = x.type.bytes(SHAPE.samples)
    pair, four = gpus(2, PCIE), gpus(4, PCIE)
    samples = Split(0, (1, 1), of_batch=True)
    whole: Layouts = ("whole", "whole")
    partial: Layouts = ("partial", "partial")
    # A sum over all at once sends 3/2 of the value, along one axis after the other 2.
    assert prices.conversion_seconds(x, partial, whole) == pytest.approx(four.seconds("all_reduce", size))
    # Members with half of the samples sum half as much.
    summed = prices.conversion_seconds(x, (samples, "partial"), (samples, "whole"))
    assert summed == pytest.approx(pair.seconds("all_reduce", size / 2))
    # The gradient of a copy is summed; first what lies inside comes together.
    gathered = prices.conversion_seconds(x, (samples, samples), whole)
    steps = (pair.seconds("all_gather", part) for part in (size / 2, size))
    assert gathered == pytest.approx(min(sum(steps), four.seconds("all_gather", size)))
    half = prices.conversion_seconds(x, (samples, samples), (samples, "whole"))
    assert half == pytest.approx(pair.seconds("all_gather", size / 2))
    assert prices.conversion_seconds(x, ("copied", samples), ("whole", samples)) > 1e6
