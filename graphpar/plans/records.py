"""The fields of a plan, as they stand in its file."""

from typing import Any, Literal

import msgspec

from graphpar.explanation.account import Explanation
from graphpar.partition.types import Partition, Status
from graphpar.schedule import Schedule, StageLink, build_schedule
from graphpar.schedule.simulate import Timeline, simulate
from graphpar.schedule.timing import Timing

PLAN_FORMAT: Literal["graphpar-plan"] = "graphpar-plan"
PLAN_VERSION: Literal[1] = 1

Option = str | int | float | bool | None


class PlanReplica(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device of a stage; times are totals over one step.

    Forwards and backwards are those of the stage, everything else of all the device's stages. Collectives
    of a tensor group are part of its forwards and backwards, and of `comm_s` too.
    """

    device: str
    kind: str
    microbatches: int
    forward_s: float
    backward_s: float
    comm_s: float
    busy_share: float
    peak_bytes: float
    capacity_bytes: float


class PlanStage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Units `first` to `last - 1`, run by each replica for its share of the microbatches."""

    index: int
    pipeline: int
    first: int
    last: int
    weight_bytes: float
    replicas: tuple[PlanReplica, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices that run the stage."""
        return tuple(r.device for r in self.replicas)


class PlanEdge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Data that cross from one stage to a later one, and the slowest link they take."""

    source: int
    target: int
    forward_bytes_per_sample: float
    backward_bytes_per_sample: float
    forward_fixed_bytes: float
    backward_fixed_bytes: float
    source_device: str
    target_device: str
    latency_s: float
    bytes_per_s: float

    @property
    def link(self) -> StageLink:
        """The edge as the schedule knows it."""
        return StageLink(
            self.source,
            self.target,
            self.forward_bytes_per_sample,
            self.backward_bytes_per_sample,
            self.forward_fixed_bytes,
            self.backward_fixed_bytes,
        )


class PlanUnitFormat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The format that was chosen for a unit, the errors it alone causes, and what it saves.

    `source` says where the errors come from: a run of this unit ("measured"), of an equal one ("like
    its kind"), or rounding alone ("estimated"). Seconds are those of all microbatches of a step on the
    unit's devices, bytes those of one microbatch's activations less the weights' lower copies, of all
    members of a group together, and summed over pipelines.
    """

    unit: int
    format: str
    output_error: float
    gradient_error: float
    source: str
    saved_s: float
    saved_bytes: float


class PlanBudget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another error budget and the step it would buy, with the stages as they are."""

    budget: float
    step_s: float


class PlanPrecision(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How `precision="auto"` spent its error budget.

    Errors are relative, of the result (the loss, when training) and of the gradient. The estimates
    are the roots of the sums of the units' squared errors; measured is the whole model in its formats on
    one device, on the example batch, None where there are no weights to run. `step_s` is the step that
    the choice of formats was made with, to be compared with those of other budgets. `units` names those
    in a lower format.
    """

    budget: float
    output_error: float
    gradient_error: float
    measured_output_error: float | None
    measured_gradient_error: float | None
    step_s: float
    looser: PlanBudget | None
    tighter: PlanBudget | None
    units: tuple[PlanUnitFormat, ...]
    note: str


class PlanRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A partition with its schedule, prediction and certificate, for one model and one cluster.

    Attributes:
        model: Name of the model for people.
        model_hash: Hash of the model's captured structure.
        cluster: The cluster as a plain dict.
        cluster_hash: Hash of that dict.
        training: Whether the step trains.
        precision: Name of the number format.
        batch: Samples in one global batch.
        batch_reason: Why the batch may not be split; empty when it may.
        options: What was asked of the planner.
        units: Names of the chain's units.
        partition: The partition with its certificate.
        stages: The table of stages.
        edges: Data crossing stages.
        left_out: Devices without work, each with its kind.
        timing: The numbers the prediction was made from.
        predicted_step_s: Simulated time of one step.
        predicted_peak_bytes: Simulated peak memory of every used device.
        bubble_share: Share of device time that is neither compute nor gradient exchange.
        assumptions: What the prediction takes for granted.
        notes: Remarks of the planner.
        explanation: Why the plan is as it is, where that was worked out.
        error_budget: How `precision="auto"` chose formats; None for any other precision.
    """

    format: Literal["graphpar-plan"] = PLAN_FORMAT
    version: Literal[1] = PLAN_VERSION
    model: str
    model_hash: str
    cluster: dict[str, Any]
    cluster_hash: str
    training: bool
    precision: str
    batch: int
    batch_reason: str
    options: dict[str, Option]
    units: tuple[str, ...]
    partition: Partition
    stages: tuple[PlanStage, ...]
    edges: tuple[PlanEdge, ...]
    left_out: dict[str, str]
    timing: Timing
    predicted_step_s: float
    predicted_peak_bytes: dict[str, float]
    bubble_share: float
    assumptions: tuple[str, ...]
    notes: tuple[str, ...]
    explanation: Explanation | None = None
    error_budget: PlanPrecision | None = None

    @property
    def status(self) -> Status:
        """`optimal`, or `feasible` when the search stopped before its proof."""
        return self.partition.status

    @property
    def gap(self) -> float:
        """How far the plan may be from the best of its family, as a share of its objective."""
        return self.partition.gap

    @property
    def bound_s(self) -> float:
        """No plan of the family has a lower objective than this."""
        return self.partition.bound_s

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the devices that have work; a device's index is its rank."""
        return self.partition.used_devices

    @property
    def replicas(self) -> tuple[PlanReplica, ...]:
        """The devices with all they do, by rank."""
        found: dict[str, PlanReplica] = {}
        for row in (r for s in self.stages for r in s.replicas):
            before = found.get(row.device)
            found[row.device] = (
                row
                if before is None
                else msgspec.structs.replace(
                    row,
                    forward_s=before.forward_s + row.forward_s,
                    backward_s=before.backward_s + row.backward_s,
                )
            )
        return tuple(found.values())

    @property
    def bottleneck(self) -> PlanReplica:
        """The device that computes for the largest share of the step."""
        return max(self.replicas, key=lambda r: r.busy_share)

    def schedule(self) -> Schedule:
        """The action lists of all ranks."""
        return build_schedule(self.partition, [e.link for e in self.edges], self.training)

    def timeline(self) -> Timeline:
        """The simulated timeline of one step."""
        return simulate(self.schedule(), self.timing)
