"""Let units compute in lower formats: mark their ops, then cast where formats meet."""

from dataclasses import dataclass, field, replace

from graphpar.errors import VerifyError
from graphpar.ir.chain import build_chain
from graphpar.ir.formats import (
    FORMATS,
    LARGEST,
    PARTLY,
    carrier,
    feeds_islands,
    format_in,
    format_of,
    role_of,
    wire_format,
)
from graphpar.ir.graph import Graph, Level
from graphpar.ir.ops import SOURCES, Argument, Op, Ref, Symbol, TensorType, map_arguments


@dataclass(frozen=True)
class AssignFormats:
    """Mark every op of a unit with the unit's format, unless all of them are float32.

    Attributes:
        unit_formats: For each unit of the graph's chain its format; empty for float32 everywhere.

    >>> from graphpar.ir.text import parse_graph
    >>> g = parse_graph('''graph captured "N" batch=2
    ... %x = input("x") : float32[B,4]
    ... %w = parameter("w") : float32[4,4]
    ... %y = aten.linear.default(%x, %w) : float32[B,4]
    ... %output = output((%y,))
    ... ''')
    >>> AssignFormats(("bfloat16",)).run(g)["y"].attr("format")
    'bfloat16'
    """

    unit_formats: tuple[str, ...] = ()
    name: str = "formats"
    takes: Level = "captured"
    gives: Level = "captured"

    def run(self, graph: Graph) -> Graph:
        """Build the marked graph.

        Raises:
            VerifyError: The formats are not those of plans, or do not fit the graph's chain.
        """
        lower = {f for f in self.unit_formats if f != "float32"}
        if not lower:
            return graph
        unknown = sorted(lower - {*FORMATS, *PARTLY})
        if unknown:
            raise VerifyError(f"Pass formats knows {', '.join(FORMATS)}, not {unknown[0]!r}.")
        units = build_chain(graph).units
        if len(units) != len(self.unit_formats):
            raise VerifyError(
                f"Pass formats was given formats for {len(self.unit_formats)} units, "
                f"but the graph has {len(units)}."
            )
        marks = {
            name: format_in(unit_format, graph[name])
            for unit, unit_format in zip(units, self.unit_formats, strict=True)
            for name in unit.ops
        }
        return graph.with_ops(
            op.with_attrs(format=marks[op.name]) if op.name in marks else op for op in graph.ops
        )


@dataclass(frozen=True)
class InsertCasts:
    """Give each marked op the types it computes in, and cast where a reader needs another.

    Each value is cast to a format at most once per stage, and never back and forth: whoever reads a
    float32 copy of a lower value and wants it lower gets the lower one. Values from outside the units
    (masks) keep within the lower format's range instead of turning infinite. Weights stay float32 and
    are cast by `gp.cast_weight`, which keeps the copy until the weight changes. What a later stage
    reads is rounded before it is sent (see `graphpar.ir.formats.wire_format`).

    >>> from graphpar.ir.text import format_op, parse_graph
    >>> g = InsertCasts().run(parse_graph('''graph placed "N" batch=2
    ... %x = input("x") : float32[B,4]
    ... %w = parameter("w") : float32[4,4]
    ... %h = aten.linear.default(%x, %w) : float32[B,4] {format="bfloat16", stage=0}
    ... %y = aten.softmax.int(%h, -1) : float32[B,4] {format="bfloat16", stage=0}
    ... %output = output((%y,))
    ... '''))
    >>> for op in g.ops[2:6]: print(format_op(op).split(" {")[0])
    %x_bfloat16 = aten._to_copy.default(%x, dtype=dtype:bfloat16) : bfloat16[B,4]
    %w_bfloat16 = gp.cast_weight(%w, dtype:bfloat16) : bfloat16[4,4]
    %h = aten.linear.default(%x_bfloat16, %w_bfloat16) : bfloat16[B,4]
    %h_float32 = aten._to_copy.default(%h, dtype=dtype:float32) : float32[B,4]
    """

    name: str = "casts"
    takes: Level = "placed"
    gives: Level = "placed"

    def run(self, graph: Graph) -> Graph:
        """Build the graph with casts; one without marks comes back as it is."""
        if all(format_of(op) == "float32" for op in graph.ops):
            return graph
        return _Casting(graph, self.name).run()


