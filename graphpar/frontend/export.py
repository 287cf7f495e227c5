"""Run torch.export on a model without changing it, and turn its failures into readable errors."""

import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from graphpar.errors import CaptureError
from graphpar.frontend.averages import averages_as_tensors
from graphpar.frontend.decisions import Replay, record_decisions
from graphpar.frontend.functions import functions_as_operators
from graphpar.frontend.objects import opened
from graphpar.frontend.refusals import (
    host_randomness,
    host_state,
    moved_numbers,
    no_tensor_hooks,
    numbers_of,
    refuse_counters,
    refuse_gradient_hooks,
    refuse_unready,
)
from graphpar.frontend.torch_private import (
    as_if_not_exported,
    code_on_demand,
    flatten,
    unflatten,
    vmap_can_be_exported,
)
from graphpar.tracing import TRACING

MODEL_PREFIX = "model."
"""Where the user's model sits inside `Traced`; stripped from every name."""


class Traced(nn.Module):
    """The module that is exported: the user's model, and for training the loss on top of it.

    With `loss="returned"` the result is the model's own loss (a scalar, or `.loss`, or the entry
    `loss`); with a callable it is `loss(model(*args[:-1], **kwargs), args[-1])`; with None it is what
    the model returns. `replay` answers the model's questions for values, if it has any.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Any] | str | None,
        replay: Replay | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.replay = replay
        self.training = model.training
        self.moved: set[tuple[str, str]] = set()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model as the user would, and note which of its numbers change by that."""
        before = numbers_of(self.model)
        result = self._called(args, kwargs)
        self.moved.update(moved_numbers(self.model, before))
        return result

    def _called(self, args: Any, kwargs: Any) -> Any:
        if self.replay is None:
            return self._result(args, kwargs)
        with self.replay.running():
            result = self._result(args, kwargs)
        return self.replay.checked(result)

    def _result(self, args: Any, kwargs: Any) -> Any:
        if callable(self.loss):
            return self.loss(self.model(*args[:-1], **kwargs), args[-1])
        result = self.model(*args, **kwargs)
        if self.loss is None:
            return opened(result)
        return find_loss(result)


def find_loss(result: Any) -> torch.Tensor:
    """The loss in what a model returned.

    Raises:
        CaptureError: There is none: not a scalar tensor, no `.loss`, no entry `loss`.
    """
    loss = result
    if isinstance(result, Mapping):
        loss = result.get("loss")
    elif hasattr(result, "loss"):
        loss = result.loss
    elif isinstance(result, (tuple, list)) and result:
        loss = result[0]
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        raise CaptureError(
            f"Training needs a loss, but the model returned {_describe(result)}. "
            "Return a scalar loss (or an object with `.loss`), pass the labels that make the model "
            "compute one, or give Training(loss=lambda output, target: ...)."
        )
    return loss


def _describe(result: Any) -> str:
    if isinstance(result, torch.Tensor):
        return f"a tensor of shape {tuple(result.shape)}"
    if isinstance(result, Mapping):
        return f"{type(result).__name__} with keys {sorted(map(str, result))}"
    return type(result).__name__


def without_aliases(tree: Any, model: nn.Module | None = None) -> Any:
    """The same arguments with every tensor that shares storage with an earlier one cloned.

    torch.export merges two inputs that are one tensor and leaves no guard, so that a later call with
    two different tensors would silently use the first for both. The same goes for an input that is
    one of the model's own tensors.
    """
    leaves, spec = flatten(tree)
    own = (*model.parameters(), *model.buffers()) if model is not None else ()
    seen = {_storage(tensor) for tensor in own}
    fresh = []
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            key = _storage(leaf)
            leaf = leaf.detach().clone() if key in seen else leaf
            seen.add(key)
        fresh.append(leaf)
    return unflatten(fresh, spec)


def _storage(tensor: torch.Tensor) -> int:
    return id(tensor) if tensor.device.type == "meta" else tensor.untyped_storage().data_ptr()


def export(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    loss: Callable[[Any, Any], Any] | str | None = None,
    training: bool | None = None,
    decide: bool | Exception = True,
) -> ExportedProgram:
    """Export the model in its own mode, or in the one given by `training`.

    Args:
        model: Any module; its mode and hooks are left as they were.
        args: Positional example arguments.
        kwargs: Keyword example arguments.
        loss: See `Traced`.
        training: Mode to export in; None keeps each submodule's own.
        decide: Whether branches on values may be taken as in the example batch, and checked then. An
            error says that the export without has failed already, and how.

    Raises:
        CaptureError: Names the user's module, file and line, and what to try.
    """
    refuse_unready(model)
    args, kwargs = without_aliases((tuple(args), dict(kwargs)), model)
    if loss is not None:
        refuse_gradient_hooks(model)
    before = host_state()
    with (
        _mode(model, training),
        _without_weights(model) as on_meta,
        _watched(),
        warnings.catch_warnings(),
    ):
        args, kwargs = _moved(on_meta, (args, kwargs))
        warnings.simplefilter("ignore")
        try:
            if isinstance(decide, Exception):
                raise decide
            program = _exported(Traced(model, loss), args, kwargs)
        except Exception as error:
            if isinstance(error, CaptureError) and error is not decide:
                raise
            again = _decided(model, loss, args, kwargs, error) if decide else None
            if again is None:
                if isinstance(error, CaptureError):
                    raise
                raise CaptureError(explain_failure(model, error)) from error
            program = again
        if host_state() != before:
            raise host_randomness(model, lambda: Traced(model, loss)(*args, **kwargs))
    return program


