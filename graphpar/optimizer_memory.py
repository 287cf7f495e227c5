"""What an optimiser's update takes beside what stays, found out by watching one."""

import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from graphpar.cluster import Cluster
from graphpar.frontend.torch_private import DispatchMode, flatten, steps_together
from graphpar.optimizer_probe import OptimizerFactory, optimizer_state
from graphpar.training import Training

_NUMBERS = (2, 4, 8, 16)
"""Of parameters. Several, since a function may put the first few into a group of their own, and groups
are updated in turn: wherever it cuts, some doubling adds to one group alone."""

_SIZE = 64
"""Parameters are square, for some optimisers take matrices only, and as large as the one that tells
the state."""


@dataclass(frozen=True)
class UpdateMemory:
    """What an update takes for a while.

    Attributes:
        share: Bytes per byte of all gradients, where parameters are updated together.
        copies: Bytes per byte of the largest parameter, where they are updated one by one.
    """

    share: float = 0.0
    copies: float = 0.0


Tried = tuple[float, UpdateMemory, UpdateMemory]
"""Bytes of state per byte of parameters, and what the update takes on a GPU and on a processor."""


def update_memory(factory: OptimizerFactory, *, on_gpu: bool) -> UpdateMemory:
    """What a step takes for a while on a GPU or a processor.

    On GPUs most of torch's optimisers update all parameters together unless told otherwise (`foreach`),
    so that what they work out for one parameter is there for all of them at once; on processors they do
    if told so. A step is watched on few parameters and on more: the most that a further one adds is the
    share, and what is there without any the copies. An optimiser that cannot be watched counts as Adam.

    >>> update_memory(lambda p: torch.optim.AdamW(p), on_gpu=True)
    UpdateMemory(share=1.0, copies=0.0)
    >>> update_memory(lambda p: torch.optim.AdamW(p), on_gpu=False)
    UpdateMemory(share=0.0, copies=2.0)
    """
    for as_there in (_together, _as_it_is) if on_gpu else (_as_it_is,):
        with torch.device("cpu"), torch.random.fork_rng(devices=[]), suppress(Exception):
            peaks = [(number, _peak_bytes(factory, number, as_there)) for number in _NUMBERS]
            added = max((many - few) / (n - m) for (m, few), (n, many) in pairwise(peaks))
            fixed = max(0.0, _peak_bytes(factory, 1, as_there) - added)
            return UpdateMemory(*(round(size / (4 * _SIZE**2), 2) for size in (added, fixed)))
    return UpdateMemory(share=1.0) if on_gpu else UpdateMemory(copies=2.0)


def tried_optimizer(train: Training | None, cluster: Cluster) -> Tried:
    """What an optimiser takes, found by trying it."""
    if train is None:
        return 0.0, UpdateMemory(), UpdateMemory()
    # The user's optimiser is not tried for devices that are not there.
    on_gpu, on_cpu = (
        update_memory(train.optimizer, on_gpu=gpu)
        if any(device.is_cpu != gpu for device in cluster.devices)
        else UpdateMemory()
        for gpu in (True, False)
    )
    return optimizer_state(train), on_gpu, on_cpu


def _peak_bytes(
    factory: OptimizerFactory, number: int, as_on_gpu: Callable[[torch.optim.Optimizer], None]
) -> int:
    """The most bytes in use at once of those that a step allocates, after one that has made the state."""
    weights = (torch.ones(_SIZE, _SIZE, dtype=torch.float32) for _ in range(number))
    parameters = [nn.Parameter(weight) for weight in weights]
    optimizer = factory(parameters)
    as_on_gpu(optimizer)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with _Allocations() as seen:
        optimizer.step()
    return int(seen.most_bytes)


def _together(optimizer: torch.optim.Optimizer) -> None:
    """Have it step here as it would on a GPU, where the choice is left to torch."""
    if steps_together(optimizer):
        for group in optimizer.param_groups:
            if group.get("foreach") is None and not group.get("fused"):
                group["foreach"] = True


def _as_it_is(optimizer: torch.optim.Optimizer) -> None:
    """For those that refuse: a learning rate that is a tensor keeps torch from it on GPUs, too."""


class _Allocations(DispatchMode):  # type: ignore[misc]
    """Within it, counts the bytes of tensors that are made and not yet given back."""

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes = 0
        self._bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            self._note(tensor, num_bytes=0)  # not made here: it was there before
        made = function(*args, **(kwargs or {}))
        for tensor in _tensors(made):
            self._note(tensor, tensor.untyped_storage().nbytes())
        self.most_bytes = max(self.most_bytes, self._bytes)
        return made

    def _note(self, tensor: torch.Tensor, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        if id(storage) not in self._known:
            self._known.add(id(storage))
            self._bytes += num_bytes
            weakref.finalize(storage, self._given_back, id(storage), num_bytes)

    def _given_back(self, storage: int, num_bytes: int) -> None:
        self._known.discard(storage)
        self._bytes -= num_bytes


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, torch.Tensor)]
