"""An independent judge of sharding answers: plain integers, no arrays, nothing of the solver."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from graphpar.partition.number_rows import Number
from graphpar.partition.problems import IMPOSSIBLE_COST, ShardingProblem


@dataclass(frozen=True)
class ShardingVerdict:
    """Cost and peak memory of an answer, and everything that is wrong with it."""

    cost: Number
    peak: Number
    errors: tuple[str, ...]

    @property
    def feasible(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors


def check_sharding(problem: ShardingProblem, answer: Sequence[int]) -> ShardingVerdict:
    """Price an answer from the problem as read, with exact integers.

    >>> problem = ShardingProblem("two", ((0, 2), (1, 3)), ((5, 1), (2, 2)), ((0, 8), (4, 0)),
    ...                           ((0, 1),), ((0, 9, 3, 0),), 8)
    >>> check_sharding(problem, [1, 1])
    ShardingVerdict(cost=3, peak=8, errors=())
    >>> check_sharding(problem, [1, 0]).errors
    ('memory at time 1 is 12, above the limit 8',)
    """
    if len(answer) != len(problem.node_costs):
        return ShardingVerdict(0, 0, (f"{len(answer)} strategies for {len(problem.node_costs)} nodes",))
    for node, strategy in enumerate(answer):
        if not 0 <= strategy < len(problem.node_costs[node]):
            return ShardingVerdict(0, 0, (f"node {node} has no strategy {strategy}",))
    errors = []
    total: Number = 0
    for node, strategy in enumerate(answer):
        cost = problem.node_costs[node][strategy]
        if cost >= IMPOSSIBLE_COST:
            errors.append(f"node {node} takes its impossible strategy {strategy}")
        total += cost
    for edge, ends in enumerate(problem.edge_nodes):
        place = 0
        for node in ends:
            place = place * len(problem.node_costs[node]) + answer[node]
        cost = problem.edge_costs[edge][place]
        if cost >= IMPOSSIBLE_COST:
            errors.append(f"edge {edge} joins impossible strategies")
        total += cost
    peak, when = peak_usage(problem, answer)
    if problem.usage_limit is not None and peak > problem.usage_limit:
        errors.append(f"memory at time {when} is {peak}, above the limit {problem.usage_limit}")
    return ShardingVerdict(total, peak, tuple(errors))


def peak_usage(problem: ShardingProblem, answer: Sequence[int]) -> tuple[Number, int]:
    """The most memory that an answer has live at once, and when first."""
    change: dict[int, Number] = {}
    for (begin, end), usage, strategy in zip(problem.intervals, problem.usages, answer, strict=True):
        if begin < end:
            change[begin] = change.get(begin, 0) + usage[strategy]
            change[end] = change.get(end, 0) - usage[strategy]
    moments = sorted(change)
    live = list(accumulate(change[moment] for moment in moments))
    peak = max(live, default=0)
    return (peak, moments[live.index(peak)]) if live else (0, 0)
