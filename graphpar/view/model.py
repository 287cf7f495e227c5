"""What the views draw, as plain frozen data: nothing in here knows a file format.

Times are seconds from the start of the step, amounts are bytes, ranks index `ViewData.devices` up
to `ViewData.num_ranks`; devices without work follow after them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from graphpar.explanation.account import Explanation
from graphpar.plans.precision import FormatRun
from graphpar.plans.records import PlanBudget, PlanEdge
from graphpar.schedule import Action

if TYPE_CHECKING:
    from graphpar.runtime.comparison import DeviceComparison


@dataclass(frozen=True)
class ViewNode:
    """A machine of the cluster and what it holds, such as `(("v100", 4),)`."""

    name: str
    kinds: tuple[tuple[str, int], ...]
    used: int


@dataclass(frozen=True)
class ViewLink:
    """A link inside a node (both names equal), between two, or of the network (names empty)."""

    node: str
    other: str
    bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class ViewDevice:
    """A device, its work in one step and its memory.

    Attributes:
        stages: What it runs; none for a device without work.
        share: Its share of a tensor group's work on each microbatch; 1 for a device on its own.
        peak_bytes: Predicted peak; the sum of the three parts that follow.
        resident_bytes: Weights, gradients, optimiser state and framework, when memory is at its peak,
            with the copy in which a process on a CPU gathers gradients for their sum.
        later_bytes: Gradients that come after that.
        weight_bytes: The weights among them, as far as they can be told apart; else 0.
        saved_bytes: Activations held for backwards (in inference: results) when memory is at its peak.
        working_bytes: What is being worked on then.
        update_bytes: What the optimiser's update takes when activations are gone; where memory is at its
            peak in it that is `working_bytes`, too.
        memory_by_size: For each of its stages and each microbatch size: stage, size, and the bytes saved
            for its backward, worked on, and kept from the first half of a backward to the second, its
            gradients, which come with the first backward, and what it holds less than with all of them.
        measured_peak_bytes: None where nothing was measured.
    """

    name: str
    kind: str
    node: str
    stages: tuple[int, ...] = ()
    share: float = 1.0
    microbatches: int = 0
    forward_s: float = 0.0
    backward_s: float = 0.0
    comm_s: float = 0.0
    busy_share: float = 0.0
    peak_bytes: float = 0.0
    capacity_bytes: float = 0.0
    resident_bytes: float = 0.0
    later_bytes: float = 0.0
    weight_bytes: float = 0.0
    saved_bytes: float = 0.0
    working_bytes: float = 0.0
    update_bytes: float = 0.0
    memory_by_size: tuple[tuple[int, int, float, float, float, float, float], ...] = ()
    measured_peak_bytes: float | None = None

    @property
    def stage(self) -> int | None:
        """The first stage it runs; None for a device without work."""
        return self.stages[0] if self.stages else None

    @property
    def working_words(self) -> str:
        """What `working_bytes` are for."""
        in_update = self.update_bytes > 0 and self.working_bytes == self.update_bytes
        return "the optimiser's update" if in_update else "working"

    @property
    def stage_words(self) -> str:
        """`stage 1`, or `stages 1, 5`."""
        return f"stage{'s' * (len(self.stages) > 1)} {', '.join(map(str, self.stages))}"


@dataclass(frozen=True)
class ViewBlock:
    """Consecutive units `first` to `last - 1` that look alike: `count` times `label`."""

    label: str
    count: int
    first: int
    last: int


@dataclass(frozen=True)
class ViewModule:
    """Units `first` to `last - 1` as a module of the model.

    `count` tells how often its children repeat; a unit has no children.
    """

    label: str
    count: int
    first: int
    last: int
    children: tuple["ViewModule", ...] = ()


@dataclass(frozen=True)
class ViewStage:
    """A stage, its units folded into blocks, and the ranks that work on it.

    Attributes:
        first: First of its units; `last` is the one after its last.
        weight_bytes: Of all its weights, once.
        ranks: All ranks with work on it.
        groups: The same ranks by replica: replicas take turns over the microbatches, the members of
            one (a tensor group) share the work on each.
        blocks: Its units, folded into a flat list.
        modules: Its units as a tree.
        precision: The number format it computes in; the lowest of them where units differ.
        unit_formats: The format of each unit where they differ; else empty.
        recompute: Whether activations are computed again in the backward.
        zero: ZeRO level.
        sharing: How its tensor groups share it, where that is not the usual way.
    """

    index: int
    pipeline: int
    first: int
    last: int
    weight_bytes: float
    ranks: tuple[int, ...]
    blocks: tuple[ViewBlock, ...]
    modules: tuple[ViewModule, ...]
    groups: tuple[tuple[int, ...], ...]
    precision: str = "float32"
    unit_formats: tuple[str, ...] = ()
    recompute: bool = False
    zero: int = 0
    sharing: tuple[str, ...] = ()


@dataclass(frozen=True)
class ViewPipeline:
    """A share of the batch, the sizes of its microbatches, and the number of the first of them."""

    samples: int
    first_microbatch: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Lane:
    """What one rank does: actions in order with their times.

    `stopped` marks a lane that ends before the rank's schedule did.
    """

    rank: int
    actions: tuple[Action, ...]
    starts_s: Sequence[float] = field(repr=False)
    ends_s: Sequence[float] = field(repr=False)
    stopped: bool = False

    def events(self) -> Iterator[tuple[Action, float, float]]:
        """Each action with its start and end."""
        return zip(self.actions, self.starts_s, self.ends_s, strict=True)


@dataclass(frozen=True)
class ViewKernel:
    """An operation that a profiler saw on one of a rank's threads or streams."""

    rank: int
    track: str
    name: str
    start_s: float
    end_s: float


