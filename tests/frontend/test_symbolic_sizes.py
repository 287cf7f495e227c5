"""Which sizes follow the batch, and what keeps a batch whole."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from one_device import Calls, assert_as_eager, assert_close, in_parts, ready
from torch import Tensor, nn

from graphpar.frontend.capture import batch_size, capture, resize
from graphpar.ir.ops import BatchSize
from graphpar.ir.whole import tail_reason

X, Y = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])


def test_sizes_in_proportion_become_symbols() -> None:
    graph = capture(Calls(lambda s, h, y: h.reshape(-1) * 2), (X, Y), {}).graph
    assert graph.ops[-2].type.shape == (BatchSize(4),)
    assert graph.ops[-3].args[1] in ((-1,), (BatchSize(4),))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda s, h, y: h * (1 / h.size(0)), "uses 0.25 for a batch of 4"),
        (lambda s, h, y: torch.cat([h, h[:1]]), "has a size 5 for a batch of 4|makes"),
        (lambda s, h, y: sum(h[i] for i in range(h.size(0))), "ops for a batch of 4 but"),
        (lambda s, h, y: h * (2 if h.size(0) > 5 else 3), "3 for a batch of 4 but 2"),
        (lambda s, h, y: h * (2 if h.size(0) % 2 else 3), "3 for a batch of 4 but 2"),
        (lambda s, h, y: h * torch.tensor([float(h.size(0))]), "constant .* changes with the batch size"),
    ],
)
def test_what_depends_on_the_batch_size_keeps_the_batch_whole(
    function: Callable[..., Tensor], why: str
) -> None:
    made = ready(Calls(lambda s, h, y: function(s, h, y).pow(2).sum()), (X, Y))
    assert made.reason
    assert_as_eager(made.model, (X, Y))
    assert re.search(why, made.reason), made.reason


def test_samples_reshaped_into_each_other_meet_after_all_forwards() -> None:
    made = ready(Calls(lambda s, h, y: h.view(2, -1).pow(2).sum()), (X, Y))
    assert made.reason == ""
    assert re.search("view at .* reshapes samples into each other", tail_reason(made.source))
    assert_close(in_parts(made, (X, Y), (1, 3)), in_parts(made, (X, Y), (4,)))


def test_a_batch_of_one_runs_whole() -> None:
    made = assert_as_eager(Calls(lambda s, h, y: F.cross_entropy(h, y)), (X[:1], Y[:1]))
    assert made.reason == "the example batch has one sample"


def test_batch_sizes_and_resizing() -> None:
    assert batch_size([]) == 1
    assert batch_size([torch.zeros(()), 3, "a"]) == 1
    assert batch_size([torch.zeros(5, 2), torch.zeros(5), torch.zeros(2)]) == 5
    assert resize(torch.arange(3), 3, 7).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert resize(torch.arange(3), 3, 2).tolist() == [0, 1]
    assert resize("text", 3, 2) == "text" and resize(torch.arange(4), 3, 2).tolist() == [0, 1, 2, 3]
    ghost = torch.zeros(3, 2, device="meta")
    assert resize(ghost, 3, 7).shape == (7, 2)


ASKED: tuple[Callable[[int], Any], ...] = (
    lambda n: n / 2 > 8,
    lambda n: math.sqrt(n) > 4,
    lambda n: math.ceil(n / 4) > 4,
    lambda n: int(n * 0.5) > 8,
    lambda n: int(n) > 16,
    lambda n: float(n) > 16,
    lambda n: n**2 > 256,
    lambda n: pow(n, 2, 101) < 80,
    lambda n: -n < -16,
    lambda n: divmod(n, 4)[0] > 4,
    lambda n: bool(n >> 4),
    lambda n: n not in {10, 11},
)


class Asking(nn.Module):
    """Asks its batch for its size in every way, and goes the same way for 24 samples and more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for asked in ASKED:
            x = x * 2 if asked(x.shape[0]) else x + 1
        return x


def test_numbers_made_of_the_batch_size_are_conditions() -> None:
    captured = capture(Asking(), (torch.ones(24, 2),), {})
    told = {int(c.text.rpartition(":")[2]) for c in captured.conditions if not c.holds(10)}
    assert told == {asked.__code__.co_firstlineno for asked in ASKED}
    assert not captured.unsplittable and not captured.unlike(24)


def test_one_number_of_samples_and_a_size_that_happens_to_be_a_multiple_are_conditions() -> None:
    class Comparing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (2 if x.shape[0] > x.shape[1] else 3) + (1 if x.shape[0] == 73 else 0)

    captured = capture(Comparing(), (torch.ones(24, 96),), {})
    assert [n for n in (72, 73, 96, 97) if captured.unlike(n)] == [73, 97]
