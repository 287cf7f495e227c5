"""The parts of a graph: ops, their arguments, and the types of the values they make."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import floor, prod
from typing import TypeAlias

DTYPE_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
    "complex64": 8, "complex128": 16, "int64": 8, "int32": 4, "int16": 2, "int8": 1,
    "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "bool": 1,
}  # fmt: skip
FLOATING = frozenset(
    {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "complex64"}
    | {"complex128"}
)


@dataclass(frozen=True, order=True)
class BatchSize:
    """`times` x the number of samples in the (micro)batch: a size known only when a graph is stamped.

    With `parts` it counts the samples that one member of a tensor group has; the members share the
    samples in proportion to these whole numbers.

    >>> BatchSize(16).at(4), str(BatchSize(16)), str(BatchSize(1))
    (64, '16*B', 'B')
    >>> BatchSize(16, (3, 1), 1).at(4), str(BatchSize(16, (3, 1), 1))
    (16, '16*B@1:3/1')
    """

    times: int = 1
    parts: tuple[int, ...] = field(default=(), repr=False)
    member: int = field(default=0, repr=False)

    def at(self, batch: int) -> int:
        """The size for a batch of so many samples."""
        if not self.parts:
            return self.times * batch
        return self.times * apportion(batch, self.parts)[self.member]

    def __str__(self) -> str:
        whole = "B" if self.times == 1 else f"{self.times}*B"
        return f"{whole}@{self.member}:{'/'.join(map(str, self.parts))}" if self.parts else whole


def apportion(units: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Whole units near the shares, at least one each while there are enough; the largest shares first.

    >>> apportion(32, (0.62, 0.38)), apportion(128, (0.6, 0.4)), apportion(2, (1, 1, 1))
    ((20, 12), (77, 51), (1, 1, 0))
    """
    if units < len(shares):
        order = sorted(range(len(shares)), key=lambda k: (-shares[k], k))
        return tuple(int(k in order[:units]) for k in range(len(shares)))
    exact = [units * share / sum(shares) for share in shares]
    counts = [max(1, floor(x)) for x in exact]
    while sum(counts) < units:
        counts[max(range(len(counts)), key=lambda k: (exact[k] - counts[k], -k))] += 1
    while sum(counts) > units:
        candidates = [k for k in range(len(counts)) if counts[k] > 1]
        counts[min(candidates, key=lambda k: (exact[k] - counts[k], k))] -= 1
    return tuple(counts)


Dim: TypeAlias = int | BatchSize


@dataclass(frozen=True)
class Ref:
    """An argument that is the result of the op with this name."""

    name: str

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class Symbol:
    """A torch constant that is no number: `kind` is dtype, device, layout or memory_format."""

    kind: str
    value: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"


Argument: TypeAlias = (
    "Ref | Symbol | BatchSize | int | float | complex | bool | str | None | tuple[Argument, ...]"
)
Attribute: TypeAlias = int | str | bool | tuple[int, ...]


@dataclass(frozen=True)
class TensorType:
    """Shape and element type of a value; sizes that scale with the batch are `BatchSize`.

    >>> str(TensorType((BatchSize(), 16), "float32")), TensorType((BatchSize(), 16), "float32").bytes(2)
    ('float32[B,16]', 128)
    """

    shape: tuple[Dim, ...]
    dtype: str

    def __hash__(self) -> int:
        # Types are looked up by the hundred thousand; text hashes otherwise in another process.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.shape)

    def sizes(self, batch: int) -> tuple[int, ...]:
        """The shape for a batch of so many samples."""
        return tuple(d.at(batch) if isinstance(d, BatchSize) else d for d in self.shape)

    def numel(self, batch: int) -> int:
        """Number of elements for a batch of so many samples."""
        fixed, power = self._scale
        if power > 1:
            return prod(self.sizes(batch))
        return fixed * batch if power else fixed

    @cached_property
    def _scale(self) -> tuple[int, int]:
        """Elements for one sample, and with which power of the batch they grow; 2 for any other way."""
        unequal = any(isinstance(d, BatchSize) and d.parts for d in self.shape)
        return prod(self.sizes(1)), 2 if unequal else len(self.batch_dims)

    def bytes(self, batch: int) -> int:
        """Bytes of a dense tensor of this type for a batch of so many samples."""
        return self.numel(batch) * DTYPE_BYTES[self.dtype]

    @property
    def batch_dims(self) -> tuple[int, ...]:
        """The dimensions whose size scales with the batch."""
        return tuple(i for i, d in enumerate(self.shape) if isinstance(d, BatchSize))

    @property
    def is_floating(self) -> bool:
        """Whether gradients can flow through the value."""
        return self.dtype in FLOATING

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


