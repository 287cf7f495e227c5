"""What ops, weights and collectives cost a group of one or two axes.

An op takes its time at the member with the largest part of it: the product of its parts along the axes.
A value goes from layouts to others as the rewriting will bring it there (`ir.mesh.route`): along an axis
it is sent over that axis' link, of what the other one leaves. Collectives of lines that run side by side
are priced as if each had its links to itself.
"""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import lru_cache
from itertools import product
from math import prod

import numpy as np
import numpy.typing as npt

from graphpar.cost_models.group_times import (
    BATCH_CUT_S,
    WORKLESS,
    KnownWork,
    OpTimes,
    Portion,
    ShardingOptions,
    TensorGroup,
)
from graphpar.cost_models.memory import HELD
from graphpar.cost_models.rates import CatalogueRates, Rates
from graphpar.cost_models.sending import Sending, Sent, largest_part
from graphpar.device import Device
from graphpar.ir.conversions import CollectiveName
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Layouts, Ways
from graphpar.ir.ops import Op
from graphpar.ir.shards import Split
from graphpar.ir.strategies import Strategy, carries_gradient
from graphpar.partition.problems import IMPOSSIBLE_COST


class MeshTimes:
    """Seconds and bytes of ops and conversions for one group.

    Args:
        graph: The lowered graph.
        group: Who computes.
        options: Microbatch size and the like.
        rates: See `OpTimes`.
        known: See `OpTimes`.
    """

    def __init__(
        self,
        graph: Graph,
        group: TensorGroup,
        options: ShardingOptions,
        rates: Callable[[Device], Rates] = CatalogueRates,
        known: KnownWork | None = None,
    ) -> None:
        self.graph, self.group, self.options = graph, group, options
        self.alone = OpTimes(graph, group, options, rates, known)
        self.layout = self.alone.layout
        self._lines = [group.along(axis) for axis in range(len(group.axes))]
        self._largest_shares = [max(line.shares) for line in self._lines]
        self._bytes: dict[str, float] = {}
        self._portions: dict[object, tuple[Portion, ...]] = {}
        self._sending = Sending(group.axes)
        self._priced: dict[object, tuple[float, float]] = {}

    def at(self, samples: int) -> "MeshTimes":
        """The same for microbatches of another size; what does not depend on it is found once for all."""
        other = copy(self)
        other.options = replace(self.options, samples=samples)
        other.alone, other._bytes, other._portions = self.alone.at(samples), {}, {}
        return other

    def parts(self, op: Op, ways: Ways) -> tuple[float, float]:
        """Forward and backward seconds at the member that takes longest."""
        return self.alone.parts_at(op, self._portions_of(ways))

    def several(
        self, ops: Sequence[Op], kinds: Sequence[Ways], kind_of: npt.NDArray[np.intp]
    ) -> tuple[list[float], list[float]]:
        """`parts` of each of some ops.

        Args:
            ops: What is computed.
            kinds: One of each kind of ways that take equally long (see `alike`).
            kind_of: The kind of each op's.
        """
        portions = [self._portions_of(ways) for ways in kinds]
        most = max(map(len, portions), default=1)
        filled = np.array([(*own, *[own[0]] * (most - len(own))) for own in portions])
        each = filled.reshape(len(kinds), most, 2)[kind_of]
        return self.alone.several(ops, each[:, :, 0].astype(np.intp), each[:, :, 1])

    def _portions_of(self, ways: Ways) -> tuple[Portion, ...]:
        key = tuple([(way.samples, way.shares) for way in ways.along])
        if key not in self._portions:
            self._portions[key] = self.alone.unlike(self.shares(ways))
        return self._portions[key]

    def seconds(self, op: Op, ways: Ways) -> float:
        """Seconds of an op in both directions, collectives inside it included."""
        total = sum(self.parts(op, ways)) + sum(self.inner_seconds(op, ways))
        return total + (BATCH_CUT_S if ways.samples else 0.0)

    def inner_seconds(self, op: Op, ways: Ways) -> tuple[float, float]:
        """Collectives that are part of an op: a loss over cut classes exchanges a few numbers a row."""
        special = [axis for axis, way in enumerate(ways.along) if way.special == "classes"]
        if not special:
            return 0.0, 0.0
        rows = self.graph[op.operands()[1]].type.bytes(self.options.samples) / 8
        axis = special[0] if len(special) == 1 else None
        rows *= largest_part(ways.operands[1], axis) if axis is not None else 1.0
        return 2 * self._group(axis).seconds("all_reduce", 8.0 * rows), 0.0

    def _as_one(self, ways: Ways) -> Strategy:
        """A strategy along one axis in which each member has as much of the work."""
        if len(ways.along) == 1:
            return ways.along[0]
        along = [
            self.alone.shares_of(way) or (1.0,) * size
            for way, size in zip(ways.along, self.group.axes, strict=True)
        ]
        shares: tuple[float, ...] = (1.0,)
        for axis in along:
            shares = tuple(before * own for before in shares for own in axis)
        return Strategy((), (), shares=shares)

    def _group(self, axis: int | None) -> TensorGroup:
        return self.group if axis is None else self._lines[axis]

    def sent(self, op: Op, made: Layouts, wanted: Layouts) -> Sent | None:
        """What is sent to bring a value from some layouts to others; None where it cannot be brought."""
        moves = self._sending.way(made, wanted, self._flows_back(op), op.target == "parameter")
        return None if moves and not all(t is not None for t in op.types) else moves

    def sent_seconds(self, op: Op, moves: Sent) -> tuple[float, float]:
        """Forward and backward seconds of sending a value so."""
        return self._seconds(moves, self._num_bytes(op)) if moves else (0.0, 0.0)

    def conversions(
        self, op: Op, made: Sequence[Layouts], wanted: Sequence[Layouts]
    ) -> tuple[tuple[Sent | None, ...], npt.NDArray[np.intp]]:
        """The ways in which a value is sent, and which of them leads from each layout to each other one.

        Most pairs of layouts send the same and differ in what they cut alone.
        """
        return self._sending.table(made, wanted, self._flows_back(op), op.target == "parameter")

    def sending_seconds(self, op: Op, ways: Sequence[Sent | None]) -> npt.NDArray[np.float64]:
        """Seconds of each of some ways to send a value in both directions; endless for no way."""
        is_tensor = all(t is not None for t in op.types)
        num_bytes = self._num_bytes(op) if is_tensor else 0.0
        return np.array([
            float(IMPOSSIBLE_COST)
            if moves is None or (moves and not is_tensor)
            else sum(self._seconds(moves, num_bytes))
            for moves in ways
        ])  # fmt: skip

    @staticmethod
    def alike(rows: Sequence[Ways]) -> tuple[list[Ways], npt.NDArray[np.intp]]:
        """Of ways to compute an op one of each kind that takes equally long, and the kind of each."""
        kinds: dict[object, int] = {}
        first: list[Ways] = []
        numbers = []
        for ways in rows:
            special = [axis for axis, way in enumerate(ways.along) if way.special == "classes"]
            scores = ways.operands[1] if special else ()
            key = tuple((way.samples, way.shares) for way in ways.along), tuple(special), scores
            numbers.append(kinds.setdefault(key, len(kinds)))
            if len(kinds) > len(first):
                first.append(ways)
        return first, np.array(numbers, dtype=np.intp)

    def _flows_back(self, op: Op) -> bool:
        return self.options.training and carries_gradient(self.graph, op.name)

    def _num_bytes(self, op: Op) -> float:
        if op.name not in self._bytes:
            self._bytes[op.name] = sum(t.bytes(self.options.samples) for t in op.types if t is not None)
        return self._bytes[op.name]

    def _seconds(self, moves: Sent, num_bytes: float) -> tuple[float, float]:
        key = moves, num_bytes
        if key not in self._priced:
            ahead = behind = 0.0
            for move in moves:
                group, sent = self._group(move.axis), num_bytes * move.left
                ahead += self._send_seconds(move.forward, sent, group)
                back = self._send_seconds(move.backward, sent, group)
                # Summed once, after the last microbatch.
                behind += back / (self.options.microbatches if move.once else 1)
            self._priced[key] = ahead, behind
        return self._priced[key]

    def _send_seconds(self, name: CollectiveName | None, num_bytes: float, group: TensorGroup) -> float:
        if name is None:
            return 0.0
        return group.seconds(name, num_bytes) + self.alone.host_seconds(name, num_bytes)

    def optimizer_seconds(self, op: Op, held: Layouts) -> float:
        """A microbatch's part of the optimiser's time for a weight."""
        return self.alone.step_seconds(op, shares_held(held, self.group.axes))

    def priced_bytes(self, op: Op, held: Layouts) -> float:
        """Bytes of weight, gradient and optimiser state at a member, as they are priced.

        Any slice counts as the largest share: heads that do not divide are no reason to cut elsewhere.
        """
        largest = (
            share if isinstance(layout, Split) else 1.0
            for share, layout in zip(self._largest_shares, held, strict=True)
        )
        return self.alone.weight_bytes(op, prod(largest))

    def holding_seconds(self, op: Op, held: Layouts) -> float:
        """The price of holding a weight, in seconds."""
        return self.options.hold_factor * self.priced_bytes(op, held) / self.group.link.bytes_per_s

    def weight_bytes(self, op: Op, held: Layouts) -> float:
        """Weight, gradient and optimiser state at the member with most of it."""
        return self.alone.weight_bytes(op, largest_part(held))

    def kept_bytes(self, op: Op, ways: Ways) -> float:
        """What the op keeps for its backward, at the member with most of it.

        Of a value that several ops keep each counts for its part, as if all read it in the same layouts.
        """
        own, values = self.kept_values(op)
        total = own * self.largest_share(ways) if own else 0.0
        for slot, num_bytes in values:
            layouts = ways.results[0] if slot is None else ways.operands[slot]
            total += num_bytes * largest_part(layouts)
        return total

    def kept_values(self, op: Op) -> tuple[float, list[tuple[int | None, float]]]:
        """Bytes of its own that an op keeps for its backward, and of its operands and result (None)."""
        alone, samples = self.alone, self.options.samples
        work = alone.work(op) if self.options.training and op.target not in WORKLESS else None
        if work is None or not work.backward:
            return 0.0, []
        slots, values = op.operands(), list[tuple[int | None, float]]()
        for name in work.saved:
            root = self.graph[self.layout.root[name]]
            if root.target not in HELD:
                num_bytes = sum(t.bytes(samples) for t in root.types if t is not None)
                slot = None if name == op.name else slots.index(name)
                values.append((slot, num_bytes / alone.keepers[root.name]))
        return work.saved_bytes, values

    def largest_share(self, ways: Ways) -> float:
        """The largest part of an op's work that a member has."""
        return max(self.shares(ways))

    def shares(self, ways: Ways) -> tuple[float, ...]:
        """Each member's part of an op's work."""
        return self.alone.shares_of(self._as_one(ways)) or (1.0,) * self.group.size


@lru_cache(maxsize=65536)
def shares_held(held: Layouts, axes: tuple[int, ...]) -> tuple[float, ...]:
    """Each member's part of a value, row by row of a group with so many members along its axes.

    >>> shares_held((Split(0, (3, 1)), Split(1, (1, 1))), (2, 2))
    (0.375, 0.375, 0.125, 0.125)
    """
    along = (
        [layout.share(k) for k in range(size)] if isinstance(layout, Split) else [1.0] * size
        for layout, size in zip(held, axes, strict=True)
    )
    return tuple(map(prod, product(*along)))
