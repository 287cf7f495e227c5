"""Capture: export twice at unlike batch sizes, convert, and unify into one graph for every batch size."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphpar.errors import CaptureError
from graphpar.frontend.conditions import Asked, Condition, conditions, noted
from graphpar.frontend.convert import Converted, Literal
from graphpar.frontend.fold import LEAST_BLOCKS, Exporter
from graphpar.frontend.frames import blame
from graphpar.frontend.objects import closed
from graphpar.frontend.refusals import refuse_object_inputs, refuse_unready
from graphpar.frontend.torch_private import TreeSpec, flatten, memory_of, unflatten
from graphpar.frontend.unify import Mismatch, unify
from graphpar.frontend.weightless import values_apart
from graphpar.ir.graph import Graph
from graphpar.ir.ops import Op, map_arguments


@dataclass(frozen=True)
class Signature:
    """How the user's arguments become flat inputs, and flat results the user's structure.

    Attributes:
        keywords: Keyword arguments in the order captured.
        spec: Structure of `(args, kwargs)`.
        inputs: For each flat argument the input's name, or the constant it was captured with.
        batched: Names of the inputs whose first dimension is the batch.
        results: For each flat result the op's name, or the constant it always is.
        output_spec: Structure of the result.
        overwritten: Names of the inputs that the model writes to.
    """

    keywords: tuple[str, ...]
    spec: TreeSpec
    inputs: tuple["str | Literal", ...]
    batched: frozenset[str]
    results: tuple["str | Literal", ...]
    output_spec: TreeSpec
    overwritten: frozenset[str] = frozenset()

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Flat inputs by name from a call's arguments.

        Raises:
            ValueError: The call does not have the structure or the constants of the example batch.
        """
        if set(kwargs) != set(self.keywords):
            raise ValueError(
                f"The model was captured with the keyword arguments {sorted(self.keywords)}, but was "
                f"called with {sorted(kwargs)}. Call it like the example batch, or compile again."
            )
        ordered = {key: kwargs[key] for key in self.keywords}
        leaves, spec = flatten((tuple(args), ordered))
        if spec != self.spec:
            raise ValueError(
                f"The model was captured with arguments of the structure {_outline(self.spec)}, but was "
                f"called with {_outline(spec)}. Call it like the example batch, or compile again."
            )
        bound = {}
        seen: dict[int, tuple[str, str]] = {}
        for path, expected, leaf in zip(leaf_paths(args, ordered), self.inputs, leaves, strict=True):
            if isinstance(expected, str):
                if not isinstance(leaf, torch.Tensor):
                    raise ValueError(
                        f"Argument {path} was a tensor in the example batch, now it is "
                        f"{_shown(leaf)}. Give a tensor, or compile again."
                    )
                _refuse_form(path, leaf)
                self._refuse_shared(path, expected, leaf, seen)
                bound[expected] = leaf
            elif not _same_constant(leaf, expected.value):
                raise ValueError(
                    f"Argument {path} was {expected.value!r} in the example batch and is part of the "
                    f"captured graph; now it is {_shown(leaf)}. Compile again for the other value, or "
                    "make it a tensor."
                )
        return bound

    def _refuse_shared(
        self, path: str, name: str, tensor: torch.Tensor, seen: dict[int, tuple[str, str]]
    ) -> None:
        """
        Raises:
            ValueError: Two arguments share memory, and the model writes to one of them.
        """
        if not self.overwritten:
            return
        other, its_name = seen.setdefault(memory_of(tensor), (path, name))
        if its_name != name and {name, its_name} & self.overwritten:
            first, second = (path, other) if name in self.overwritten else (other, path)
            raise ValueError(
                f"Argument {first} is overwritten by the model, and its memory is also that of {second}, "
                "which would change as well; a job works on copies. Give a clone of one of them."
            )

    def assemble(self, values: Mapping[str, Any]) -> Any:
        """The user's output structure from flat results by name."""
        leaves = [r.value if isinstance(r, Literal) else values[r] for r in self.results]
        return closed(unflatten(leaves, self.output_spec))


def _refuse_form(path: str, tensor: torch.Tensor) -> None:
    """
    Raises:
        ValueError: The tensor holds no values, or not in a form that can be sent.
    """
    if tensor.device.type == "meta":
        raise ValueError(f"Argument {path} is on the meta device and holds no values; give them.")
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise ValueError(
            f"Argument {path} is a {'quantized' if tensor.is_quantized else tensor.layout} tensor, which "
            "cannot be sent to workers; give tensor.to_dense() or tensor.dequantize()."
        )


def _shown(leaf: Any) -> str:
    if isinstance(leaf, torch.Tensor):
        return f"a tensor of shape {tuple(leaf.shape)}"
    if hasattr(leaf, "shape"):
        return f"a {type(leaf).__name__} of shape {tuple(leaf.shape)}"
    text = repr(leaf)
    return text if len(text) <= 80 else f"a {type(leaf).__name__}"


