"""What lies before, after and between classes, as bits of items.

An accelerator's set is contiguous: with two of its classes it holds whatever lies between any of their
items, and the classes of that with all their items, and so on.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from graphpar.partition.placement.units import Units


class Reach:
    """Orders among the items of some units; built once for all that ask."""

    def __init__(self, units: Units) -> None:
        self.units = units
        count = units.num_items
        self._before, self._after = [0] * count, [0] * count
        for i in range(count):
            for j in units.before[i]:
                self._before[i] |= self._before[j] | 1 << j
        for i in reversed(range(count)):
            for j in units.after[i]:
                self._after[i] |= self._after[j] | 1 << j
        self._beyond: dict[int, tuple[list[int], list[int]]] = {}

    def beyond(self, c: int) -> tuple[list[int], list[int]]:
        """The classes after a class, and those before it."""
        if c not in self._beyond:
            items = self.units.items[c]
            after = self.classes(_union(items, self._after))
            self._beyond[c] = after, self.classes(_union(items, self._before))
        return self._beyond[c]

    def between(self, classes: Iterable[int]) -> list[int]:
        """The classes, and all that an accelerator with these must hold."""
        held = Held(self)
        held.take(classes)
        return self.classes(held.items)

    def classes(self, items: int) -> list[int]:
        """The classes of some items, in order."""
        return sorted({self.units.class_of[i] for i in bits(items)})

    def around(self, items: Sequence[int]) -> tuple[int, int]:
        """All that is before some of the items, and all that is after."""
        return _union(items, self._before), _union(items, self._after)


@dataclass(eq=False)
class Held:
    """What an accelerator must hold, while it is told one class after the other.

    Attributes:
        items: As bits.
        work, size: Accelerator time and memory of all of it.
    """

    reach: Reach
    items: int = 0
    work: float = 0.0
    size: float = 0.0
    _before: int = 0
    _after: int = 0

    def take(self, classes: Iterable[int]) -> None:
        """Hold these classes, too, and what that entails."""
        units, waiting = self.reach.units, list(classes)
        while waiting:
            for c in waiting:
                if self.items >> units.items[c][0] & 1:
                    continue
                for i in units.items[c]:
                    self.items |= 1 << i
                before, after = self.reach.around(units.items[c])
                self._before |= before
                self._after |= after
                self.work += float(units.accelerator[c])
                self.size += float(units.size[c])
            waiting = self.reach.classes(self._before & self._after & ~self.items)


def bits(mask: int) -> list[int]:
    """The places of the bits that are set.

    >>> bits(0b1010)
    [1, 3]
    """
    found = []
    while mask:
        low = mask & -mask
        found.append(low.bit_length() - 1)
        mask ^= low
    return found


def _union(items: Sequence[int], masks: list[int]) -> int:
    whole = 0
    for i in items:
        whole |= masks[i]
    return whole
