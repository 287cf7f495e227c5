"""The graph: ops in topological order, a NetworkX multigraph on demand, immutable to its users."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Literal

import networkx as nx

from graphpar.errors import VerifyError
from graphpar.ir.ops import SOURCES, Op

Level = Literal["captured", "placed", "lowered"]
LEVELS: tuple[Level, ...] = ("captured", "placed", "lowered")


class Graph:
    """A computation at one of three levels; passes read one graph and build another.

    As a NetworkX graph (`nx`) its nodes carry an `op`, and edges run from the op that makes a value to
    the op that reads it, with the operand position as key. `ops` is a topological order, which is also
    the order of execution.

    Args:
        ops: The ops in an order in which each reads only earlier ones.
        level: How far the graph has come: captured, placed or lowered.
        name: The model's class name.
        batch: Samples in the example batch.
        aliases: Other names of a parameter or buffer (tied weights), by the name the graph uses.

    >>> from graphpar.ir.ops import Op, Ref, TensorType
    >>> x = Op("x", "input", ("x",), types=(TensorType((2,), "float32"),))
    >>> y = Op("y", "aten.relu.default", (Ref("x"),), types=x.types)
    >>> g = Graph([x, y, Op("output", "output", ((Ref("y"),),))], level="captured", name="Relu", batch=2)
    >>> g
    Graph('Relu', captured, 3 ops)
    >>> [user.name for user in g.users("x")]
    ['y']
    """

    def __init__(
        self,
        ops: Iterable[Op],
        *,
        level: Level,
        name: str = "",
        batch: int = 1,
        aliases: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.level = level
        self.name = name
        self.batch = batch
        self.aliases: Mapping[str, tuple[str, ...]] = dict(sorted((aliases or {}).items()))
        self._named: dict[str, Op] = {}
        for op in ops:
            if op.name in self._named:
                raise VerifyError(f"Two ops are named %{op.name} in graph {name!r}.")
            for operand in op.operands():
                if operand not in self._named:
                    raise VerifyError(
                        f"Op %{op.name} ({op.target}, made by {op.made_by}) reads %{operand}, "
                        f"which is not defined before it in graph {name!r}."
                    )
            self._named[op.name] = op

    @cached_property
    def nx(self) -> "nx.MultiDiGraph[str]":
        """Ops and who reads whom, frozen; made when first asked for, since most passes ask for less."""
        made: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        for op in self:
            made.add_node(op.name, op=op)
            for position, operand in enumerate(op.operands()):
                made.add_edge(operand, op.name, key=position)
        return nx.freeze(made)  # type: ignore[no-any-return]

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """All ops, in order of execution."""
        return tuple(self._named.values())

    def __getitem__(self, name: str) -> Op:
        return self._named[name]

    def __contains__(self, name: object) -> bool:
        return name in self._named

    def __len__(self) -> int:
        return len(self._named)

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def users(self, name: str) -> tuple[Op, ...]:
        """Ops that read the op's result, each once, in order of execution."""
        return self._readers.get(name, ())

    @cached_property
    def _readers(self) -> Mapping[str, tuple[Op, ...]]:
        found: dict[str, list[Op]] = {}
        for op in self:
            for name in dict.fromkeys(op.operands()):
                found.setdefault(name, []).append(op)
        return {name: tuple(readers) for name, readers in found.items()}

    @cached_property
    def bytes_per_sample(self) -> int:
        """What the results of all ops take more with one sample more, in bytes."""
        return sum(each.bytes(2) - each.bytes(1) for op in self for each in op.types if each)

    @cached_property
    def position(self) -> Mapping[str, int]:
        """Place of each op in the order of execution."""
        return {name: index for index, name in enumerate(self._named)}

    def sources(self, target: str) -> tuple[Op, ...]:
        """The input, parameter, buffer or constant ops."""
        assert target in SOURCES
        return tuple(op for op in self.ops if op.target == target)

    @property
    def output(self) -> Op:
        """The op that names the results."""
        return self.ops[-1]

    def with_ops(self, ops: Iterable[Op], *, level: Level | None = None) -> "Graph":
        """A graph of other ops under the same name, batch and aliases."""
        return Graph(
            ops,
            level=level or self.level,
            name=self.name,
            batch=self.batch,
            aliases=self.aliases,
        )

    def with_batch(self, batch: int) -> "Graph":
        """The same ops for an example batch of another size."""
        for name in ("ops", "_readers", "bytes_per_sample"):
            getattr(self, name)  # found once for all batches
        other = copy.copy(self)
        other.batch = batch
        return other

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return (self.level, self.name, self.batch, self.aliases, self.ops) == (
            other.level,
            other.name,
            other.batch,
            other.aliases,
            other.ops,
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Graph({self.name!r}, {self.level}, {len(self)} ops)"
