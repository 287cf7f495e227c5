"""The plan: who runs what, how fast it should be, and how sure we are. Prints, saves, loads.

A plan is one small, sorted, versioned JSON file that people can read, compare and edit. Loading
checks every field, and that the parts agree with each other; `check_model` and `check_cluster` tell
whether a plan belongs to what is at hand.
"""

import hashlib
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from graphpar.errors import PlanError
from graphpar.files import write_asked
from graphpar.plans.check import find_contradiction
from graphpar.plans.page import format_plan
from graphpar.plans.records import (
    PLAN_FORMAT,
    PLAN_VERSION,
    PlanEdge,
    PlanRecord,
    PlanReplica,
    PlanStage,
)
from graphpar.units import format_percent, format_seconds

__all__ = ["Plan", "PlanEdge", "PlanReplica", "PlanStage", "hash_of", "plan_schema"]

_REMEDY = "mend the file, or make the plan anew with `graphpar plan`"


class Plan(PlanRecord, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan for one model and one cluster; its fields are those of `PlanRecord`.

    >>> import torch, graphpar
    >>> layer, batch = torch.nn.Linear(4, 2), torch.randn(6, 4)
    >>> plan = graphpar.plan(layer, {"devices": [{"kind": "cpu"}]}, (batch,))
    >>> plan.gap <= 0.01, graphpar.Plan.from_json(plan.to_json()) == plan
    (True, True)
    """

    def check_model(self, model: str, model_hash: str) -> None:
        """Make sure that the plan is for this model; PlanError otherwise."""
        if self.model_hash != model_hash:
            raise PlanError(
                f"this plan was made for model {self.model} (structure {self.model_hash[:12]}), "
                f"but the model given is {model} (structure {model_hash[:12]}); "
                "other layers, shapes or another mode make another structure: make a new plan"
            )

    def check_mode(self, *, training: bool) -> None:
        """Make sure that the plan is for training, or for inference; PlanError otherwise."""
        if self.training != training:
            made, wanted = ("training", "inference") if self.training else ("inference", "training")
            raise PlanError(
                f"this plan was made for {made}, but {wanted} is asked for; "
                f"ask for {made}, or make a new plan for {wanted}"
            )

    def check_cluster(self, cluster: Mapping[str, Any], cluster_hash: str) -> None:
        """Make sure that the plan is for this cluster; PlanError names what differs."""
        if self.cluster_hash != cluster_hash:
            where = _first_difference(self.cluster, dict(cluster), "cluster") or "its hash differs"
            raise PlanError(
                f"this plan was made for another cluster: {where}; "
                "make a new plan for this cluster, or give the cluster the plan was made for"
            )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as sorted JSON, whole or not at all.

        Raises:
            PlanError: The path cannot be written to.
            OSError: The disk is full.
        """
        target = Path(path)
        data = self.to_json()
        write_asked(target, data, "plan file")
        return target

    def to_json(self) -> bytes:
        """The plan as sorted, indented JSON; PlanError if a number is not finite."""
        for where, number in _numbers(msgspec.to_builtins(self), ""):
            if not math.isfinite(number):
                raise PlanError(
                    f"the plan cannot be saved: field {where} is {number}, and JSON holds finite "
                    "numbers only; look at the cluster and cost numbers this plan came from"
                )
        return msgspec.json.format(msgspec.json.encode(self, order="sorted"), indent=2) + b"\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Read a plan and check all of it; PlanError names the file, the field and what to try."""
        source = Path(path)
        try:
            data = source.read_bytes()
        except OSError as error:
            raise PlanError(
                f"plan file {source}: cannot be read: {error.strerror or error}; "
                "`graphpar plan MODEL --cluster FILE -o plan.json` makes one"
            ) from error
        return cls.from_json(data, name=f"plan file {source}")

    @classmethod
    def from_json(cls, data: bytes, *, name: str = "plan") -> "Plan":
        """The plan that was saved as `data`; `name` says in errors where it came from."""
        _check_header(data, name)
        try:
            plan = msgspec.json.decode(data, type=cls)
        except msgspec.ValidationError as error:
            raise PlanError(f"{name}: {_at_field(error)}; {_REMEDY}") from error
        contradiction = find_contradiction(plan)
        if contradiction:
            raise PlanError(f"{name}: {contradiction}; {_REMEDY}")
        return plan

    def __repr__(self) -> str:
        return (
            f"Plan({self.model}: {len(self.stages)} stages on {len(self.devices)} devices, "
            f"{format_seconds(self.predicted_step_s)} per step predicted, {self.status}, "
            f"gap {format_percent(self.gap)})"
        )

    def __str__(self) -> str:
        return format_plan(self)


def plan_schema() -> dict[str, Any]:
    """The JSON Schema of plan files."""
    return msgspec.json.schema(Plan)


def hash_of(data: object) -> str:
    """A hash of plain data that does not depend on the order of keys.

    >>> hash_of({"a": 1, "b": [2.0]}) == hash_of({"b": [2.0], "a": 1})
    True
    """
    return hashlib.sha256(msgspec.json.encode(data, order="sorted")).hexdigest()


def _check_header(data: bytes, name: str) -> None:
    """Tell a file that is no plan, or one of a newer version, before looking at its fields."""
    try:
        header = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise PlanError(f"{name}: is not valid JSON: {error}; {_REMEDY}") from error
    if not isinstance(header, dict) or header.get("format") != PLAN_FORMAT:
        found = repr(header.get("format")) if isinstance(header, dict) else type(header).__name__
        raise PlanError(
            f"{name}: is not a plan: field format must be {PLAN_FORMAT!r}, found {found}; "
            "give a file that `graphpar plan` wrote"
        )
    version = header.get("version")
    if type(version) is not int or version < 1:
        raise PlanError(f"{name}: field version: expected a positive integer; {_REMEDY}")
    if version > PLAN_VERSION:
        raise PlanError(
            f"{name}: field version: {version} is newer than {PLAN_VERSION}, the newest that this "
            "graphpar reads; upgrade graphpar, or make the plan anew with this one"
        )


def _at_field(error: msgspec.ValidationError) -> str:
    """`Expected X - at `$.a.b`` in the words of our other errors."""
    match = re.fullmatch(r"(.*) - at `(?:key in )?\$\.?(.*)`", str(error), re.DOTALL)
    return f"field {match[2]}: {match[1]}" if match and match[2] else str(error)


def _numbers(data: object, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(data, float):
        yield where, data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from _numbers(value, f"{where}.{key}" if where else str(key))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from _numbers(value, f"{where}[{index}]")


def _first_difference(planned: object, given: object, where: str) -> str | None:
    """The first place where two pieces of plain data differ, with both values."""
    if isinstance(planned, dict) and isinstance(given, dict):
        for key in sorted(planned.keys() | given.keys(), key=str):
            if key not in planned or key not in given:
                side = "the given one" if key in given else "the plan"
                return f"{where}.{key} stands only in {side}"
            if found := _first_difference(planned[key], given[key], f"{where}.{key}"):
                return found
        return None
    if isinstance(planned, list | tuple) and isinstance(given, list | tuple):
        if len(planned) != len(given):
            return f"{where} has {len(planned)} entries in the plan, {len(given)} in the given one"
        pairs = enumerate(zip(planned, given, strict=True))
        found_in = (_first_difference(a, b, f"{where}[{i}]") for i, (a, b) in pairs)
        return next(filter(None, found_in), None)
    if planned != given:
        return f"{where} is {planned!r} in the plan, {given!r} in the given one"
    return None
