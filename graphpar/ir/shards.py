"""How the members of a tensor group hold a value, and the arithmetic of uneven slices.

A *layout* says what each member has of a value and of its gradient:

| layout | each member has | its gradient there |
|---|---|---|
| `whole` | the value | the gradient |
| `copied` | the value | a part; the sum over members is the gradient |
| `partial` | a part; the sum over members is the value | the gradient |
| `disjoint` | a part; where one has a number the others have zeros | the gradient, where it has numbers |
| a `Split` | a slice | the slice's gradient |
| `first` | all, but only the first member reads it | there the gradient, elsewhere none |

Nothing is made `first`; it is how a bias beside a sum over the members is wanted, held whole by all.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias, get_args

from graphpar.ir.ops import BatchSize, Dim, TensorType, apportion


@dataclass(frozen=True, order=True)
class Split:
    """One dimension cut among the members, in whole units.

    The dimension has the size `outer * sum(counts) * inner`; of each of the `outer` runs of units
    member k has `counts[k]` consecutive ones. A fused projection to (3, heads, head size) split by
    heads is `Split(dim, counts, outer=3, inner=head size)`.

    Where the units are the samples of a microbatch, how many there are is not known yet; `counts` are
    then the proportions in which members share them.

    >>> Split(1, (3, 1), inner=8).size(0), Split(1, (3, 1), inner=8).size(1)
    (24, 8)
    >>> str(Split(0, (3, 1), of_batch=True).size(1))
    'B@1:3/1'
    """

    dim: int
    counts: tuple[int, ...]
    outer: Dim = 1
    inner: int = 1
    of_batch: bool = False

    def __hash__(self) -> int:
        # Layouts are looked up by the hundred thousand.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.dim, self.counts, self.outer, self.inner, self.of_batch))

    @property
    def numbers(self) -> tuple[Dim, ...]:
        """Units of each member, of samples as sizes that a microbatch fills in."""
        if not self.of_batch:
            return self.counts
        return tuple(BatchSize(1, self.counts, member) for member in range(len(self.counts)))

    @property
    def units(self) -> int:
        """Units of all members together."""
        return sum(self.counts)

    def size(self, member: int) -> Dim:
        """Size of the dimension at one member."""
        if self.of_batch:
            return BatchSize(self.inner, self.counts, member)
        return scaled(self.outer, self.counts[member] * self.inner)

    def first(self, member: int) -> int:
        """Units before the member's own."""
        return sum(self.counts[:member])

    def share(self, member: int) -> float:
        """The member's part of the dimension."""
        return self.counts[member] / self.units

    def local(self, kind: TensorType, member: int) -> TensorType:
        """The type of the member's slice of a value."""
        shape = list(kind.shape)
        shape[self.dim] = self.size(member)
        return TensorType(tuple(shape), kind.dtype)

    def __str__(self) -> str:
        around = (
            f"{self.outer}x" if self.outer != 1 else "",
            f"x{self.inner}" if self.inner != 1 else "",
        )
        marked = "B:" if self.of_batch else ""
        return f"dim{self.dim}:{around[0]}{marked}{'/'.join(map(str, self.counts))}{around[1]}"


PlainLayout = Literal["whole", "copied", "partial", "disjoint", "first"]
Layout: TypeAlias = Split | PlainLayout
_SPLIT = re.compile(r"dim(\d+):(?:(?:(\d+)\*)?(B|\d+)x)?(B:)?(\d+(?:/\d+)+)(?:x(\d+))?")


def parse_layout(text: str) -> Layout:
    """The layout that `str` wrote.

    Raises:
        ValueError: It is none.

    >>> heads, rows = Split(1, (3, 1), 3, 8), Split(0, (2, 1), BatchSize(2))
    >>> all(parse_layout(str(s)) == s for s in (heads, rows, Split(0, (1, 1), 1, 4, of_batch=True)))
    True
    """
    for plain in get_args(PlainLayout):
        if text == plain:
            return plain  # type: ignore[no-any-return]
    found = _SPLIT.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{text!r} is no layout; one is {', '.join(get_args(PlainLayout))}, or dim1:8/4x64"
        )
    dim, times, outer, of_batch, counts, inner = found.groups()
    size: Dim = BatchSize(int(times or 1)) if outer == "B" else int(outer or 1)
    units = tuple(map(int, counts.split("/")))
    return Split(int(dim), units, size, int(inner or 1), of_batch is not None)


def scaled(outer: Dim, times: int) -> Dim:
    """A size times a whole number."""
    if isinstance(outer, BatchSize):
        return BatchSize(outer.times * times, outer.parts, outer.member)
    return outer * times


def apportion_units(units: int, shares: Sequence[float]) -> tuple[int, ...] | None:
    """Whole units near the shares, at least one each; None where there are fewer units than members.

    >>> apportion_units(32, (0.62, 0.38)), apportion_units(2, (1, 1, 1))
    ((20, 12), None)
    """
    return apportion(units, shares) if units >= len(shares) else None


def whole_shares(shares: Sequence[float]) -> tuple[int, ...]:
    """Shares as whole numbers, exact to a thousandth.

    >>> whole_shares((0.25, 0.25)), whole_shares((0.6, 0.4))
    ((1, 1), (600, 400))
    """
    if len(set(shares)) == 1:
        return (1,) * len(shares)
    return tuple(max(1, round(1000 * share / sum(shares))) for share in shares)
