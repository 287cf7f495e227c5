"""Slices of tensors as the members of a tensor group hold them: taken out, and put together again."""

from collections.abc import Sequence

import torch


def _unfolded(tensor: torch.Tensor, dim: int, run: int) -> torch.Tensor:
    """The dimension as (runs, length of a run)."""
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], shape[dim] // run, run, *shape[dim + 1 :])


def resized(size: int, counts: Sequence[int], inner: int, member: int, units: int) -> int:
    """Size of a dimension with so many units, where the member's own slice has a size.

    A member without any unit cannot tell how often the units are repeated; that is samples, and once.

    >>> resized(4, (2, 1), 1, 0, 3), resized(0, (1, 0), 8, 1, 1)
    (6, 8)
    """
    return size // counts[member] * units if counts[member] else inner * units


def take(tensor: torch.Tensor, dim: int, counts: Sequence[int], inner: int, member: int) -> torch.Tensor:
    """The member's slice of a whole tensor.

    >>> take(torch.arange(12), 0, (2, 1), 2, 1)
    tensor([ 4,  5, 10, 11])
    """
    return part_of(tensor, dim, counts, inner, member).contiguous()


def part_of(
    tensor: torch.Tensor, dim: int, counts: Sequence[int], inner: int, member: int
) -> torch.Tensor:
    """The member's slice where it lies in the whole, if that is possible without a copy."""
    whole = _unfolded(tensor, dim, sum(counts) * inner)
    own = whole.narrow(dim + 1, sum(counts[:member]) * inner, counts[member] * inner)
    return own.flatten(dim, dim + 1)


def join(parts: Sequence[torch.Tensor], dim: int, counts: Sequence[int], inner: int) -> torch.Tensor:
    """The whole tensor from all members' slices.

    >>> join([torch.tensor([0, 1, 4, 5]), torch.tensor([2, 6])], 0, (2, 1), 1)
    tensor([0, 1, 2, 4, 5, 6])
    """
    rows = [_unfolded(p, dim, c * inner) for p, c in zip(parts, counts, strict=True) if c]
    return torch.cat(rows, dim + 1).flatten(dim, dim + 1)


def padded(
    tensor: torch.Tensor, dim: int, counts: Sequence[int], inner: int, member: int
) -> torch.Tensor:
    """A whole tensor with the member's slice in its place and zeros elsewhere.

    >>> padded(torch.tensor([1, 2]), 0, (2, 1, 1), 1, 0)
    tensor([1, 2, 0, 0])
    """
    parts = []
    for k, count in enumerate(counts):
        if k == member:
            parts.append(tensor)
            continue
        shape = list(tensor.shape)
        shape[dim] = resized(shape[dim], counts, inner, member, count)
        parts.append(tensor.new_zeros(shape))
    return join(parts, dim, counts, inner)


def places(size: int, counts: Sequence[int], inner: int, member: int) -> torch.Tensor:
    """For each element of the member's slice of a dimension its place in the whole.

    >>> places(12, (2, 1), 2, 1)
    tensor([ 4,  5, 10, 11])
    """
    return take(torch.arange(size), 0, counts, inner, member)
