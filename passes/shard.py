"""Rewrite a stage of a lowered graph into what one member of a tensor group computes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from graphpar.ir.graph import Graph, Level
from graphpar.ir.mesh import Layouts, Move, at_once, local_type, route, seen_along, whole_along
from graphpar.ir.ops import SOURCES, Argument, Attribute, Op, Ref, TensorType
from graphpar.ir.shards import Layout, Split
from graphpar.ir.strategies import Strategy, layout_of
from graphpar.passes.shard_args import local_arguments


@dataclass(frozen=True)
class Shard:
    """Local shapes, slices of weights, and a collective wherever layouts do not meet.

    Attributes:
        stage: The stage to rewrite; others stay as they are.
        member: Which member of the group.
        chosen: For ops of the stage how they are computed; an op without an entry is computed whole.
        forms: For a value that is read several times the layout into which it is brought first.
        weights: For parameters and buffers the slices that members hold; without an entry, all of it.
        partial: Weights whose gradients are parts because of another stage of the same members.
        size: Members along this axis; only asked for where there are two.
        inner: The second axis of a mesh: how what a member has by this one is shared again by its row.

    >>> from graphpar.ir.text import format_op, parse_graph
    >>> from graphpar.ir.strategies import strategies_of
    >>> g = parse_graph('''graph lowered "N" batch=2
    ... %x = input("x") : float32[B,4]
    ... %w = parameter("w") : float32[6,4] {grad=true}
    ... %y = aten.linear.default(%x, %w) : float32[B,6] {grad=true, stage=0}
    ... %output = output((%y,))
    ... ''')
    >>> columns = next(s for s in strategies_of(g, (2, 1))["y"] if "dim0:4" in str(s))
    >>> local = Shard(0, 1, {"y": columns}, weights={"w": columns.operands[1]}).run(g)
    >>> for op in local.ops[1:4]: print(format_op(op))
    %w = parameter("w") : float32[2,4] {grad=true, shard=(0, 1, 4, 2)}
    %y = aten.linear.default(%x, %w) : float32[B,2] {grad=true, stage=0} from(%y) by("shard")
    %y__whole = gp.all_gather(%y, 1, (4, 2), 1) : float32[B,6] {grad=true, stage=0} from(%y) by("shard")
    """

    stage: int
    member: int
    chosen: Mapping[str, Strategy] = field(default_factory=dict)
    forms: Mapping[str, Layout] = field(default_factory=dict)
    weights: Mapping[str, Layout] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()
    size: int = 0
    inner: "Shard | None" = None
    name: str = "shard"
    takes: Level = "lowered"
    gives: Level = "lowered"

    @property
    def axes(self) -> "tuple[Shard, ...]":
        """The axes of the mesh, the outer one first."""
        return (self, *(self.inner.axes if self.inner is not None else ()))

    def at(self, coords: Sequence[int]) -> "Shard":
        """The same for the member with these places along the axes."""
        inner = self.inner.at(coords[1:]) if self.inner is not None else None
        return replace(self, member=coords[0], inner=inner)

    def run(self, graph: Graph) -> Graph:
        """Build the member's graph."""
        return graph.with_ops(_Member(self, graph).ops())

    def partial_weights(self, graph: Graph) -> frozenset[str]:
        """Weights of which a reader wants a copy: a member's gradient is a part, summed once, after all.

        Readers that want the whole then give the first member its gradient and the others none.
        """
        return self.partial | frozenset(
            op.name
            for op in graph.sources("parameter")
            if op.attr("grad")
            and not isinstance(self.weights.get(op.name), Split)
            and any(
                layout in ("copied", "first")
                for user in graph.users(op.name)
                if user.attr("stage") == self.stage and user.name in self.chosen
                for name, layout in zip(user.operands(), self.chosen[user.name].operands, strict=True)
                if name == op.name
            )
        )


def shard_attribute(split: Split) -> tuple[int, ...]:
    """A slice of a weight as an attribute: dimension, inner size, then the counts."""
    return (split.dim, split.inner, *split.counts)


