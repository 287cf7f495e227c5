"""What a value means to the samples of the batch, and the rules by which ops pass that on.

Each value is one of

- *shared*: the same for every split of the batch (weights, constants, what follows from them);
- *sample*: exactly one dimension scales with the batch, and each index of it belongs to one sample.
  Its size is `outer * B * inner`; index `(o * B + s) * inner + i` belongs to sample `s`;
- *iota*: `arange(B)`, good for nothing but picking from its own sample;
- *partial*: a sum over samples: the value of the whole batch is the sum over its parts;
- *mixed*: samples have met; the batch must not be split before this point.

An op without a rule makes a mixed value of anything but shared ones: correct, if cautious. The rules
are in `sample_rules.py` (arithmetic and layers) and `sample_moves.py` (reshaping and picking).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from graphpar.ir.ops import Argument, BatchSize, Dim, Op, Ref, TensorType
from graphpar.ir.optable import ELEMENTWISE_FUNCTIONS, POINTWISE, packet

Kind = Literal[
    "shared", "sample", "iota", "partial", "mixed",
    "sorting", "order", "sorted", "unorder", "rows", "offsets", "starts", "placed",
]  # fmt: skip
DISPATCHED: frozenset[Kind] = frozenset(
    {"sorting", "order", "sorted", "unorder", "rows", "offsets", "starts", "placed"}
)
"""Kinds that only `dispatch.py` and `positions.py` know; to all other rules such a value is mixed."""


@dataclass(frozen=True)
class Samples:
    """One value's meaning to the samples; `reason` tells why samples met.

    `key` and `every` belong to rows that were sorted (see `dispatch.py`) or are counted through the batch
    (see `positions.py`).
    """

    kind: Kind
    outer: int = 1
    inner: int = 1
    reason: str = ""
    key: str = ""
    every: int = 1


SHARED = Samples("shared")
PARTIAL = Samples("partial")


@dataclass(frozen=True)
class Call:
    """An op with what is known of its operands; what every rule is given."""

    op: Op
    ops: Mapping[str, Op]
    states: Mapping[str, Samples]

    def state(self, argument: Argument) -> Samples:
        """The state of one argument; constants are shared."""
        return self.states[argument.name] if isinstance(argument, Ref) else SHARED

    def type(self, argument: Argument) -> TensorType | None:
        """The tensor type of one argument, None for constants and tuples."""
        if not isinstance(argument, Ref):
            return None
        made = self.ops[argument.name]
        return made.type if made.makes_tensor else None

    def operands(self) -> tuple[Ref, ...]:
        """All operands as references."""
        return tuple(Ref(name) for name in self.op.operands())

    def dim(self, argument: Argument) -> int | None:
        """The batch dimension of one argument, None where it has not exactly one."""
        kind = self.type(argument)
        return kind.batch_dims[0] if kind is not None and len(kind.batch_dims) == 1 else None

    def out_dim(self) -> int | None:
        """The batch dimension of the result, None where it has not exactly one."""
        if not self.op.makes_tensor or len(self.op.type.batch_dims) != 1:
            return None
        return self.op.type.batch_dims[0]

    def mixed(self, why: str) -> Samples:
        """Samples meet here."""
        return mixed(self.op, why)

    def like(self, argument: Argument) -> Samples:
        """Per sample, laid out as the argument; mixed when the result has not one batch dimension."""
        if self.op.makes_tensor and self.out_dim() is None:
            return self.mixed("combines samples with each other")
        state = self.state(argument)
        return replace(state, kind="sample") if state.kind in ("sample", "iota") else Samples("sample")

    def first_sample(self) -> Ref | None:
        """The first operand that is per sample."""
        return next((r for r in self.operands() if self.state(r).kind == "sample"), None)

    def same_layout(self, arguments: Iterable[Argument] | None = None) -> bool:
        """Whether all operands (or those given) are shared, or per sample and laid out alike."""
        refs = self.operands() if arguments is None else arguments
        states = {self.state(r) for r in refs} - {SHARED}
        return len(states) <= 1 and all(s.kind == "sample" for s in states)


def place_of(op: Op) -> str:
    """An op as the user knows it: the operator, the module and the source line."""
    source = f" ({op.source})" if op.source else ""
    return f"{packet(op)} at {op.module or '(top)'}{source}"


def mixed(op: Op, why: str) -> Samples:
    """The state after an op in which samples meet."""
    return Samples("mixed", reason=f"{place_of(op)} {why}")


CREATION = frozenset({"arange"})
"""Ops without operands whose values nevertheless tell samples apart."""
_UNIFORM = frozenset({
    "full", "zeros", "ones", "empty", "new_full", "new_zeros", "new_ones", "new_empty", "full_like",
    "zeros_like", "ones_like", "empty_like", "expand", "broadcast_to", "expand_as", "repeat", "tile",
    "gp.random",
})  # fmt: skip
"""Ops that make the same value for each sample of what all samples share."""

Rule = Callable[[Call], Samples]
_RULES: dict[str, Rule] = {}


def rule(*packets: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule for some operators."""

    def register(function: Rule) -> Rule:
        for name in packets:
            _RULES[name] = function
        return function

    return register


