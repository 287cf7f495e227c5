"""What `what_if` is asked in Python: refused in words, as it was given, before anything is planned."""

import math
from typing import Any

import pytest
import torch
from torch import nn

import graphpar
from graphpar.errors import GraphparError
from graphpar.scenarios.asked import as_scenarios
from graphpar.scenarios.sweeps import as_sweeps, scenarios_of
from graphpar.scenarios.types import Scenario

NODES = [{"name": name, "devices": {"kind": "t4", "count": 2}} for name in "ab"]


def ask(scenarios: Any = (), **options: Any) -> graphpar.Study:
    """A study that would be made if the question made sense."""
    cluster = {"nodes": NODES, "network": "ethernet-10g"}
    return graphpar.what_if(
        nn.Linear(4, 2), cluster, scenarios, (torch.randn(6, 4),), **{"cache": False, **options}
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"time_limit_s": -1.0}, "got -1.0"),
        ({"time_limit_s": math.nan}, "got nan"),
        ({"gap": 1.0}, "got 1.0"),
        ({"processes": 0}, "got 0"),
        ({"processes": 2.0}, "whole number"),
        ({"time_limit_s": "5"}, "must be positive, got '5'"),
        ({"gap": None}, "got None"),
        ({"budget_usd_per_h": "12"}, "must be a positive number"),
        ({"objective": "cost"}, "is for a budget"),
        ({"objective": "price", "budget_usd_per_h": 9.0, "instances": "g5.xlarge"}, "time or cost"),
        ({"prices": {"a": math.inf}}, "price of a"),
        ({"prices": {"a": "cheap"}}, "price of a is 'cheap'"),
        ({"prices": {"a": None}}, "price of a is None"),
        ({"prices": [("a", 1.0)]}, "dict of node names"),
        ({"instances": [5], "budget_usd_per_h": 9.0}, "names of instance types"),
        ({"scenarios": None}, "not None"),
        ({"scenarios": 5}, "not 5"),
        ({"scenarios": {"x": 5}}, "scenario 'x' is 5; write a change in words"),
        ({"scenarios": {"x": ["drop a", None]}}, "scenario 'x' has None among its changes"),
        ({"scenarios": ["drop a", None]}, "scenario number 2 is None"),
        ({"scenarios": {5: "drop a"}}, "name of a scenario is text"),
        ({"scenarios": ["drop a", "drop a"]}, "'drop a' is asked twice"),
        (
            {"scenarios": [Scenario("x", ("drop a",)), Scenario("x", ("drop b",))]},
            "named 'x'.*rename one",
        ),
        ({"scenarios": {"batch=8": "drop a"}, "sweep": ["batch=8"]}, "two scenarios are named 'batch=8'"),
        ({"scenarios": {"baseline": "drop a"}}, "the job as it is"),
        ({"scenarios": torch.tensor(1.0)}, "scenarios= takes"),
        ({"sweep": {"batch": torch.tensor(1.0)}}, "path to its values"),
        ({"cache": None}, "cache="),
        ({"inputs": 5}, "inputs= takes a function"),
        ({"progress": {}}, "progress= takes a function"),
        ({"calibration": 1.0}, "graphpar.calibrate"),
        ({"prices": 0}, "dict of node names"),
        ({"kwargs": torch.ones(2)}, "kwargs= must be a dict"),
    ],
)
def test_senseless_arguments_are_refused_and_told_as_they_were_given(
    options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("graphpar.scenarios.api.ask")
    with pytest.raises(ValueError, match=words):
        ask(**options)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (nn.LazyLinear(2), {}, "LazyLinear|lazy|uninitialized"),
        (nn.Linear(4, 2), {"args": 5}, "args="),
        (nn.Linear(4, 2), {"kwargs": {"input": [torch.ones(8, 4), {"a": None}]}}, "."),
    ],
)
def test_what_no_model_takes_is_told_by_the_capture(
    model: nn.Module, options: dict[str, Any], words: str
) -> None:
    given: dict[str, Any] = {"args": (torch.ones(8, 4),), **options}
    with pytest.raises((GraphparError, ValueError), match=words):
        graphpar.what_if(model, {"nodes": NODES, "network": "ethernet-10g"}, **given, cache=False)


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (["batch=1", "a.count=1", "b.count=1"], "one or two"),
        ({"batch": []}, "no values"),
        ({"batch": range(1, 102), "a.count": range(1, 101)}, "10100 points"),
        (["batch=1", "batch=2"], "both sweeps"),
        ({"batch": [8, 16, 8.0]}, "has 8 twice"),
        ({"batch": 8}, "dict of a path to its values"),
        ([5], "words such as"),
        (None, "words such as"),
        ("batch", "PATH=VALUE"),
    ],
)
def test_senseless_sweeps_are_refused_before_anything_is_captured(sweep: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ask(sweep=sweep)


def test_a_text_alone_is_one_scenario_or_sweep() -> None:
    assert [s.title for s in as_scenarios("drop b; set batch=8")] == ["drop b; set batch=8"]
    for same in ({"batch": [8, 16]}, {"batch": "8,16"}):
        assert scenarios_of(as_sweeps("batch=8,16")) == scenarios_of(as_sweeps(same))
