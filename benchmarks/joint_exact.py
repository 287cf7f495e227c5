"""What the planner loses against all decisions at once, every plan played through, on small clusters.

    python benchmarks/joint_exact.py [--seeds N] [--first N] [--blocks N] [--limit S] [--json]

Clusters are those of `joint_tables.py`. All of it is decided at once here: sets of pipelines side by
side and their shares, microbatches, stages and who runs them in which order, a mode for each stage
(format, computing again, ZeRO, how a tensor group shares its ops), and the order of work: 1F1B, GPipe,
zero-bubble (with as much memory as it wants, and with no more than 1F1B), interleaved with two or three
stages per device, and both together. Each plan is played through by the simulator, as it would run;
what counts is the simulated step.

Plans are left out only with a proof that their step is no shorter than the best one's: a device has all
its work to do, after a microbatch came through the stages before and before its gradient went back. Ways
that another one outdoes in seconds and bytes are left out, too; a tensor group has one way for each of
the two kinds of blocks, and stages of an interleaved device share their mode. Where `--limit` seconds are
not enough, what was not looked at is bounded.

The planner is asked as `plan` asks it: `partition` with a gap of zero, then `choose_plan`. Groups have
the fastest way and the one that holds least. Losses are told as they are, and with the planner's rule
that an order without a formula has to be a tenth shorter.
"""

import argparse
import heapq
import itertools
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from graphpar.choice.final import choose_plan
from graphpar.choice.orders import judged_s
from graphpar.cost import CostTable
from graphpar.errors import InfeasibleError, VerifyError
from graphpar.partition.pipeline import partition
from graphpar.partition.types import PipelineChoice, Replica, ScheduleName, StageChoice, StagePace
from graphpar.schedule.simulated import deal_any, has_formula, simulated, stage_paces

sys.path.insert(0, str(Path(__file__).parent))

from joint_tables import tables

CHUNKS = (2, 3)
"""Stages per device of interleaved plans."""

Pipelines = tuple[PipelineChoice, ...]


@dataclass(frozen=True)
class Loss:
    """Simulated steps: of the planner's plan, of the best plan, and of the best under a formula.

    `judged_s` is the best by the planner's rule; `searched_s` what the search ended with, before other
    orders were tried. `open_s` bounds what time did not allow to look at; infinite for nothing.
    """

    planned_s: float
    searched_s: float
    best_s: float
    formula_s: float
    judged_s: float
    planned: ScheduleName
    best: ScheduleName
    played: int
    open_s: float


@dataclass(frozen=True)
class _Staffed:
    """Units on some devices in a mode, and seconds that any order of work needs.

    `own_s` is what some replica has to do in all, `first_s` without gradients of weights; `costs` are
    all seconds and bytes.
    """

    choice: StageChoice
    ahead_s: float
    back_s: float
    own_s: float
    first_s: float
    costs: tuple[float, ...]


