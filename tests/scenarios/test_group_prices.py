"""Prices of tensor groups by several processes."""

import itertools
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from graphpar.scenarios.group_prices import LEAST_TASKS, priced_by_several


def bundle(length: int, size: int) -> dict[str, Any]:
    groups = (SimpleNamespace(mesh=()),)
    return {f"{length} {k}": SimpleNamespace(groups=groups, shapes=k % 3) for k in range(size)}


@pytest.mark.parametrize("parts", [1, 2])
def test_what_is_made_is_priced_while_more_is_made(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    def submitted(_pool: object, _work: object, tasks: list[Any]) -> Future[list[Any]]:
        told.append(f"priced {len(tasks)}")
        future: Future[list[Any]] = Future()
        future.set_result([(task,) for task in tasks])
        return future

    def bundles(*sizes: int) -> Iterator[dict[str, Any]]:
        for length, size in enumerate(sizes):
            told.append("made")
            yield bundle(length, size)

    monkeypatch.setattr("graphpar.scenarios.group_prices.submitted", submitted)
    monkeypatch.setattr("graphpar.scenarios.group_prices.started", nullcontext)
    assert list(priced_by_several(bundles(LEAST_TASKS - 1), 2, parts)) == []
    assert told == ["made"], "no process is started for so few"
    found = list(priced_by_several(bundles(LEAST_TASKS - 3, 6, 3), 2, parts))
    assert sorted(name for name, _, _ in found) == sorted(
        name for k, n in enumerate((LEAST_TASKS - 3, 6, 3)) for name in bundle(k, n)
    )
    assert all(id(task) == id(modes[0]) for _, task, modes in found)
    assert told[1:3] == ["made", "made"] and told[3].startswith("priced")
    assert told.index("made", 3) < len(told) - 1, "the last is made after others were handed over"
    assert len(told) == 1 + 3 + 2 * parts


def test_what_was_priced_before_one_was_killed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    number = itertools.count()

    def submitted(_pool: object, _work: object, tasks: list[Any]) -> Future[list[Any]]:
        if next(number) == 2:
            raise BrokenProcessPool
        future: Future[list[Any]] = Future()
        future.set_result([(task,) for task in tasks])
        return future

    monkeypatch.setattr("graphpar.scenarios.group_prices.submitted", submitted)
    monkeypatch.setattr("graphpar.scenarios.group_prices.started", nullcontext)
    priced = priced_by_several((bundle(n, LEAST_TASKS) for n in range(4)), 2, 1)
    found = {name for name, _, _ in itertools.islice(priced, 2 * LEAST_TASKS)}
    assert found == {*bundle(0, LEAST_TASKS), *bundle(1, LEAST_TASKS)}
    with pytest.raises(BrokenProcessPool):
        next(priced)
