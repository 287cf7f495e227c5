"""What `torch.autocast` in a model casts, found by asking torch, as casts that a graph can hold.

torch.export records autocast as a graph of its own whose casts happen while it runs. Which arguments
of an operator are cast follows from lists inside torch that change with its versions. So each operator
is run on tensors without values, with autocast and without, and all that happens below autograd is
watched. Casts of arguments are accepted as the explanation only if the same operators of the same
element types follow from them without autocast.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from graphpar.frontend.torch_private import (
    DispatchMode,
    fake_tensors,
    flatten,
    op_name,
    unflatten,
    views_first_argument,
)
from graphpar.ir.ops import TensorType

_CAST = "aten._to_copy.default"
_MOVES = frozenset({"aten.clone.default", "aten._unsafe_view.default", "aten._reshape_copy.default"})
"""Operators that move numbers without a look at them; views do so, too."""


@dataclass(frozen=True)
class Casting:
    """The setting of an autocast that is switched on.

    Attributes:
        device: The type of device whose operators are cast.
        dtype: What they are cast to where precision allows it.
    """

    device: str
    dtype: torch.dtype

    def on(self) -> torch.autocast:
        """The setting itself, without its memory of weights that were cast before."""
        return torch.autocast(self.device, self.dtype, cache_enabled=False)


@dataclass(frozen=True)
class Casts:
    """What autocast does to one operator.

    Attributes:
        places: New element types by the place among the flat arguments.
        keywords: Arguments that it adds.
    """

    places: Mapping[int, torch.dtype]
    keywords: Mapping[str, torch.dtype] = field(default_factory=dict)


class NoSuchCasts(Exception):  # noqa: N818 - control flow between this file and its caller
    """Casts of its arguments do not explain what autocast does to an operator."""


_known: dict[Any, Casts] = {}


def casts_of(function: Any, args: Any, kwargs: Any, casting: Casting, device: torch.device) -> Casts:
    """What autocast does to an operator, given the types of its tensors.

    Args:
        function: The operator.
        args: Its arguments, with a `TensorType` of known sizes in the place of each tensor.
        kwargs: The same for keyword arguments.
        casting: The setting.
        device: Where the tensors are.

    Raises:
        NoSuchCasts: It cannot be said by casts of arguments.

    >>> from graphpar.frontend.torch_private import lookup_op
    >>> matrix = TensorType((2, 2), "float32")
    >>> setting, cpu = Casting("cpu", torch.bfloat16), torch.device("cpu")
    >>> casts_of(lookup_op("aten.mm.default"), (matrix, matrix), {}, setting, cpu).places
    {0: torch.bfloat16, 1: torch.bfloat16}
    >>> casts_of(lookup_op("aten.add.Tensor"), (matrix, matrix), {}, setting, cpu).places
    {}
    """
    leaves, spec = flatten((args, kwargs), is_leaf=lambda x: isinstance(x, TensorType))
    key = op_name(function), str(spec), tuple(map(_known_by, leaves)), casting, device
    if key not in _known:
        with fake_tensors(), torch.no_grad():
            given = [_empty(x, device) if isinstance(x, TensorType) else x for x in leaves]
            _known[key] = _found(function, given, spec, casting)
    return _known[key]


def _known_by(leaf: Any) -> Any:
    return (len(leaf.shape), leaf.dtype) if isinstance(leaf, TensorType) else repr(leaf)


def _empty(kind: TensorType, device: torch.device) -> torch.Tensor:
    return torch.empty(kind.sizes(1), dtype=getattr(torch, kind.dtype), device=device)


def _found(function: Any, leaves: Sequence[Any], spec: Any, casting: Casting) -> Casts:
    def watched(casts: Casts, *, on: bool = False) -> _Watch:
        changed = [
            x.to(casts.places[i]) if i in casts.places and isinstance(x, torch.Tensor) else x
            for i, x in enumerate(leaves)
        ]
        args, kwargs = unflatten(changed, spec)
        watch = _Watch({id(x): i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)})
        with casting.on() if on else nullcontext(), watch:
            function(*args, **kwargs, **casts.keywords)
        return watch

    nothing = Casts({})
    wanted = watched(nothing, on=True)
    try:
        plain = watched(nothing)
    except Exception:  # not with these types
        plain = _Watch({})
    if plain.happened == wanted.happened:
        return nothing
    for casts in _candidates(function, leaves, plain, wanted, casting):
        try:
            if watched(casts).computed == wanted.computed:
                return casts
        except Exception:
            continue
    raise NoSuchCasts(f"torch.autocast makes {', '.join(name for name, _ in wanted.computed)} of it")


def _candidates(
    function: Any, leaves: Sequence[Any], plain: "_Watch", wanted: "_Watch", casting: Casting
) -> Iterable[Casts]:
    """Guesses, the likeliest first: what was cast, all to one type, a type asked for by keyword."""
    yield Casts({i: d for i, d in sorted(wanted.casts.items()) if plain.casts.get(i) != d})
    floats = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.is_floating_point()]
    for dtype in (casting.dtype, torch.float32):
        yield Casts({i: dtype for i in floats if leaves[i].dtype != torch.float64})
    if any(a.name == "dtype" for a in function._schema.arguments):
        yield Casts({}, {"dtype": torch.float32})


class _Watch(DispatchMode):  # type: ignore[misc]
    """Notes the operators below autograd, the types of what they make, and casts of the arguments."""

    def __init__(self, places: Mapping[int, int]) -> None:
        super().__init__()
        self._places = places
        self.happened: list[tuple[str, tuple[torch.dtype, ...]]] = []
        self.casts: dict[int, torch.dtype] = {}
        self._moves = set(_MOVES)

    @property
    def computed(self) -> list[tuple[str, tuple[torch.dtype, ...]]]:
        """What happened but for casts, and for moves: it is all the same whether they come before."""
        return [entry for entry in self.happened if entry[0] != _CAST and entry[0] not in self._moves]

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        name = op_name(func) or str(func)
        tensors = [x for x in flatten(made)[0] if isinstance(x, torch.Tensor)]
        if views_first_argument(func):
            self._moves.add(name)
        if tensors:
            self.happened.append((name, tuple(x.dtype for x in tensors)))
        if name == _CAST and id(args[0]) in self._places:
            self.casts[self._places[id(args[0])]] = made.dtype
        return made
