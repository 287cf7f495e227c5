"""The graph: ops in topological order over one NetworkX multigraph, immutable to its users."""

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

    Nodes of `nx` carry an `op`, edges run from the op that makes a value to the op that reads it, with
    the operand position as key. `ops` is a topological order, which is also the order of execution.

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
        self.nx: nx.MultiDiGraph[str] = nx.MultiDiGraph()
        for op in ops:
            if op.name in self.nx:
                raise VerifyError(f"Two ops are named %{op.name} in graph {name!r}.")
            self.nx.add_node(op.name, op=op)
            for position, operand in enumerate(op.operands()):
                if operand not in self.nx or operand == op.name:
                    raise VerifyError(
                        f"Op %{op.name} ({op.target}, made by {op.made_by}) reads %{operand}, "
                        f"which is not defined before it in graph {name!r}."
                    )
                self.nx.add_edge(operand, op.name, key=position)
        nx.freeze(self.nx)

    @cached_property
    def ops(self) -> tuple[Op, ...]:
        """All ops, in order of execution."""
        return tuple(data["op"] for _, data in self.nx.nodes(data=True))

    def __getitem__(self, name: str) -> Op:
        op: Op = self.nx.nodes[name]["op"]
        return op

    def __contains__(self, name: object) -> bool:
        return name in self.nx

    def __len__(self) -> int:
        return len(self.nx)

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def users(self, name: str) -> tuple[Op, ...]:
        """Ops that read the op's result, each once, in order of execution."""
        return tuple(self[user] for user in self.nx.successors(name))

    @cached_property
    def position(self) -> Mapping[str, int]:
        """Place of each op in the order of execution."""
        return {name: index for index, name in enumerate(self.nx)}

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
