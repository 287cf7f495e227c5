"""Pieces of tensors as ranks hold or step them (`program.Slice`): taken out, and put together again."""

from collections.abc import Iterable

import torch

from graphpar.runtime.program import Slice
from graphpar.runtime.slices import join, padded, take


def sliced(tensor: torch.Tensor, cut: Slice | None) -> torch.Tensor:
    """A piece of a whole tensor; all of it where there is no cut.

    >>> sliced(torch.arange(12), Slice(0, (2, 1), 1, 0, rows=Slice(0, (4, 4), 1, 1)))
    tensor([ 6,  7,  9, 10])
    """
    if cut is None:
        return tensor
    return sliced(take(tensor, cut.dim, cut.counts, cut.inner, cut.member), cut.rows)


def joined(pieces: Iterable[tuple[torch.Tensor, Slice | None]]) -> torch.Tensor:
    """The whole tensor from all its pieces, in any order.

    >>> whole = torch.arange(12)
    >>> rows = [Slice(0, (4, 4), 1, k) for k in range(2)]
    >>> cuts = [*(Slice(0, (2, 1), 1, 0, rows=own) for own in rows), Slice(0, (2, 1), 1, 1)]
    >>> joined((sliced(whole, cut), cut) for cut in reversed(cuts)).equal(whole)
    True
    """
    members: dict[int, list[tuple[torch.Tensor, Slice | None]]] = {}
    cuts: list[Slice] = []
    for tensor, cut in pieces:
        if cut is None:
            return tensor
        cuts.append(cut)
        members.setdefault(cut.member, []).append((tensor, cut.rows))
    parts = [joined(members[member]) for member in sorted(members)]
    return join(parts, cuts[0].dim, cuts[0].counts, cuts[0].inner)


def in_place(piece: torch.Tensor, cut: Slice) -> torch.Tensor:
    """A whole tensor with a piece in its place and zeros elsewhere.

    >>> cut = Slice(0, (2, 1), 2, 0, rows=Slice(0, (1, 1), 1, 1))
    >>> in_place(torch.tensor([7, 7, 7, 7]), cut)
    tensor([0, 7, 0, 7, 0, 0, 0, 7, 0, 7, 0, 0])
    """
    own = piece if cut.rows is None else in_place(piece, cut.rows)
    return padded(own, cut.dim, cut.counts, cut.inner, cut.member)


def whole_size(size: int, cut: Slice) -> int:
    """Size of a whole of which a piece has a size.

    >>> whole_size(2, Slice(0, (2, 1), 2, 0, rows=Slice(0, (1, 1), 1, 1)))
    6
    """
    own = size if cut.rows is None else whole_size(size, cut.rows)
    return own // cut.counts[cut.member] * sum(cut.counts)
