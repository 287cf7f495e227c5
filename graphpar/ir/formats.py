"""Number formats, and which of them each op computes in when its unit is told to use a lower one.

A unit (a run of ops) has one format. In a unit of a lower format

- *products* (matrix products, convolutions, attention) compute in it: their arithmetic is what a lower
  format makes faster, and their kernels add up in float32;
- *followers* (what acts element by element without magnifying errors, and what only moves elements)
  take the format of what they read: lower where a lower value comes in and nothing that was made in
  float32 does. A residual sum over float32 values stays float32. Followers that only feed islands
  compute in float32 as well, so that a loss gets its logits rounded once;
- all others are *islands* and compute in float32: norms, softmax, losses, sums over many elements,
  functions that magnify errors (powers, logarithms, exponentials), lookups, recurrent layers, and
  whatever is not known.

The division into products and functions that need range follows the practice of mixed-precision
training (Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740).
"""

from typing import Literal

from graphpar.ir.graph import Graph
from graphpar.ir.ops import SOURCES, Op, Symbol
from graphpar.ir.optable import CASTS, POINTWISE, packet

Role = Literal["product", "follower", "island"]

FORMATS = ("float32", "bfloat16", "float16", "float8_e4m3fn")
"""Formats of units that may be asked for by name."""

EIGHT_BITS = ("float8_e4m3fn",)
"""Formats in which products with weights are computed alone; everything around them is bfloat16."""

EIGHT_BIT_MULTIPLE = 16
"""Units for 8 bits take weights whose both widths are multiples of this; others stay in bfloat16."""

PARTLY = {"bfloat16_linear": "bfloat16"}
"""Formats of units, not of ops: products with weights are lower, attention stays in float32.

Some CPUs have fast lower products but compute lower attention, its backward above all, more slowly
than float32's.
"""

LARGEST = {"bfloat16": 3.3895313892515355e38, "float16": 65504.0, "float8_e4m3fn": 448.0}
"""The largest finite value of each lower format."""

ROUNDOFF = {"float32": 2.0**-24, "bfloat16": 2.0**-8, "float16": 2.0**-11, "float8_e4m3fn": 2.0**-4}
"""Half the distance between 1 and the next larger value."""

_PRODUCTS = frozenset(
    """
    linear matmul mm bmm addmm baddbmm addbmm mv einsum bilinear convolution conv1d conv2d conv3d
    conv_transpose1d conv_transpose2d conv_transpose3d scaled_dot_product_attention gp.attention
    _grouped_mm grouped_mm
    """.split()
)
ATTENTION = frozenset({"scaled_dot_product_attention", "gp.attention"})
_MAGNIFYING = frozenset(
    """
    acos acosh asin asinh atanh cosh digamma erfinv exp exp2 expm1 i0 igamma igammac lgamma log log10
    log1p log2 logaddexp logaddexp2 logit mvlgamma polygamma pow float_power reciprocal rsqrt sinh
    special_entr special_erfcx special_i0e special_i1 special_i1e special_log_ndtr special_ndtri
    special_xlog1py special_zeta softplus tan xlogy nextafter gcd lcm heaviside ldexp frac fmod
    remainder floor_divide fill lift_fresh lift_fresh_copy
    """.split()
)
"""Element by element, but a small error of the operand may be a large one of the result."""
_MOVES = frozenset(
    """
    view reshape transpose permute t numpy_T mT T unsqueeze squeeze expand expand_as slice select
    narrow split split_with_sizes chunk unbind unsafe_split unsafe_chunk tensor_split detach alias
    view_as movedim moveaxis swapaxes swapdims diagonal unfold flatten ravel unflatten _unsafe_view
    broadcast_to contiguous getitem cat concat stack constant_pad_nd roll flip repeat tile
    repeat_interleave index_select gather tril triu gp.dropout
    """.split()
)
"""Operators whose results are elements of their operands, moved (or dropped)."""
LOSSES = frozenset(
    """
    cross_entropy_loss nll_loss nll_loss2d nll_loss_nd mse_loss l1_loss smooth_l1_loss huber_loss kl_div
    binary_cross_entropy binary_cross_entropy_with_logits soft_margin_loss log_softmax _log_softmax
    """.split()
)
"""Operators that must not get operands rounded on their way to them."""


