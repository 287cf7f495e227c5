"""Run torch.export on a model without changing it, and turn its failures into readable errors."""

import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from graphpar.errors import CaptureError
from graphpar.frontend.averages import averages_as_tensors
from graphpar.frontend.checkpoints import called_for_training, checkpoints_followed
from graphpar.frontend.conditions import lengths_counted, sizes_counted, uncounted
from graphpar.frontend.conversions import conversions_left_out
from graphpar.frontend.decisions import Replay, data_followed, record_decisions
from graphpar.frontend.explain import ON_VALUES, explain_failure
from graphpar.frontend.functions import functions_as_operators
from graphpar.frontend.host import (
    HostReads,
    host_randomness,
    host_state,
    host_watched,
    refuse_frozen,
)
from graphpar.frontend.objects import opened
from graphpar.frontend.packing import packed_as_padded
from graphpar.frontend.recorded import record
from graphpar.frontend.refusals import (
    no_functional_gradients,
    no_tensor_hooks,
    refuse_gradient_hooks,
    refuse_trained_loss,
    refuse_unready,
)
from graphpar.frontend.registered import Registered, read_copies
from graphpar.frontend.state import (
    Kept,
    attributes_left,
    left_as_it_was,
    moved_numbers,
    numbers_of,
    refuse_counters,
    refuse_kept,
)
from graphpar.frontend.torch_private import (
    as_if_not_exported,
    code_on_demand,
    flatten,
    gradient_modes_in_autocast,
    quiet_failures,
    short_stacks,
    unflatten,
    vmap_can_be_exported,
)
from graphpar.frontend.weightless import numbers_as_operators
from graphpar.tracing import TRACING

