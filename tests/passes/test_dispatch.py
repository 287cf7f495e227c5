"""Experts that work on sorted rows of all samples: exact when the batch is split, or else refused."""

from collections.abc import Callable

import pytest
import torch
from one_device import Calls, assert_close, eagerly, in_parts, ready
from torch import Tensor, arange

pytest.importorskip("transformers.integrations.moe")

H = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(3))
Y = torch.tensor([0, 3, 1, 2, 2, 3])[:, None].repeat(1, 5)


def grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    product: Tensor = torch.ops.transformers.grouped_mm_fallback(rows, weights, ends)
    return product


class Parts:
    """The steps of a mixture of experts, each of which a test may replace by a wrong one."""

    def __init__(self, **wrong: Callable[..., Tensor]) -> None:
        self.wrong = wrong

    def step(self, name: str, usual: Callable[..., Tensor], *args: Tensor) -> Tensor:
        return self.wrong.get(name, usual)(*args)

    def __call__(self, s: Calls, h: Tensor, y: Tensor) -> Tensor:
        tokens = h.reshape(-1, 4)
        scores, chosen = s.linear(tokens).softmax(-1).topk(2)
        key = self.step("key", lambda c, y: c.reshape(-1), chosen, y)
        values, order = torch.sort(key)
        rows = self.step("rows", lambda t, o: t[o // 2], tokens, order)
        ends = self.step("ends", lambda v, k: count(v), values, key)
        made = grouped(rows, s.table[:16].view(4, 4, 4), ends).tanh()
        made = self.step("between", lambda m, v: m * s.vector, made, values)
        made = made * scores.reshape(-1)[order].unsqueeze(-1)
        done = self.step("back", inverted, made, order, tokens)
        return (done.view_as(h) + h).pow(3).mean()


def count(values: Tensor) -> Tensor:
    return torch.histc(values.float(), 4, 0, 3).cumsum(0, dtype=torch.int32)


def inverted(made: Tensor, order: Tensor, tokens: Tensor) -> Tensor:
    back = torch.empty_like(order)
    back[order] = arange(order.size(0))
    return made[back].view(-1, 2, 4).sum(1)


def argsorted(made: Tensor, order: Tensor, tokens: Tensor) -> Tensor:
    return made[torch.argsort(order)].view(-1, 2, 4).sum(1)


def added(made: Tensor, order: Tensor, tokens: Tensor) -> Tensor:
    return torch.zeros_like(tokens).index_add(0, order // 2, made)


RIGHT = {
    "as transformers does": Parts(),
    "argsort of the order": Parts(back=argsorted),
    "added up": Parts(back=added),
    "counted unsorted": Parts(ends=lambda v, k: count(k)),
    "biases by expert": Parts(between=lambda m, v: m + torch.linspace(0, 1, 16).view(4, 4)[v]),
}
WRONG = {
    "keys from labels": Parts(key=lambda c, y: y.repeat_interleave(2, 1).reshape(-1)),
    "bins for two": Parts(ends=lambda v, k: torch.histc(v.float(), 4, 0, 7).cumsum(0, dtype=torch.int32)),
    "ends of another": Parts(ends=lambda v, k: count((3 - k).sort()[0])),
    "over the rows": Parts(between=lambda m, v: m.softmax(0)),
    "summed rows": Parts(between=lambda m, v: m + m.cumsum(0)),
    "rows by place": Parts(between=lambda m, v: m * arange(m.size(0))[:, None]),
    "rows in pairs": Parts(between=lambda m, v: m.view(-1, 8).tanh().view(-1, 4).view(-1, 2, 4).sum(1)
                           .repeat_interleave(2, 0)),
    "never put back": Parts(back=lambda m, o, t: m.view(-1, 2, 4).sum(1)),
    "put back twice": Parts(back=lambda m, o, t: m[o].view(-1, 2, 4).sum(1)),
    "tokens of others": Parts(rows=lambda t, o: t[o // 3]),
    "turned": Parts(rows=lambda t, o: t[(o // 2).flip(0)]),
}  # fmt: skip


@pytest.mark.parametrize("name", RIGHT)
def test_experts_are_exact_in_parts(name: str) -> None:
    model = Calls(RIGHT[name])
    made = ready(model, (H, Y))
    assert made.reason == ""
    wanted = eagerly(model, (H, Y))
    for sizes in ((6,), (1, 3, 2), (4, 2), (1,) * 6):
        assert_close(in_parts(made, (H, Y), sizes), wanted, 2e-5)


@pytest.mark.parametrize("name", WRONG)
def test_what_mixes_is_refused(name: str) -> None:
    assert ready(Calls(WRONG[name]), (H, Y)).reason