class Exact:
    """Every plan of a table, the most promising first."""

    def __init__(self, table: CostTable, cutoff_s: float) -> None:
        self.table = table
        self.best_s = self.formula_s = self.judged_s = cutoff_s
        self.best: ScheduleName = "1f1b"
        self.best_plan: Pipelines = ()
        self.formula_plan: Pipelines = ()
        self.played = 0
        self.open_s = math.inf
        self._staffed: dict[tuple[int, int, tuple[str, ...], int, int], list[_Staffed]] = {}

    def search(self, limit_s: float) -> None:
        """Play through what may be shorter than the best, until nothing is left or time is up."""
        until_s = time.process_time() + limit_s
        heap = [(bound, i, plan) for i, (bound, plan) in enumerate(self._plans())]
        heapq.heapify(heap)
        while heap:
            bound, _, plan = heapq.heappop(heap)
            # Orders without a formula are judged to be longer, so what is below the judged best counts.
            if bound >= max(self.best_s, self.formula_s, self.judged_s):
                return
            if time.process_time() > until_s:
                self.open_s = bound
                return
            self._play(plan, bound)

    # --- plans ---

    def _plans(self) -> Iterator[tuple[float, Pipelines]]:
        table = self.table
        for groups in self._groupings(tuple(table.class_of)):
            for shares in _shares(table.batch, len(groups)):
                own = [list(self._pipelines(g, n)) for g, n in zip(groups, shares, strict=True)]
                for chosen in itertools.product(*own):
                    yield max(bound for bound, _ in chosen), tuple(p for _, p in chosen)

    def _groupings(self, devices: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ...]]:
        """Sets of disjoint sets of devices; of those that differ in equal devices alone one."""
        seen = set()
        for labels in itertools.product(range(len(devices) + 1), repeat=len(devices)):
            groups = [
                tuple(d for d, n in zip(devices, labels, strict=True) if n == k) for k in range(1, 5)
            ]
            groups = sorted(g for g in groups if g)
            kinds = tuple(sorted(tuple(self.table.class_of[d] for d in g) for g in groups))
            if groups and kinds not in seen:
                seen.add(kinds)
                yield tuple(groups)

    def _pipelines(
        self, devices: tuple[str, ...], samples: int
    ) -> Iterator[tuple[float, PipelineChoice]]:
        seen = set()
        for microbatches in range(1, min(samples, self.table.max_microbatches) + 1):
            for line in _lines(devices):
                if max(map(len, line)) > 2 * microbatches:
                    continue
                kinds = (microbatches, tuple(tuple(self.table.class_of[d] for d in own) for own in line))
                if kinds in seen:
                    continue
                seen.add(kinds)
                yield from self._cut(line, samples, microbatches)

    def _cut(
        self, line: tuple[tuple[str, ...], ...], samples: int, microbatches: int
    ) -> Iterator[tuple[float, PipelineChoice]]:
        units = self.table.num_units
        for chunks in (1, *CHUNKS):
            number = chunks * len(line)
            if number > units or (chunks > 1 and len(line) < 2):
                continue
            for cuts in itertools.combinations(range(1, units), number - 1):
                edges = (0, *cuts, units)
                rows = [
                    self._ways(edges[i], edges[i + 1], line[i % len(line)], samples, microbatches)
                    for i in range(number)
                ]
                for stages in _joined(rows, len(line), chunks):
                    bound = _bound_s(stages, len(line))
                    if bound < self._cutoff_s:
                        chosen = tuple(s.choice for s in stages)
                        yield bound, PipelineChoice(samples, microbatches, chosen)

    @property
    def _cutoff_s(self) -> float:
        return max(self.best_s, self.formula_s, self.judged_s)

    def _ways(
        self, first: int, last: int, devices: tuple[str, ...], samples: int, microbatches: int
    ) -> list[_Staffed]:
        key = first, last, devices, samples, microbatches
        if key not in self._staffed:
            found = list(self._all_ways(first, last, devices, samples, microbatches))
            self._staffed[key] = [
                w
                for i, w in enumerate(found)
                if not any(_outdoes(o, w, j < i) for j, o in enumerate(found) if j != i)
            ]
        return self._staffed[key]

    def _all_ways(
        self, first: int, last: int, devices: tuple[str, ...], samples: int, microbatches: int
    ) -> Iterator[_Staffed]:
        table = self.table
        for mode in table.every_mode:
            width, rest = divmod(len(devices), len(mode.members))
            if rest or width > microbatches or (width == 1 and mode.zero):
                continue
            own = [devices[i * len(mode.members) : (i + 1) * len(mode.members)] for i in range(width)]
            members = [tuple(table.class_of[d] for d in r) for r in own]
            if members[0] != mode.members:
                continue
            replicas = tuple(Replica(r[0], 0, r[1:], mode.shares) for r in own)
            choice = StageChoice(first, last, replicas, mode.precision, mode.recompute, mode.zero)
            numbers = [table.mode_number(choice, r) for r in replicas]
            if all(n is not None for n in numbers):
                size = samples // microbatches
                found = self._staffing(choice, [n for n in numbers if n is not None], size, microbatches)
                if found is not None and found.own_s < self._cutoff_s:
                    yield found

    def _staffing(
        self, choice: StageChoice, modes: list[int], size: int, microbatches: int
    ) -> _Staffed | None:
        """None where weights, gradients and state alone do not fit."""
        table, width = self.table, len(modes)
        units = range(choice.first, choice.last)
        ahead, back, later, held, numbers = [], [], [], 0.0, []
        for mode in modes:
            costs = [table.every_mode[mode].costs[table.units[u]] for u in units]
            ahead.append(math.fsum(table.forward_s(u, mode, size) for u in units))
            later.append(math.fsum(table.weight_s(u, mode, size) for u in units))
            back.append(math.fsum(table.backward_s(u, mode, size) for u in units) - later[-1])
            weights = sum(c.weight_bytes[0] for c in costs)
            gradients = sum(c.gradient_bytes[0] for c in costs) / (width if choice.zero > 1 else 1)
            state = sum(c.optimizer_bytes[0] for c in costs) / (width if choice.zero else 1)
            saved = sum(table.at_size(c.saved_bytes[0], size) for c in costs)
            working = max(table.at_size(c.working_bytes[0], size) for c in costs)
            deferred = sum(table.at_size(c.deferred_bytes[0], size) for c in costs if c.deferred_bytes)
            held = weights + gradients + state
            memory = table.device_classes[table.every_mode[mode].members[0]].memory_bytes
            if held + saved + table.reserved_bytes > memory * (1 + 1e-9):
                return None
            moved = sum(c.gradient_bytes[0] for c in costs)
            numbers += [held, saved, working, deferred, moved if width > 1 else 0.0, float(choice.zero)]
        # However microbatches are dealt, some replica has so many of them.
        most = -(-microbatches // width)
        needs = [a + b for a, b in zip(ahead, back, strict=True)]
        own = most * min(n + w for n, w in zip(needs, later, strict=True))
        every = (*ahead, *back, *later, *numbers)
        return _Staffed(choice, min(ahead), min(back), own, most * min(needs), every)

    # --- playing ---

    def _play(self, plan: Pipelines, bound: float) -> None:
        stages = [s for p in plan for s in p.stages]
        shared = any(len(p.stages) > len({s.replicas for s in p.stages}) for p in plan)
        groups = any(r.others for s in stages for r in s.replicas)
        deep = any(len(p.stages) > 1 and p.microbatches > 1 for p in plan)
        names: list[tuple[ScheduleName, bool]] = [] if shared else [("1f1b", False), ("gpipe", False)]
        if all(s.zero < 2 for s in stages) and not (shared and groups):
            names += [("zero-bubble", False), ("zero-bubble", True)] if deep else []
            names += [("interleaved", False)] if shared else []
        for name, frugal in names:
            if judged_s(bound, name) >= self.judged_s and bound >= self.best_s:
                continue
            step_s = self._step_s(plan, name, frugal)
            if step_s is None:
                continue
            self.judged_s = min(self.judged_s, judged_s(step_s, name))
            if has_formula(name) and step_s < self.formula_s:
                self.formula_s, self.formula_plan = step_s, plan
            if step_s < self.best_s:
                self.best_s, self.best, self.best_plan = step_s, name, plan

    def _step_s(self, plan: Pipelines, name: ScheduleName, frugal: bool) -> float | None:
        table = self.table
        self.played += 1
        try:
            dealt = tuple(deal_any(table, p, name) for p in plan)
            if any(r.microbatches == 0 for p in dealt for s in p.stages for r in s.replicas):
                return None
            paces = _frugal(table, dealt) if frugal else None
            played = simulated(table, dealt, name, paces)
        except (ValueError, VerifyError):
            return None
        return played.step_s if played.fits(table) else None


def _frugal(table: CostTable, pipelines: Pipelines) -> tuple[StagePace, ...]:
    """Paces that keep no more microbatches in any device than 1F1B does."""
    paces = iter(stage_paces(table, pipelines))
    return tuple(
        replace(next(paces), held=-(-sum(len(s.replicas) for s in p.stages[i:]) // len(stage.replicas)))
        for p in pipelines
        for i, stage in enumerate(p.stages)
    )


def _outdoes(one: _Staffed, other: _Staffed, earlier: bool) -> bool:
    """Whether a way is no worse in anything, and better in something or earlier in the list."""
    mine, theirs = one.costs, other.costs
    if len(mine) != len(theirs):
        return False
    return all(a <= b for a, b in zip(mine, theirs, strict=True)) and (mine != theirs or earlier)


def _bound_s(stages: Sequence[_Staffed], devices: int) -> float:
    """No order of work of these stages is shorter; stages of a device are every `devices`-th."""
    there, back = 0.0, 0.0
    works: dict[int, list[float]] = {}
    for number, stage in enumerate(stages):
        work = works.setdefault(number % devices, [there, back, 0.0, 0.0])
        work[2] += stage.own_s
        work[3] += stage.first_s
        there += stage.ahead_s
        back += stage.back_s
    # What may come later need not be done before the last gradient goes back.
    return max(ahead + max(own, first + behind) for ahead, behind, own, first in works.values())


def _joined(rows: Sequence[list[_Staffed]], devices: int, chunks: int) -> Iterator[tuple[_Staffed, ...]]:
    """A way for every stage; stages of one device share their mode."""
    if chunks == 1:
        yield from itertools.product(*rows)
        return
    by_mode = []
    for device in range(devices):
        mine = rows[device::devices]
        keys = [{_mode_of(w): w for w in row if not w.choice.replicas[0].others} for row in mine]
        shared = set(keys[0]).intersection(*keys[1:])
        by_mode.append([[key[mode] for key in keys] for mode in sorted(shared)])
    for chosen in itertools.product(*by_mode):
        yield tuple(chosen[i % devices][i // devices] for i in range(devices * chunks))


def _mode_of(way: _Staffed) -> tuple[object, ...]:
    choice = way.choice
    return choice.precision, choice.recompute, choice.zero


def _lines(devices: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], ...]]:
    """All ways to line up non-empty disjoint sets that together are the devices."""
    if not devices:
        yield ()
        return
    for size in range(1, len(devices) + 1):
        for first in itertools.combinations(devices, size):
            rest = tuple(d for d in devices if d not in first)
            for others in _lines(rest):
                yield (first, *others)


def _shares(batch: int, number: int) -> Iterator[tuple[int, ...]]:
    if number == 1:
        yield (batch,)
        return
    for first in range(1, batch - number + 2):
        for others in _shares(batch - first, number - 1):
            yield (first, *others)


def loss(seed: int, blocks: int, limit_s: float) -> Loss | None:
    """What the planner loses on a drawn cluster; None where it finds nothing that fits."""
    table, whole = tables(seed, blocks)
    try:
        found = partition(table, gap=0.0, time_limit_s=120.0)
    except InfeasibleError:
        return None
    chosen = choose_plan(table, found, time_limit_s=60.0)
    searched_s = simulated(table, found.pipelines, found.schedule).step_s
    planned_s = chosen.objective_s
    if has_formula(chosen.schedule):
        planned_s = simulated(table, chosen.pipelines, chosen.schedule).step_s
    exact = Exact(whole, math.inf)
    hair = 1 + 1e-9
    exact.best_s, exact.best = planned_s * hair, chosen.schedule
    exact.formula_s = searched_s * hair
    exact.judged_s = min(judged_s(planned_s, chosen.schedule), searched_s) * hair
    exact.search(limit_s)
    return Loss(
        planned_s,
        searched_s,
        min(exact.best_s, planned_s),
        min(exact.formula_s, searched_s),
        min(exact.judged_s, judged_s(planned_s, chosen.schedule)),
        chosen.schedule,
        exact.best,
        exact.played,
        exact.open_s,
    )


def main() -> None:
    """Draw clusters, plan them, look at everything, print what is lost."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="N")
    parser.add_argument("--blocks", type=int, default=6, metavar="N")
    parser.add_argument("--limit", type=float, default=60.0, metavar="S", help="of CPU per cluster")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    rows: dict[int, Loss] = {}
    for seed in range(arguments.first, arguments.first + arguments.seeds):
        found = loss(seed, arguments.blocks, arguments.limit)
        if found is None:
            continue
        rows[seed] = found
        if not arguments.json:
            print(_told(seed, found), flush=True)
    if arguments.json:
        print(json.dumps({seed: vars(row) for seed, row in rows.items()}, indent=1))


def _told(seed: int, row: Loss) -> str:
    judged = row.planned_s if has_formula(row.planned) else judged_s(row.planned_s, row.planned)
    left = "" if math.isinf(row.open_s) else f"  open from {row.open_s:.4g} s on"
    return (
        f"seed {seed:3}  {row.planned:11} {row.planned_s:8.4g} s  "
        f"lost {row.planned_s / row.best_s - 1:7.2%} to {row.best:11}, "
        f"{judged / row.judged_s - 1:7.2%} by the rule; search "
        f"{row.searched_s / row.formula_s - 1:7.2%}  {row.played} played{left}"
    )


if __name__ == "__main__":
    main()
