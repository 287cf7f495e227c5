"""Weights and optimiser state of a running job: read, written, saved and loaded as whole tensors."""

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence

import torch

from graphpar.runtime.assemble import Lowered
from graphpar.runtime.checkpoint import (
    free_place,
    read_manifest,
    restored_for,
    save_checkpoint,
    stored_model,
    stored_optimizer,
    write_manifest,
)
from graphpar.runtime.pieces import joined, sliced
from graphpar.runtime.program import Slice
from graphpar.runtime.subject import Subject
from graphpar.runtime.turns import Turn
from graphpar.runtime.weights import Weights
from graphpar.runtime.workers import Workers

_log = logging.getLogger("graphpar.job")


class JobState:
    """What the ranks of a job hold, under the model's own names; `CompiledModel` adds how it runs.

    Args:
        subject: What the job is made of.
        workers: The ranks at work.
        lowered: The graphs they run.
        weights: Where every tensor of the model came from.
    """

    def __init__(self, subject: Subject, workers: Workers, lowered: Lowered, weights: Weights) -> None:
        self._subject = subject
        self._workers = workers
        self._trained_on = lowered
        self._weights = weights
        self._weights_moved = False
        self._steps = 0
        self._turn = Turn()
        self._held = [set(p.labels) for p in lowered.placements]
        self._slices = [dict(p.slices) for p in lowered.placements]
        self._stepped = lowered.stepped

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Whole tensors under the model's own names, tied and unused ones included."""
        current = self._whole(self._workers.read, self._slices, self._trained_on.givers)
        names = self._subject.model.state_dict()
        return {name: current.get(name, self._weights.get(name, other)) for name, other in names.items()}

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients by name that the optimiser left in place; summed over the whole batch.

        The usual optimisers' gradients are cleared after each step, so this is empty then.
        """
        return self._whole(self._workers.gradients, self._stepped, self._trained_on.stepping_givers)

    def _whole(
        self,
        read: Callable[[Sequence[Sequence[str]]], Sequence[Mapping[str, torch.Tensor]]],
        slices_of: Sequence[Mapping[str, Slice]],
        wanted: Sequence[Collection[str]],
    ) -> dict[str, torch.Tensor]:
        """Whole tensors by name from what the ranks hold; slices are put together."""
        held: dict[str, list[tuple[torch.Tensor, Slice | None]]] = {}
        for part, cuts in zip(read([sorted(labels) for labels in wanted]), slices_of, strict=True):
            for label, tensor in part.items():
                held.setdefault(label, []).append((tensor, cuts.get(label)))
        current = {label: joined(parts) for label, parts in held.items()}
        for label, others in self._subject.graph.aliases.items():
            if label in current:
                current.update(dict.fromkeys(others, current[label]))
        return current

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Overwrite parameters and buffers on all workers; optimiser state is kept as it is.

        Raises:
            ValueError: A tensor that a worker holds is missing, unknown, or of another shape.
        """
        own = self._subject.model.state_dict()
        if not isinstance(state, Mapping) or not all(isinstance(t, torch.Tensor) for t in state.values()):
            raise ValueError(
                "load_state_dict takes a dict of tensors by name, as state_dict() gives it; the path of "
                "a checkpoint goes to load()."
            )
        unknown = sorted(state.keys() - own.keys())
        if unknown:
            raise ValueError(f"The model has no tensor of the name {', '.join(unknown)}.")
        for name, tensor in own.items():
            if name in state and state[name].shape != tensor.shape:
                raise ValueError(
                    f"{name} has the shape {list(state[name].shape)} in the state, "
                    f"but {list(tensor.shape)} in the model."
                )
        per_rank = []
        for rank, held in enumerate(self._held):
            labels = sorted(held & own.keys())
            absent = [label for label in labels if label not in state]
            if absent:
                raise ValueError(f"The state has no tensor for {', '.join(absent)}.")
            per_rank.append({la: sliced(state[la], self._slices[rank].get(la)) for la in labels})
        with self._turn:
            self._workers.write(per_rank)
            self._weights_moved = True
            self._weights.here.update({name: tensor.detach().clone() for name, tensor in state.items()})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint: weights, optimiser state and step, in a folder that knows no plan.

        Each rank writes its own part; the folder appears, or takes the place of an older checkpoint,
        when all is written. It loads under any other plan (`load`), as `compile(weights=...)`, and in
        plain PyTorch (`graphpar.checkpoint_state`). Under torchrun the folder must be one that all
        machines share, and every process makes the call.

        Raises:
            ValueError: Something that is no checkpoint stands there.
            RunError: A rank could not write; what stood there before is kept, and the job goes on.
        """
        place = free_place(path)
        shapes = self._shapes()
        wanted = [sorted(labels & shapes.keys()) for labels in self._trained_on.stepping_givers]
        held = {label for labels in wanted for label in labels}
        tied = {name for others in self._subject.graph.aliases.values() for name in others}
        rest = {n: self._weights[n] for n in shapes if n not in held | tied and n in self._weights}
        with self._turn:  # no other thread may step between the parts and their step's number
            save_checkpoint(
                self._workers,
                place,
                wanted,
                rest,
                self._stepped,
                lambda folder, parts: write_manifest(
                    folder, self._subject.graph.name, self._steps, self._subject.graph.aliases, parts
                ),
            )

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from a checkpoint, whatever plan wrote it: weights, optimiser state and step.

        Raises:
            ValueError: The folder is no checkpoint, or not of this model; nothing is changed then.
            RunError: A worker failed to read. The job is over then.
        """
        manifest = read_manifest(path)
        model, optimizer = stored_model(path, manifest), stored_optimizer(path, manifest)
        shapes = self._shapes()
        parts = [
            restored_for(held, shapes, manifest, model, optimizer, cuts, stepped)
            for held, cuts, stepped in zip(self._held, self._slices, self._stepped, strict=True)
        ]
        if self._subject.training is not None and not manifest.optimizer:
            _log.warning("%s holds no optimiser state; the optimiser starts afresh.", os.fspath(path))
        with self._turn:
            self._workers.load(parts)
            self._weights_moved = True
            self._weights.take({name: s for name, s in model.items() if name in shapes})
            self._steps = manifest.step

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(t.shape) for name, t in self._subject.model.state_dict().items()}
