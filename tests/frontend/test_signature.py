"""Arguments and results keep the structure that the user gave them."""

import math
from typing import Any, NamedTuple

import pytest
import torch
from one_device import ready
from torch import Tensor, nn

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])


class Flags(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, *, mode: str, scale: float | None, more: dict[str, Any]) -> Any:
        h = self.linear(x) * (scale or 1.0) + more["y"]
        return {"a": h, "nested": [mode, (h.sum(-1), None, 3)], "again": h}


def flags(**changes: Any) -> dict[str, Any]:
    return {"mode": "up", "scale": 2.0, "more": {"y": torch.ones(4, 4), "k": 1}, **changes}


def test_outputs_are_put_together_as_the_user_had_them() -> None:
    made = ready(Flags(), (X,), flags(), loss=None)
    wanted = made.model(X, **flags())
    values = made.device().forward((X,), flags())
    by_name = dict(zip(made.lowered.output.operands(), values, strict=True))
    originals = dict(zip(made.captured.graph.output.operands(), values, strict=True))
    assert len(by_name) == 2
    got = made.captured.signature.assemble(originals)
    assert list(got) == ["a", "nested", "again"]
    torch.testing.assert_close(got["a"], wanted["a"])
    mode, (total, nothing, three) = got["nested"]
    assert (mode, nothing, three) == ("up", None, 3)
    torch.testing.assert_close(total, wanted["nested"][1][0])


def test_keyword_order_does_not_matter_and_constants_do() -> None:
    signature = ready(Flags(), (X,), flags(), loss=None).captured.signature
    given = flags()
    backwards = {key: given[key] for key in reversed(given)}
    assert list(signature.bind((X,), backwards)) == list(signature.bind((X,), given))
    for changed, message in (
        (flags(mode="down"), "'up' in the example batch"),
        (flags(scale=None), "structure|example batch"),
        (flags(scale=2), "2.0 in the example batch"),
        (flags(scale=X), "2.0 in the example batch"),
        (flags(more={"y": 3.0, "k": 1}), "was a tensor in the example batch"),
        (flags(more={"y": X}), "structure"),
        ({"mode": "up"}, r"keyword arguments \['mode', 'more', 'scale'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            signature.bind((X,), changed)
    with pytest.raises(ValueError, match="structure"):
        signature.bind((X, X), flags())


def test_nan_is_a_constant_like_any_other() -> None:
    given = flags(scale=math.nan)
    signature = ready(Flags(), (X,), given, loss=None).captured.signature
    assert signature.bind((X,), flags(scale=math.nan))


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def test_named_tuples_in_and_out() -> None:
    class Swap(nn.Module):
        def forward(self, pair: Pair) -> Pair:
            return Pair(pair.second * 2, pair.first)

    made = ready(Swap(), (Pair(X, Y),), loss=None)
    values = made.device().forward((Pair(X, Y),), {})
    torch.testing.assert_close(values[0], Y * 2)
    torch.testing.assert_close(values[1], X)


def test_an_argument_may_be_called_output() -> None:
    class Named(nn.Module):
        def forward(self, output: Tensor, input: Tensor) -> Tensor:
            return output * input

    (value,) = ready(Named(), (X, X * 2), loss=None).device().forward((X, X * 2), {})
    torch.testing.assert_close(value, X * X * 2)
