"""Passes and pipelines: a pass is frozen data plus `run`; levels must meet, rules are checked between.

A pass says which level it takes and which it gives. A pipeline whose levels do not meet cannot be
built, and after each pass the graph is checked against the rules of its level.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

from graphpar.errors import VerifyError
from graphpar.ir.graph import Graph, Level
from graphpar.ir.rules import verify


@runtime_checkable
class Pass(Protocol):
    """What every pass offers; implementations are frozen dataclasses whose fields are their options."""

    @property
    def name(self) -> str:
        """Short name shown in logs and kept in `Op.made_by`."""

    @property
    def takes(self) -> Level:
        """Level of the graph it reads."""

    @property
    def gives(self) -> Level:
        """Level of the graph it builds."""

    def run(self, graph: Graph) -> Graph:
        """Build a new graph; never changes the one it is given."""


@dataclass(frozen=True)
class Step:
    """What one pass did: seconds spent and the number of ops before and after."""

    name: str
    seconds: float
    ops_before: int
    ops_after: int


@dataclass(frozen=True)
class Trace:
    """What a pipeline did, pass by pass."""

    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "\n".join(
            f"{s.name:<16} {s.ops_before:>6} -> {s.ops_after:>6} ops  {s.seconds * 1e3:8.1f} ms"
            for s in self.steps
        )


@dataclass(frozen=True)
class Pipeline:
    """Passes in order.

    Raises:
        VerifyError: Two neighbours do not meet: one gives another level than the next takes.
    """

    passes: tuple[Pass, ...]

    def __post_init__(self) -> None:
        for left, right in zip(self.passes, self.passes[1:], strict=False):
            if left.gives != right.takes:
                raise VerifyError(
                    f"Pass {left.name!r} gives a {left.gives} graph but {right.name!r}, which "
                    f"follows it, takes a {right.takes} one; put a pass between them that leads over."
                )

    def run(
        self, graph: Graph, *, watch: Callable[[Pass, Graph], None] | None = None
    ) -> tuple[Graph, Trace]:
        """Run all passes; `watch` sees the graph after each.

        Raises:
            VerifyError: The graph has the wrong level, or a pass broke a rule; names the pass.
        """
        steps = []
        for current in self.passes:
            if graph.level != current.takes:
                raise VerifyError(
                    f"Pass {current.name!r} takes a {current.takes} graph, not a {graph.level} one."
                )
            start = time.perf_counter()
            built = current.run(graph)
            try:
                verify(built)
            except VerifyError as error:
                raise VerifyError(f"After pass {describe(current)}: {error}") from error
            steps.append(Step(current.name, time.perf_counter() - start, len(graph), len(built)))
            graph = built
            if watch is not None:
                watch(current, graph)
        return graph, Trace(tuple(steps))


def describe(current: Pass) -> str:
    """The pass with its options, as text for people."""
    options = ", ".join(
        f"{f.name}={getattr(current, f.name)!r}"[:80]
        for f in fields(current)  # type: ignore[arg-type]
    )
    return f"{current.name}({options})"
