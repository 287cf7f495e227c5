"""From a plan's partition and the lowered graphs to every rank's program."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, chain

from graphpar.errors import VerifyError
from graphpar.ir.graph import Graph
from graphpar.ir.mesh import Layouts, coords_of, line_of, localized, numbered, whole_along
from graphpar.ir.ops import Dim, Op, TensorType
from graphpar.ir.recomputed import Units, units_of_member
from graphpar.ir.rows import rows_in
from graphpar.ir.shards import Layout, Split
from graphpar.ir.text import format_graph
from graphpar.ir.whole import tail_reason
from graphpar.partition.types import Partition
from graphpar.runtime.copies import Holding, Reduction, owners, ranks_of, reductions
from graphpar.runtime.lower import StageInterface, interface
from graphpar.runtime.other_batches import at_once, rescale, whole_batch
from graphpar.runtime.parcels import parcels_of
from graphpar.runtime.program import Meeting, RankProgram, Scatter, Slice
from graphpar.runtime.user_ops import foreign_targets, needed_code
from graphpar.runtime.zero import rows_of
from graphpar.schedule import Schedule, StageLink, backward_order, build_schedule


@dataclass(frozen=True)
class Placement:
    """Where a rank stands.

    Attributes:
        pipeline: Its pipeline.
        interfaces: Its stages there, and what each reads and makes.
        team: The ranks of its tensor group, itself included; itself alone where there is none.
        mesh: Members along each axis of a group of two; empty for one.
        slices: Of which tensors it holds a slice.
        held: The layouts of each of these along the axes of the group.
        partial: Parameters whose gradients are summed over members, with the axes along which.
        recompute: Ops of the units whose values are computed again for the backward.
    """

    pipeline: int
    interfaces: tuple[StageInterface, ...]
    team: tuple[int, ...] = ()
    mesh: tuple[int, ...] = ()
    slices: Mapping[str, Slice] = field(default_factory=dict)
    held: Mapping[str, Layouts] = field(default_factory=dict)
    partial: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    recompute: Units = ()

    def lines(self, rank: int) -> tuple[tuple[int, ...], ...]:
        """The ranks of the lines of a mesh that a rank of the group stands in, one along each axis."""
        member = self.team.index(rank)
        return tuple(
            tuple(self.team[k] for k in line_of(member, axis, self.mesh))
            for axis in range(len(self.mesh))
        )

    def holding(self, rank: int, label: str) -> Holding:
        """What a rank of the group holds of a tensor."""
        parts, sizes = self.partial.get(label, ()), self.mesh or (len(self.team),)
        coords = coords_of(self.team.index(rank), sizes)
        held = self.held.get(label, whole_along(len(sizes)))
        same = [axis for axis, layout in enumerate(held) if layout == "whole" and axis not in parts]
        alike = numbered([coords[axis] for axis in same], [sizes[axis] for axis in same])
        return Holding(rank, self.slices.get(label), bool(parts), alike)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of all parameters, buffers and constants the rank holds."""
        return tuple(dict.fromkeys(label for labels in self.tensors.values() for label in labels))

    @cached_property
    def tensors(self) -> Mapping[str, tuple[str, ...]]:
        """The same by kind, each once however many stages read it."""
        kinds = self.interfaces[0].tensors
        return {
            kind: tuple(dict.fromkeys(la for face in self.interfaces for la in face.tensors[kind]))
            for kind in kinds
        }

    @property
    def stages(self) -> tuple[int, ...]:
        """Its stages, numbered within the pipeline."""
        return tuple(face.stage for face in self.interfaces)


