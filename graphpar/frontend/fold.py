"""Capture a model of many equal blocks by following each distinct block once.

The model is exported with the first block of each kind as it is, while every other one is a single op
`graphpar.block` of the same inputs and results. So all the code around the blocks runs as ever, and
only what is inside of them is taken to be equal. Each kind is exported once on its own and stamped
wherever its op stands, under the names of that block's weights.

This is proven before it is used: with *all* blocks stamped the very same ops must come out as with the
first ones followed. What a block reads from, or leaves behind in, the world around it shows there, or
stops the export. The place of a block in its list (`layer_idx`) is replaced by an object that may be
handed on but not be computed with. Where anything is in the way, the whole model is followed.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from graphpar.errors import CaptureError
from graphpar.frontend.blocks import Block, find_blocks
from graphpar.frontend.convert import Converted, convert, renumbered
from graphpar.frontend.export import FOLLOWS_ALL, aliased_places, export
from graphpar.frontend.torch_private import TreeSpec, flatten, output_spec, unflatten
from graphpar.frontend.writes import BLOCK
from graphpar.ir.ops import SOURCES, Op, map_arguments

LEAST_BLOCKS = 8
"""Fewer equal blocks than this are followed one by one; it takes hardly longer."""

_log = logging.getLogger("graphpar.capture")
_library = torch.library.Library("graphpar", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("block(Tensor[] given, int call, bool trained) -> Tensor[]")  # type: ignore[no-untyped-call]


class NotFoldable(Exception):  # noqa: N818 - control flow inside this file
    """Why blocks cannot be stamped."""


@dataclass(frozen=True)
class _Made:
    """A tensor as far as an operator's choice of kernel may depend on it.

    Attention takes another kernel where a mask wants a gradient, with other strides of its result.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_Made":
        return cls(
            tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, tensor.requires_grad
        )

    def empty(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class _Given:
    """A result that is one of the arguments, by the place of its leaf."""

    place: int


@dataclass(frozen=True)
class _Key:
    """Calls of equal key do the same but for weights."""

    kind: int
    spec: str
    leaves: tuple[Any, ...]
    grad_enabled: bool


@dataclass(frozen=True)
class _Form:
    """What the first call of a key was given and gave."""

    block: Block
    spec: TreeSpec
    leaves: tuple[Any, ...]
    results: tuple[Any, ...]
    result_spec: TreeSpec


@dataclass
class _Calls:
    """The blocks' calls during exports of one model for one batch.

    `forms` fills while first calls are followed; `made` lists the calls that were not.
    """

    blocks: Sequence[Block]
    forms: dict[_Key, _Form] = field(default_factory=dict)
    made: list[tuple[Block, _Key]] = field(default_factory=list)
    _entered: int = 0

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Let every block tell of its calls; the modules are as before afterwards."""
        self.made.clear()
        _results_of.clear()
        with ExitStack() as stack:
            for block in self.blocks:
                stack.enter_context(_replaced(block.module, "forward", self._forward(block)))
            yield

    def _forward(self, block: Block) -> Callable[..., Any]:
        original = block.module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            tried = not torch.compiler.is_exporting() or FOLLOWS_ALL.get()
            if self._entered or tried:
                return original(*args, **kwargs)
            leaves, spec = flatten((args, kwargs))
            key = _Key(block.kind, str(spec), _leaves_key(leaves, block), torch.is_grad_enabled())
            if any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
                raise NotFoldable(f"{block.path} is called under torch.autocast")
            if block.is_trained and not key.grad_enabled:
                raise NotFoldable(f"{block.path} holds trained weights where gradients are switched off")
            if key not in self.forms:
                result = self._follow(original, args, kwargs)
                self.forms[key] = _form(block, spec, leaves, result)
                return result
            return self._stand_in(block, key, leaves)

        return forward

    def _follow(self, original: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._entered += 1
        try:
            return original(*args, **kwargs)
        finally:
            self._entered -= 1

    def _stand_in(self, block: Block, key: _Key, leaves: Sequence[Any]) -> Any:
        form = self.forms[key]
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        number = len(self.made)
        _results_of[number] = [r for r in form.results if isinstance(r, _Made)]
        self.made.append((block, key))
        made = iter(torch.ops.graphpar.block(tensors, number, block.is_trained))
        results = [
            next(made) if isinstance(r, _Made) else leaves[r.place] if isinstance(r, _Given) else r
            for r in form.results
        ]
        return unflatten(results, form.result_spec)


_results_of: dict[int, list[_Made]] = {}
"""What each numbered `graphpar.block` makes: an operator cannot be given shapes in other ways."""


def _block_results(given: list[torch.Tensor], call: int, trained: bool) -> list[torch.Tensor]:
    return [r.empty() for r in _results_of[call]]


torch.library.impl(_library, "block", "CompositeExplicitAutograd")(_block_results)
torch.library.register_fake("graphpar::block", _block_results, lib=_library)


def _leaves_key(leaves: Sequence[Any], block: Block) -> tuple[Any, ...]:
    described: list[Any] = []
    ids = [id(leaf) for leaf in leaves]
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            described.append((_Made.of(leaf), ids.index(ids[place])))
        elif leaf is None or isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
            described.append((type(leaf), leaf))
        else:
            raise NotFoldable(f"{block.path} is called with a {type(leaf).__name__}")
    return tuple(described)


def _form(block: Block, spec: TreeSpec, leaves: Sequence[Any], result: Any) -> _Form:
    places = {id(leaf): i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)}
    results, result_spec = flatten(result)
    made = [id(r) for r in results if isinstance(r, torch.Tensor) and id(r) not in places]
    if not made or len(set(made)) < len(made):
        raise NotFoldable(f"{block.path} returns no new tensor, or one twice")
    kept = tuple(
        _Given(places[id(r)]) if id(r) in places else kept
        for r, kept in zip(results, _kept(results), strict=True)
    )
    return _Form(block, spec, _kept(leaves), kept, result_spec)


def _kept(leaves: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(_Made.of(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)


@contextmanager
def _replaced(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """Another value for an attribute of one module for a while."""
    had, before = name in module.__dict__, module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if had:
            module.__dict__[name] = before
        else:
            del module.__dict__[name]


class _Position:
    """Stands for a block's place in its list; may be handed on, but not be looked at."""

    def _refuse(self, *_: Any) -> Any:
        raise NotFoldable("a block computes with its place in the list")

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = __bool__ = __int__ = __float__ = __index__ = __repr__ = __format__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __mod__ = __rmod__ = _refuse
    __truediv__ = __rtruediv__ = __floordiv__ = __rfloordiv__ = __pow__ = __rpow__ = _refuse
    __and__ = __rand__ = __neg__ = __divmod__ = __str__ = _refuse

    def __getattr__(self, name: str) -> Any:
        raise NotFoldable("a block computes with its place in the list")


class Exporter:
    """Exports one model at one batch size after another.

    That blocks may be stamped is proven once, at the first size; the sizes that follow rely on it, and
    on a comparison with the first one by their caller.

    Args:
        model: The model; left as it is.
        loss: See `graphpar.frontend.export.Traced`.
        training: Mode to export in; None keeps each submodule's own.
        fold: The least number of equal blocks worth folding, 0 for none.
        proven: Whether another exporter has proven that for this model.

    Attributes:
        stamped: Calls of blocks that were not followed, in the export before.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Any] | str | None,
        training: bool | None,
        fold: int,
        proven: bool = False,
    ) -> None:
        self.model, self.loss, self.training = model, loss, training
        self.stamped = 0
        self._blocks = find_blocks(model, fold) if fold else ()
        self._proven = proven

    def run(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Converted, TreeSpec]:
        """The model's ops for a batch, and the structure of its result.

        Raises:
            CaptureError: The model cannot be captured.
        """
        if self._blocks:
            try:
                made = self._folded(args, kwargs)
                self._proven = True
                return made
            except (NotFoldable, CaptureError) as error:
                if self._proven:
                    raise CaptureError(str(error)) from error
                _log.info("All blocks are followed one by one: %s", error)
                self._blocks = ()
        return self._whole(args, kwargs)

    def _whole(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Converted, TreeSpec]:
        program = export(self.model, args, kwargs, loss=self.loss, training=self.training)
        aliased = aliased_places((tuple(args), dict(kwargs)), self.model)
        try:
            converted = convert(program, self.model, aliased=aliased)
        except CaptureError as error:  # a shape that depends on values is found only here
            program = export(
                self.model, args, kwargs, loss=self.loss, training=self.training, decide=error
            )
            converted = convert(program, self.model, aliased=aliased)
        return renumbered(converted), output_spec(program)

    def _folded(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Converted, TreeSpec]:
        calls = _Calls(self._blocks)

        aliased = aliased_places((tuple(args), dict(kwargs)), self.model)

        def around() -> tuple[Converted, TreeSpec]:
            with calls.patched():
                program = export(
                    self.model, args, kwargs, loss=self.loss, training=self.training, decide=False
                )
            return convert(program, self.model, aliased=aliased), output_spec(program)

        first, out_spec = around()
        templates = _Templates(calls.forms, self.training)
        if not calls.made:
            raise NotFoldable("no two blocks are called alike")
        folded = stamped(first, calls.made, templates)
        count = _count(first)
        if not self._proven:
            again, _ = around()
            if _count(again) - count != len(calls.forms):
                raise NotFoldable("torch.export followed the model more than once")
            if not _alike(stamped(again, calls.made, templates), folded):
                raise NotFoldable("a stamped block is not what following it gives")
        self.stamped = count
        return folded, out_spec


def _alike(a: Any, b: Any) -> bool:
    """Whether two graphs are equal, constants that are tensors by their values.

    >>> _alike((1, torch.ones(2)), (1, torch.ones(2))), _alike([torch.ones(2)], [torch.zeros(2)])
    (True, False)
    """
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if dataclasses.is_dataclass(a):
        return all(_alike(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_alike, a, b))
    return bool(a == b)


def _count(converted: Converted) -> int:
    return sum(op.target == BLOCK for op in converted.ops)


@dataclass
class _Templates:
    """Each kind of call exported on its own, once, and converted for the inputs that carry gradients."""

    forms: Mapping[_Key, _Form]
    training: bool | None
    _programs: dict[_Key, Any] = field(default_factory=dict)
    _converted: dict[tuple[_Key, frozenset[int]], Converted] = field(default_factory=dict)

    def get(self, key: _Key, differentiable: frozenset[int]) -> Converted:
        """The ops of a call; `differentiable` are the places of leaves that carry gradients."""
        form = self.forms[key]
        if key not in self._programs:
            self._programs[key] = self._export(form)
        wanted = key, differentiable
        if wanted not in self._converted:
            program = self._programs[key]
            self._converted[wanted] = convert(
                program, form.block.module, differentiable, keeps_inputs=True
            )
        return self._converted[wanted]

    def _export(self, form: _Form) -> Any:
        leaves = [
            leaf.empty().requires_grad_(leaf.requires_grad) if isinstance(leaf, _Made) else leaf
            for leaf in form.leaves
        ]
        args, kwargs = unflatten(leaves, form.spec)
        module = form.block.module
        with ExitStack() as stack:
            for path, name in form.block.positions:
                stack.enter_context(_replaced(module.get_submodule(path), name, _Position()))
            return export(module, args, kwargs, training=self.training, decide=False)


def stamped(converted: Converted, made: Sequence[tuple[Block, _Key]], templates: _Templates) -> Converted:
    """The same ops with each `graphpar.block` replaced by the ops of its block."""
    return renumbered(_Stamping(converted, made, templates).run())


@dataclass
class _Stamping:
    converted: Converted
    made: Sequence[tuple[Block, _Key]]
    templates: _Templates
    ops: dict[str, Op] = field(default_factory=dict)
    change: dict[str, str] = field(default_factory=dict)
    results: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def run(self) -> Converted:
        held = {(op.target, op.args[0]): op.name for op in self.converted.ops if op.target in SOURCES}
        for op in self.converted.ops:
            if op.target == BLOCK:
                self.results[op.name] = self._stamp(map_arguments(op, self.change), held)
            elif op.target == "getitem" and op.operands()[0] in self.results:
                self._take(op)
            else:
                self.ops[op.name] = map_arguments(op, self.change)
        results = tuple(
            self.change.get(r, r) if isinstance(r, str) else r for r in self.converted.results
        )
        return replace(self.converted, ops=tuple(self.ops.values()), results=results)

    def _take(self, op: Op) -> None:
        place = op.args[1]
        assert isinstance(place, int)
        made = self.ops[self.results[op.operands()[0]][place]]
        if made.types != op.types or made.attr("grad") != op.attr("grad"):
            raise NotFoldable(f"a result of {op.module} is not what its block makes")
        self.change[op.name] = made.name

    def _stamp(self, op: Op, held: Mapping[tuple[str, Any], str]) -> tuple[str, ...]:
        number = op.args[1]
        assert isinstance(number, int)
        block, key = self.made[number]
        given = op.operands()
        form = self.templates.forms[key]
        tensors = [i for i, leaf in enumerate(form.leaves) if isinstance(leaf, _Made)]
        grads = frozenset(
            i for i, name in zip(tensors, given, strict=True) if self.ops[name].attr("grad")
        )
        template = self.templates.get(key, grads)
        names: dict[str, str] = {}
        for leaf, name in zip(tensors, given, strict=True):
            own = template.inputs[leaf]
            assert isinstance(own, str)
            names[own] = name
        for inner in template.ops:
            if inner.target in ("input", "output"):
                continue
            if inner.target in SOURCES:
                names[inner.name] = self._source(inner, block, held)
                continue
            made = map_arguments(inner, names)
            module = f"{block.path}.{made.module}" if made.module else block.path
            names[inner.name] = f"{inner.name}@{number}"
            self.ops[names[inner.name]] = replace(
                made, name=names[inner.name], module=module, source=made.source or op.source
            )
        return self._made(template, names, given, form)

    def _source(self, op: Op, block: Block, held: Mapping[tuple[str, Any], str]) -> str:
        label = f"{block.path}.{op.args[0]}"
        if (op.target, label) not in held:
            raise NotFoldable(f"{block.path} makes a constant of its own")
        return held[op.target, label]

    def _made(
        self, template: Converted, names: Mapping[str, str], given: Sequence[str], form: _Form
    ) -> tuple[str, ...]:
        made = tuple(
            names[name]
            for name, result in zip(template.results, form.results, strict=True)
            if isinstance(result, _Made) and isinstance(name, str)
        )
        if set(made) & set(given):
            raise NotFoldable(f"{form.block.path} returns one of its arguments")
        return made
