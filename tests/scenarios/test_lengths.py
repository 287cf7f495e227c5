"""Captures between others are the captures that would be made there."""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

import graphpar
from graphpar.examples.gpt import GPT
from graphpar.preparation import Prepared, prepare, prepare_like
from graphpar.scenarios.captures import Captures
from graphpar.scenarios.lengths import between, support
from graphpar.scenarios.pricing import PriceBook

TRAINING = graphpar.Training(optimizer=torch.optim.AdamW)


def gpt() -> nn.Module:
    with torch.device("meta"):
        return GPT(width=32, layers=2, heads=2, length=128)


def ids(batch: int, length: int) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    tokens = torch.empty(batch, length, dtype=torch.long, device="meta")
    return (tokens, tokens), {}


def captured(model: nn.Module, length: int) -> Prepared:
    return prepare(model, *ids(6, length), TRAINING)


@given(st.sets(st.integers(1, 300), min_size=1))
def test_what_is_captured_spans_all_lengths_and_most_follow_from_it(lengths: set[int]) -> None:
    chosen, low, high = support(lengths), min(lengths), max(lengths)
    assert set(chosen) <= lengths and {low, high} <= set(chosen)
    assert len(chosen) == min(len(lengths), 3)
    if len(lengths) > 3:
        doublings = {low << power for power in range(9)}

        def left(middle: int) -> int:
            doubled = {middle, high} <= doublings
            step = math.gcd(middle - low, high - middle)
            return sum((n - low) % step > 0 or (doubled and n not in doublings) for n in lengths)

        assert left(chosen[1]) == min(map(left, lengths - {low, high}))


def test_a_length_between_three_is_as_captured_there() -> None:
    model = gpt()
    ends = {length: captured(model, length) for length in (32, 96, 128)}
    made, real = between(ends, 64), captured(model, 64)
    assert made is not None
    assert made.graph.ops == real.graph.ops
    assert (made.chain, made.batch_reason, made.model_hash) == (
        real.chain, real.batch_reason, real.model_hash,
    )  # fmt: skip
    assert made.graph.ops != ends[96].graph.ops
    # Beyond the ends, or out of step: nothing is known there.
    assert all(between(ends, length) is None for length in (24, 136, 80, 97))


class Windowed(nn.Module):
    """Averages that bend somewhere between the lengths, or do something else."""

    def __init__(self, bend: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.table, self.bend = nn.Embedding(128, 8, device="meta"), bend

    def forward(self, tokens: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return self.bend(self.table(tokens)).mean()


BENDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a window": lambda x: x[:, :64],
    "a scale": lambda x: x * (1.0 / x.shape[1] ** 0.5),
    "another way": lambda x: x.relu() if x.shape[1] > 100 else x,
    "pairs": lambda x: x @ x.reshape(x.shape[0], 1, -1).transpose(1, 2)[:, :8],
    "squares": lambda x: (x @ x.transpose(1, 2)).flatten(1),
    "filled up to a power of two": lambda x: functional.pad(
        x, (0, 0, 0, (1 << (x.shape[1] - 1).bit_length()) - x.shape[1])
    ),
    "filled up to threes": lambda x: functional.pad(x, (0, 0, 0, -x.shape[1] % 3)),
}


@pytest.mark.parametrize("bend", BENDS)
def test_what_does_not_lie_on_a_line_is_captured_itself(bend: str) -> None:
    model = Windowed(BENDS[bend])
    threes, twos = bend == "filled up to threes", bend == "filled up to a power of two"
    lengths = (33, 66, 126) if threes else (32, 64, 128) if twos else (32, 96, 128)
    ends = {length: captured(model, length) for length in lengths}
    made, at = between(ends, 97 if threes else 96 if twos else 64), 96 if twos else 64
    assert made is None or (bend == "pairs" and made.graph.ops == captured(model, at).graph.ops)
    if threes:
        made = between(ends, 96)
        assert made is not None and made.graph.ops == captured(model, 96).graph.ops


def blocks() -> nn.Module:
    with torch.device("meta"):
        return GPT(width=16, layers=8, heads=2, length=128)


def _square(x: torch.Tensor) -> torch.Tensor:
    return x[:, : min(x.shape[0], x.shape[1])]


def _many_tokens(x: torch.Tensor) -> torch.Tensor:
    return x.cos() if x.shape[0] * x.shape[1] > 20 else x.sin()


def _first_tokens(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])[:20]