def settled(op: Op, state: Samples) -> Samples:
    """The state, or mixed where the result's shape contradicts it."""
    if not op.makes_tensor or state.kind == "mixed":
        return state
    dims = op.type.batch_dims
    if state.kind in ("shared", "partial", "offsets"):
        return mixed(op, "makes a value that depends on the size of the batch") if dims else state
    if len(dims) != 1:
        return mixed(op, "combines samples with each other")
    if times(op.type.shape[dims[0]]) != state.outer * state.inner:
        return mixed(op, "lays samples out in a way that cannot be followed")
    return state


def by_rule(call: Call) -> Samples:
    """What the rule of an op makes of its operands' states; see `dispatch.infer` for all there is."""
    states = [call.state(r) for r in call.operands()]
    met = next((s for s in states if s.kind == "mixed"), None)
    if met is not None:
        return met
    kind = packet(call.op)
    if call.op.target == "getitem":
        return states[0]
    if all(s.kind == "shared" for s in states) and kind not in CREATION:
        return _from_shared(call, kind)
    if kind in _RULES:
        return _RULES[kind](call)
    if kind in POINTWISE or (kind in ("max", "min") and call.op.target.endswith(".other")):
        return _RULES["add"](call)
    if call.op.target.startswith(f"{ELEMENTWISE_FUNCTIONS}.") and call.same_layout():
        return _RULES["add"](call)
    return call.mixed("is not known to keep samples apart")


def _from_shared(call: Call, kind: str) -> Samples:
    if not scales(call.op):
        return SHARED
    if kind not in _UNIFORM:
        return call.mixed("tells samples apart by their position in the batch")
    return uniform(call)


def scales(op: Op) -> bool:
    """Whether any result has a size that scales with the batch."""
    return any(t is not None and t.batch_dims for t in op.types)


def uniform(call: Call) -> Samples:
    """A shared value repeated for each sample, by creation or expansion."""
    dim = call.out_dim()
    if dim is None:
        return call.mixed("makes a value with several batch dimensions")
    return Samples("sample", inner=times(call.op.type.shape[dim]))


def times(size: Dim) -> int:
    """How many rows of a batch dimension belong to one sample."""
    return size.times if isinstance(size, BatchSize) else 1


def dims_argument(argument: Argument, ndim: int) -> tuple[int, ...]:
    """Dimensions given as one int, a tuple, or not at all (all of them), made non-negative."""
    if argument is None or argument == ():
        return tuple(range(ndim))
    items = argument if isinstance(argument, tuple) else (argument,)
    return tuple(d % ndim for d in items if isinstance(d, int)) if ndim else ()
