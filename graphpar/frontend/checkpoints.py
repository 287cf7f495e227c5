"""What `torch.utils.checkpoint` does to buffers: eager torch runs a part again for its backward.

A graph runs the part once; stages choose themselves what to compute again. But eager torch updates the
statistics of a batch normalisation in the part once more then, with the same batch. Both updates are
made at once, which is the same where nothing comes between them; anything else is told.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import nn
from torch.overrides import TorchFunctionMode

from graphpar.frontend.torch_private import checkpoints_within, memory_of, writes_to

_log = logging.getLogger("graphpar.capture")
_NORMS = {F.batch_norm: "training", F.instance_norm: "use_input_stats"}
"""Functions that keep a running mean and variance, and the argument that says whether they update it."""
_RUNNING = ("running_mean", "running_var")


@dataclass
class _Call:
    """One forward of a model that is trained, and the memory that its checkpointed parts update."""

    model: nn.Module
    updated: set[int] = field(default_factory=set)


_CALL: ContextVar[_Call | None] = ContextVar("CALL", default=None)


@contextmanager
def called_for_training(model: nn.Module) -> Iterator[None]:
    """Within it a model is called whose backward follows."""
    before = _CALL.set(_Call(model))
    try:
        yield
    finally:
        _CALL.reset(before)


class _Twice(TorchFunctionMode):
    """Updates running statistics and counts of batches as if each update were made twice."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _NORMS:
            return self._normalized(func, args, kwargs)
        if func is torch.Tensor.add_ and len(args) == 2 and type(args[1]) is int and not args[0].ndim:
            self.done.append(memory_of(args[0]))
            return func(args[0], 2 * args[1], **kwargs)
        return func(*args, **kwargs)

    def _normalized(self, func: Any, args: Any, kwargs: Any) -> Any:
        given = signature(func).bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        if values[_NORMS[func]] and isinstance(values["momentum"], float):
            self.done += [memory_of(values[n]) for n in _RUNNING if values[n] is not None]
            values["momentum"] = 1 - (1 - values["momentum"]) ** 2
        return func(*given.args, **given.kwargs)


@contextmanager
def run_again_later() -> Iterator[None]:
    """Around a part that eager torch runs again."""
    call = _CALL.get()
    if call is None or not torch.is_grad_enabled():
        yield
        return
    before = _versions(call.model)
    with _Twice() as twice:
        yield
    exact = {place for place in twice.done if twice.done.count(place) == 1 and place not in call.updated}
    call.updated.update(twice.done)
    now = _versions(call.model)
    places = {n: place for n, (place, version) in now.items() if before.get(n) != (place, version)}
    places |= {n: place for n, (place, _) in now.items() if place in twice.done}
    if changed := [name for name, place in places.items() if place not in exact]:
        _log.warning(
            "torch.utils.checkpoint changes the buffers %s again in the backward of eager torch, in an "
            "order that a graph does not follow: they will differ from eager torch's. Change them "
            "outside, or leave torch.utils.checkpoint out: plans choose what to compute again.",
            ", ".join(changed[:3]),
        )


def _versions(model: nn.Module) -> dict[str, tuple[int, int]]:
    return {name: (memory_of(b), writes_to(b)) for name, b in model.named_buffers()}


@contextmanager
def checkpoints_followed() -> Iterator[None]:
    """Within it, checkpointed parts update buffers as eager torch does by the end of its backward."""
    with checkpoints_within(run_again_later):
        yield