@dataclass(frozen=True)
class ViewTimeline:
    """The lanes of one step.

    Attributes:
        note: What a reader must know about them.
        planned_batch: Whether microbatches are those of the plan: same number, sizes and routes.
        kernels: What a profiler saw, by rank and track, in order of time.
    """

    step_s: float
    lanes: tuple[Lane, ...]
    note: str = ""
    planned_batch: bool = True
    kernels: tuple[ViewKernel, ...] = field(default=(), repr=False)

    @property
    def stopped(self) -> bool:
        """Whether any rank did not finish its step."""
        return any(lane.stopped for lane in self.lanes)


@dataclass(frozen=True)
class ViewCertificate:
    """How sure the planner is, in the partitioner's own numbers."""

    status: str
    objective_s: float
    bound_s: float
    gap: float
    physical_bound_s: float
    parts: dict[str, float]
    seconds: float
    truncated_by: tuple[str, ...]
    family: str


@dataclass(frozen=True)
class ViewShares:
    """Shares of all ranks' time in the predicted step; they add up to one.

    Attributes:
        compute: Forwards, backwards and the optimiser.
        communication: Waiting for messages that are on their way, and collectives inside tensor groups.
        gradients: Sums of gradients, with the waiting for the other ranks.
        bubble: Having nothing to do.
    """

    compute: float
    communication: float
    gradients: float
    bubble: float


@dataclass(frozen=True)
class ViewComparison:
    """A measured step beside its prediction.

    Attributes:
        off: Whether anything that matters differs by more than `tolerance`.
        reasons: The likely ones, where it does.
    """

    devices: "tuple[DeviceComparison, ...]"
    reasons: tuple[str, ...]
    off: bool
    tolerance: float


@dataclass(frozen=True)
class ViewError:
    """A relative error: as estimated, as measured on the example batch, and in a job's first step."""

    what: str
    estimated: float
    measured: float | None
    first_step: float | None = None


