"""What a what-if question is made of, and what its answer says: frozen data."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from graphpar.choice.played import NO_GAIN
from graphpar.cluster import Cluster
from graphpar.partition.settings import Microbatches, ScheduleWish
from graphpar.partition.types import PipelineChoice, ScheduleName, TensorWidth

OPTIMIZER_STATES = {"sgd": 0.0, "momentum": 1.0, "adam": 2.0, "adamw": 2.0}
"""Bytes of state per byte of parameters of the optimisers a scenario may name."""

OPTIMIZER_UPDATES = {"sgd": 0.0, "momentum": 0.0, "adam": 1.0, "adamw": 1.0}
"""Bytes that their updates take for a while on a GPU, per byte of gradients (`optimizer_memory`)."""

BASELINE = "baseline"
"""What the job as it is is called; no scenario may be."""

Status = Literal["ok", "infeasible", "invalid"]


@dataclass(frozen=True)
class Layout:
    """A hand-made configuration: widths of tensor, pipeline and data parallelism.

    >>> str(Layout(tensor=8, pipeline=4))
    'tp=8 pp=4 dp=1'
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    microbatches: int | None = None

    def __post_init__(self) -> None:
        for name in ("tensor", "pipeline", "data"):
            if getattr(self, name) < 1:
                raise ValueError(f"a configuration's {name} width must be at least 1: {self}")

    @property
    def devices(self) -> int:
        """How many devices it takes."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        text = f"tp={self.tensor} pp={self.pipeline} dp={self.data}"
        return text + (f" m={self.microbatches}" if self.microbatches else "")


@dataclass(frozen=True)
class Setting:
    """Everything a plan depends on besides the model.

    Attributes:
        cluster: The devices.
        batch: Samples per global batch.
        seq_len: Tokens per sample; None where it is the example's own.
        training: Whether the step trains.
        precision: Number format of arithmetic and activations.
        optimizer: A name of `OPTIMIZER_STATES`, or `given` for the caller's own.
        schedule: `1f1b`, `gpipe`, `interleaved`, `zero-bubble`, or `auto`.
        microbatches: A fixed number, or `auto`.
        recompute: Whether every unit computes its activations again; None leaves it to the planner.
        tensor: Most members of a tensor group that the planner may form.
        layout: A hand-made configuration instead of a search.
        usd_per_h: Dollars per hour by node name; nodes without an entry have no known price.
    """

    cluster: Cluster
    batch: int
    seq_len: int | None = None
    training: bool = False
    precision: str = "float32"
    optimizer: str = "given"
    schedule: ScheduleWish = "auto"
    microbatches: Microbatches = "auto"
    recompute: bool | None = None
    tensor: TensorWidth = 1
    layout: Layout | None = None
    usd_per_h: tuple[tuple[str, float], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data that two equal settings share."""
        layout = str(self.layout) if self.layout else None
        return {
            **{k: v for k, v in vars(self).items() if k not in ("cluster", "layout", "usd_per_h")},
            "cluster": self.cluster.to_dict(),
            "devices": [device.name for device in self.cluster.devices],
            "layout": layout,
            "usd_per_h": dict(self.usd_per_h),
        }


@dataclass(frozen=True)
class Scenario:
    """A named question: changes to the baseline, in the words that `changes.apply` takes.

    >>> Scenario("smaller", ("drop a/1", "set batch=16")).title
    'smaller'
    >>> Scenario("", ("drop a/1", "set batch=16")).title
    'drop a/1; set batch=16'
    """

    name: str
    changes: tuple[str, ...]

    @property
    def title(self) -> str:
        """The name, or the changes where there is none."""
        return self.name or "; ".join(self.changes) or "no change"


@dataclass(frozen=True)
class Bottleneck:
    """What the step spends most of its time on, where, and what would relieve it.

    `kind` is `compute`, `link`, `bubble` or `memory`; `share` is of the step's time, for memory of the
    fullest device's capacity.
    """

    kind: Literal["compute", "link", "bubble", "memory"]
    where: str
    share: float
    relief: str


