"""Modules that a model converts while it runs, to what they are already.

Routers that compute in float32 whatever the rest does convert their own layers at each call. torch.export
cannot put other weights into a module, not even equal ones; where nothing changes, nothing has to be put.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn

from graphpar.frontend.torch_private import parsed_conversion

_TYPES = {
    "float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16,
}  # fmt: skip


@contextmanager
def conversions_left_out() -> Iterator[None]:
    """Within it, a conversion of a module that changes none of its tensors does nothing."""
    before = {name: getattr(nn.Module, name) for name in ("to", *_TYPES)}

    def to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        device, dtype, layout = parsed_conversion(*args, **kwargs)
        same = layout is None and _is(self, device, dtype)
        made: nn.Module = self if same else before["to"](self, *args, **kwargs)
        return made

    try:
        nn.Module.to = to  # type: ignore[method-assign, assignment]
        for name, dtype in _TYPES.items():
            setattr(nn.Module, name, _cast(before[name], dtype))
        yield
    finally:
        for name, method in before.items():
            setattr(nn.Module, name, method)


def _cast(
    original: Callable[[nn.Module], nn.Module], dtype: torch.dtype
) -> Callable[[nn.Module], nn.Module]:
    def cast(self: nn.Module) -> nn.Module:
        return self if _is(self, None, dtype) else original(self)

    return cast


def _is(module: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    """Whether all tensors of a module are there already, and the floating ones of the type."""
    return all(
        (device is None or tensor.device == device)
        and (dtype is None or tensor.dtype == dtype or not tensor.is_floating_point())
        for tensor in chain(module.parameters(), module.buffers())
    )
