"""What a call of a model computes, operator by operator and without an export.

Two calls that call the same operators with the same numbers on the same tensors have the same graph; that
is told in a fraction of the time that two exports take.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from graphpar.frontend.torch_private import DispatchMode, as_if_exported, flatten, memory_of


@dataclass(frozen=True)
class Recorded:
    """The operators that a call came to and its result, equal for calls that compute the same.

    While it is there no other tensor can take the memory of one that the call met, which is what tensors
    from outside are told by.
    """

    operators: tuple[Any, ...]
    held: tuple[torch.Tensor, ...] = field(compare=False, repr=False)


def record(call: Callable[[], Any], known: Iterable[torch.Tensor]) -> Recorded:
    """What a call comes to.

    Args:
        call: Calls a model, as it is called while it is exported.
        known: Tensors that are told by their place among these: what the call is given. Others that it
            did not make are told by their identity.
    """
    recorder = _Recorder(known)
    with as_if_exported(), recorder:
        result = call()
    return Recorded((*recorder.seen, recorder.told(result)), tuple(recorder.held))


class _Recorder(DispatchMode):  # type: ignore[misc]
    """Notes operators, arguments and what they make; tensors by what made their memory."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.seen: list[Any] = []
        self.held: list[torch.Tensor] = []
        self._origin: dict[int, Any] = {}
        for place, tensor in enumerate(known):
            self._own(tensor, ("given", place))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = self.told((args, kwargs or {}))
        made = func(*args, **(kwargs or {}))
        for place, leaf in enumerate(flatten(made)[0]):
            if isinstance(leaf, torch.Tensor):
                self._own(leaf, (len(self.seen), place))
        self.seen.append((str(func), given, self.told(made), torch.is_grad_enabled()))
        return made

    def told(self, tree: Any) -> Any:
        """The structure and the leaves of something, comparable to those of another call."""
        leaves, spec = flatten(tree)
        return str(spec), [self._leaf(leaf) for leaf in leaves]

    def _leaf(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return type(leaf), repr(leaf)
        origin = self._own(leaf, ("outside", memory_of(leaf)))
        form = leaf.dtype, tuple(leaf.shape), leaf.stride(), leaf.storage_offset(), leaf.device.type
        return origin, form, leaf.requires_grad

    def _own(self, tensor: torch.Tensor, origin: Any) -> Any:
        """Where a tensor's memory comes from: what is known of it already, or else this."""
        self.held.append(tensor)  # no other memory may take its place
        return self._origin.setdefault(memory_of(tensor), origin)