class _Member:
    """One rewriting."""

    def __init__(self, options: Shard, graph: Graph) -> None:
        self.options, self.graph = options, graph
        self.axes = options.axes
        self.coords = tuple(axis.member for axis in self.axes)
        self.sizes = tuple(axis.size for axis in self.axes)
        self.built: list[Op] = []
        self.have: dict[tuple[str, Layouts], str] = {}
        self.silent: dict[str, str] = {}
        self.fresh: set[str] = set()
        self.partial = tuple(axis.partial_weights(graph) for axis in self.axes)

    def ops(self) -> Iterator[Op]:
        for op in self.graph.ops:
            if op.target in SOURCES:
                self.built.append(self._source(op))
            elif op.target == "output":
                self.built.append(self._with_operands(op, dict.fromkeys(range(99), self._whole)))
            elif op.attr("stage") != self.options.stage or op.target == "gp.recv":
                self.built.append(op)
            elif op.target == "getitem":
                self.built.append(self._local(op, op.args, (self._made(op.name),)))
            else:
                self.built.append(self._computed(op))
        yield from self.built

    @property
    def _whole(self) -> Layouts:
        return whole_along(len(self.axes))

    # --- weights ---

    def _held(self, name: str) -> Layouts:
        return tuple(axis.weights.get(name, "whole") for axis in self.axes)

    def _source(self, op: Op) -> Op:
        held = self._held(op.name)
        local = op
        if held != self._whole:
            local = replace(op, types=(local_type(op.type, held, self.coords),))
        for key, layout in zip(("shard", "inner_shard"), held, strict=False):
            if isinstance(layout, Split):
                local = local.with_attrs(**{key: shard_attribute(layout)})
        parts = tuple(axis for axis, names in enumerate(self.partial) if op.name in names)
        if not parts:
            return local
        # Held by all members, read or not, so that they stay alike.
        return local.with_attrs(partial=parts if len(self.axes) > 1 else True, held=self.options.stage)

    # --- values ---

    def _strategies(self, op: Op) -> tuple[Strategy, ...]:
        whole: Layout = "whole"
        computed_whole = Strategy((whole,) * len(op.operands()), (whole,) * len(op.types))
        return tuple(axis.chosen.get(op.name, computed_whole) for axis in self.axes)

    def _made(self, name: str) -> Layouts:
        if self.graph[name].target in SOURCES:
            return self._held(name)
        return tuple(layout_of(self.graph, axis.chosen, name) for axis in self.axes)

    def _read(self, name: str, wanted: Layouts) -> str:
        """The name under which a value stands in layouts, made where it is not there yet."""
        if any(name in names for names in self.partial):
            return self._read_in_parts(name, wanted)
        made = self._made(name)
        form = tuple(a.forms.get(name, own) for a, own in zip(self.axes, made, strict=True))
        first = self._converted(name, name, made, form)
        return self._converted(name, first, form, wanted)

    def _read_in_parts(self, name: str, wanted: Layouts) -> str:
        """A weight whose gradients are parts along some axes: it is a copy there for whoever reads it."""
        made, asked, is_silent = list(self._made(name)), list(wanted), False
        for axis, names in enumerate(self.partial):
            if name not in names:
                continue
            made[axis] = "copied"
            if not isinstance(wanted[axis], Split):
                asked[axis] = "copied"
                is_silent = is_silent or (wanted[axis] == "whole" and self.coords[axis] > 0)
        found = self._converted(name, name, tuple(made), tuple(asked))
        # Last, so that what comes before it is the same for all members.
        return self._silent(found) if is_silent else found

    def _silent(self, name: str) -> str:
        """A weight whose gradient another member has already: its values, and a gradient of zeros.

        Without any gradient what is made of it alone would have none either, and collectives of the
        backward would wait for this member.
        """
        if name not in self.silent:
            values = self._derived(name, "values", "aten.detach.default", (Ref(name),), grad=False)
            zeros = self._derived(name, "zeros", "aten.mul.Scalar", (Ref(name), 0.0), grad=True)
            both = (Ref(values), Ref(zeros))
            self.silent[name] = self._derived(name, "silent", "aten.add.Tensor", both, grad=True)
        return self.silent[name]

    def _derived(
        self, name: str, suffix: str, target: str, args: tuple[Argument, ...], *, grad: bool
    ) -> str:
        """Add an op of a weight's own type; its name."""
        source = next(op for op in reversed(self.built) if op.name == name)
        made = replace(
            source,
            name=self._fresh(f"{name}__{suffix}"),
            target=target,
            args=args,
            kwargs=(),
            origin=source.origin or (name,),
            made_by=self.options.name,
            attrs=(),
        )
        attrs = {"stage": self.options.stage, **({"grad": True} if grad else {})}
        self.built.append(made.with_attrs(**attrs))
        return made.name

    def _converted(self, name: str, start: str, made: Layouts, wanted: Layouts) -> str:
        moves = route(self.sizes, made, wanted, bool(self.graph[name].attr("grad")))
        assert moves is not None, (name, made, wanted)
        for move in moves:
            if move.how.target:
                start = self._moved(name, start, move)
        return start

    def _moved(self, name: str, start: str, move: Move) -> str:
        """The value behind one conversion."""
        key = (start, move.after)
        if key not in self.have:
            source = self.graph[name]
            wanted = move.after[move.axis or 0]
            converted = Op(
                name=self._fresh(f"{name}__{_word(wanted)}"),
                target=move.how.target,
                args=(Ref(start), *self._cuts(move)),
                kwargs=(("axis", move.axis),) if len(self.axes) > 1 and move.axis is not None else (),
                types=(local_type(source.type, move.after, self.coords),),
                module=source.module,
                source=source.source,
                origin=source.origin or (name,),
                made_by=self.options.name,
            )
            attrs: dict[str, Attribute] = {"stage": self.options.stage}
            if source.attr("grad"):
                attrs["grad"] = True
            self.built.append(converted.with_attrs(**attrs))
            self.have[key] = converted.name
        return self.have[key]

    def _cuts(self, move: Move) -> tuple[Argument, ...]:
        """Dimension, units of each member and inner size of the slices before and after."""
        found: list[Argument] = []
        for layouts in (move.before, move.after):
            if move.axis is None:
                layout = at_once(layouts, self.sizes)
            else:
                layout = seen_along(move.axis, layouts, self.coords)
            if isinstance(layout, Split):
                found += [layout.dim, layout.numbers, layout.inner]
        return tuple(found)

    def _fresh(self, name: str) -> str:
        number, free = 1, name
        while free in self.fresh or free in self.graph:
            number += 1
            free = f"{name}{number}"
        self.fresh.add(free)
        return free

    # --- ops ---

    def _computed(self, op: Op) -> Op:
        ways = self._strategies(op)
        wanted: dict[int, Layouts] = dict(enumerate(zip(*(way.operands for way in ways), strict=True)))
        for way, member in zip(ways, self.coords, strict=True):
            for slot in way.first_only if member > 0 else ():
                wanted.pop(slot, None)
        read = self._with_operands(op, wanted)
        local = self._local(op, read.args, tuple(zip(*(way.results for way in ways), strict=True)))
        local = replace(local, kwargs=read.kwargs)
        if op.target == "gp.cast_weight" and local.operands() != op.operands():
            # What was gathered for this once is no weight that keeps its lower copy.
            local = replace(
                local,
                target="aten._to_copy.default",
                args=local.args[:1],
                kwargs=(("dtype", op.args[1]),),
            )
        return local_arguments(op, local, ways, self.coords)

    def _with_operands(self, op: Op, wanted: Mapping[int, Layouts]) -> Op:
        """The op reading each operand in the layout wanted of it; slots without one stay."""
        slots = iter(range(len(op.operands())))
        change = {}
        for slot, name in zip(slots, op.operands(), strict=True):
            stage = self.graph[name].attr("stage")
            if slot in wanted and stage in (None, self.options.stage):
                change[slot] = (
                    self._read(name, wanted[slot]) if op.target != "output" else self._result(name)
                )
        return _with_slots(op, change)

    def _result(self, name: str) -> str:
        inside = self.graph[name].attr("stage") == self.options.stage
        return self._read(name, self._whole) if inside else name

    def _local(self, op: Op, args: tuple[Argument, ...], layouts: tuple[Layouts, ...]) -> Op:
        types = tuple(
            local_type(kind, own, self.coords) if isinstance(kind, TensorType) else kind
            for kind, own in zip(op.types, layouts, strict=True)
        )
        local = replace(op, args=args, types=types)
        if local == op:
            return op
        return replace(local, origin=op.origin or (op.name,), made_by=self.options.name)


def _word(layout: Layout) -> str:
    return f"split{layout.dim}" if isinstance(layout, Split) else layout


def _with_slots(op: Op, change: Mapping[int, str]) -> Op:
    """The op with operands renamed by their number, not by their name: one value may stand twice."""
    count = iter(range(len(op.operands())))

    def renamed(argument: Argument) -> Argument:
        if isinstance(argument, Ref):
            slot = next(count)
            return Ref(change.get(slot, argument.name))
        if isinstance(argument, tuple):
            return tuple(renamed(item) for item in argument)
        return argument

    args = tuple(renamed(a) for a in op.args)
    return replace(op, args=args, kwargs=tuple((k, renamed(v)) for k, v in op.kwargs))