def _outline(spec: TreeSpec) -> str:
    """The structure of a call as one would write it, with a star for each value."""
    args, kwargs = unflatten([_Star()] * spec.num_leaves, spec)
    return ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in kwargs.items())])


class _Star:
    def __repr__(self) -> str:
        return "*"


def leaf_paths(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """How a user would write each flat argument.

    >>> leaf_paths((1, [2, 3]), {"scale": 4})
    ['args[0]', 'args[1] (part 0)', 'args[1] (part 1)', 'scale']
    """
    paths = []
    for name, value in (*((f"args[{i}]", a) for i, a in enumerate(args)), *kwargs.items()):
        count = len(flatten(value)[0])
        paths += [name] if count == 1 else [f"{name} (part {i})" for i in range(count)]
    return paths


def _same_constant(given: Any, captured: Any) -> bool:
    """Whether an argument that is no tensor is what it was; True is not 1, and NaN is NaN."""
    if type(given) is not type(captured):
        return False
    same: bool = given == captured or (given != given and captured != captured)
    return same


@dataclass(frozen=True)
class Captured:
    """A model as a graph, with what is needed to call it.

    `unsplittable` tells why the graph is for the example's number of samples only; empty otherwise.
    `mixes` tells why a batch must stay whole though the graph is for any; the batch pass finds that.
    `stamped` counts the calls of repeated blocks that were not followed one by one.
    `conditions` must come out as in the example for another number of samples.
    """

    graph: Graph
    signature: Signature
    constants: Mapping[str, torch.Tensor]
    unsplittable: str
    stamped: int = 0
    mixes: str = ""
    conditions: tuple[Condition, ...] = ()

    def unlike(self, samples: int) -> str:
        """Why the model has another graph for so many samples; empty where it has not.

        Where the graph is for the example's number of samples only, that is told apart.
        """
        return next((c.text for c in self.conditions if not c.holds(samples)), "")


def capture(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    loss: Callable[[Any, Any], Any] | str | None = None,
    training: bool | None = None,
    fold: int = LEAST_BLOCKS,
) -> Captured:
    """Capture a model as a graph in which sizes that scale with the batch are symbolic.

    Args:
        model: Any module, on any device, the meta device included.
        args: Positional arguments of the example batch.
        kwargs: Keyword arguments of the example batch.
        loss: None for the model's own result, "returned" for the loss in it, or a callable
            `loss(output, target)` with the target as last positional argument.
        training: Mode to capture in; None keeps each submodule's own.
        fold: Follow only the first of so many or more equal blocks, and stamp the others; 0 for none.

    Raises:
        CaptureError: Names the user's module, file and line, why, and what to try.
    """
    _check_call(args, kwargs)
    refuse_unready(model)
    refuse_object_inputs(args, kwargs)
    leaves, spec = flatten((tuple(args), dict(kwargs)))
    leaves = [plain(x) for x in leaves]
    for path, leaf in zip(leaf_paths(args, kwargs), leaves, strict=True):
        if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
            _refuse_form(path, leaf)
    batch = batch_size(leaves)
    exporter = Exporter(model, loss, training, fold)

    def run(size: int) -> tuple[Converted, TreeSpec, Asked]:
        with torch.inference_mode(False), noted(size) as asked, values_apart(model, loss):
            sized = [resize(x, batch, size) for x in leaves]
            some_args, some_kwargs = unflatten(sized, spec)
            return *exporter.run(some_args, some_kwargs), asked

    first, out_spec, asked = run(batch)
    if not any(isinstance(result, str) for result in first.results):
        raise CaptureError(
            f"The model, {blame(model, ())}, returns no tensor that it computes "
            f"({_told(first.results)}), so that there is nothing to run. Return the tensors wanted."
        )
    stamped = exporter.stamped
    ops, reason, held = _symbolic(first, out_spec, asked, run, batch)
    ops, aliases = merge_ties(model, ops)
    graph = Graph(ops, level="captured", name=type(model).__name__, batch=batch, aliases=aliases)
    signature = Signature(
        keywords=tuple(kwargs),
        spec=spec,
        inputs=first.inputs,
        batched=_batched(first, leaves, batch),
        results=first.results,
        output_spec=out_spec,
        overwritten=first.overwritten,
    )
    return Captured(graph, signature, first.constants, reason, stamped, conditions=held)


def _check_call(args: Any, kwargs: Any) -> None:
    """
    Raises:
        ValueError: Arguments that Python would take apart into other ones without a word.
    """
    if not isinstance(args, (tuple, list)):
        hint = "args=(x,)" if isinstance(args, torch.Tensor) else "args=(first, second)"
        if isinstance(args, Mapping):
            hint = "kwargs={...} for keyword arguments, or args=(x,) for one dict"
        raise ValueError(
            f"args= must be a tuple of the model's positional arguments, not a {type(args).__name__}; "
            f"give {hint}."
        )
    if not isinstance(kwargs, Mapping):
        raise ValueError(f"kwargs= must be a dict of keyword arguments, not a {type(kwargs).__name__}.")


def plain(leaf: Any) -> Any:
    """A tensor made in inference mode as one that may be written to; anything else as it is."""
    if not isinstance(leaf, torch.Tensor) or not leaf.is_inference():
        return leaf
    with torch.inference_mode(False):
        return leaf.clone()


def _told(results: Sequence["str | Literal"]) -> str:
    values = [r.value for r in results if isinstance(r, Literal)]
    return ", ".join(map(repr, values[:3])) or "an empty structure"


def batch_size(leaves: Sequence[Any]) -> int:
    """The size of the first dimension that most tensor arguments share; 1 if there is none.

    >>> batch_size([torch.zeros(4, 2), torch.zeros(4), torch.zeros(7, 1), 3])
    4
    """
    sizes = [x.shape[0] for x in leaves if isinstance(x, torch.Tensor) and x.ndim]
    if not sizes:
        return 1
    (most, _), *_ = Counter(sizes).most_common(1)
    if most == 0:
        raise CaptureError("The example batch is empty; give one with at least one sample.")
    return int(most)


def resize(leaf: Any, batch: int, size: int) -> Any:
    """The same argument for another number of samples: its samples repeated or cut."""
    if not isinstance(leaf, torch.Tensor) or not leaf.ndim or leaf.shape[0] != batch:
        return leaf
    if size == batch:
        return leaf
    if leaf.device.type == "meta":
        return leaf.new_empty((size, *leaf.shape[1:]))
    return leaf.detach()[torch.arange(size, device=leaf.device) % batch]


def _symbolic(
    first: Converted,
    out_spec: TreeSpec,
    asked: Asked,
    run: Callable[[int], tuple[Converted, TreeSpec, Asked]],
    batch: int,
) -> tuple[tuple[Op, ...], str, tuple[Condition, ...]]:
    """Ops for any batch size and under what conditions, or the concrete ones and the reason why not."""
    if batch == 1:
        return first.ops, "the example batch has one sample", ()
    other = unlike_size(batch)
    try:
        second, other_spec, also_asked = run(other)
        if other_spec != out_spec:
            raise Mismatch("the structure of the model's result changes with the batch size")
        _same_constants(first.constants, second.constants)
        ops = unify(first.ops, second.ops, batch, other)
        held = conditions(asked, also_asked, ops)
        if _literals(first) != _literals(second):
            held += (Condition(f"samples == {batch} (a result is a number)", True, lambda n: n == batch),)
        return ops, "", held
    except Mismatch as mismatch:
        return first.ops, mismatch.reason, ()
    except CaptureError as error:
        return first.ops, f"the model cannot be captured for a batch of {other}: {error}", ()


def _literals(made: Converted) -> list[Any]:
    return [result.value for result in made.results if isinstance(result, Literal)]


def _same_constants(first: Mapping[str, torch.Tensor], second: Mapping[str, torch.Tensor]) -> None:
    """
    Raises:
        Mismatch: A tensor that the model makes anew at each call changes with the batch size.
    """
    for label, tensor in first.items():
        other = second.get(label)
        if other is None or tensor.shape != other.shape or not _equal(tensor, other):
            raise Mismatch(f"the constant {label} that the model makes changes with the batch size")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.device.type == "meta" or b.device.type == "meta":
        return a.dtype == b.dtype
    return a.dtype == b.dtype and bool(torch.all((a == b) | ((a != a) & (b != b))))


def unlike_size(batch: int) -> int:
    """Another batch size that is neither a multiple nor a divisor of the first, and of the other parity.

    About double. A model that goes another way for an odd batch is thus seen to; it stays whole.

    >>> unlike_size(6), unlike_size(2), unlike_size(7)
    (13, 5, 16)
    """
    return 2 * batch + (2 if batch % 2 else 1)


def _batched(first: Converted, leaves: Sequence[Any], batch: int) -> frozenset[str]:
    return frozenset(
        name
        for name, leaf in zip(first.inputs, leaves, strict=True)
        if isinstance(name, str) and isinstance(leaf, torch.Tensor)
        if leaf.ndim and leaf.shape[0] == batch
    )


def merge_ties(model: nn.Module, ops: Sequence[Op]) -> tuple[tuple[Op, ...], dict[str, tuple[str, ...]]]:
    """One op for each tied weight, and its other names by the one kept."""
    groups: dict[int, list[str]] = {}
    for name, tensor in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        groups.setdefault(id(tensor), []).append(name)
    made = {str(op.args[0]): op.name for op in ops if op.target in ("parameter", "buffer")}
    aliases: dict[str, tuple[str, ...]] = {}
    change: dict[str, str] = {}
    for group in groups.values():
        present = [name for name in group if name in made]
        if present and len(group) > 1:
            kept = present[0]
            aliases[kept] = tuple(name for name in group if name != kept)
            change.update({made[name]: made[kept] for name in present[1:]})
    merged = tuple(map_arguments(op, change) for op in ops if op.name not in change)
    return merged, aliases
