"""The runtime checks itself: the first step's loss and gradients against one device."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphpar.errors import NumbersDifferError
from graphpar.frontend.capture import Captured
from graphpar.ir.graph import Graph
from graphpar.partition.types import Partition
from graphpar.runtime.assemble import Lowered
from graphpar.runtime.numbers import (
    FLOAT32_ROUNDING,
    compare_gradients,
    finite_share,
    relative_difference,
)
from graphpar.runtime.own_rounding import own_rounding
from graphpar.runtime.reference import EagerModel, OneDevice, draws_at_random, whole_on_one_device
from graphpar.training import Training

_log = logging.getLogger("graphpar.verify")
_TELLS_LITTLE = 0.05
"""Relative difference from which on a wrong gradient could pass for rounding."""
_HIDES = (
    ". Other last bits of the weights move one device's own numbers as much: an error of this size would "
    "not be noticed"
)


@dataclass(frozen=True)
class FirstStepCheck:
    """Runs a step on one device and compares.

    Attributes:
        model: The user's model; left as it is.
        captured: The captured model.
        graph: Its graph after the first passes.
        training: How it is trained.
        lower: Lowers the graph for a partition.
    """

    model: nn.Module
    captured: Captured
    graph: Graph
    training: Training
    lower: Callable[[Graph, Partition, Lowered | None], Lowered]

    def compare(
        self,
        loss: torch.Tensor,
        gradients: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        step: int = 0,
        is_exact: bool = True,
    ) -> None:
        """Compare a step from a state with the same step on one device.

        Args:
            loss: The job's.
            gradients: The job's, by name.
            state: The weights before the step.
            args: Positional arguments of the batch.
            kwargs: Keyword arguments of the batch.
            step: The step's number, which random numbers depend on.
            is_exact: Whether the job computes in float32; rounding to fewer bits is told, not refused.

        Raises:
            NumbersDifferError: Loss or gradients differ by more than rounding; says by how much.
        """
        reference = self._reference(state)
        (result,) = reference.forward(args, kwargs, step)
        result.backward()  # type: ignore[no-untyped-call]
        wanted = result.detach().cpu()
        loss_difference = relative_difference(loss, wanted)
        own = {name: g.cpu() for name, g in reference.gradients().items()}
        worst, difference = compare_gradients(gradients, own)
        text = (
            f"the loss is {float(loss):.6g} and {float(wanted):.6g} on one device (relative difference "
            f"{loss_difference:.2g}); the largest relative difference of a gradient is {difference:.2g}"
            + (f" ({worst})" if worst else "")
        )
        if loss_difference <= FLOAT32_ROUNDING and difference <= FLOAT32_ROUNDING:
            self._tell_agreement(text, finite_share([wanted, *own.values()]))
        elif self._is_rounding(loss, gradients, wanted, own, state, args, kwargs, step):
            far = max(loss_difference, difference) > _TELLS_LITTLE
            _log.log(
                logging.WARNING if far else logging.INFO,
                "The first step agrees with one device as far as its last bits tell: %s%s",
                text,
                _HIDES if far else "",
            )
        elif is_exact:
            raise NumbersDifferError(
                f"The first step differs from one device by more than rounding: {text}. The weights "
                "have not been changed. This is a bug of graphpar: report it with the plan; until then "
                "train on fewer devices, or with microbatches=1."
            )
        else:
            _log.warning("The first step was rounded to fewer bits: %s", text)

    def _tell_agreement(self, text: str, share: float) -> None:
        if share == 1:
            _log.info("The first step agrees with one device: %s", text)
        else:
            _log.warning(
                "The first step agrees with one device, but %.3g %% of its numbers are NaN or infinite "
                "there too, which tells nothing: %s",
                100 * (1 - share),
                text,
            )

    def _is_rounding(
        self,
        loss: torch.Tensor,
        gradients: Mapping[str, torch.Tensor],
        wanted: torch.Tensor,
        own: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        step: int,
    ) -> bool:
        """Whether the last bits of the weights move loss and gradients as much on one device."""
        in_loss, explained = own_rounding(lambda: self._reference(state), args, kwargs, wanted, own, step)
        _, rest = compare_gradients(gradients, own, explained)
        loss_rest = relative_difference(loss, wanted, explained=in_loss)
        return rest <= FLOAT32_ROUNDING and loss_rest <= FLOAT32_ROUNDING

    def _reference(self, state: Mapping[str, torch.Tensor]) -> EagerModel | OneDevice:
        if not draws_at_random(self.graph):
            eager = EagerModel(self.model, self.training)
            eager.model.load_state_dict(state, strict=False)
            return eager
        (whole,) = self.lower(self.graph, whole_on_one_device(self.graph), None).graphs
        device = OneDevice(self.model, self.captured, whole, self.graph, self.training.seed)
        with torch.no_grad():
            for name, tensor in device.tensors.items():
                if name in state:
                    tensor.copy_(state[name])
        return device