@dataclass(frozen=True)
class KnownPlan:
    """A plan found for one setting, to be tried in others.

    Stages that compute their activations again are marked so, however the setting asked for it.
    """

    pipelines: tuple[PipelineChoice, ...]
    schedule: ScheduleName
    batch: int


@dataclass(frozen=True)
class Answer:
    """What a scenario's plan promises; numbers are None where there is no plan or no such fact.

    Attributes:
        title: The scenario's name.
        changes: What was changed, in words.
        status: `ok`; `infeasible` (nothing fits); `invalid` (the question makes no sense).
        problem: Why there is no plan.
        step_s: Simulated time of one step.
        bound_s: No plan of the searched family has a shorter objective.
        gap: How far the plan may be from the best of its family, both by the formula that the search
            goes by, which `step_s` is not; None for a hand-made configuration.
            Where the schedule has no formula, how far it may be from plans of any kind.
        any_bound_s: No plan of any kind has a shorter step under the same prices.
        batch: Samples per step.
        usd_per_h: Price of all nodes that hold a used device.
        watts: Power of the used devices at full load.
        bottleneck: What limits the step.
        headroom_bytes: Free memory of each used device at the peak.
        used: Devices with work.
        left_out: Devices without.
        shape: The plan in a few words.
        error_bar: Half-width of the interval the step is expected in, as a share of it.
        remarks: What is assumed, truncated or ignored.
        one_device_s: Step time on the best single device, where the model fits into one.
        seconds: Time the search took.
        plan: The plan itself, for other scenarios to start from.
        quarrels: Devices that would share a stage but no format; such an answer is asked for again.
    """

    title: str
    changes: tuple[str, ...] = ()
    status: Status = "ok"
    problem: str = ""
    step_s: float | None = None
    bound_s: float | None = None
    gap: float | None = None
    batch: int = 0
    usd_per_h: float | None = None
    watts: float | None = None
    bottleneck: Bottleneck | None = None
    headroom_bytes: dict[str, float] = field(default_factory=dict)
    used: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    shape: str = ""
    error_bar: float = 0.2
    remarks: tuple[str, ...] = ()
    one_device_s: float | None = None
    one_device: str = ""
    seconds: float = 0.0
    any_bound_s: float | None = None
    plan: KnownPlan | None = None
    quarrels: tuple[tuple[str, ...], ...] = ()

    @property
    def samples_per_s(self) -> float | None:
        """Throughput."""
        return self.batch / self.step_s if self.step_s else None

    @property
    def usd_per_million_samples(self) -> float | None:
        """Dollars for a million samples."""
        if self.usd_per_h is None or not self.step_s:
            return None
        return self.usd_per_h / 3600 * self.step_s / self.batch * 1e6

    @property
    def kwh_per_million_samples(self) -> float | None:
        """Energy of a million samples with every used device at full load: an upper estimate."""
        if self.watts is None or not self.step_s:
            return None
        return self.watts * self.step_s / self.batch * 1e6 / 3.6e6

    @property
    def needless(self) -> bool:
        """Whether one device would do as well."""
        if self.step_s is None or self.one_device_s is None:
            return False
        return self.one_device_s <= self.step_s * (1 + NO_GAIN)

    def change(self, baseline: "Answer") -> float | None:
        """Throughput relative to the baseline's, minus one."""
        mine, other = self.samples_per_s, baseline.samples_per_s
        return mine / other - 1 if mine and other else None


@dataclass(frozen=True)
class Worth:
    """What a little more of something is worth, found by solving again.

    `saved_s` per step; within `noise_s`, which the plans' gaps allow, nothing is proven. `order` is the
    order of work it comes with where that has no formula and the plan without it has one: what that order
    was short of before it was to be taken is part of what is saved.
    """

    what: str
    saved_s: float
    noise_s: float
    order: str = ""


def renamed(answer: Answer, title: str, changes: tuple[str, ...]) -> Answer:
    """The same answer to a question of another name."""
    return replace(answer, title=title, changes=changes)
