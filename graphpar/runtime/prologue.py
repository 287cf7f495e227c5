"""Values that the whole batch must be known for (a count of labels), computed once by the driver."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES, Op
from graphpar.ir.whole import prologue, whole_batch_names
from graphpar.runtime.lower import StageBuilder
from graphpar.runtime.random import StepContext


@dataclass(frozen=True)
class Prologue:
    """The part of a graph that runs on the whole batch before a step, and what it makes."""

    builder: StageBuilder
    names: tuple[str, ...]

    @classmethod
    def of(cls, graph: Graph, constants: Mapping[str, torch.Tensor]) -> "Prologue | None":
        """The prologue of a captured graph, None where nothing must be known of the whole batch."""
        part = prologue(graph)
        if part is None:
            return None
        staged = [
            op if op.target in SOURCES or op.target == "output" else _in_one_stage(op) for op in part.ops
        ]
        builder = StageBuilder(
            part.with_ops(staged, level="lowered"),
            0,
            constants,
            torch.device("cpu"),
            StepContext(),
        )
        return cls(builder, whole_batch_names(graph))

    def run(self, inputs: Mapping[str, torch.Tensor], samples: int) -> dict[str, torch.Tensor]:
        """Whole-batch values by label."""
        module = self.builder.module(samples, samples)
        with torch.no_grad():
            _, values = module(*(inputs[label].cpu() for label in self.builder.interface.inputs))
        return dict(zip(self.names, values, strict=True))


def _in_one_stage(op: Op) -> Op:
    attrs = tuple((key, value) for key, value in op.attrs if key != "tail")
    return replace(op, attrs=attrs).with_attrs(stage=0)