SOURCES = frozenset({"input", "parameter", "buffer", "constant"})
"""Targets of ops that compute nothing: their first argument is the name of what they stand for."""


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        name: Unique in its graph.
        target: What is computed: `aten.linear.default`, `getitem`, `output`, one of `SOURCES`, or one
            of our own (`gp.*`).
        args: Positional arguments.
        kwargs: Keyword arguments in the order given.
        types: Types of the results; None stands for a result that is no tensor.
        is_tuple: Whether the result is a tuple that `getitem` takes apart, whatever its length.
        module: Path of the user's module that called it, such as `h.0.attn`.
        source: File and line in the user's code, such as `gpt.py:33`.
        origin: Names of the captured ops it stands for; itself when captured.
        made_by: The pass that made it.
        attrs: Facts found by passes, sorted by key; which are legal depends on the graph's level.
    """

    name: str
    target: str
    args: tuple[Argument, ...] = ()
    kwargs: tuple[tuple[str, Argument], ...] = ()
    types: tuple[TensorType | None, ...] = ()
    is_tuple: bool = False
    module: str = ""
    source: str = ""
    origin: tuple[str, ...] = ()
    made_by: str = "capture"
    attrs: tuple[tuple[str, Attribute], ...] = ()

    @property
    def type(self) -> TensorType:
        """The type of an op that makes exactly one tensor."""
        (only,) = self.types
        assert only is not None and not self.is_tuple, self
        return only

    @property
    def makes_tensor(self) -> bool:
        """Whether the result is exactly one tensor."""
        return not self.is_tuple and len(self.types) == 1 and self.types[0] is not None

    def operands(self) -> tuple[str, ...]:
        """Names of the ops it reads, in argument order, repeats kept."""
        return self._operands

    @cached_property
    def _operands(self) -> tuple[str, ...]:
        return tuple(self._refs(self.args)) + tuple(self._refs(tuple(v for _, v in self.kwargs)))

    @staticmethod
    def _refs(argument: Argument) -> Iterator[str]:
        if isinstance(argument, Ref):
            yield argument.name
        elif isinstance(argument, tuple):
            for item in argument:
                yield from Op._refs(item)

    def attr(self, key: str, default: Attribute | None = None) -> Attribute | None:
        """One attribute, or the default."""
        for name, value in self.attrs:
            if name == key:
                return value
        return default

    def with_attrs(self, **attrs: Attribute) -> "Op":
        """The same op with attributes added or replaced."""
        merged = {**dict(self.attrs), **attrs}
        return replace(self, attrs=tuple(sorted(merged.items())))

    def kwarg(self, key: str, default: Argument = None) -> Argument:
        """One keyword argument, or the default."""
        for name, value in self.kwargs:
            if name == key:
                return value
        return default

    def argument(self, position: int, key: str, default: Argument = None) -> Argument:
        """An argument that may be given by position or by keyword."""
        return self.args[position] if position < len(self.args) else self.kwarg(key, default)


def map_arguments(op: Op, change: "dict[str, str]") -> Op:
    """The op with its operands renamed by a table; names not in it stay."""

    def renamed(argument: Argument) -> Argument:
        if isinstance(argument, Ref):
            return Ref(change.get(argument.name, argument.name))
        if isinstance(argument, tuple):
            return tuple(renamed(item) for item in argument)
        return argument

    return replace(
        op,
        args=tuple(renamed(a) for a in op.args),
        kwargs=tuple((k, renamed(v)) for k, v in op.kwargs),
    )
