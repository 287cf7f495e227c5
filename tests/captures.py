"""One capture of a model for all parameters of a test: capturing is most of what a small job costs."""

import io
import os
from collections.abc import Mapping, Sequence
from typing import Any

import cloudpickle
import torch
from torch import nn

from graphpar.preparation import Prepared, prepare
from graphpar.training import Training

_shared: dict[bytes, tuple[Prepared, bytes]] = {}
_shared_by = [""]


def prepared_once(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], train: Training | None
) -> Prepared:
    """What `prepare` makes, or what it made for the same test, with other parameters, of an equal model.

    Models and batches are equal that agree in every byte, their attributes and the code of local classes
    included. Tests of different names never share, for one may have changed what captures.
    """
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" (")[0].partition("[")[0]
    if test != _shared_by[0]:
        _shared.clear()
        _shared_by[0] = test
    try:
        key = _content((model, tuple(args), dict(kwargs), train is None, train and train.loss, _modes()))
    except Exception:  # what cannot be written down is captured anew
        return prepare(model, args, kwargs, train)
    if key in _shared:
        prepared, constants = _shared[key]
        if _content(prepared.captured.constants) == constants:
            return prepared
    prepared = prepare(model, args, kwargs, train)
    _shared[key] = prepared, _content(prepared.captured.constants)
    return prepared


def _modes() -> tuple[Any, ...]:
    """What torch lets a test set for all that it captures."""
    autocast = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return torch.is_grad_enabled(), torch.get_default_dtype(), *autocast


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Writes tensors by what they hold; torch writes addresses, which tell equal tensors apart."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return super().reducer_override(obj)
        held = (
            b""
            if obj.is_meta
            else obj.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
        form = (type(obj), obj.dtype, tuple(obj.shape), obj.stride(), obj.requires_grad, str(obj.device))
        return tuple, ((form, held),)


def _content(value: Any) -> bytes:
    written = io.BytesIO()
    _Pickler(written).dump(value)
    return written.getvalue()
