"""Calls are told apart by what they compute, without an export."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from graphpar.frontend.recorded import Recorded, record

Compute = Callable[["Twice", Tensor, Tensor], Tensor]


class Twice(nn.Module):
    """Does something else when it is called again; on the meta device, where numbers do not tell."""

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.compute, self.calls = compute, 0
        self.kept: Tensor | None = None
        self.a, self.b = (nn.Parameter(torch.empty(3, 3, device="meta")) for _ in range(2))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.compute(self, x, y)


def told(model: Twice) -> Recorded:
    given = torch.empty(3, 3, device="meta"), torch.empty(3, 3, device="meta")
    return record(lambda: model(*given), [*model.parameters(), *given])


def notes(m: Twice, x: Tensor, y: Tensor) -> Tensor:
    m.kept = x
    return (x @ m.a).relu()[1:] + y[: m.a.shape[0] - 1]


def keeps(m: Twice, x: Tensor, y: Tensor) -> Tensor:
    kept, m.kept = x if m.kept is None else m.kept, x
    return kept @ m.a


def grows(m: Twice, x: Tensor, y: Tensor) -> Tensor:
    m.kept = y if m.kept is None else torch.cat((m.kept, y))
    return x + m.kept.sum()


def in_other_modes(m: Twice, x: Tensor, y: Tensor) -> Tensor:
    with torch.set_grad_enabled(m.calls == 1):
        return x @ m.a


def in_place(m: Twice, x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    (z if m.calls == 1 else z[:1]).add_(1)
    return z


def of_the_export(m: Twice, x: Tensor, y: Tensor) -> Tensor:
    return x * m.calls if torch.compiler.is_exporting() else x


CHANGES: dict[str, Compute] = {
    "a number": lambda m, x, y: x * m.calls,
    "a weight": lambda m, x, y: x @ (m.a if m.calls == 1 else m.b),
    "an argument": lambda m, x, y: (x if m.calls == 1 else y) @ m.a,
    "another operator": lambda m, x, y: x.sin() if m.calls == 1 else x.cos(),
    "the order": lambda m, x, y: x - y if m.calls == 1 else y - x,
    "a view": lambda m, x, y: x[m.calls - 1] + 1,
    "a made tensor": lambda m, x, y: (x.sin(), x.cos())[m.calls - 1] + (x.sin(), y.cos())[1],
    "the result alone": lambda m, x, y: (x + 1, y + 1)[m.calls - 1 :][0] if m.calls < 3 else x,
    "no operator at all": lambda m, x, y: x if m.calls == 1 else y,
    "a type": lambda m, x, y: x.to((torch.float64, torch.float16)[m.calls - 1]),
    "numbers in new memory": lambda m, x, y: x * torch.from_numpy(np.full(99, float(m.calls)))[0],
    "a kept argument": keeps,
    "a kept tensor that grows": grows,
    "whether gradients are recorded": in_other_modes,
    "what is written": in_place,
    "an export alone": of_the_export,
}


@pytest.mark.parametrize("compute", CHANGES.values(), ids=CHANGES)
def test_what_changes_is_told(compute: Compute) -> None:
    model = Twice(compute)
    assert told(model) != told(model)


def test_what_is_noted_alone_is_not() -> None:
    model = Twice(notes)
    assert told(model) == told(model)
