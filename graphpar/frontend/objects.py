"""Results that hold tensors in plain Python objects, such as the caches of transformers.

torch.export passes tuples, dicts and classes registered with it, and nothing else. While a model is
traced, other objects of its result are taken apart: attributes that hold tensors become part of the
structure, the rest is kept as it was. What a job returns is put together again, new objects of the same
classes.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from graphpar.frontend.torch_private import flatten, register_node, unflatten

_PLAIN = (torch.Tensor, str, bytes, int, float, complex, bool, type(None), type)
_LEAVES = (torch.Tensor, str, int, float, type(None))
"""What torch.export lets a model return, in the structures that it knows."""
_DEEPEST = 20


class Opened:
    """An object taken apart; a node of the structures that torch knows.

    Attributes:
        made: Its class.
        held: The attributes that hold tensors, taken apart themselves.
        rest: All of them in their order, None in the place of those.
    """

    def __init__(self, made: type, held: dict[str, Any], rest: dict[str, Any]) -> None:
        self.made, self.held, self.rest = made, held, rest


register_node(
    Opened,
    lambda o: (list(o.held.values()), (o.made, tuple(o.held), _Rest(o.rest))),
    lambda values, about: Opened(about[0], dict(zip(about[1], values, strict=True)), about[2].values),
)


class Fixed:
    """A result that is neither a tensor nor a plain value, such as a member of an enumeration."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values


register_node(Fixed, lambda fixed: ([], _Rest(fixed.values)), lambda _, rest: Fixed(rest.values))


class _Rest:
    """Attributes that are no part of the graph; equal where torch has to tell structures apart."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rest) and _same(self.values, other.values)

    def __hash__(self) -> int:
        return hash(tuple(self.values))

    def __repr__(self) -> str:
        return repr(self.values)


def opened(tree: Any) -> Any:
    """The tree with every plain object that holds tensors taken apart.

    >>> class Cache:
    ...     def __init__(self, keys):
    ...         self.keys, self.length = keys, 3
    >>> apart = opened({"cache": Cache(torch.ones(2))})
    >>> type(apart["cache"]).__name__, closed(apart)["cache"].length
    ('Opened', 3)
    """
    return _opened(tree, ())


def closed(tree: Any) -> Any:
    """The inverse of `opened`: fresh objects of the same classes."""
    leaves, spec = flatten(tree, is_leaf=lambda x: isinstance(x, (Opened, Fixed)))
    return unflatten(
        [_closed(leaf) if isinstance(leaf, (Opened, Fixed)) else leaf for leaf in leaves], spec
    )


def plain_objects(tree: Any) -> Iterator[Any]:
    """The plain objects of a tree that hold tensors."""
    leaves, _ = flatten(tree)
    return (leaf for leaf in leaves if _holds_tensors(leaf, ()))


def _opened(tree: Any, above: tuple[int, ...]) -> Any:
    leaves, spec = flatten(tree)
    apart = [_apart(leaf, above) if _holds_tensors(leaf, above) else _fixed(leaf) for leaf in leaves]
    return unflatten(apart, spec)


def _fixed(leaf: Any) -> Any:
    return leaf if isinstance(leaf, (*_LEAVES, Iterator)) else Fixed({"value": leaf})


def _apart(made: Any, above: tuple[int, ...]) -> Opened:
    inside = (*above, id(made))
    held = {k: v for k, v in vars(made).items() if _has_tensors(v, inside)}
    rest = {k: None if k in held else v for k, v in vars(made).items()}
    return Opened(type(made), {k: _opened(v, inside) for k, v in held.items()}, rest)


def _closed(apart: Opened | Fixed) -> Any:
    if isinstance(apart, Fixed):
        return apart.values["value"]
    made: Any = apart.made.__new__(apart.made)  # type: ignore[call-overload]
    made.__dict__.update({k: copy.copy(v) for k, v in apart.rest.items()})
    made.__dict__.update({k: closed(v) for k, v in apart.held.items()})
    return made


def _holds_tensors(leaf: Any, above: tuple[int, ...]) -> bool:
    """Whether a leaf is an object with tensors inside; one that contains itself is left alone."""
    if isinstance(leaf, (*_PLAIN, torch.nn.Module)) or callable(leaf) or not hasattr(leaf, "__dict__"):
        return False
    if id(leaf) in above or len(above) > _DEEPEST:
        return False
    return any(_has_tensors(value, (*above, id(leaf))) for value in vars(leaf).values())


def _has_tensors(tree: Any, above: tuple[int, ...]) -> bool:
    leaves, _ = flatten(tree)
    return any(isinstance(leaf, torch.Tensor) or _holds_tensors(leaf, above) for leaf in leaves)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    return a is b or (type(a) is type(b) and bool(a == b))