def _exported(traced: Traced, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ExportedProgram:
    def program() -> ExportedProgram:
        with TRACING:
            return torch.export.export(traced, tuple(args), dict(kwargs), strict=False)

    made = program()
    refuse_counters(
        traced.model, traced.moved, lambda: traced(*args, **kwargs), lambda: str(program().graph)
    )
    return made


def _decided(
    model: nn.Module,
    loss: Callable[[Any, Any], Any] | str | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    error: Exception,
) -> ExportedProgram | None:
    """The export as the example batch goes in eager torch; None where that is not the remedy.

    Branches on values are taken as in the example batch. Where the failure has nothing to do with values,
    the model may go another way while it is exported than it does otherwise (transformers' masks do).
    """
    on_values = re.search(_ON_VALUES, f"{type(error).__name__}: {error}", re.IGNORECASE)
    decisions = record_decisions(model, lambda: Traced(model, loss)(*args, **kwargs))
    if on_values and not decisions:
        return None
    replay = Replay(decisions)
    try:
        if on_values:
            program = _exported(Traced(model, loss, replay), args, kwargs)
        else:
            with as_if_not_exported():
                program = _exported(Traced(model, loss, replay), args, kwargs)
    except CaptureError:
        raise
    except Exception:
        return None
    if replay.checks:
        places = ", ".join(sorted({place for place, _ in decisions}))
        _log.warning("Branches on values are taken as in the example batch, and checked: %s", places)
    return program


@contextmanager
def _watched() -> Iterator[None]:
    """What torch.export needs help with, and what it would drop."""
    with (
        code_on_demand(),
        functions_as_operators(),
        no_tensor_hooks(),
        averages_as_tensors(),
        vmap_can_be_exported(),
    ):
        yield


@contextmanager
def _mode(model: nn.Module, training: bool | None) -> Any:
    before = {m: m.training for m in model.modules()}
    if training is not None:
        model.train(training)
    try:
        yield
    finally:
        for module, flag in before.items():
            module.training = flag


_log = logging.getLogger("graphpar.capture")
_ON_VALUES = (
    r"data.dependent|depends on the data|GuardOnDataDependent|unbacked|Could not extract specialized"
    r"|item\(\)|_local_scalar"
)


@contextmanager
def _without_weights(model: nn.Module) -> Any:
    """Where some of the model is on the meta device, all of it for a while; tells whether it is so.

    torch refuses to compute with tensors of which some have values and some have none.
    """
    tensors = [*model.parameters(), *model.buffers()]
    if not any(t.device.type == "meta" for t in tensors):
        yield False
        return
    twins: dict[int, torch.Tensor] = {}
    with ExitStack() as stack:
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                own: dict[str, Any] = held  # parameters or buffers
                stack.callback(own.update, dict(own))
                for name, tensor in own.items():
                    if tensor is not None and tensor.device.type != "meta":
                        own[name] = twins.setdefault(id(tensor), _on_meta(tensor))
        yield True


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    empty = tensor.detach().to("meta")
    is_parameter = isinstance(tensor, nn.Parameter)
    return nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty


def _moved(on_meta: bool, tree: Any) -> Any:
    leaves, spec = flatten(tree)
    if on_meta:
        leaves = [x.detach().to("meta") if isinstance(x, torch.Tensor) else x for x in leaves]
    return unflatten(leaves, spec)


_ADVICE = (
    (r"vmap|batching rule|batching operators",
     "it is called inside torch.vmap and has no batched form there",
     "write the batch as a dimension of the tensors instead of using torch.vmap"),
    (_ON_VALUES,
     "the control flow or a shape depends on the values in a tensor, which no static graph can hold",
     "compute both branches and choose with torch.where, or use a fixed size with a mask"),
    (r"Unsupported.*(?:input|type)|Unsupported input",
     "an argument has a type that torch.export does not know",
     "pass tensors, numbers, strings, or nested tuples, lists and dicts of them"),
    (r"device meta|Cannot copy out of meta|DeviceMismatch|on the same device|different devices",
     "part of the model or of its inputs lives on another device than the rest",
     "build model and example inputs on the same device"),
    (r"missing \d+ required|unexpected keyword|takes \d+ positional",
     "the example arguments do not match the model's forward signature",
     "pass the example batch as args=(...) and kwargs={...} exactly as you would call the model"),
    (r"shapes? cannot be multiplied|same reduction dim|size mismatch|must match the size|Expected.*dim",
     "the example batch does not fit the model",
     "run model(*args, **kwargs) once on its own; it should fail at the same line"),
)  # fmt: skip


def explain_failure(model: nn.Module, error: BaseException) -> str:
    """What failed, in which of the user's modules, at which line, why, and what to try."""
    text = f"{type(error).__name__}: {error}"
    where = _blame(model, error)
    first_line = next((line for line in str(error).splitlines() if line.strip()), "")
    why, remedy = "torch.export cannot follow it", "see the message of torch.export below"
    for pattern, reason, advice in _ADVICE:
        if re.search(pattern, text, re.IGNORECASE | re.DOTALL):
            why, remedy = reason, advice
            break
    return (
        f"The model could not be captured at {where}: {why}. What to try: {remedy}. "
        f"(torch: {type(error).__name__}: {first_line[:300]})"
    )


def _blame(model: nn.Module, error: BaseException) -> str:
    """The deepest of the user's modules on the traceback, and the line it was at."""
    names = {id(module): name for name, module in model.named_modules()}
    place = f"module {type(model).__name__}"
    torch_root = torch.__path__[0]
    for frame, line in traceback.walk_tb(error.__traceback__):
        filename = frame.f_code.co_filename
        if filename.startswith(torch_root) or filename == __file__:
            continue
        module = frame.f_locals.get("self")
        if isinstance(module, nn.Module) and id(module) in names:
            path = names[id(module)] or "(top)"
            place = f"module {path!r} ({type(module).__name__}), {filename}:{line}"
    return place