def base_format(unit_format: str) -> str:
    """The number format that a unit's format is about.

    >>> base_format("bfloat16_linear"), base_format("float16")
    ('bfloat16', 'float16')
    """
    return PARTLY.get(unit_format, unit_format)


def carrier(op_format: str) -> str:
    """The format that values are held in where an op computes in a format.

    Products in 8 bits round their operands themselves; everything around them is bfloat16.
    """
    return "bfloat16" if op_format in EIGHT_BITS else op_format


def multiplies_8_bits(op: Op) -> bool:
    """Whether an op is a product with a weight that its unit's format wants in 8 bits.

    >>> multiplies_8_bits(Op("y", "aten.linear.default").with_attrs(format="float8_e4m3fn"))
    True
    >>> multiplies_8_bits(Op("y", "aten.bmm.default").with_attrs(format="float8_e4m3fn"))
    False
    """
    if format_of(op) not in EIGHT_BITS:
        return False
    return packet(op) == "linear" or (packet(op) == "addmm" and not op.kwargs)


def format_in(unit_format: str, op: Op) -> str:
    """The format that an op is told to compute in, in a unit of a format."""
    if unit_format in PARTLY and packet(op) in ATTENTION:
        return "float32"
    return base_format(unit_format)


def role_of(op: Op) -> Role:
    """What an op does in a unit of a lower format.

    What the model itself put outside of autocast (`autocast(enabled=False)`) stays as it is.

    Small powers follow in bfloat16, which has float32's range; float16 overflows from 256 squared on.

    >>> role_of(Op("y", "aten.linear.default")), role_of(Op("y", "aten.add.Tensor"))
    ('product', 'follower')
    >>> role_of(Op("y", "aten.softmax.int"))
    'island'
    """
    name = packet(op)
    if op.attr("island"):
        return "island"
    if name in _PRODUCTS:
        return "product"
    if name == "pow" and op.argument(1, "exponent") in (2, 2.0, 3, 3.0):
        return "island" if format_of(op) == "float16" else "follower"
    if name in CASTS or _names_a_type(op) or name in _MAGNIFYING:
        return "island"
    return "follower" if name in POINTWISE or name in _MOVES else "island"


def _names_a_type(op: Op) -> bool:
    """Whether the user said which type the op computes in."""
    given = (*op.args, *(value for _, value in op.kwargs))
    return any(isinstance(a, Symbol) and a.kind == "dtype" for a in given)


def format_of(op: Op) -> str:
    """The format an op was told to compute in: that of its unit; float32 where nothing was said."""
    return str(op.attr("format", "float32"))


def feeds_islands(graph: Graph) -> frozenset[str]:
    """Followers in units of a lower format whose every reader computes in float32."""
    found: set[str] = set()
    for op in reversed(graph.ops):
        if format_of(op) == "float32" or role_of(op) != "follower":
            continue
        users = graph.users(op.name)
        if users and all(
            user.name in found or user.target == "output" or _is_island(user) for user in users
        ):
            found.add(op.name)
    return frozenset(found)


def _is_island(op: Op) -> bool:
    return format_of(op) == "float32" or role_of(op) == "island"


def wire_format(op: Op, readers: tuple[Op, ...]) -> str:
    """The format in which a value goes to a later stage, whose ops `readers` read it.

    A float32 value between units of bfloat16 goes as bfloat16, except into a loss. It keeps float32's
    range that way, which float16 does not have.
    """
    kind = op.types[0]
    assert kind is not None
    inside = all(carrier(format_of(o)) == "bfloat16" for o in (op, *readers))
    losses = all(packet(r) in LOSSES for r in readers)
    if kind.dtype != "float32" or not kind.batch_dims or op.target in SOURCES or not inside or losses:
        return kind.dtype
    return "bfloat16"