@dataclass
class _Casting:
    graph: Graph
    made_by: str
    ops: dict[str, Op] = field(default_factory=dict)
    made: dict[tuple[str, str, object], str] = field(default_factory=dict)
    wired: dict[tuple[str, object], str] = field(default_factory=dict)

    def run(self) -> Graph:
        up = feeds_islands(self.graph)
        for op in self.graph.ops:
            if op.target in SOURCES:
                self.ops[op.name] = op
                continue
            self.ops[op.name] = self._part(op) if op.target == "getitem" else self._cast_for(op, up)
        return self.graph.with_ops(self.ops.values())

    def _part(self, op: Op) -> Op:
        """One result of a tuple has the type it has there."""
        index = op.args[1]
        assert isinstance(index, int)
        return replace(op, types=(self.ops[op.operands()[0]].types[index],))

    def _cast_for(self, op: Op, up: frozenset[str]) -> Op:
        """The op with its operands in the format it computes in."""
        wanted = self._computes_in(op, op.name in up)
        change = {name: self._as(name, wanted, op) for name in dict.fromkeys(op.operands())}
        changed = map_arguments(op, change)
        if wanted != "float32":
            changed = _in_range(_retyped(changed, wanted), wanted)
        return self._cancelled(changed)

    def _computes_in(self, op: Op, feeds_islands: bool) -> str:
        unit_format = format_of(op)
        role = role_of(op)
        if unit_format == "float32" or role == "island" or feeds_islands:
            return "float32"
        unit_format = carrier(unit_format)
        if role == "product":
            return unit_format
        read = [self.ops[name] for name in op.operands()]
        if any(_is_firm(value) for value in read):
            return "float32"
        return unit_format if any(_is_lower(value) for value in read) else "float32"

    def _as(self, name: str, wanted: str, reader: Op) -> str:
        """The name of a value in the format a reader computes in."""
        value = self.ops[name]
        if not value.makes_tensor:
            return name
        at = value.attr("stage") if reader.target == "output" else reader.attr("stage")
        source = self._arrived(value, at)
        have = source.type.dtype
        # Formats that the user's own code chose are the user's; only float32 values are up to us.
        ours = have in ("float32", *LARGEST) and self.graph[name].type.dtype == "float32"
        if have == wanted or not ours:
            return source.name
        return self._cast(value, source, wanted, at, reader)

    def _arrived(self, value: Op, at: object) -> Op:
        """A value as a stage gets it: rounded for the wire where another stage makes it."""
        made_at = value.attr("stage")
        if made_at is None or made_at == at:
            return value
        key = (value.name, at)
        if key not in self.wired:
            users = self.graph.users(value.name)
            readers = tuple(u for u in users if u.attr("stage") == at)
            wire = wire_format(value, readers) if readers else value.type.dtype
            same = wire == value.type.dtype
            self.wired[key] = value.name if same else self._cast(value, value, wire, made_at, value)
        return self.ops[self.wired[key]]

    def _cast(self, value: Op, source: Op, wanted: str, at: object, reader: Op) -> str:
        key = (value.name, wanted, at)
        if key not in self.made:
            made = self._cast_op(source, wanted, at, self._fresh(value, wanted, at))
            if reader.attr("format") is not None:
                made = made.with_attrs(format=format_of(reader))
            self.ops[made.name] = made
            self.made[key] = made.name
        return self.made[key]

    def _cast_op(self, source: Op, wanted: str, at: object, name: str) -> Op:
        kind = TensorType(source.type.shape, wanted)
        attrs = tuple((k, v) for k, v in source.attrs if k in ("grad", "samples", "outer"))
        cast = replace(
            source,
            name=name,
            target="aten._to_copy.default",
            args=(Ref(source.name),),
            kwargs=(("dtype", Symbol("dtype", wanted)),),
            types=(kind,),
            is_tuple=False,
            origin=source.origin or (source.name,),
            made_by=self.made_by,
            attrs=attrs,
        )
        if isinstance(at, int):
            cast = cast.with_attrs(stage=at)
        if source.target in ("parameter", "buffer"):
            return replace(
                cast,
                target="gp.cast_weight",
                args=(Ref(source.name), Symbol("dtype", wanted)),
                kwargs=(),
            )
        if wanted != "float32" and self._comes_from_outside(source):
            cast = replace(cast, args=(Ref(self._clamped(source, wanted, at)),))
        return cast

    def _comes_from_outside(self, source: Op) -> bool:
        """Whether a value is none of a unit's (a mask, say), so that it must not turn infinite."""
        computed = source.target not in ("input", "constant")
        return computed and source.attr("format") is None and not source.attr("grad")

    def _clamped(self, source: Op, wanted: str, at: object) -> str:
        key = (source.name, f"{wanted}_range", at)
        if key not in self.made:
            clamp = replace(
                source,
                name=self._fresh(source, "clamped", at),
                target="aten.clamp.default",
                args=(Ref(source.name), -LARGEST[wanted], LARGEST[wanted]),
                kwargs=(),
                origin=source.origin or (source.name,),
                made_by=self.made_by,
            )
            self.ops[clamp.name] = clamp.with_attrs(stage=at) if isinstance(at, int) else clamp
            self.made[key] = clamp.name
        return self.made[key]

    def _fresh(self, value: Op, wanted: str, at: object) -> str:
        name = f"{value.name}_{wanted}"
        if name in self.ops or name in self.graph:
            name = f"{name}_at{at}"
        while name in self.ops or name in self.graph:
            name += "_"
        return name

    def _cancelled(self, op: Op) -> Op:
        """A user's own cast back to the format that was cast up for it becomes a copy of nothing."""
        if op.target != "aten._to_copy.default" or not op.operands():
            return op
        widened = self.ops[op.operands()[0]]
        if widened.made_by != self.made_by or widened.target != op.target:
            return op
        narrow = self.ops[widened.operands()[0]]
        if widened.type.dtype != "float32" or narrow.type.dtype != op.type.dtype:
            return op
        if any(key not in ("dtype",) for key, _ in op.kwargs):
            return op
        return replace(op, target="aten.alias.default", args=(Ref(narrow.name),), kwargs=())


def _is_lower(value: Op) -> bool:
    return any(t is not None and t.dtype in LARGEST for t in value.types)


def _is_firm(value: Op) -> bool:
    """Whether a value was made in float32 by a unit's own op, and so should not be rounded."""
    if value.target in SOURCES or value.attr("format") is None:
        return False
    return any(t is not None and t.dtype == "float32" and t.shape != () for t in value.types)


def _retyped(op: Op, wanted: str) -> Op:
    types = tuple(
        TensorType(t.shape, wanted) if t is not None and t.dtype == "float32" else t for t in op.types
    )
    return replace(op, types=types)


def _in_range(op: Op, wanted: str) -> Op:
    """Numbers among the arguments that the format cannot hold become its largest."""
    largest = LARGEST[wanted]

    def kept(argument: Argument) -> Argument:
        if isinstance(argument, float) and abs(argument) > largest and abs(argument) != float("inf"):
            return largest if argument > 0 else -largest
        return argument

    return replace(op, args=tuple(map(kept, op.args)), kwargs=tuple((k, kept(v)) for k, v in op.kwargs))
