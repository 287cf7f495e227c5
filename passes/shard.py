"""Rewrite a stage of a lowered graph into what one member of a tensor group computes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from graphpar.ir.conversions import conversion
from graphpar.ir.graph import Graph, Level
from graphpar.ir.ops import SOURCES, Argument, Attribute, Op, Ref, TensorType
from graphpar.ir.shards import Layout, Split
from graphpar.ir.strategies import Strategy, layout_of
from graphpar.passes.shard_args import localized


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
    name: str = "shard"
    takes: Level = "lowered"
    gives: Level = "lowered"

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
        self.built: list[Op] = []
        self.have: dict[tuple[str, Layout], str] = {}
        self.fresh: set[str] = set()
        self.partial = options.partial_weights(graph)

    def ops(self) -> Iterator[Op]:
        for op in self.graph.ops:
            if op.target in SOURCES:
                self.built.append(self._source(op))
            elif op.target == "output":
                self.built.append(self._with_operands(op, dict.fromkeys(range(99), "whole")))
            elif op.attr("stage") != self.options.stage or op.target == "gp.recv":
                self.built.append(op)
            elif op.target == "getitem":
                self.built.append(self._local(op, op.args, (self._made(op.name),)))
            else:
                self.built.append(self._computed(op))
        yield from self.built

    # --- weights ---

    def _source(self, op: Op) -> Op:
        layout = self.options.weights.get(op.name)
        if isinstance(layout, Split):
            local = replace(op, types=(layout.local(op.type, self.options.member),))
            return local.with_attrs(shard=shard_attribute(layout))
        if op.name in self.partial:
            # Held by all members, read or not, so that they stay alike.
            return op.with_attrs(partial=True, held=self.options.stage)
        return op

    # --- values ---

    def _strategy(self, op: Op) -> Strategy:
        found = self.options.chosen.get(op.name)
        if found is not None:
            return found
        whole: Layout = "whole"
        return Strategy((whole,) * len(op.operands()), (whole,) * len(op.types))

    def _made(self, name: str) -> Layout:
        if self.graph[name].target in SOURCES:
            return self.options.weights.get(name, "whole")
        return layout_of(self.graph, self.options.chosen, name)

    def _read(self, name: str, wanted: Layout) -> str:
        """The name under which a value stands in a layout, made where it is not there yet."""
        if name in self.partial and not isinstance(wanted, Split):
            return name if wanted != "whole" or self.options.member == 0 else self._silent(name)
        made = self._made(name) if name not in self.partial else "copied"
        form = self.options.forms.get(name, made)
        first = self._converted(name, name, made, form)
        return self._converted(name, first, form, wanted)

    def _silent(self, name: str) -> str:
        """A weight whose gradient another member has already: its values, and a gradient of zeros.

        Without any gradient what is made of it alone would have none either, and collectives of the
        backward would wait for this member.
        """
        key: tuple[str, Layout] = (name, "whole")
        if key not in self.have:
            values = self._derived(name, "values", "aten.detach.default", (Ref(name),), grad=False)
            zeros = self._derived(name, "zeros", "aten.mul.Scalar", (Ref(name), 0.0), grad=True)
            both = (Ref(values), Ref(zeros))
            self.have[key] = self._derived(name, "silent", "aten.add.Tensor", both, grad=True)
        return self.have[key]

    def _derived(
        self, name: str, suffix: str, target: str, args: tuple[Argument, ...], *, grad: bool
    ) -> str:
        """Add an op of a weight's own type; its name."""
        source = self.graph[name]
        made = replace(
            source,
            name=self._fresh(f"{name}__{suffix}"),
            target=target,
            args=args,
            origin=source.origin or (name,),
            made_by=self.options.name,
            attrs=(),
        )
        attrs = {"stage": self.options.stage, **({"grad": True} if grad else {})}
        self.built.append(made.with_attrs(**attrs))
        return made.name

    def _converted(self, name: str, start: str, made: Layout, wanted: Layout) -> str:
        has_gradient = bool(self.graph[name].attr("grad"))
        how = conversion(made, wanted, has_gradient)
        assert how is not None, (name, made, wanted)
        if not how.target:
            return start
        key = (start, wanted)
        if key not in self.have:
            source = self.graph[name]
            own = wanted.local(source.type, self.options.member) if isinstance(wanted, Split) else None
            kind = own or source.type
            converted = Op(
                name=self._fresh(f"{name}__{_word(wanted)}"),
                target=how.target,
                args=(Ref(start), *_split_arguments(made, wanted)),
                types=(kind,),
                module=source.module,
                source=source.source,
                origin=source.origin or (name,),
                made_by=self.options.name,
            )
            attrs: dict[str, Attribute] = {"stage": self.options.stage}
            if has_gradient:
                attrs["grad"] = True
            self.built.append(converted.with_attrs(**attrs))
            self.have[key] = converted.name
        return self.have[key]

    def _fresh(self, name: str) -> str:
        number, free = 1, name
        while free in self.fresh or free in self.graph:
            number += 1
            free = f"{name}{number}"
        self.fresh.add(free)
        return free

    # --- ops ---

    def _computed(self, op: Op) -> Op:
        strategy = self._strategy(op)
        wanted = dict(enumerate(strategy.operands))
        if self.options.member > 0:
            for slot in strategy.first_only:
                del wanted[slot]
        read = self._with_operands(op, wanted)
        local = self._local(op, read.args, strategy.results)
        local = replace(local, kwargs=read.kwargs)
        if op.target == "gp.cast_weight" and local.operands() != op.operands():
            # What was gathered for this once is no weight that keeps its lower copy.
            local = replace(
                local,
                target="aten._to_copy.default",
                args=local.args[:1],
                kwargs=(("dtype", op.args[1]),),
            )
        return localized(op, local, strategy, self.options.member)

    def _with_operands(self, op: Op, wanted: Mapping[int, Layout]) -> Op:
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
        return self._read(name, "whole") if self.graph[name].attr("stage") == self.options.stage else name

    def _local(self, op: Op, args: tuple[Argument, ...], layouts: tuple[Layout, ...]) -> Op:
        types = tuple(
            layout.local(kind, self.options.member)
            if isinstance(layout, Split) and isinstance(kind, TensorType)
            else kind
            for kind, layout in zip(op.types, layouts, strict=True)
        )
        local = replace(op, args=args, types=types)
        if local == op:
            return op
        return replace(local, origin=op.origin or (op.name,), made_by=self.options.name)


def _word(layout: Layout) -> str:
    return f"split{layout.dim}" if isinstance(layout, Split) else layout


def _split_arguments(made: Layout, wanted: Layout) -> tuple[Argument, ...]:
    found: list[Argument] = []
    for layout in (made, wanted):
        if isinstance(layout, Split):
            found += [layout.dim, layout.numbers, layout.inner]
    return tuple(found)


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
