"""What kinds of torch operators there are, as far as the passes must know, without importing torch.

Names are operator packets (`add` for `aten.add.Tensor`). `tests/test_optable.py` compares the list of
pointwise operators with torch's own tags.
"""

from graphpar.ir.ops import Op

POINTWISE = frozenset(
    """
    abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and
    bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift bitwise_xor ceil celu clamp
    clamp_max clamp_min clip clone conj_physical copysign cos cosh deg2rad digamma div elu eq
    erf erfc erfinv exp exp2 expm1 floor floor_divide fmax fmin fmod frac gcd ge gelu greater
    greater_equal gt hardshrink hardsigmoid hardswish hardtanh heaviside hypot i0 igamma igammac
    isclose isfinite isinf isnan isneginf isposinf lcm ldexp le leaky_relu lerp less less_equal
    lgamma log log10 log1p log2 log_sigmoid logaddexp logaddexp2 logical_and logical_not
    logical_or logical_xor logit lt masked_fill maximum minimum mish mul multiply mvlgamma
    nan_to_num ne neg negative nextafter not_equal polygamma positive pow rad2deg real
    reciprocal relu relu6 remainder round rsqrt rsub selu sgn sigmoid sign signbit silu sin sinc
    sinh softplus softshrink special_entr special_erfcx special_expit special_i0e special_i1
    special_i1e special_log_ndtr special_ndtri special_xlog1py special_zeta sqrt square sub
    subtract tan tanh threshold true_divide trunc where xlogy __and__ __or__ __xor__
    __lshift__ __rshift__ _to_copy to type_as contiguous detach alias lift_fresh_copy lift_fresh
    zeros_like ones_like full_like empty_like conj imag fill float_power divide
    """.split()
)
"""Operators that act element by element on broadcast operands (or only change type or layout)."""

FUNCTIONS = "graphpar_function"
"""Namespace of operators that are a user's `torch.autograd.Function`."""
ELEMENTWISE_FUNCTIONS = "graphpar_elementwise"
"""Namespace of those among them that act element by element, forward and backward."""

IDENTITY = frozenset({"alias", "contiguous", "detach", "clone", "lift_fresh_copy", "lift_fresh"})
"""Operators whose result has the values of the first operand."""

CASTS = frozenset({"_to_copy", "to", "type_as"})
"""Operators that change the element type or do nothing."""


def packet(op: Op) -> str:
    """The operator without namespace and overload.

    >>> packet(Op("y", "aten.add.Tensor")), packet(Op("y", "getitem"))
    ('add', 'getitem')
    """
    parts = op.target.split(".")
    return parts[1] if parts[0] == "aten" and len(parts) > 1 else op.target
