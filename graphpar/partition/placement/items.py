"""Operators that may be counted as one when latency counts, without changing any answer's latency.

Operators in a circle wait for themselves and end together; such an item cannot run on the CPUs. Of two
operators of one class, which are on one device,

* one that takes no time on the CPUs and waits for the other alone ends when that does;
* one that waits for the other alone, which nothing else waits for, follows it at once;
* one that takes no time, waits for nothing, and that only its own class waits for delays nobody.

On an accelerator both are done when all of it is. So each such pair is one item, over and over: weights
join what they multiply, and what only looks at a result joins what made it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx

from graphpar.partition.problems import PlacementProblem


@dataclass(frozen=True)
class Item:
    """Operators that run in one go.

    Attributes:
        operators: Their positions.
        cpu_latency: Time on the CPUs, infinite where they cannot run there.
        before, after: Places, in the list of all, of the items that it waits for and that wait for it.
    """

    operators: tuple[int, ...]
    cpu_latency: float
    before: tuple[int, ...]
    after: tuple[int, ...]


def items_of(problem: PlacementProblem) -> list[Item]:
    """The items in an order in which they can run."""
    order: nx.DiGraph[int] = nx.DiGraph()
    order.add_nodes_from(range(len(problem.operators)))
    order.add_edges_from((t.source, t.target) for t in problem.transfers)
    whole = nx.condensation(order)
    parts: dict[int, tuple[int, ...]] = {n: tuple(sorted(whole.nodes[n]["members"])) for n in whole}
    merging = _Merging(
        {n: problem.operators[part[0]].colour for n, part in parts.items()},
        {
            n: problem.operators[part[0]].cpu_latency if len(part) == 1 else float("inf")
            for n, part in parts.items()
        },
        {n: set(whole.predecessors(n)) for n in whole},
        {n: set(whole.successors(n)) for n in whole},
    )
    merging.merge()
    remaining = whole.subgraph(merging.cpu)
    joined: nx.DiGraph[int] = nx.DiGraph()
    joined.add_nodes_from(remaining)
    joined.add_edges_from((n, m) for n, after in merging.after.items() for m in after)
    sequence = list(nx.topological_sort(joined))
    place = {n: i for i, n in enumerate(sequence)}
    members: dict[int, list[int]] = {n: list(parts[n]) for n in sequence}
    for n, into in merging.joined.items():
        members[merging.where(into)].extend(parts[n])
    return [
        Item(
            tuple(sorted(members[n])),
            merging.cpu[n],
            _places(merging.before[n], place),
            _places(merging.after[n], place),
        )
        for n in sequence
    ]


def _places(numbers: Iterable[int], place: dict[int, int]) -> tuple[int, ...]:
    return tuple(sorted(place[n] for n in numbers))


class _Merging:
    """Items by number, while they are being joined.

    Attributes:
        colour, cpu, before, after: Of the items that are left.
        joined: For each item that is gone, the one that it went to.
    """

    def __init__(
        self,
        colour: dict[int, str],
        cpu: dict[int, float],
        before: dict[int, set[int]],
        after: dict[int, set[int]],
    ) -> None:
        self.colour, self.cpu, self.before, self.after = colour, cpu, before, after
        self.joined: dict[int, int] = {}

    def where(self, n: int) -> int:
        """The item that holds n now."""
        while n in self.joined:
            n = self.joined[n]
        return n

    def merge(self) -> None:
        """Join until nothing more can be joined."""
        waiting = list(self.cpu)
        while waiting:
            n = waiting.pop()
            if n in self.joined:
                continue
            into = self._partner(n)
            if into is not None:
                around = self.before[n] | self.after[n]
                self._join(n, into)
                waiting.extend([into, *around])

    def _partner(self, n: int) -> int | None:
        """An item that n may join."""
        before, after, own = self.before[n], self.after[n], self.colour[n]
        if len(before) == 1:
            (only,) = before
            alike = self.colour[only] == own
            return only if alike and (self.cpu[n] == 0 or len(self.after[only]) == 1) else None
        if not before and after and self.cpu[n] == 0 and all(self.colour[m] == own for m in after):
            return min(after)
        return None

    def _join(self, n: int, into: int) -> None:
        follows = into in self.before[n]
        for m in self.before.pop(n):
            self.after[m].discard(n)
        for m in self.after.pop(n):
            self.before[m].discard(n)
            if follows:
                self.after[into].add(m)
                self.before[m].add(into)
        self.cpu[into] += self.cpu.pop(n)
        self.joined[n] = into
