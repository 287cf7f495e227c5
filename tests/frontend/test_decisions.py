"""Branches on values: taken as in the example batch, checked at every step."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from one_device import Calls, assert_as_eager, assert_close, in_parts, ready
from torch import Tensor, nn

from graphpar.errors import CaptureError, RunError

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])
NOT_A_NUMBER = torch.full_like(X, torch.nan)


def sized_by_values(s: Calls, h: Tensor, y: Any) -> Any:
    """Sizes that torch takes out of tensors by itself."""
    return F.pad(h, (0, y[1] + 1)).view(4, y[2] * 3).pow(2).mean()


def indexed_by_values(s: Calls, h: Tensor, y: Any) -> Any:
    """Bounds and rows of an index that are tensors of one number, sizes that stand first, and a name."""
    rows, columns = zip(*torch.stack([y % 3, y % 2], 1), strict=True)
    kept = torch.ones(3, 2)
    kept[rows, columns] = 0
    steps = torch.arange(0, y.max()).sum() + torch.arange(y.max()).sum()
    named = {"0": s.vector, "1": h}[f"{y[0]}"]
    return (h[:, : y[3]] * kept.sum()).pow(2).mean() * steps * named.sum()


CASES: list[tuple[Callable[[Calls, Tensor, Tensor], Any], tuple[Tensor, Tensor], bool]] = [
    (lambda s, h, y: h.pow(2).mean() if torch.isfinite(h).all() else h.sum(), (NOT_A_NUMBER, Y), True),
    (lambda s, h, y: h.sum() if (y > 5).any() else h.pow(2).mean(), (X, Y + 9), True),
    (lambda s, h, y: h.sum() if (y > 2).any().item() else h.pow(2).mean(), (X, Y - 9), True),
    (lambda s, h, y: h[:, : int(y[-1])].pow(2).mean(), (X, Y - 1), False),
    (sized_by_values, (X, Y + 1), False),
    (indexed_by_values, (X, Y + 1), False),
    (lambda s, h, y: h.pow(2).mean() * max(1.0, float(y.float().mean())), (X, Y + 1), False),
]


@pytest.mark.parametrize(("function", "other", "splits"), CASES)
def test_the_way_of_the_example_is_taken_and_checked(
    function: Any, other: tuple[Tensor, Tensor], splits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    made = assert_as_eager(Calls(function), (X, Y))
    assert "test_decisions.py:" in caplog.text
    assert (made.reason == "") == splits
    if splits:
        assert_close(in_parts(made, (X, Y), (1, 3)), in_parts(made, (X, Y), (4,)))
    with pytest.raises(RunError, match=r"branches on values at test_decisions.py:\d+.*Compile again"):
        made.device().forward(other, {})


def test_inference_is_checked_too() -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = self.norm(self.first(x))
            if torch.isinf(h).any():
                h = h.clamp(-1, 1)
            return {"positive": h > 0, "h": h}

    model = Clamped()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = ready(model, (X,), loss=None, training=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(made.device().forward((X,), {})) == 2
    with pytest.raises(RunError, match="was captured for False"):
        made.device().forward((X.masked_fill(torch.eye(4) > 0, torch.inf),), {})


def test_a_branch_at_random_is_refused() -> None:
    def skip(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        return h.pow(2).mean() if torch.rand([]) < 0.5 else h.sum()

    with pytest.raises(CaptureError, match=r"test_decisions.py:\d+ decides at random"):
        ready(Calls(skip), (X, Y))


def test_a_shape_that_depends_on_data_and_cannot_be_counted_is_refused() -> None:
    with pytest.raises(CaptureError, match="depend"):
        ready(Calls(lambda s, h, y: h[torch.unique(y)].sum()), (X, Y))


COUNTED: list[Callable[[Calls, Tensor, Tensor], Any]] = [
    lambda s, h, y: h[y > 1].pow(2).sum(),
    lambda s, h, y: h[:, y > 0].pow(2).sum(),
    lambda s, h, y: h[torch.nonzero(y > 1)].pow(2).sum(),
    lambda s, h, y: h[torch.where(y > 1)].pow(2).sum(),
    lambda s, h, y: torch.masked_select(h, (y > 1)[:, None]).pow(2).sum(),
    lambda s, h, y: torch.repeat_interleave(h, y, dim=0).pow(2).sum(),
    lambda s, h, y: h[: max(y.tolist())].pow(2).sum(),
    lambda s, h, y: h.sum() if torch.equal(y, y.sort().values) else h.pow(2).sum(),
]


@pytest.mark.parametrize("function", COUNTED)
def test_shapes_by_data_are_those_of_the_example_and_checked(function: Any) -> None:
    made = assert_as_eager(Calls(function), (X, Y))
    with pytest.raises(RunError, match=r"branches on values at test_decisions.py:\d+.*Compile again"):
        made.device().forward((X, torch.tensor([0, 0, 2, 1])), {})


def test_a_batch_that_is_gathered_by_a_mask_is_not_split() -> None:
    made = assert_as_eager(Calls(lambda s, h, y: h[y > -1].pow(2).sum()), (X, Y))
    if not made.reason:
        assert_close(in_parts(made, (X, Y), (1, 3)), in_parts(made, (X, Y), (4,)))


def test_a_model_that_goes_another_way_while_it_is_exported() -> None:
    def fails(s: Calls, h: Tensor, y: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise ValueError("not while exported")
        return h.pow(2).mean()

    assert assert_as_eager(Calls(fails), (X, Y)).reason == ""


def written(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    """One number goes wherever a mask tells, however many these places are."""
    h = h.clone()
    h[torch.where(y > 1)] = 0.5
    h[torch.nonzero(h > 1, as_tuple=True)] = 1
    return h.pow(2).sum()


def written_and_counted(s: Calls, h: Tensor, y: Tensor) -> Tensor:
    places = torch.where(y > 1)
    h = h.clone()
    h[places] = 0.5
    return h.pow(2).sum() + places[0].shape[0]


def test_places_that_only_receive_a_number_are_not_counted() -> None:
    model = Calls(written)
    made = assert_as_eager(model, (X, Y))
    other = (3 * X, torch.tensor([2, 0, 2, 3]))
    assert_close(in_parts(made, other, (4,)), in_parts(ready(model, other), other, (4,)))
    assert made.reason == ""


def test_places_that_are_counted_too_are_checked() -> None:
    made = assert_as_eager(Calls(written_and_counted), (X, Y))
    with pytest.raises(RunError, match=r"branches on values at test_decisions.py:\d+.*Compile again"):
        made.device().forward((X, torch.tensor([0, 0, 2, 1])), {})