CAPTURED: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "equal blocks": (64, blocks),
    "no more than the batch": (4, lambda: Windowed(_square)),
    "no more than the batch, and longer": (64, lambda: Windowed(_square)),
    "a branch by tokens": (64, lambda: Windowed(_many_tokens)),
    "so many tokens": (64, lambda: Windowed(_first_tokens)),
    **{name: (64, partial(Windowed, BENDS[name])) for name in ("a window", "squares", "another way")},
}


@pytest.mark.parametrize("name", CAPTURED)
def test_a_study_captures_what_a_capture_in_full_gives(name: str) -> None:
    own, make = CAPTURED[name]
    model, lengths = make(), (2, 6, 10, 102)
    captures = Captures(model, *ids(6, own), TRAINING, ids)
    captures.expect(lengths)
    for length in lengths if name != "equal blocks" else (6,):
        assert captures.at(length, None).graph == captured(model, length).graph


class Limited(nn.Module):
    """A model of 128 positions."""

    def __init__(self) -> None:
        super().__init__()
        with torch.device("meta"):
            self.gpt = GPT(width=32, layers=1, heads=2, length=128)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert tokens.shape[1] <= 128
        loss: torch.Tensor = self.gpt(tokens, targets)
        return loss


def test_a_sweep_of_lengths_is_captured_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    made, briefly = list[int](), list[int]()

    def counted(model: nn.Module, args: tuple[torch.Tensor, ...], *rest: object) -> Prepared:
        made.append(args[0].shape[1])
        return prepare(model, args, *rest)  # type: ignore[arg-type]

    def like(known: Prepared, model: nn.Module, args: tuple[torch.Tensor, ...], *rest: Any) -> Any:
        briefly.append(args[0].shape[1])
        return prepare_like(known, model, args, *rest)

    monkeypatch.setattr("graphpar.scenarios.captures.prepare", counted)
    monkeypatch.setattr("graphpar.scenarios.captures.prepare_like", like)
    device, lengths = {"kind": "t4", "count": 1}, [32, 48, 64, 80, 96, 112, 128, 144]
    study = graphpar.what_if(
        Limited(), {"devices": [device]}, (), *ids(6, 64), train=TRAINING, inputs=ids,
        sweep={"seq_len": lengths}, cache=False, processes=1, time_limit_s=0.1,
    )  # fmt: skip
    # In full the baseline and what cannot be captured; the others follow from three.
    assert sorted(made) == [64, 144]
    assert set(briefly) == {32, 48, 128, 144}
    assert [answer.status for answer in study.answers] == 7 * ["ok"] + ["invalid"]
    assert len({answer.step_s for answer in study.answers} - {None}) == 7
    assert study["seq_len=64"].step_s == study.baseline.step_s


def test_the_same_call_is_not_captured_again() -> None:
    book = PriceBook(gpt(), *ids(6, 64), TRAINING, inputs=ids)
    assert book.captures.at(64, None) is book.baseline()


def test_groups_of_the_example_are_priced_while_other_lengths_are_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured_before: list[int] = []

    def noted(bundles: Iterable[object], *_: object) -> list[object]:
        captured_before.extend(len(made) for _ in bundles)
        return []

    def counted(*args: Any) -> Prepared:
        made.append(prepare(*args))
        return made[-1]

    made: list[Prepared] = []
    monkeypatch.setattr("graphpar.scenarios.study.priced_by_several", noted)
    monkeypatch.setattr("graphpar.scenarios.captures.prepare", counted)
    graphpar.what_if(
        gpt(), {"devices": [{"kind": "t4", "count": 2}]}, (), *ids(6, 64), train=TRAINING, inputs=ids,
        sweep={"seq_len": [32, 64]}, cache=False, processes=2, time_limit_s=0.1, tensor=2, gap=0.9,
    )  # fmt: skip
    assert captured_before == [1, 1, 2]
