"""A captured graph made runnable, and whether it answers a call's inputs."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from graphpar.frontend.capture import Captured, Signature, resize
from graphpar.frontend.torch_private import flatten, unflatten
from graphpar.runtime.assemble import Lowered
from graphpar.runtime.merge import check_inputs, samples_of
from graphpar.runtime.program import Part
from graphpar.runtime.prologue import Prologue
from graphpar.schedule import Schedule


@dataclass(frozen=True)
class Loaded:
    """A captured graph with its prologue, lowered; its schedules are by batch size and part of a step."""

    name: str
    captured: Captured
    lowered: Lowered
    prologue: Prologue | None
    schedules: dict[tuple[int, Part], Schedule] = field(default_factory=dict)

    def misfit(self, inputs: Mapping[str, torch.Tensor]) -> str:
        """Why this graph cannot answer for inputs of other sizes; empty when it can.

        Raises:
            ValueError: The inputs differ in more than sizes, so that no other graph could either.
        """
        graph, batched = self.captured.graph, self.captured.signature.batched
        samples = samples_of(graph, inputs, batched)
        if self.captured.unsplittable and samples != graph.batch:
            return (
                f"The batch has {samples} samples, but the captured graph is for {graph.batch}: "
                f"{self.captured.unsplittable}."
            )
        if asked := self.captured.unlike(samples):
            return (
                f"The batch has {samples} samples, for which the model has another graph than for the "
                f"{graph.batch} it was captured with: {asked}."
            )
        try:
            check_inputs(graph, inputs, batched)
        except ValueError as error:
            if self._differ_in_sizes_only(inputs):
                return str(error)
            raise
        return ""

    def _differ_in_sizes_only(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        return all(
            inputs[label].ndim == len(op.type.shape)
            and inputs[label].dtype == getattr(torch, op.type.dtype)
            for op in self.captured.graph.sources("input")
            if (label := str(op.args[0])) in inputs
        )

    def at_captured_size(
        self, inputs: Mapping[str, torch.Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments for as many samples as this graph was captured with.

        A graph captured for them answers any number of samples; where it cannot be split, or the model
        has another graph for so many, the arguments stay as they are.
        """
        if self._for_its_batch(inputs):
            return tuple(args), dict(kwargs)
        graph, signature = self.captured.graph, self.captured.signature
        samples = samples_of(graph, inputs, signature.batched)
        leaves, spec = flatten((tuple(args), dict(kwargs)))
        names = _names(signature, len(leaves))
        sized = [
            resize(leaf, samples, graph.batch) if name in signature.batched else leaf
            for name, leaf in zip(names, leaves, strict=True)
        ]
        resized_args, resized_kwargs = unflatten(sized, spec)
        return resized_args, resized_kwargs

    def shapes(self, inputs: Mapping[str, torch.Tensor]) -> Hashable:
        """What calls have in common that one other graph can answer: sizes, but for the batch."""
        keep_batch = self._for_its_batch(inputs)
        batched = self.captured.signature.batched
        return tuple(
            (name, tuple(tensor.shape[0 if keep_batch or name not in batched else 1 :]))
            for name, tensor in sorted(inputs.items())
        )

    def _for_its_batch(self, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Whether these inputs' number of samples needs a graph captured with it."""
        captured = self.captured
        samples = samples_of(captured.graph, inputs, captured.signature.batched)
        return bool(captured.unsplittable or captured.unlike(samples))


def with_own_constants(captured: Captured, prefix: str) -> Captured:
    """The same with its constants under names of their own.

    Graphs of one job number the constants that a model makes anew alike, and hold other values there.
    """
    ops = [
        replace(op, args=(f"{prefix}{op.args[0]}",)) if op.target == "constant" else op
        for op in captured.graph.ops
    ]
    constants = {f"{prefix}{label}": tensor for label, tensor in captured.constants.items()}
    return replace(captured, graph=captured.graph.with_ops(ops), constants=constants)


def _names(signature: Signature, count: int) -> list[str]:
    names = [name if isinstance(name, str) else "" for name in signature.inputs]
    assert len(names) == count, "bind checks the structure first"
    return names
