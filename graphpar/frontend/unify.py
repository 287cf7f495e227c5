"""Two exports at unlike batch sizes become one graph in which every size that scales is a `BatchSize`.

A size or constant that is equal in both is a constant; one in proportion to the batch is
`times x batch`. Anything else means that the structure depends on the batch size, and the model is
kept at its full batch.
"""

from dataclasses import dataclass, replace
from typing import Any

from graphpar.ir.ops import Argument, BatchSize, Dim, Op, Symbol, TensorType


@dataclass(frozen=True)
class Mismatch(Exception):  # noqa: N818 - control flow between two functions of this file's callers
    """The two exports differ in more than proportional sizes."""

    reason: str


def unify(ops: tuple[Op, ...], other: tuple[Op, ...], batch: int, other_batch: int) -> tuple[Op, ...]:
    """One list of ops from two exports of the same model.

    Raises:
        Mismatch: The exports differ in structure; says where.
    """
    if len(ops) != len(other):
        raise Mismatch(
            f"the graph has {len(ops)} ops for a batch of {batch} but {len(other)} for {other_batch}"
        )
    return tuple(_unify_op(a, b, batch, other_batch) for a, b in zip(ops, other, strict=True))


def scaled_like(ops: tuple[Op, ...], known: tuple[Op, ...], batch: int) -> tuple[Op, ...]:
    """Ops of one export, in which those sizes scale with the batch that do so in known ops.

    Raises:
        Mismatch: The ops are not like the known ones.
    """
    if len(ops) != len(known):
        raise Mismatch(f"the graph has {len(ops)} ops where {len(known)} are known")
    return tuple(_scaled_op(a, like, batch) for a, like in zip(ops, known, strict=True))


def _scaled_op(a: Op, like: Op, batch: int) -> Op:
    rest: dict[str, Any] = {"args": (), "kwargs": (), "types": (), "source": ""}
    if replace(a, **rest) != replace(like, **rest):
        raise Mismatch(f"op {a.name} at {a.module or a.source} is another one")
    args, kwargs, types = (
        _scaled(x, y, batch)
        for x, y in ((a.args, like.args), (a.kwargs, like.kwargs), (a.types, like.types))
    )
    return replace(a, args=args, kwargs=kwargs, types=types)


def _scaled(x: Any, like: Any, batch: int) -> Any:
    """A part of an op, whose numbers and sizes scale with the batch where those of a like one do."""
    if type(x) is int and isinstance(like, BatchSize) and x % batch == 0:
        return BatchSize(x // batch)
    if type(x) is float and isinstance(like, Symbol) and like.kind == "batch":
        return Symbol("batch", repr(x / batch))
    if type(x) is not type(like):
        raise Mismatch(f"{x!r} is not like {like!r}")
    if isinstance(x, tuple) and len(x) == len(like):
        return tuple(_scaled(p, q, batch) for p, q in zip(x, like, strict=True))
    if isinstance(x, TensorType) and x.dtype == like.dtype:
        return TensorType(_scaled(x.shape, like.shape, batch), x.dtype)
    if isinstance(x, (tuple, TensorType)):
        raise Mismatch(f"{x} is not like {like}")
    return x


def _unify_op(a: Op, b: Op, batch: int, other_batch: int) -> Op:
    if (a.name, a.target, a.attrs, len(a.args), len(a.types)) != (
        b.name, b.target, b.attrs, len(b.args), len(b.types),
    ) or [k for k, _ in a.kwargs] != [k for k, _ in b.kwargs]:  # fmt: skip
        raise Mismatch(f"op {a.name} at {a.module or a.source} changes with the batch size")
    where = f"{a.target} at {a.module or '(top)'} {a.source}".strip()

    def same(x: Argument, y: Argument) -> Argument:
        return _unify_argument(x, y, batch, other_batch, where)

    return replace(
        a,
        args=tuple(same(x, y) for x, y in zip(a.args, b.args, strict=True)),
        kwargs=tuple((k, same(x, y)) for (k, x), (_, y) in zip(a.kwargs, b.kwargs, strict=True)),
        types=tuple(
            _unify_type(x, y, batch, other_batch, where) for x, y in zip(a.types, b.types, strict=True)
        ),
    )


def _unify_argument(x: Argument, y: Argument, batch: int, other_batch: int, where: str) -> Argument:
    if isinstance(x, tuple) and isinstance(y, tuple) and len(x) == len(y):
        return tuple(_unify_argument(p, q, batch, other_batch, where) for p, q in zip(x, y, strict=True))
    if type(x) is type(y) and (x == y or (x != x and y != y)):
        return x
    if type(x) is int and type(y) is int:
        return _proportional(x, y, batch, other_batch, where)
    if type(x) is float and type(y) is float and x / batch == y / other_batch:
        return Symbol("batch", repr(x / batch))  # a count of samples among the numbers of an op
    raise Mismatch(f"{where} uses {x!r} for a batch of {batch} but {y!r} for {other_batch}")


def _unify_type(
    x: TensorType | None, y: TensorType | None, batch: int, other_batch: int, where: str
) -> TensorType | None:
    if x is None or y is None or len(x.shape) != len(y.shape) or x.dtype != y.dtype:
        if x is None and y is None:
            return None
        raise Mismatch(f"{where} makes {x} for a batch of {batch} but {y} for {other_batch}")
    shape: list[Dim] = []
    for p, q in zip(x.shape, y.shape, strict=True):
        assert isinstance(p, int) and isinstance(q, int)
        shape.append(p if p == q else _proportional(p, q, batch, other_batch, where))
    return TensorType(tuple(shape), x.dtype)


def _proportional(x: int, y: int, batch: int, other_batch: int, where: str) -> BatchSize:
    """
    >>> _proportional(96, 224, 6, 14, "")
    BatchSize(times=16)
    """
    times, rest = divmod(x, batch)
    if rest or times * other_batch != y:
        raise Mismatch(
            f"{where} has a size {x} for a batch of {batch} but {y} for {other_batch}, "
            "which is not in proportion"
        )
    return BatchSize(times)