@dataclass(frozen=True)
class ViewErrors:
    """How an error budget was spent on lower number formats, and what others would buy.

    Attributes:
        step_s: The step that the formats were chosen with; to be compared with those of other budgets.
        runs: Neighbouring units of one lower format.
        first_step_kept: Whether a job's first step kept the budget; None where there was none.
    """

    budget: float
    rows: tuple[ViewError, ...]
    step_s: float
    looser: PlanBudget | None
    tighter: PlanBudget | None
    runs: tuple[FormatRun, ...]
    note: str
    first_step_kept: bool | None = None


@dataclass(frozen=True)
class ViewData:
    """Everything the views show of one plan, and of a measured step if there is one."""

    model: str
    model_hash: str
    training: bool
    precision: str
    batch: int
    batch_reason: str
    schedule: str
    step_s: float
    bottleneck: int
    shares: ViewShares
    nodes: tuple[ViewNode, ...]
    links: tuple[ViewLink, ...]
    devices: tuple[ViewDevice, ...]
    num_ranks: int
    pipelines: tuple[ViewPipeline, ...]
    stages: tuple[ViewStage, ...]
    units: tuple[str, ...]
    edges: tuple[PlanEdge, ...]
    certificate: ViewCertificate
    notes: tuple[str, ...]
    assumptions: tuple[str, ...]
    options: dict[str, str]
    explanation: Explanation | None
    routes: tuple[tuple[int, ...], ...] = field(repr=False)
    predicted: ViewTimeline = field(repr=False)
    measured: ViewTimeline | None = field(default=None, repr=False)
    comparison: ViewComparison | None = field(default=None, repr=False)
    errors: ViewErrors | None = None

    @property
    def headline(self) -> str:
        """What the plan is for, in one line."""
        mode = "training" if self.training else "inference"
        return f"{self.model}, {mode}, {self.precision}, batch {self.batch}"

    @property
    def scale_s(self) -> float:
        """The time that both timelines are drawn against; never zero."""
        return max(self.step_s, self.measured.step_s if self.measured else 0.0) or 1.0

    @property
    def splits_backward(self) -> bool:
        """Whether any backward is done in two halves."""
        return any(action.kind == "W" for lane in self.predicted.lanes for action in lane.actions)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Samples of each microbatch, over all pipelines."""
        return tuple(size for pipeline in self.pipelines for size in pipeline.sizes)

    @property
    def left_out(self) -> tuple[ViewDevice, ...]:
        """Devices without work."""
        return self.devices[self.num_ranks :]

    @cached_property
    def _first_stage_of(self) -> tuple[int, ...]:
        """For each stage the first of its pipeline."""
        first: dict[int, int] = {}
        return tuple(first.setdefault(stage.pipeline, stage.index) for stage in self.stages)

    def rank_of(self, stage: int, microbatch: int) -> int:
        """The rank that runs `stage` for `microbatch`, which must be of the same pipeline."""
        return self.routes[microbatch][stage - self._first_stage_of[stage]]

    @cached_property
    def _rates(self) -> dict[tuple[str, int], tuple[float, float]]:
        """Bytes per sample and fixed bytes of what a stage receives and sends, by kind and stage."""
        rates: dict[tuple[str, int], tuple[float, float]] = {}
        for edge in self.edges:
            ahead = edge.forward_bytes_per_sample, edge.forward_fixed_bytes
            back = edge.backward_bytes_per_sample, edge.backward_fixed_bytes
            for kind, stage, (per_sample, fixed) in (
                ("S", edge.source, ahead),
                ("R", edge.target, ahead),
                ("D", edge.target, back),
                ("G", edge.source, back),
            ):
                was = rates.get((kind, stage), (0.0, 0.0))
                rates[kind, stage] = was[0] + per_sample, was[1] + fixed
        return rates

    def message_bytes(self, action: Action) -> float:
        """Bytes that a send or receive of the plan moves; 0 for other actions."""
        if action.microbatch is None:
            return 0.0
        per_sample, fixed = self._rates.get((action.kind, action.stage), (0.0, 0.0))
        return per_sample * self.sizes[action.microbatch] + fixed
