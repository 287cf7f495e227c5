"""What one op asks of a device, whichever it is: kernels with sizes, FLOPs and bytes."""

from dataclasses import dataclass, replace

from graphpar.ir.graph import Graph
from graphpar.ir.ops import DTYPE_BYTES, Op, Ref, TensorType

MEMORY_CURVES = frozenset({"pointwise", "accumulate", "copy", "fill", "reduce", "cast"})
"""Kernels limited by memory; their curves run over bytes moved, all others over elements."""


@dataclass(frozen=True)
class Kernel:
    """One kernel call.

    Attributes:
        curve: Name of the measured curve that prices it on a calibrated device.
        elements: Elements of its principal tensor.
        bytes: Bytes it must read and write.
        flops: Floating-point operations.
        dtype: Format it computes in.
        matrix: For matrix products: number of products, rows, columns, inner size.
        attention: For attention: sequence length of the keys, head size, whether causal.
    """

    curve: str
    elements: float
    bytes: float
    flops: float = 0.0
    dtype: str = "float32"
    matrix: tuple[int, int, int, int] | None = None
    attention: tuple[int, int, bool] | None = None

    def part(self, share: float) -> "Kernel":
        """A share of the kernel's work."""
        return replace(
            self,
            elements=self.elements * share,
            bytes=self.bytes * share,
            flops=self.flops * share,
        )

    @property
    def size(self) -> float:
        """Where on its curve the kernel lies."""
        return self.bytes if self.curve in MEMORY_CURVES else self.elements


@dataclass(frozen=True)
class OpWork:
    """Kernels of one op, and what autograd keeps of it.

    Attributes:
        forward: Kernels in forward.
        backward: Kernels in backward; empty where no gradient flows.
        saved: Names of values kept for backward.
        saved_bytes: Bytes kept besides those values (masks, statistics, log-probabilities).
        known: False where a rule had to guess.
        late: Those of `backward` that make gradients of weights.
    """

    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...] = ()
    saved: tuple[str, ...] = ()
    saved_bytes: float = 0.0
    known: bool = True
    late: tuple[Kernel, ...] = ()

    def part(self, share: float) -> "OpWork":
        """A share of the same work, at the same rates.

        >>> OpWork((Kernel("reduce", 8, 64, 16.0),)).part(0.25).forward
        (Kernel(curve='reduce', elements=2.0, bytes=16.0, flops=4.0, dtype='float32', matrix=None, \
attention=None),)
        """
        return replace(
            self,
            forward=tuple(kernel.part(share) for kernel in self.forward),
            backward=tuple(kernel.part(share) for kernel in self.backward),
            saved_bytes=self.saved_bytes * share,
            late=tuple(kernel.part(share) for kernel in self.late),
        )


@dataclass(frozen=True)
class Call:
    """One op at one microbatch size, as the rules see it.

    Attributes:
        op: The op.
        graph: Its graph.
        batch: Samples in the microbatch.
        precision: Format that float32 values are computed in.
        copies: Whether a view has to copy because of its operand's layout.
    """

    op: Op
    graph: Graph
    batch: int
    precision: str = "float32"
    copies: bool = False

    @property
    def out(self) -> TensorType:
        """The first tensor among the results."""
        return next(t for t in self.op.types if t is not None)

    @property
    def grad(self) -> bool:
        """Whether a gradient flows back through the op."""
        return bool(self.op.attr("grad")) or any(
            user.target == "getitem" and user.attr("grad") for user in self.graph.users(self.op.name)
        )

    def operand(self, position: int, key: str = "") -> Op | None:
        """The op that makes an argument; None where the argument is no tensor."""
        argument = self.op.argument(position, key)
        return self.graph[argument.name] if isinstance(argument, Ref) else None

    def operands(self) -> tuple[Op, ...]:
        """The ops that make its tensors, repeats kept."""
        return tuple(self.graph[name] for name in self.op.operands())

    def needs_grad(self, operand: Op | None) -> bool:
        """Whether backward computes a gradient for an operand."""
        return operand is not None and self.grad and bool(operand.attr("grad"))

    def dtype(self, kind: TensorType) -> str:
        """The format a value is held in."""
        return self.precision if kind.dtype == "float32" else kind.dtype

    def numel(self, of: Op | TensorType | None) -> int:
        """Elements of a value."""
        kind = first_type(of)
        return kind.numel(self.batch) if kind is not None else 0

    def bytes(self, of: Op | TensorType | None) -> float:
        """Bytes of a value."""
        kind = first_type(of)
        return self.numel(kind) * DTYPE_BYTES[self.dtype(kind)] if kind is not None else 0.0

    def sizes(self, of: Op | TensorType) -> tuple[int, ...]:
        """The shape of a value."""
        kind = first_type(of)
        assert kind is not None
        return kind.sizes(self.batch)

    def moved(self) -> float:
        """Bytes of all operands and results, each once."""
        inside = sum(self.bytes(o) for o in {o.name: o for o in self.operands()}.values())
        return inside + sum(self.bytes(t) for t in self.op.types if t is not None)


def first_type(of: Op | TensorType | None) -> TensorType | None:
    """The type of a value, or of the first tensor among several."""
    if isinstance(of, Op):
        return next((t for t in of.types if t is not None), None)
    return of