FOLLOWS_ALL: ContextVar[bool] = ContextVar("FOLLOWS_ALL", default=False)
"""Set while an export only serves a comparison: no block may stand for what is inside."""

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
        # Not a submodule even where it is a module: the job's weights are the model's, and what else a
        # loss holds (weights of classes, say) is a constant of the graph.
        self._loss = (loss,)
        self.replay = replay
        self.training = model.training
        self.moved: set[tuple[str, str]] = set()
        self.kept: set[tuple[str, str]] = set()
        self.reassigned: set[tuple[str, str]] = set()

    def modules_called(self) -> nn.Module:
        """The user's model, with the loss beside it where that is a module, too."""
        (loss,) = self._loss
        if not isinstance(loss, nn.Module):
            return self.model
        return nn.ModuleDict({"model": self.model, "loss": loss})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model as the user would, and note what it keeps of that in plain attributes."""
        called = self.modules_called()
        before, held, registered = numbers_of(called), Kept.by(called), Registered.by(called)
        read_copies(called, self.reassigned)
        (loss,) = self._loss
        with called_for_training(called) if loss is not None else nullcontext():
            result = self._called(args, kwargs)
        written, left = registered.write_reassigned()
        self.reassigned |= written
        self.kept |= left
        self.moved.update(moved_numbers(called, before))
        self.kept.update(Kept.by(called).changed_since(held))
        return result

    def _called(self, args: Any, kwargs: Any) -> Any:
        if self.replay is None:
            return self._plain_result(args, kwargs)
        with self.replay.running():
            result = self._plain_result(args, kwargs)
        return self.replay.checked(result)

    def _plain_result(self, args: Any, kwargs: Any) -> Any:
        with numbers_as_operators(), sizes_counted():
            leaves, spec = flatten(self._result(args, kwargs))
        return unflatten([uncounted(leaf) for leaf in leaves], spec)

    @data_followed()
    def _result(self, args: Any, kwargs: Any) -> Any:
        (loss,) = self._loss
        if callable(loss):
            return checked_loss(loss(self.model(*args[:-1], **kwargs), args[-1]))
        result = self.model(*args, **kwargs)
        if loss is None:
            return opened(result)
        return find_loss(result)


def checked_loss(loss: Any) -> torch.Tensor:
    """What the user's loss function returned.

    Raises:
        CaptureError: It is no scalar tensor.
    """
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        advice = "its mean, say" if isinstance(loss, torch.Tensor) else "without float() or item()"
        raise CaptureError(
            f"Training(loss=...) returned {_describe(loss)}. It must return a tensor of one number: "
            f"{advice}."
        )
    return loss


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


def aliased_places(tree: Any, model: nn.Module) -> frozenset[int]:
    """Places of the flat arguments that share storage with another one or with the model's tensors."""
    leaves, _ = flatten(tree)
    places = {i: _storage(leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    uses = Counter(places.values())
    own = {_storage(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return frozenset(i for i, key in places.items() if uses[key] > 1 or key in own)


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
        refuse_trained_loss(model, loss)
    reads = HostReads(model)
    try:
        return _export(model, args, kwargs, loss, training, decide, reads)
    except Exception:
        if not reads.draws.asked:
            raise
    reads.draws.undecided = False
    return _export(model, args, kwargs, loss, training, decide, reads)


def _export(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    loss: Callable[[Any, Any], Any] | str | None,
    training: bool | None,
    decide: bool | Exception,
    reads: HostReads,
) -> ExportedProgram:
    before = host_state(reads)
    with _mode(model, training), _without_weights(model) as on_meta, _watched(reads):
        args, kwargs = _moved(on_meta, (args, kwargs))

        def call() -> Any:
            return Traced(model, loss)(*_copied(args), **_copied(kwargs))

        try:
            if isinstance(decide, Exception):
                raise decide
            program = _exported(Traced(model, loss), args, kwargs, reads)
        except Exception as error:
            if isinstance(error, CaptureError) and error is not decide:
                raise
            again = _decided(model, loss, args, kwargs, error, reads) if decide else None
            if again is None:
                if isinstance(error, CaptureError):
                    raise
                eager = None if on_meta else _eager_failure(model, call)
                raise CaptureError(explain_failure(model, error, eager)) from error
            program = again
        if host_state(reads) != before:
            raise host_randomness(reads, call)
    return program


def _copied(tree: Any) -> Any:
    """Arguments of which a model may change whatever it likes."""
    leaves, spec = flatten(tree)
    return unflatten([x.detach().clone() if isinstance(x, torch.Tensor) else x for x in leaves], spec)


def _eager_failure(model: nn.Module, call: Callable[[], Any]) -> Exception | None:
    """What the model raises when it is simply called."""
    try:
        with left_as_it_was(model), torch.enable_grad():
            call()
    except Exception as error:
        return error
    return None


def _exported(
    traced: Traced, args: Sequence[Any], kwargs: Mapping[str, Any], reads: HostReads
) -> ExportedProgram:
    model = traced.modules_called()

    def program() -> ExportedProgram:
        with TRACING, attributes_left(model):
            return torch.export.export(traced, tuple(args), dict(kwargs), strict=False)

    def call() -> Any:
        return traced(*_copied(args), **_copied(kwargs))

    def whole() -> str:
        with _following_all():
            return str(program().graph)

    def ops() -> Any:
        given = _copied((args, kwargs))
        known = [*model.parameters(), *model.buffers(), *_tensors(given)]
        with _following_all(), attributes_left(model):
            return record(lambda: traced(*given[0], **given[1]), known)

    made = program()
    if traced.reassigned:
        made = program()  # with the buffers to copy known from the start
    kept = set(traced.kept)
    refuse_counters(model, traced.moved, call, lambda: str(program().graph))
    refuse_kept(model, kept, call, whole, ops)
    refuse_frozen(reads, _described(made), lambda: _described(program()))
    return made


@contextmanager
def _following_all() -> Iterator[None]:
    """Within it no block stands for another."""
    following = FOLLOWS_ALL.set(True)
    try:
        yield
    finally:
        FOLLOWS_ALL.reset(following)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in flatten(tree)[0] if isinstance(leaf, torch.Tensor)]


def _described(program: ExportedProgram) -> str:
    """All that tells one graph from another: its ops, and the values of its constants."""
    constants = [f"{k}: {v.tolist()}" for k, v in program.constants.items() if _has_values(v)]
    return "\n".join([str(program.graph), *constants])


def _has_values(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "meta"


def _decided(
    model: nn.Module,
    loss: Callable[[Any, Any], Any] | str | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    error: Exception,
    reads: HostReads,
) -> ExportedProgram | None:
    """The export as the example batch goes in eager torch; None where that is not the remedy.

    Branches on values are taken as in the example batch. Where the failure has nothing to do with values,
    the model may go another way while it is exported than it does otherwise (transformers' masks do).
    """
    on_values = re.search(ON_VALUES, f"{type(error).__name__}: {error}", re.IGNORECASE)
    decisions = record_decisions(model, lambda: Traced(model, loss)(*_copied(args), **_copied(kwargs)))
    if on_values and not decisions:
        return None
    replay = Replay(decisions)
    try:
        if on_values:
            program = _exported(Traced(model, loss, replay), args, kwargs, reads)
        else:
            with as_if_not_exported():
                program = _exported(Traced(model, loss, replay), args, kwargs, reads)
    except CaptureError:
        raise
    except Exception:
        return None
    if replay.checks:
        places = ", ".join(sorted({place for place, _ in decisions}))
        _log.warning("Branches on values are taken as in the example batch, and checked: %s", places)
    return program


@contextmanager
def _watched(reads: HostReads) -> Iterator[None]:
    """What torch.export needs help with, and what it would drop or freeze."""
    with (
        code_on_demand(),
        short_stacks(),
        functions_as_operators(),
        checkpoints_followed(),
        no_tensor_hooks(reads.model),
        no_functional_gradients(reads.model),
        averages_as_tensors(),
        conversions_left_out(),
        packed_as_padded(reads.modules),
        lengths_counted(reads.modules),
        vmap_can_be_exported(),
        gradient_modes_in_autocast(),
        host_watched(reads),
        quiet_failures(),
        warnings.catch_warnings(),
        _recording(),
    ):
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _recording() -> Iterator[None]:
    """Gradients on and autocast off, whatever holds around the call of graphpar.

    A graph holds what the model switches itself; a setting that holds around it would get lost.
    """
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    if kinds:
        _log.warning(
            "torch.autocast around graphpar is ignored; give precision=, or switch it on inside the model"
        )
    with ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
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
