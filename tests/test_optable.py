"""The list of pointwise operators agrees with torch's own tags."""

from typing import Any

import pytest
import torch

from graphpar.ir.optable import CASTS, IDENTITY, POINTWISE

_ALIAS = "another name of a tagged operator, without tags of its own"
_VALUES = "the same values, or part of each"
_TYPE = "changes the type or the strides alone"
_CONSTANT = "one constant for each element, whatever the operand"
UNTAGGED = {
    **dict.fromkeys(
        "divide greater greater_equal less less_equal multiply negative not_equal subtract special_expit "
        "__and__ __or__".split(),
        _ALIAS,
    ),
    **dict.fromkeys("detach alias lift_fresh lift_fresh_copy real imag conj".split(), _VALUES),
    **dict.fromkeys("contiguous to type_as _to_copy".split(), _TYPE),
    **dict.fromkeys("zeros_like ones_like full_like empty_like fill".split(), _CONSTANT),
    **dict.fromkeys(
        "floor_divide hardswish isclose log_sigmoid".split(),
        "element by element by its documentation, though untagged",
    ),
}  # fmt: skip
TAGGED_LATER = {"leaky_relu"}  # pointwise to torch 2.13, not yet to 2.11


def overloads(name: str) -> list[object]:
    packet = getattr(torch.ops.aten, name)
    return [getattr(packet, overload) for overload in packet.overloads() if "out" not in overload]


def is_pointwise(operator: Any) -> bool:
    """Whether torch marks it as acting element by element."""
    return torch.Tag.pointwise in operator.tags


@pytest.mark.parametrize("name", sorted(POINTWISE))
def test_every_name_is_an_operator_that_torch_calls_pointwise(name: str) -> None:
    found = overloads(name)
    assert found
    if name not in UNTAGGED.keys() | TAGGED_LATER:
        assert any(map(is_pointwise, found)), f"{name} is not tagged pointwise by torch"


def test_exceptions_are_all_listed_and_needed() -> None:
    assert set(UNTAGGED) <= POINTWISE
    assert not [name for name in UNTAGGED if any(map(is_pointwise, overloads(name)))]


def test_other_lists_name_operators() -> None:
    assert IDENTITY | CASTS <= POINTWISE