@dataclass(frozen=True)
class Lowered:
    """A partition with one lowered graph per pipeline.

    `graphs` are for any batch size where sizes are symbolic; `whole` tells that samples mix, so that
    every batch is one microbatch. `local` holds for each rank that is a member of a tensor group its own
    graph of its pipeline; `units` are the ops of each unit of the chain, needed where a stage recomputes.
    """

    partition: Partition
    graphs: tuple[Graph, ...]
    training: bool
    whole: bool = False
    local: Mapping[int, Graph] = field(default_factory=dict)
    units: Units = ()

    @cached_property
    def placements(self) -> tuple[Placement, ...]:
        """One per rank, in the order of `Partition.used_devices`."""
        rank_of = {device: rank for rank, device in enumerate(self.partition.used_devices)}
        stages: dict[int, list[int]] = {}
        places: dict[int, tuple[int, tuple[int, ...], tuple[int, ...]]] = {}
        for number, pipeline in enumerate(self.partition.pipelines):
            for index, choice in enumerate(pipeline.stages):
                for replica in choice.replicas:
                    team = tuple(rank_of[device] for device in replica.devices)
                    for rank in team:
                        places[rank] = number, team, replica.mesh
                        stages.setdefault(rank, []).append(index)
        return tuple(self._placement(rank, *places[rank], stages[rank]) for rank in sorted(places))

    def _placement(
        self,
        rank: int,
        pipeline: int,
        team: tuple[int, ...],
        mesh: tuple[int, ...],
        stages: Sequence[int],
    ) -> Placement:
        graph = self.local.get(rank, self.graphs[pipeline])
        faces = tuple(interface(graph, stage) for stage in stages)
        held = {label for face in faces for labels in face.tensors.values() for label in labels}
        choices = [self.partition.pipelines[pipeline].stages[stage] for stage in stages]
        again: Units = ()
        for stage, choice in zip(stages, choices, strict=True):
            units = self.units[choice.first : choice.last] if choice.recompute else ()
            again += units_of_member(graph, stage, units) if len(team) > 1 else units
        slices, layouts, partial = {}, {}, {}
        coords = coords_of(team.index(rank), mesh or (len(team),))
        for op in (*graph.sources("parameter"), *graph.sources("buffer")):
            label = str(op.args[0])
            if label not in held:
                continue
            own = _held(op, self.graphs[pipeline][op.name].type, len(coords))
            cut = _slice_of(own, coords)
            if cut is not None:
                slices[label], layouts[label] = cut, own
            parts = op.attr("partial")
            if parts:
                partial[label] = parts if isinstance(parts, tuple) else (0,)
        return Placement(pipeline, faces, team, mesh, slices, layouts, partial, again)

    def graph_of(self, rank: int) -> Graph:
        """The graph that a rank runs its stage of."""
        return self.local.get(rank, self.graphs[self.placements[rank].pipeline])

    @cached_property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """All ranks, the tensor groups, their lines, every set of ranks that sum gradients together."""
        everyone = tuple(range(len(self.placements)))
        summing = sorted({*ranks_of(self._reductions), *self.divided.values()})
        placed = enumerate(self.placements)
        lines = dict.fromkeys(line for rank, placement in placed for line in placement.lines(rank))
        return tuple(dict.fromkeys((everyone, *self.teams, *lines, *summing)))

    @cached_property
    def divided(self) -> Mapping[int, tuple[int, ...]]:
        """For each rank whose optimiser state is divided (ZeRO), the replicas it is divided among.

        Of tensor groups those are the members in equal places.
        """
        rank_of = {device: rank for rank, device in enumerate(self.partition.used_devices)}
        found: dict[int, tuple[int, ...]] = {}
        for choice in (c for pipeline in self.partition.pipelines for c in pipeline.stages):
            if self.training and choice.zero and len(choice.replicas) > 1:
                for alike in zip(*(replica.devices for replica in choice.replicas), strict=True):
                    group = tuple(rank_of[device] for device in alike)
                    found.update(dict.fromkeys(group, group))
        return found

    @cached_property
    def shards(self) -> tuple[Mapping[str, Slice], ...]:
        """For each rank the rows of what it holds that it steps alone, by parameter.

        Of what has fewer rows than there are replicas, or is held in other slices there, nothing.
        """
        found: list[Mapping[str, Slice]] = []
        for rank, placement in enumerate(self.placements):
            group = self.divided.get(rank, ())
            held = set(placement.tensors["parameter"]) if group else ()
            slices = [self.placements[other].slices for other in group]
            own = [
                (label, *rows)
                for label in self.trained
                if label in held
                and len({cuts.get(label) for cuts in slices}) == 1
                and (rows := rows_in(self._shape_held(rank, label)))[1] >= len(group)
            ]
            found.append(
                {
                    label: rows_of(rows, len(group), turn, group.index(rank), dim)
                    for turn, (label, dim, rows) in enumerate(own)
                }
            )
        return tuple(found)

    def _shape_held(self, rank: int, label: str) -> tuple[int, ...]:
        """Sizes of what a rank holds of a parameter."""
        shape = [size if isinstance(size, int) else 0 for size in self._parameter_shapes[label]]
        cut = self.placements[rank].slices.get(label)
        while cut is not None:
            shape[cut.dim] = shape[cut.dim] // sum(cut.counts) * cut.counts[cut.member]
            cut = cut.rows
        return tuple(shape)

    @cached_property
    def _parameter_shapes(self) -> Mapping[str, tuple[Dim, ...]]:
        return {str(op.args[0]): op.type.shape for op in self.graphs[0].sources("parameter")}

    @cached_property
    def stepped(self) -> tuple[Mapping[str, Slice], ...]:
        """For each rank the slices of whole tensors that it holds, or of them the rows that it steps."""
        found = []
        for placement, rows in zip(self.placements, self.shards, strict=True):
            cuts = dict(placement.slices)
            for label, own in rows.items():
                cuts[label] = cuts[label].divided(own) if label in cuts else own
            found.append(cuts)
        return tuple(found)

    def steppers(self, label: str) -> tuple[int, ...]:
        """The ranks that together step a trained parameter once: its first holders, or their replicas."""
        ranks = (holding.rank for holding in owners(self.holders[label]))
        alike = (self.divided[rank] if label in self.shards[rank] else (rank,) for rank in ranks)
        return tuple(chain.from_iterable(alike))

    @cached_property
    def givers(self) -> tuple[frozenset[str], ...]:
        """For each rank the tensors that are read from it: each is held once by all that give it."""
        given: list[set[str]] = [set() for _ in self.placements]
        for kind in ("parameter", "buffer", "constant"):
            for label, copies in self.copies(kind).items():
                for holding in owners(copies):
                    given[holding.rank].add(label)
        return tuple(map(frozenset, given))

    @cached_property
    def stepping_givers(self) -> tuple[frozenset[str], ...]:
        """The same with trained parameters as they are stepped: of divided ones replicas give rows."""
        given = [set(labels - set(self.holders)) for labels in self.givers]
        for label in self.holders:
            for rank in self.steppers(label):
                given[rank].add(label)
        return tuple(map(frozenset, given))

    @cached_property
    def teams(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of every tensor group of several."""
        return tuple(dict.fromkeys(p.team for p in self.placements if len(p.team) > 1))

    def copies(self, kind: str = "parameter") -> Mapping[str, tuple[tuple[Holding, ...], ...]]:
        """For each tensor of a kind what the members of each replica hold of it."""
        found: dict[str, dict[tuple[int, ...], list[Holding]]] = {}
        for rank, placement in enumerate(self.placements):
            for label in placement.tensors[kind]:
                holding = placement.holding(rank, label)
                found.setdefault(label, {}).setdefault(placement.team, []).append(holding)
        return {label: tuple(map(tuple, teams.values())) for label, teams in found.items()}

    @cached_property
    def holders(self) -> Mapping[str, tuple[tuple[Holding, ...], ...]]:
        """For each trained parameter what each replica holds of it."""
        trained = set(self.trained)
        return {label: copies for label, copies in self.copies().items() if label in trained}

    @cached_property
    def summed_bytes(self) -> Mapping[tuple[int, ...], float]:
        """Bytes of float32 gradients that every set of ranks sums, members of tensor groups left out."""
        graph = self.graphs[0]
        sizes = {str(op.args[0]): 4.0 * op.type.numel(1) for op in graph.sources("parameter")}
        found: dict[tuple[int, ...], float] = {}
        for label, parts in self._reductions.items():
            for part in parts:
                found[part.group] = found.get(part.group, 0.0) + sizes[label]
        return {} if self.teams else found

    @cached_property
    def _reductions(self) -> Mapping[str, list[Reduction]]:
        return {label: reductions(label, copies) for label, copies in self.holders.items()}

    @cached_property
    def trained(self) -> tuple[str, ...]:
        """Labels of the parameters that gradients reach, in the graph's order."""
        graph = self.graphs[0]
        reached: set[str] = set()
        for op in reversed(graph.ops):
            if op.target == "output" or (op.name in reached and op.attr("grad")):
                reached.update(op.operands())
        return tuple(
            str(op.args[0]) for op in graph.sources("parameter") if op.attr("grad") and op.name in reached
        )

    def programs(self, schedule: Schedule, batch: int) -> list[RankProgram]:
        """Every rank's program for a schedule of a global batch."""
        texts = {id(graph): format_graph(graph) for graph in (*self.graphs, *self.local.values())}
        owned = {label: self.steppers(label) for label in self.holders}
        starts = (0, *accumulate(schedule.microbatch_sizes))
        first_stages = (0, *accumulate(len(p.stages) for p in self.partition.pipelines))
        meetings = self._meetings(schedule)
        scatters = self._scatters(schedule)
        programs = []
        for rank, placement in enumerate(self.placements):
            mine = [r for rs in self._reductions.values() for r in rs if rank in r.group]
            mine = mine if self.training else []
            graph = self.graph_of(rank)
            foreign = [target for s in placement.stages for target in foreign_targets(graph, s)]
            imports, operators = needed_code(tuple(dict.fromkeys(foreign)))
            programs.append(
                RankProgram(
                    graph=texts[id(graph)],
                    stages=placement.stages,
                    training=self.training,
                    actions=tuple(str(action) for action in schedule.actions[rank]),
                    routes=schedule.routes,
                    sizes=schedule.microbatch_sizes,
                    first_samples=starts[:-1],
                    batch=batch,
                    shared={r.label: self.groups.index(r.group) for r in mine},
                    owned=tuple(la for la, ranks in owned.items() if rank in ranks),
                    silent=tuple(r.label for r in mine if rank in r.silent),
                    spread=tuple(r.label for r in mine if r.spread),
                    slices=dict(placement.slices),
                    teams=self.teams,
                    team=self.groups.index(placement.team) if len(placement.team) > 1 else -1,
                    lines=tuple(map(self.groups.index, placement.lines(rank))),
                    imports=imports,
                    operators=operators,
                    recompute=placement.recompute if self.training else (),
                    first_stage=first_stages[placement.pipeline],
                    rank=rank,
                    meetings={name: m for name, m in meetings.items() if rank in m.ranks},
                    scatter=scatters.get(rank),
                )
            )
        return programs

    def _scatters(self, schedule: Schedule) -> dict[int, Scatter]:
        """For each rank that divides its gradients among replicas how it does so."""
        found: dict[int, Scatter] = {}
        ranks = [(r, p) for r, p in enumerate(self.placements) if self._zero_of(r) > 1]
        if not ranks or not schedule.training:
            return found
        ordered = backward_order(schedule)
        for rank, placement in ranks:
            (stage,) = schedule.stages_of[rank]
            group = self.divided.get(rank, ())
            order = ordered.get(stage, ())
            if not group or not self.shards[rank]:
                continue
            leaders = [self.placements[other].team[0] for other in group]
            owners = (leaders.index(schedule.routes[m][placement.stages[0]]) for m in order)
            units = parcels_of(self.graph_of(rank), placement.stages[0], self.shards[rank], self.units)
            found[rank] = Scatter(group, group.index(rank), order, tuple(owners), units)
        return found

    def _zero_of(self, rank: int) -> int:
        placement = self.placements[rank]
        stages = self.partition.pipelines[placement.pipeline].stages
        return max(stages[stage].zero for stage in placement.stages)

    def _meetings(self, schedule: Schedule) -> dict[str, Meeting]:
        """Ops in which the parts of pipelines in step meet, where there are several parts."""
        if not self._in_step or schedule.num_microbatches < 2:
            return {}
        pipelines = [
            p
            for p, span in enumerate(schedule.pipelines)
            for _ in range(span.first_microbatch, span.last_microbatch)
        ]
        names = [op.name for op in self.graphs[0].ops if op.attr("meets")]
        found = {}
        for number, name in enumerate(names):
            stages = [self.graphs[p][name].attr("stage") for p in pipelines]
            ranks = (r[s] for r, s in zip(schedule.routes, stages, strict=True) if isinstance(s, int))
            found[name] = Meeting(number, tuple(ranks))
        return found

    @property
    def _in_step(self) -> bool:
        """Whether pipelines meet within the model, so that each takes its samples in one part."""
        return bool(self.graphs[0].output.attr("in_step"))

    def schedule(self, batch: int) -> Schedule:
        """The schedule for a global batch of so many samples; few samples leave ranks idle."""
        partition = self._for_batch(batch)
        if self.training and partition.schedule != "gpipe" and any(map(tail_reason, self.graphs)):
            raise VerifyError(
                f"The schedule is {partition.schedule}, but {tail_reason(self.graphs[0])}: all forwards "
                "have to come before the first backward. Plan with schedule='gpipe'."
            )
        links = stage_links(partition, self.graphs)
        return build_schedule(partition, links, self.training, idle_allowed=True)

    def _for_batch(self, batch: int) -> Partition:
        """The partition for so many samples."""
        working = sum(p.samples > 0 for p in self.partition.pipelines)
        if self.whole or (self._in_step and batch < working):
            return whole_batch(self.partition, batch)
        partition = rescale(self.partition, batch)
        if not self._in_step:
            return partition
        return at_once(partition)


def _held(op: Op, whole: TensorType, axes: int) -> Layouts:
    """How a weight is held along each axis, from what its op in a member's graph says."""
    found: list[Layout] = []
    for key in ("shard", "inner_shard")[:axes]:
        cut = op.attr(key)
        if not isinstance(cut, tuple):
            found.append("whole")
            continue
        dim, inner, *counts = cut
        size = whole.shape[dim]
        assert isinstance(size, int)
        found.append(Split(dim, tuple(counts), size // (sum(counts) * inner), inner))
    return tuple(found)


def _slice_of(held: Layouts, coords: Sequence[int]) -> Slice | None:
    """What a member holds of a weight: a slice, or a slice of a slice; None for all of it."""
    found: Slice | None = None
    for split, member in zip(localized(held, coords), coords, strict=True):
        if isinstance(split, Split):
            own = Slice(split.dim, split.counts, split.inner, member)
            found = own if found is None else found.divided(own)
    return found


def stage_links(partition: Partition, graphs: Sequence[Graph]) -> tuple[StageLink, ...]:
    """Which stages (numbered over all pipelines) exchange how much."""
    links: list[StageLink] = []
    first = 0
    for pipeline, graph in zip(partition.pipelines, graphs, strict=True):
        totals: dict[tuple[int, int], StageLink] = {}
        for op in graph.ops:
            if op.target != "gp.send":
                continue
            source, target = op.attr("stage"), op.args[1]
            assert isinstance(source, int) and isinstance(target, int)
            key = (first + source, first + target)
            per_sample = op.type.bytes(1) if op.type.batch_dims else 0
            fixed = 0 if op.type.batch_dims else op.type.bytes(1)
            back = bool(op.attr("grad"))
            old = totals.get(key, StageLink(*key, 0.0))
            totals[key] = replace(
                old,
                forward_bytes_per_sample=old.forward_bytes_per_sample + per_sample,
                backward_bytes_per_sample=old.backward_bytes_per_sample + back * per_sample,
                forward_fixed_bytes=old.forward_fixed_bytes + fixed,
                backward_fixed_bytes=old.backward_fixed_bytes + back * fixed,
            )
        links += totals.values()
        first += len(pipeline.stages)
    return tuple(links)
